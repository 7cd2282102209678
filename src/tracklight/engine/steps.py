"""One optimizer step, as fast as the device allows.

The loop by hand spends about half of a small model's step outside its kernels: dispatching modules,
recording the backward graph and traversing it. A pure model (`Supervised.pure`) is traced once into
a flat list of its forward and backward operations, the same kernels in the same order, and replayed
on memory that is allocated once.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer

from tracklight.engine import torch_internals, updates
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
        self.knows_update = updates.is_known(optimizer)
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
        if len(losses := self._take_known(trace, inputs, targets, len(targets))):
            return losses[0]
        with torch.no_grad():
            loss, *gradients = trace(inputs, targets)
            self._set_gradients(gradients)
            self.optimizer.step()
        return loss.clone()  # the next step writes to the same memory

    def take_block(
        self,
        inputs: Tensor,
        targets: Tensor,
        size: int,
        seed: Callable[[int], int],
        schedule: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Take the steps of full minibatches at once, if their shape has a trace that can.

        Return their losses, (S,); none if they have to be taken one by one. `seed` returns the seed of the
        nth step, `schedule` gives the optimizer the settings of the nth.
        """
        trace = self.traces.get((inputs[:size].shape, targets[:size].shape))
        return self._take_known(trace, inputs, targets, size, seed, schedule)

    @torch.no_grad()
    def _take_known(
        self,
        trace: Callable[..., Sequence[Tensor]] | None,
        inputs: Tensor,
        targets: Tensor,
        size: int,
        seed: Callable[[int], int] | None = None,
        schedule: Callable[[int], None] | None = None,
    ) -> Tensor:
        if not (
            self.knows_update
            and isinstance(trace, Replay)
            and (state := updates.state_of(self.optimizer, self.parameters)) is not None
            and (settings := updates.settings_of(self.optimizer)) is not None
        ):
            return inputs.new_empty(0)
        number, by_step = len(targets) // size, [settings]
        if schedule:
            for step in range(1, number):
                try:
                    schedule(step)
                except ValueError:  # such as of a schedule that has ended; raised again when that step comes
                    break
                found = updates.settings_of(self.optimizer)
                if found is None or bool(found.get("momentum")) != bool(settings.get("momentum")):
                    break  # needs other state
                by_step.append(found)
            number = len(by_step)
        seeds = [seed(step) for step in range(number)] if seed and trace.draws else []
        rows = slice(number * size)
        losses, gradients = trace.take_steps(
            inputs[rows], targets[rows], size, seeds, self.parameters, state, by_step
        )
        self._set_gradients(gradients)
        return losses

    def _set_gradients(self, gradients: Sequence[Tensor]) -> None:
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient

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
