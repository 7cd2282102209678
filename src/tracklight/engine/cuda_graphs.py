"""Steps on a CUDA device, captured once and replayed: the host then launches a step as a whole.

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

Step = Callable[[Tensor, Tensor], Tensor]
Shapes = tuple[torch.Size, torch.Size]

WARM_UP_STEPS = 3  # taken on a side stream before a capture, as PyTorch asks; they are real steps
CAPTURABLE = (SGD, Adam, AdamW)  # whose fused kernels read the learning rate on the device


def may_capture(optimizer: Optimizer) -> bool:
    """Say whether this optimizer's step can be replayed while its learning rate changes."""
    return (
        type(optimizer) in CAPTURABLE
        and not (optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks)
        and all(_suits(group) for group in optimizer.param_groups)
    )


def _suits(group: dict[str, Any]) -> bool:
    return (
        group["fused"] is not False
        and not (group["foreach"] or group["differentiable"] or isinstance(group["lr"], Tensor))
        and all(each.dtype == torch.float32 for each in group["params"])  # as the rates sent
    )


def _settings(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return all that a capture makes a constant of; some schedulers change momentum or betas."""
    return [
        {key: value for key, value in group.items() if key not in ("params", "lr")}
        for group in optimizer.param_groups
    ]


class OnDevice:
    """Keeps an optimizer's learning rates where a captured step can read them anew.

    The optimizer's own stay Python floats: schedulers compute in them, checkpoints hold them.

    Args:
        optimizer: One of `CAPTURABLE`.
        device: Of its parameters.
    """

    def __init__(self, optimizer: Optimizer, device: torch.device):
        self.optimizer = optimizer
        self.device = device
        self.sent: list[float | None] = [None for _ in optimizer.param_groups]
        self.rates = [torch.zeros((), dtype=torch.float32, device=device) for _ in self.sent]

    def send(self) -> None:
        """Send the rates that have changed."""
        for index, group in enumerate(self.optimizer.param_groups):
            if self.sent[index] != group["lr"]:
                self.sent[index] = group["lr"]
                self.rates[index].fill_(group["lr"])

    @contextmanager
    def used(self) -> Iterator[None]:
        """Let the optimizer, for the time being, take its step by what lies on the device."""
        self.send()
        plain = [dict(group) for group in self.optimizer.param_groups]
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            asked = {"lr": rate, "fused": True, "capturable": True}
            group.update({key: value for key, value in asked.items() if key in group})
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

    Args:
        eager: Takes a step in plain PyTorch: forward, backward and update.
        optimizer: Whose update `eager` makes.
        parameters: Of the model, all on one CUDA device.
    """

    def __init__(self, eager: Step, optimizer: Optimizer, parameters: Sequence[Parameter]):
        self.eager = eager
        self.optimizer = optimizer
        self.parameters = parameters
        self.on_device = OnDevice(optimizer, parameters[0].device)
        self.stream = torch.cuda.Stream()
        self.taken: Counter[Shapes] = Counter()
        self.captured: dict[Shapes, _Captured] = {}
        self.settings: dict[Shapes, list[dict[str, Any]]] = {}  # at capture

    def __call__(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Take the step."""
        shapes, settings = (inputs.shape, targets.shape), _settings(self.optimizer)
        captured = self.captured.get(shapes)
        if captured is None:
            self.taken[shapes] += 1
            if self.taken[shapes] <= WARM_UP_STEPS:
                return self._take(inputs, targets)
            with self.on_device.used():
                self.optimizer.zero_grad(set_to_none=True)
                captured = _Captured(self.eager, self.parameters, inputs, targets)
            self.captured[shapes], self.settings[shapes] = captured, settings
        if self.settings[shapes] != settings:
            return self._take(inputs, targets)
        self.on_device.send()
        return captured.replay(inputs, targets)

    def _take(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Take the step without a capture, by the same kernels."""
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream), self.on_device.used():
            loss = self.eager(inputs, targets)
        current.wait_stream(self.stream)
        return loss


class _Captured:
    """One captured step with the memory that it reads and writes."""

    def __init__(
        self, eager: Step, parameters: Sequence[Parameter], inputs: Tensor, targets: Tensor
    ):
        self.inputs = inputs.clone()
        self.targets = targets.clone()
        self.parameters = parameters
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.loss = eager(self.inputs, self.targets)
        self.gradients = [parameter.grad for parameter in parameters]

    def replay(self, inputs: Tensor, targets: Tensor) -> Tensor:
        self.inputs.copy_(inputs)
        self.targets.copy_(targets)
        self.graph.replay()
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient  # another shape's graph has its own
        return self.loss.clone()
