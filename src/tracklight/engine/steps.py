"""One optimizer step, as fast as the device allows.

The loop by hand spends about half of a small model's step outside its kernels: dispatching modules,
recording the backward graph and traversing it. A pure model (`Supervised.pure`) is traced once into
a flat list of its forward and backward operations, the same kernels in the same order, and replayed
on memory that is allocated once.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from tracklight.engine import torch_internals
from tracklight.engine.cuda_graphs import CapturedStep, Shapes, Step, can_capture
from tracklight.engine.replay import Replay, trace
from tracklight.models.supervised import Supervised

EAGER_STEPS = 16  # of a shape of minibatch, before it is worth a trace


def make_step(module: Supervised, optimizer: Optimizer) -> Step:
    """Return a function that takes one optimizer step on a minibatch and returns its loss."""
    if module.device.type == "cpu":
        _speed_up_adam(optimizer)
    eager = eager_step(module, optimizer)
    if not can_trace(module):
        return eager
    if module.device.type != "cuda":
        return TracedStep(module, optimizer, eager)
    captures = can_capture(optimizer)
    return CapturedStep(eager, optimizer, [*module.parameters()]) if captures else eager


def eager_step(module: Supervised, optimizer: Optimizer) -> Step:
    """Return the step as one would write it by hand."""

    def step(inputs: Tensor, targets: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = module.loss(module(inputs), targets)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def can_trace(module: Supervised) -> bool:
    """Check that steps depend on parameters and batch alone, so that one trace serves all."""
    return (
        vars(type(module)).get("pure", False)  # promised of this class, not of its parents
        and not torch_internals.is_compiled(module)
        and next(module.buffers(), None) is None
        and all(parameter.requires_grad for parameter in module.parameters())
        and not any(torch_internals.count_hooks(module))
    )


def signature(module: Supervised) -> tuple[Any, ...]:
    """Return what a step was made for; once it differs, `make_step` has to be called again."""
    parameters = [(id(each), each.data_ptr(), each.requires_grad) for each in module.parameters()]
    buffers, hooks = [*map(id, module.buffers())], torch_internals.count_hooks(module)
    return parameters, buffers, hooks, torch_internals.is_compiled(module)


def _speed_up_adam(optimizer: Optimizer) -> None:
    """Spare Adam and AdamW what costs more than their arithmetic on the CPU; the bits stay."""
    if type(optimizer) not in (Adam, AdamW):
        return
    torch_internals.skip_capture_check(optimizer)
    for group in optimizer.param_groups:  # by default, PyTorch loops over the parameters in Python
        has_tensors = any(isinstance(each, Tensor) for each in (group["lr"], *group["betas"]))
        set_by_user = group["foreach"] is not None or group["fused"] or group["differentiable"]
        if not (set_by_user or has_tensors):
            group["foreach"] = True


class TracedStep:
    """Replays the traced operations of a pure model, one trace for each frequent shape of minibatch."""

    def __init__(self, module: Supervised, optimizer: Optimizer, eager: Step):
        self.optimizer = optimizer
        self.is_sgd = type(optimizer) is SGD
        self.eager = eager  # takes the first steps of each shape: a trace takes as long as a hundred
        self.parameters: list[Tensor] = list(module.parameters())
        self.loss_of_batch = _LossOfBatch(module)
        self.traces: dict[Shapes, Callable[..., Sequence[Tensor]] | None] = {}
        self.num_steps: Counter[Shapes] = Counter()

    def __call__(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Take the step."""
        shapes = (inputs.shape, targets.shape)
        trace = self.traces.get(shapes)
        if trace is None:
            self.num_steps[shapes] += 1
            if self.num_steps[shapes] == EAGER_STEPS:
                self.traces[shapes] = self._trace(inputs, targets)
            return self.eager(inputs, targets)
        if isinstance(trace, Replay) and (buffers := self._sgd_buffers()) is not None:
            return self._descend(trace, inputs, targets, len(targets), [], buffers)[0]
        with torch.no_grad():
            loss, *gradients = trace(inputs, targets)
            self._set_gradients(gradients)
            self.optimizer.step()
        return loss.clone()  # the next step writes to the same memory

    def take_block(self, inputs: Tensor, targets: Tensor, size: int, seed: Callable[[int], int]) -> Tensor:
        """Take the steps of all full minibatches at once, if their shape has a trace and SGD takes them.

        Return their losses, (S,); none if they have to be taken one by one. `seed` is that of the nth step.
        """
        trace = self.traces.get((inputs[:size].shape, targets[:size].shape))
        if not isinstance(trace, Replay) or (buffers := self._sgd_buffers()) is None:
            return inputs.new_empty(0)
        seeds = [seed(step) for step in range(len(targets) // size if trace.draws else 0)]
        return self._descend(trace, inputs, targets, size, seeds, buffers)

    @torch.no_grad()
    def _descend(
        self,
        trace: Replay,
        inputs: Tensor,
        targets: Tensor,
        size: int,
        seeds: list[int],
        buffers: list[Tensor],
    ) -> Tensor:
        (group,) = self.optimizer.param_groups
        losses, gradients = trace.descend(inputs, targets, size, seeds, group, buffers)
        self._set_gradients(gradients)
        return losses

    def _set_gradients(self, gradients: Sequence[Tensor]) -> None:
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient

    def _sgd_buffers(self) -> list[Tensor] | None:
        """Return the buffers of momentum, none without, of an SGD that steps from parameter to parameter.

        Return None for any other optimizer, and before the first step with momentum. Without momentum the
        fused kernel has the same bits; with it, it differs in the last place.
        """
        if not self.is_sgd or len(self.optimizer.param_groups) != 1:
            return None
        (group,) = self.optimizer.param_groups
        is_plain = (
            not (group["foreach"] or group["differentiable"])
            and group["fused"] is not (group["momentum"] != 0)
            and isinstance(group["lr"], float)
            and not torch_internals.has_step_hooks(self.optimizer)
            and len(group["params"]) == len(self.parameters)
            and all(map(is_, group["params"], self.parameters))
            and all(parameter.device.type == "cpu" for parameter in self.parameters)
        )
        states = [self.optimizer.state.get(each, {}) for each in self.parameters if group["momentum"]]
        buffers = [state.get("momentum_buffer") for state in states]
        return buffers if is_plain and all(each is not None for each in buffers) else None

    def _trace(self, inputs: Tensor, targets: Tensor) -> Callable[..., Sequence[Tensor]] | None:
        """Return what computes loss and gradients of a batch; None if a trace cannot hold it."""
        names = [name for name, _ in self.loss_of_batch.named_parameters()]

        def loss_and_gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
            *parameters, x, y = tensors
            named = dict(zip(names, parameters, strict=True))
            loss = torch.func.functional_call(self.loss_of_batch, named, (x, y))
            pairs = zip(torch.autograd.grad(loss, parameters), parameters, strict=True)
            # Laid out as the parameter, which is what `backward` makes of it and fused kernels rely on.
            gradients = [g if g.stride() == p.stride() else torch.empty_like(p).copy_(g) for g, p in pairs]
            return loss.detach(), *gradients

        keeps_gradients = not type(self.optimizer).__module__.startswith("torch.")  # or it may
        batch = (inputs.clone(), targets.clone())  # which the model may change
        return trace(loss_and_gradients, self.parameters, batch, is_compiled=not keeps_gradients)


class _LossOfBatch(nn.Module):  # one module: a trace has to see the parameters of both
    def __init__(self, module: Supervised):
        super().__init__()
        self.module = module

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return self.module.loss(self.module(inputs), targets)
