"""One optimizer step, as fast as the device allows.

The loop by hand spends about half of a small model's step outside its kernels: dispatching modules,
recording the backward graph and traversing it. A pure model (`Supervised.pure`) is traced once into
a flat list of its forward and backward operations, the same kernels in the same order, and replayed
on memory that is allocated once.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from operator import getitem, is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from tracklight.engine import torch_internals
from tracklight.engine.cuda_graphs import CapturedStep, Shapes, Step, can_capture
from tracklight.models.supervised import Supervised

EAGER_STEPS = 16  # of a shape of minibatch, before it is worth a trace
# Operations whose result depends on shapes alone.
EMPTY = ("empty", "empty_like", "new_empty")
FILLED = ("zeros_like", "ones_like", "full_like", "zeros", "ones", "full", "scalar_tensor", "arange")


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
        self.eager = eager  # takes the first steps of each shape: a trace takes as long as a hundred
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
            loss, *gradients = trace(inputs, targets)
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                parameter.grad = gradient
            if _is_plain_sgd(self.optimizer, self.parameters):
                group = self.optimizer.param_groups[0]
                torch_internals.fused_sgd(self.parameters, gradients, group)
            else:
                self.optimizer.step()
        return loss.clone()  # the next step writes to the same memory

    def _trace(self, inputs: Tensor, targets: Tensor) -> Callable[..., Any] | None:
        """Return what computes loss and gradients of a batch; None if a trace cannot hold it."""
        names = [name for name, _ in self.loss_of_batch.named_parameters()]

        def loss_and_gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
            *parameters, x, y = tensors
            named = dict(zip(names, parameters, strict=True))
            loss = torch.func.functional_call(self.loss_of_batch, named, (x, y))
            return loss.detach(), *torch.autograd.grad(loss, parameters)

        keeps_gradients = not type(self.optimizer).__module__.startswith("torch.")  # or it may
        return trace(loss_and_gradients, self.parameters, (inputs, targets), is_compiled=not keeps_gradients)


def trace(
    function: Callable[..., tuple[Tensor, ...]],
    state: Sequence[Tensor],
    batch: tuple[Tensor, Tensor],
    rewrite: Callable[[torch.fx.Graph], None] = lambda _: None,
    is_compiled: bool = True,  # whether each call may write to the memory of the one before
) -> Callable[..., tuple[Tensor, ...]] | None:
    """Return a function of a batch that replays one of state and batch; None if a trace cannot hold it.

    The function may change the state, which is as before after the tracing.
    """
    leaves = [each.detach().requires_grad_(each.requires_grad) for each in state]
    before = [leaf.detach().clone() for leaf in leaves]
    with torch.random.fork_rng(devices=()):  # tracing draws dropout's numbers too
        try:
            traced = torch_internals.make_fx(function)(*leaves, *batch)
        except RuntimeError:  # such as a parameter that has no part in the loss
            return None
        finally:
            _restore(leaves, before)
        _drop_aliases(traced)
        rewrite(traced.graph)
        traced.graph.eliminate_dead_code()
        traced.recompile()
        parameters = [leaf.detach() for leaf in leaves]
        if not is_compiled:
            return partial(traced.forward, *parameters)
        with torch.no_grad():
            return _Replay(traced, parameters, batch).compiled()


@torch.no_grad()
def _restore(tensors: Sequence[Tensor], before: Sequence[Tensor]) -> None:
    for tensor, value in zip(tensors, before, strict=True):
        tensor.copy_(value)


class _Replay:
    """Writes the operations of a trace as straight Python on memory that is allocated once.

    A kernel that can write into given tensors gets the same ones at each step, and what is the same
    tensor at each step, such as a view of a parameter, is made once. Kernels, order and bits stay.
    """

    def __init__(self, traced: torch.fx.GraphModule, parameters: list[Tensor], batch: tuple[Tensor, ...]):
        self.traced, self.parameters, self.batch = traced, parameters, batch
        names = [node.name for node in traced.graph.nodes if node.op == "placeholder"]
        self.inputs = names[len(parameters) :]
        self.values: dict[str, Any] = dict(zip(names, (*parameters, *batch), strict=True))
        self.fixed = set(names[: len(parameters)])  # names of tensors that are the same at each step
        self.lines: list[str] = []

    def compiled(self) -> Callable[..., tuple[Tensor, ...]]:
        """Return the function of (inputs, targets): the trace's own where the bits would differ."""
        by_trace = partial(self.traced.forward, *self.parameters)
        *nodes, output = (node for node in self.traced.graph.nodes if node.op != "placeholder")
        written = {
            _owner(node.args[index])
            for node in nodes
            for index in torch_internals.written_arguments(node.target)
        }
        is_known = [node.op == "call_function" or node.name in self.fixed for node in (*nodes, *written)]
        if not all(is_known):
            return by_trace
        rng, before = torch.get_rng_state(), [each.clone() for each in self.parameters]
        for node in nodes:
            self._add(node, node in written)
        head = f"def step({', '.join(self.inputs)}):"
        exec("\n    ".join([head, *self.lines, f"return {self._word(output.args[0])}"]), self.values)
        step, found = self.values["step"], list[list[Tensor]]()
        for call in (by_trace, step):
            _restore(self.parameters, before)
            torch.set_rng_state(rng)
            found.append([each.nan_to_num() for each in (*call(*self.batch), *self.parameters)])
        _restore(self.parameters, before)
        return step if all(map(torch.equal, *found)) else by_trace

    def _add(self, node: Any, is_written: bool) -> None:
        """Run an operation, and write the line that runs it at each step where one has to."""
        operation, name = node.target, node.name
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda each: self.values[each.name])
        value = self.values[name] = operation(*args, **kwargs)
        is_fixed = all(each.name in self.fixed for each in node.all_input_nodes)
        base = torch_internals.base_name(operation)
        out: dict[str, Any] = {}
        is_constant = base in EMPTY or (base in FILLED and not is_written)
        if operation is getitem or torch_internals.returns_alias(operation):
            if is_fixed:
                self.fixed.add(name)
            if is_fixed and not torch_internals.written_arguments(operation):
                return
        elif is_constant:
            self.fixed.add(name)
            return
        elif (variant := torch_internals.out_variant(operation, args, kwargs, value)) is not None:
            self.fixed.add(name)
            operation, out = variant
            self.values[name] = (*out.values(),) if isinstance(value, tuple) else next(iter(out.values()))
        call, out = torch_internals.fastest_call(operation, args, kwargs, out, value)
        words = [self._word(each) for each in node.args]
        words += [f"{key}={self._word(each)}" for key, each in (node.kwargs | out).items()]
        self.lines.append(f"{name} = {self._word(call)}({', '.join(words)})")

    def _word(self, value: Any) -> str:
        """Return how the lines write an argument: a tensor's name, or that of a constant."""
        if isinstance(value, torch.fx.Node):
            return value.name
        if isinstance(value, list | tuple) and any(isinstance(each, torch.fx.Node) for each in value):
            return f"({', '.join(map(self._word, value))},)"
        name = f"constant_{len(self.values)}"
        self.values[name] = value
        return name


def _owner(node: Any) -> Any:
    """Return the node whose memory a node's result shares: itself, where it is no view."""
    while node.op == "call_function" and torch_internals.returns_alias(node.target):
        node = node.args[0]
    return node


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
        and len(group["params"]) == len(parameters)
        and all(map(is_, group["params"], parameters))
        and all(parameter.device.type == "cpu" for parameter in parameters)
    )
