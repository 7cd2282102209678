"""One optimizer step, as fast as the device allows.

The loop by hand spends about half of a small model's step outside its kernels: dispatching modules,
recording the backward graph and traversing it. A pure model (`Supervised.pure`) is traced once into
a flat list of its forward and backward operations, the same kernels in the same order.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.optim import SGD, Adam, AdamW, Optimizer

from tracklight.engine import torch_internals
from tracklight.engine.cuda_graphs import CapturedStep, Shapes, Step, can_capture
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
    parameters = [(id(each), each.requires_grad) for each in module.parameters()]
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
    """Runs the traced operations of a pure model, one trace for each frequent shape of minibatch.

    `eager` takes the first steps of each shape: a trace takes as long as a hundred of them.
    """

    def __init__(self, module: Supervised, optimizer: Optimizer, eager: Step):
        self.optimizer = optimizer
        self.eager = eager
        self.parameters: list[Tensor] = list(module.parameters())
        self.loss_of_batch = _LossOfBatch(module)
        self.traces: dict[Shapes, Callable[..., Any] | None] = {}
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
        with torch.no_grad():
            loss, *gradients = trace(*self.parameters, inputs, targets)
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                parameter.grad = gradient
            if _is_plain_sgd(self.optimizer, self.parameters):
                group = self.optimizer.param_groups[0]
                torch_internals.fused_sgd(self.parameters, gradients, group)
            else:
                self.optimizer.step()
        return loss

    def _trace(self, inputs: Tensor, targets: Tensor) -> Callable[..., Any] | None:
        """Return what computes loss and gradients; None if a trace cannot hold it."""
        names = [name for name, _ in self.loss_of_batch.named_parameters()]

        def loss_and_gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
            *parameters, x, y = tensors
            named = dict(zip(names, parameters, strict=True))
            loss = torch.func.functional_call(self.loss_of_batch, named, (x, y))
            return loss.detach(), *torch.autograd.grad(loss, parameters)

        leaves = [parameter.detach().requires_grad_() for parameter in self.parameters]
        try:
            with torch.random.fork_rng(devices=()):  # tracing draws dropout's numbers too
                traced = make_fx(loss_and_gradients)(*leaves, inputs, targets)
        except RuntimeError:  # such as a parameter that has no part in the loss
            return None
        _drop_aliases(traced)
        return traced.forward


class _LossOfBatch(nn.Module):  # one module: a trace has to see the parameters of both
    def __init__(self, module: Supervised):
        super().__init__()
        self.module = module

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return self.module.loss(self.module(inputs), targets)


def _drop_aliases(traced: torch.fx.GraphModule) -> None:
    """Remove the operations that autograd inserts to tell tensors apart; they compute nothing."""
    for node in list(traced.graph.nodes):
        if node.op == "call_function" and node.target is torch.ops.aten.alias.default:
            node.replace_all_uses_with(node.args[0])
            traced.graph.erase_node(node)
    traced.graph.eliminate_dead_code()
    traced.recompile()


def _is_plain_sgd(optimizer: Optimizer, parameters: list[Tensor]) -> bool:
    """Check that `fused_sgd` gives the bits of the optimizer's step, whose settings may change.

    With momentum the fused kernel differs from the loop in the last place.
    """
    if type(optimizer) is not SGD or len(optimizer.param_groups) != 1:
        return False
    (group,) = optimizer.param_groups
    return (
        group["fused"] is not False
        and not (group["foreach"] or group["differentiable"] or group["momentum"])
        and isinstance(group["lr"], float)
        and not torch_internals.has_step_hooks(optimizer)
        and {*map(id, group["params"])} == {*map(id, parameters)}
        and all(parameter.device.type == "cpu" for parameter in parameters)
    )
