"""One optimizer step, as fast as the device allows.

The loop by hand spends about half of a small model's step outside its kernels: dispatching modules,
recording the backward graph and walking it. For a pure model (`Supervised.pure`) that recording
need be made only once: the forward and backward operations are traced into a flat list, the same
kernels in the same order, which each step then runs.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.optim import SGD, Adam, AdamW, Optimizer

from tracklight.engine.cuda_graphs import CapturedStep, Step, may_capture
from tracklight.models.supervised import Supervised

MODULE_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
PARAMETER_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
EAGER_STEPS = 16  # of a shape of minibatch, before it is worth a trace


def make_step(module: Supervised, optimizer: Optimizer) -> Step:
    """Return what takes one optimizer step on a minibatch and returns its loss, detached."""
    if module.device.type == "cpu":
        _unburden(optimizer)
    eager = eager_step(module, optimizer)
    if not may_trace(module):
        return eager
    if module.device.type == "cuda":
        captures = may_capture(optimizer)
        return CapturedStep(eager, optimizer, [*module.parameters()]) if captures else eager
    return TracedStep(module, optimizer, eager)


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
    return (
        vars(type(module)).get("pure", False)  # promised of this class, not of its parents
        and module._compiled_call_impl is None
        and next(module.buffers(), None) is None
        and all(parameter.requires_grad for parameter in module.parameters())
        and not any(_hooks(module))
    )


def standing(module: Supervised) -> tuple[Any, ...]:
    """Return what a step was made for: where it has changed, another has to be made."""
    parameters = [(id(each), each.requires_grad) for each in module.parameters()]
    buffers = [id(each) for each in module.buffers()]
    return parameters, buffers, _hooks(module), module._compiled_call_impl is None


def _hooks(module: nn.Module) -> list[int]:
    """Count the hooks of each module and parameter."""
    owners = [(part, MODULE_HOOKS) for part in module.modules()]
    owners += [(each, PARAMETER_HOOKS) for each in module.parameters()]
    return [len(getattr(owner, hook, None) or ()) for owner, names in owners for hook in names]


def _unburden(optimizer: Optimizer) -> None:
    """Spare Adam and AdamW on the CPU what costs more than their arithmetic; the bits stay.

    Each step asks whether a CUDA graph is being captured, for which it looks for a driver; and the
    loop over the parameters is Python's unless told otherwise.
    """
    if type(optimizer) not in (Adam, AdamW):
        return
    optimizer.__dict__["_accelerator_graph_capture_health_check"] = lambda: None
    for group in optimizer.param_groups:
        has_tensors = any(isinstance(each, Tensor) for each in (group["lr"], *group["betas"]))
        if group["foreach"] is None and not (
            group["fused"] or group["differentiable"] or has_tensors
        ):
            group["foreach"] = True


class TracedStep:
    """Runs the traced operations of a pure model, one trace for each frequent shape of minibatch.

    Args:
        module: The model.
        optimizer: Of its parameters.
        eager: Takes the first steps of each shape: a trace takes as long as a hundred of them.
    """

    def __init__(self, module: Supervised, optimizer: Optimizer, eager: Step):
        self.module = module
        self.eager = eager
        self.of_batch = _LossOfBatch(module)
        self.names = [name for name, _ in self.of_batch.named_parameters()]
        self.parameters: list[Tensor] = list(module.parameters())
        self.update = _bare_update(optimizer, self.parameters)
        self.traces: dict[tuple[torch.Size, torch.Size], Callable[..., Any] | None] = {}
        self.seen: Counter[tuple[torch.Size, torch.Size]] = Counter()

    def __call__(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Take the step."""
        shapes = (inputs.shape, targets.shape)
        trace = self.traces.get(shapes)
        if trace is None:
            self.seen[shapes] += 1
            if self.seen[shapes] == EAGER_STEPS:
                self.traces[shapes] = self._trace(inputs, targets)
            return self.eager(inputs, targets)
        with torch.no_grad():
            loss, *gradients = trace(*self.parameters, inputs, targets)
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                parameter.grad = gradient
            self.update(gradients)
        return loss

    def _trace(self, inputs: Tensor, targets: Tensor) -> Callable[..., Any] | None:
        """Return what computes loss and gradients; None if that takes what a trace cannot hold."""

        def loss_and_gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
            *parameters, x, y = tensors
            named = dict(zip(self.names, parameters, strict=True))
            loss = torch.func.functional_call(self.of_batch, named, (x, y))
            return loss.detach(), *torch.autograd.grad(loss, parameters)

        state = torch.random.get_rng_state()  # tracing runs the operations, dropout's draws too
        leaves = [parameter.detach().requires_grad_() for parameter in self.parameters]
        try:
            traced = make_fx(loss_and_gradients)(*leaves, inputs, targets)
        except RuntimeError:  # such as a parameter that has no part in the loss
            return None
        finally:
            torch.random.set_rng_state(state)
        _drop_aliases(traced)
        return traced.forward


class _LossOfBatch(nn.Module):
    """Forward pass and loss as one module: a trace has to see the parameters of both."""

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


def _bare_update(optimizer: Optimizer, parameters: list[Tensor]) -> Callable[[list[Tensor]], Any]:
    """Return what updates the parameters: the optimizer's step, or only the kernel at its heart.

    What PyTorch wraps around plain SGD (profiling, hooks, collecting parameters) costs a fifth of a
    small model's step; the fused kernel gives the bits of the loop over the parameters.
    """
    if not _is_plain_sgd(optimizer, parameters):
        return lambda gradients: optimizer.step()
    optimizer._opt_called = True  # pyright: ignore[reportAttributeAccessIssue]; schedulers ask for it

    def update(gradients: list[Tensor]) -> None:
        if not _is_plain_sgd(optimizer, parameters):  # any more: somebody changed a setting
            optimizer.step()
            return
        group = optimizer.param_groups[0]  # a restored state brings a new one
        torch._fused_sgd_(  # pyright: ignore[reportPrivateImportUsage]
            parameters,
            gradients,
            [],
            weight_decay=group["weight_decay"],
            momentum=0.0,
            lr=group["lr"],
            dampening=0.0,
            nesterov=False,
            maximize=group["maximize"],
            is_first_step=False,
        )

    return update


def _is_plain_sgd(optimizer: Optimizer, parameters: list[Tensor]) -> bool:
    """Say whether the step is all parameters minus rate times gradient, and nobody listens.

    With momentum the fused kernel differs from the loop in the last place.
    """
    if type(optimizer) is not SGD or len(optimizer.param_groups) != 1:
        return False
    (group,) = optimizer.param_groups
    if {*map(id, group["params"])} != {*map(id, parameters)}:
        return False
    return (
        group["fused"] is not False
        and not (group["foreach"] or group["differentiable"] or group["momentum"])
        and isinstance(group["lr"], float)
        and all(parameter.device.type == "cpu" for parameter in group["params"])
        and not (optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks)
    )
