"""Steps on a CUDA device, captured once and replayed: the host then launches a step as a whole.

One graph holds one step, so that dropout's random numbers, a function of the step's seed, do not
depend on how many steps a block has.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

Step = Callable[[Tensor, Tensor], Tensor]
Shapes = tuple[torch.Size, torch.Size]

WARM_UP_STEPS = 3  # taken on a side stream before a capture, as PyTorch asks; they are real steps
CAPTURABLE = (SGD, Adam, AdamW)  # whose fused kernels read the learning rate on the device


def may_capture(optimizer: Optimizer) -> bool:
    """Say whether this optimizer's step can be replayed while its learning rate changes."""
    return type(optimizer) in CAPTURABLE and all(
        group["fused"] is not False and not group["foreach"] and not group["differentiable"]
        for group in optimizer.param_groups
    )


class CapturedStep:
    """Replays a captured optimizer step, one graph for each shape of minibatch.

    Args:
        eager: Takes a step in plain PyTorch: forward, backward and update.
        optimizer: Whose update `eager` makes.
    """

    def __init__(self, eager: Step, optimizer: Optimizer):
        self.eager = eager
        self.optimizer = optimizer
        self.stream = torch.cuda.Stream()
        self.taken: dict[Shapes, int] = {}
        self.captured: dict[Shapes, _Captured] = {}

    def __call__(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Take the step."""
        shapes = (inputs.shape, targets.shape)
        captured = self.captured.get(shapes)
        if captured is None:
            taken = self.taken[shapes] = self.taken.get(shapes, 0) + 1
            if taken <= WARM_UP_STEPS:
                return self._warm_up(inputs, targets)
            captured = _Captured(self.eager, self.optimizer, inputs, targets)
            self.captured[shapes] = captured
        return captured.replay(inputs, targets)

    def _warm_up(self, inputs: Tensor, targets: Tensor) -> Tensor:
        _make_capturable(self.optimizer, inputs.device)
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            loss = self.eager(inputs, targets)
        current.wait_stream(self.stream)
        return loss


class _Captured:
    """One captured step with the memory that it reads and writes."""

    def __init__(self, eager: Step, optimizer: Optimizer, inputs: Tensor, targets: Tensor):
        self.inputs = inputs.clone()
        self.targets = targets.clone()
        self.graph = torch.cuda.CUDAGraph()
        optimizer.zero_grad(set_to_none=True)
        with torch.cuda.graph(self.graph):
            self.loss = eager(self.inputs, self.targets)

    def replay(self, inputs: Tensor, targets: Tensor) -> Tensor:
        self.inputs.copy_(inputs)
        self.targets.copy_(targets)
        self.graph.replay()
        return self.loss.clone()


def _make_capturable(optimizer: Optimizer, device: torch.device) -> None:
    """Keep on the device what a replay must read anew: the learning rate and the step count."""
    for group in optimizer.param_groups:
        group["fused"] = True
        if "capturable" in group:
            group["capturable"] = True
        if not isinstance(group["lr"], Tensor):
            group["lr"] = torch.tensor(float(group["lr"]), device=device)
        elif group["lr"].device != device:
            group["lr"] = group["lr"].to(device)
