"""One optimizer step, as fast as the device allows.

The loop by hand spends about half of a small model's step outside its kernels: dispatching modules,
recording the backward graph and walking it. For a pure model (`Supervised.pure`) that recording
need be made only once: the forward and backward operations are traced into a flat list, the same
kernels in the same order, which each step then runs.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.optim import SGD, Optimizer

from tracklight.engine.graphs import CapturedStep, Step, may_capture
from tracklight.models.supervised import Supervised


def make_step(module: Supervised, optimizer: Optimizer) -> Step:
    """Return what takes one optimizer step on a minibatch and returns its loss, detached."""
    eager = eager_step(module, optimizer)
    if not may_trace(module):
        return eager
    if module.device.type == "cuda":
        return CapturedStep(eager, optimizer) if may_capture(optimizer) else eager
    _prefer_fused(optimizer)
    return TracedStep(module, optimizer)


def eager_step(module: Supervised, optimizer: Optimizer) -> Step:
    """Return the step as one would write it by hand."""

    def step(inputs: Tensor, targets: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = module.loss(module(inputs), targets)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def may_trace(module: Supervised) -> bool:
    """Say whether one trace serves all steps: nothing but parameters and the batch enters them."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return (
        module.pure
        and module._compiled_call_impl is None
        and next(module.buffers(), None) is None
        and all(parameter.requires_grad for parameter in module.parameters())
        and not any(getattr(part, hook) for part in module.modules() for hook in hooks)
    )


class TracedStep:
    """Runs the traced operations of a pure model, one trace for each shape of minibatch."""

    def __init__(self, module: Supervised, optimizer: Optimizer):
        self.module = module
        self.optimizer = optimizer
        self.names = [name for name, _ in module.named_parameters()]
        self.parameters = list(module.parameters())
        self.traces: dict[tuple[torch.Size, torch.Size], Callable[..., Any]] = {}

    def __call__(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Take the step."""
        shapes = (inputs.shape, targets.shape)
        trace = self.traces.get(shapes)
        if trace is None:
            trace = self.traces[shapes] = self._trace(inputs, targets)
        with torch.no_grad():
            loss, *gradients = trace(*self.parameters, inputs, targets)
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                parameter.grad = gradient
            self.optimizer.step()
        return loss

    def _trace(self, inputs: Tensor, targets: Tensor) -> Callable[..., Any]:
        def loss_and_gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
            *parameters, x, y = tensors
            named = dict(zip(self.names, parameters, strict=True))
            loss = self.module.loss(torch.func.functional_call(self.module, named, (x,)), y)
            return loss.detach(), *torch.autograd.grad(loss, parameters)

        state = torch.random.get_rng_state()  # tracing runs the operations, dropout's draws too
        leaves = [parameter.detach().requires_grad_() for parameter in self.parameters]
        traced = make_fx(loss_and_gradients)(*leaves, inputs, targets)
        torch.random.set_rng_state(state)
        _drop_aliases(traced)
        return traced.forward


def _drop_aliases(traced: torch.fx.GraphModule) -> None:
    """Remove the operations that autograd inserts to tell tensors apart; they compute nothing."""
    for node in list(traced.graph.nodes):
        if node.op == "call_function" and node.target is torch.ops.aten.alias.default:
            node.replace_all_uses_with(node.args[0])
            traced.graph.erase_node(node)
    traced.graph.eliminate_dead_code()
    traced.recompile()


def _prefer_fused(optimizer: Optimizer) -> None:
    """Update all parameters in one kernel where that gives the bits of the loop over them."""
    if type(optimizer) is not SGD:
        return
    for group in optimizer.param_groups:
        on_cpu = all(parameter.device.type == "cpu" for parameter in group["params"])
        plain = not group["foreach"] and not group["differentiable"]
        plain = plain and not group["momentum"]  # with momentum the bits differ in the last place
        if group["fused"] is None and on_cpu and plain:
            group["fused"] = True
