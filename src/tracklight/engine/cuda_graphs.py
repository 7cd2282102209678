"""Steps on a CUDA device, captured once and replayed: the host launches a step as a whole.

One graph holds one step, so that dropout's random numbers, a function of the step's seed, do not
depend on how many steps a block has.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD, Adam, AdamW, Optimizer

from tracklight.engine.torch_internals import has_step_hooks

Step = Callable[[Tensor, Tensor], Tensor]
Shapes = tuple[torch.Size, torch.Size]

WARM_UP_STEPS = 3  # taken on a side stream before a capture, as PyTorch asks; they are real steps
CAPTURABLE = (SGD, Adam, AdamW)  # whose fused kernels read the learning rate on the device


def can_capture(optimizer: Optimizer) -> bool:
    """Check whether this optimizer's step can be replayed while its learning rate changes."""
    return (
        type(optimizer) in CAPTURABLE
        and not has_step_hooks(optimizer)
        and all(
            group["fused"] is not False
            and not (group["foreach"] or group["differentiable"] or isinstance(group["lr"], Tensor))
            and all(each.dtype == torch.float32 for each in group["params"])  # as the rates
            for group in optimizer.param_groups
        )
    )


class DeviceRates:
    """Copies of an optimizer's learning rates on the device, where a captured step reads them.

    The optimizer's own stay Python floats: schedulers compute in them, checkpoints hold them.
    """

    def __init__(self, optimizer: Optimizer, device: torch.device):
        self.optimizer = optimizer
        self.device = device
        self.copied: list[float | None] = [None for _ in optimizer.param_groups]
        self.rates = [torch.zeros((), dtype=torch.float32, device=device) for _ in self.copied]

    def update(self) -> None:
        """Copy the rates that have changed."""
        for index, group in enumerate(self.optimizer.param_groups):
            if self.copied[index] != group["lr"]:
                self.copied[index] = group["lr"]
                self.rates[index].fill_(group["lr"])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Make the optimizer use the copies and its fused kernels within the context."""
        self.update()
        plain = [dict(group) for group in self.optimizer.param_groups]
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            settings = {"lr": rate, "fused": True, "capturable": True}
            group.update({key: value for key, value in settings.items() if key in group})
        for state in self.optimizer.state.values():  # a restored count of steps is on the host
            if "step" in state:
                state["step"] = state["step"].to(self.device, torch.float32)
        try:
            yield
        finally:
            for group, own in zip(self.optimizer.param_groups, plain, strict=True):
                group.update(own)


class CapturedStep:
    """Replays a captured optimizer step, one graph for each shape of minibatch.

    If a capture fails, steps are taken without: by the same kernels, more slowly.
    """

    def __init__(self, eager: Step, optimizer: Optimizer, parameters: Sequence[Parameter]):
        self.eager = eager  # takes a step in plain PyTorch
        self.optimizer = optimizer
        self.parameters = parameters  # all on one CUDA device
        self.device_rates = DeviceRates(optimizer, parameters[0].device)
        self.stream = torch.cuda.Stream()
        self.num_steps: Counter[Shapes] = Counter()
        self.captured: dict[Shapes, tuple[Step, list[dict[str, Any]]]] = {}
        self.has_failed = False

    def __call__(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Take the step."""
        shapes = (inputs.shape, targets.shape)
        settings = [  # a capture makes constants of them; schedulers may change momentum or betas
            {key: value for key, value in group.items() if key not in ("params", "lr")}
            for group in self.optimizer.param_groups
        ]
        if shapes not in self.captured:
            self.num_steps[shapes] += 1
            if self.has_failed or self.num_steps[shapes] <= WARM_UP_STEPS:
                return self._run_eager(inputs, targets)
            try:
                self.captured[shapes] = self._capture(inputs, targets), settings
            except torch.OutOfMemoryError:  # whoever has several models takes fewer at once
                raise
            except RuntimeError as error:  # an operation that no graph can hold, the driver
                self.has_failed = True
                reason = str(error).partition("\n")[0]
                print(f"steps are slower than they could be: no CUDA graph of one ({reason})", flush=True)
                return self._run_eager(inputs, targets)
        replay, captured_settings = self.captured[shapes]
        if captured_settings != settings:
            return self._run_eager(inputs, targets)
        self.device_rates.update()
        return replay(inputs, targets)

    def _run_eager(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Take the step without a capture, by the same kernels."""
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream), self.device_rates.applied():
            loss = self.eager(inputs, targets)
        current.wait_stream(self.stream)
        return loss

    def _capture(self, inputs: Tensor, targets: Tensor) -> Step:
        """Capture a step, and return the function that replays it in the same memory."""
        static_inputs, static_targets = inputs.clone(), targets.clone()
        graph = torch.cuda.CUDAGraph()
        with self.device_rates.applied():
            self.optimizer.zero_grad(set_to_none=True)
            with torch.cuda.graph(graph):
                loss = self.eager(static_inputs, static_targets)
        gradients = [parameter.grad for parameter in self.parameters]

        def replay(inputs: Tensor, targets: Tensor) -> Tensor:
            static_inputs.copy_(inputs)
            static_targets.copy_(targets)
            graph.replay()
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                parameter.grad = gradient  # another shape's graph has its own
            return loss.clone()

        return replay
