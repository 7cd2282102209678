"""A function of state and batch, traced once and replayed without Python.

The trace is written as TorchScript, whose interpreter calls the same kernels in the same order, on memory
that is allocated once. It needs no compiler, and takes all steps of a block in one call.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from operator import getitem
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from tracklight.engine import torch_internals, updates

# Operations whose result depends on shapes alone.
EMPTY = ("empty", "empty_like", "new_empty")
FILLED = ("zeros_like", "ones_like", "full_like", "zeros", "ones", "full", "scalar_tensor", "arange")
SOURCE = """
def step(fixed: List[Tensor], {inputs}: Tensor, {targets}: Tensor) -> List[Tensor]:
    {fixed}, = fixed
    {lines}
    return [{outputs}]

def take_steps(
    fixed: List[Tensor], inputs: Tensor, targets: Tensor, size: int, seeds: List[int],
    parameters: List[Tensor], state: List[List[Tensor]], settings: List[Dict[str, float]]
) -> List[Tensor]:
    losses: List[Tensor] = []
    outputs: List[Tensor] = []
    for i in range(inputs.size(0) // size):
        if len(seeds) > 0:
            torch.manual_seed(seeds[i])
        outputs = step(fixed, inputs.narrow(0, i * size, size), targets.narrow(0, i * size, size))
        step_optimizer(parameters, outputs[1:], state, settings[min(i, len(settings) - 1)])
        losses.append(outputs[0].clone())
    return [torch.stack(losses)] + outputs[1:]
"""


def trace(
    function: Callable[..., tuple[Tensor, ...]],
    state: Sequence[Tensor],
    batch: tuple[Tensor, Tensor],
    rewrite: Callable[[Graph], None] = lambda _: None,
    is_compiled: bool = True,  # whether each call may write to the memory of the one before
) -> Callable[..., Sequence[Tensor]] | None:
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
        by_trace, rng = partial(traced.forward, *parameters), torch.get_rng_state()

        @torch.no_grad()
        def outcome(call: Callable[..., Sequence[Tensor]]) -> list[Tensor]:
            torch.set_rng_state(rng)
            found = list[Tensor]()
            try:
                for turned in (lambda each: each.clone(), lambda each: each.flip(0)):  # two batches
                    results = call(*map(turned, batch))
                    found += [each.nan_to_num() for each in (*results, *parameters)]
            finally:
                _restore(parameters, before)
            return found

        try:
            expected = outcome(by_trace)
        except RuntimeError:  # of an operation that the trace cannot call, such as an LSTM's backward one
            return None
        if not is_compiled:
            return by_trace
        try:
            replay = Replay(traced, parameters, batch)
            _restore(parameters, before)
            is_same = all(map(torch.equal, expected, outcome(replay)))
        except RuntimeError:  # an operation that TorchScript does not know
            return by_trace
        finally:
            _restore(parameters, before)
        return replay if is_same else by_trace


@torch.no_grad()
def _restore(tensors: Sequence[Tensor], before: Sequence[Tensor]) -> None:
    for tensor, value in zip(tensors, before, strict=True):
        tensor.copy_(value)


def _drop_aliases(traced: GraphModule) -> None:
    """Remove the operations that autograd inserts to tell tensors apart; they compute nothing."""
    for node in list(traced.graph.nodes):
        if node.op == "call_function" and node.target is torch.ops.aten.alias.default:
            node.replace_all_uses_with(node.args[0])
            traced.graph.erase_node(node)


class Replay:
    """A trace as TorchScript, called with a batch of the traced shapes.

    A kernel that can write into given tensors gets the same ones at each step, and what is the same
    tensor at each step, such as a view of a parameter, is made once. Kernels, order and bits stay.
    """

    def __init__(self, traced: GraphModule, parameters: Sequence[Tensor], batch: tuple[Tensor, Tensor]):
        """Raise RuntimeError for what TorchScript does not know, or a trace that changes its batch."""
        *nodes, output = traced.graph.nodes
        placeholders = [node for node in nodes if node.op == "placeholder"]
        constants = [node for node in nodes if node.op == "get_attr"]
        owned = {*placeholders[: len(parameters)]}
        self.values: dict[Node, Any] = dict(zip(placeholders, (*parameters, *batch), strict=True))
        self.values |= {node: getattr(traced, str(node.target)) for node in constants}
        # The same tensor at each step, by name.
        self.fixed = {node.name: self.values[node] for node in (*owned, *constants)}
        self.used = dict[str, None]()  # names, in order
        self.lines: list[str] = []
        nodes = [node for node in nodes if node not in self.values]
        written = {_owner(each) for node in nodes for each in _written(node)}
        is_known = [torch_internals.base_name(node.target) or node.target is getitem for node in nodes]
        if not all(is_known) or not written <= {*owned, *nodes}:
            raise RuntimeError("a trace that changes its batch or a constant, or has operations of others")
        with torch.no_grad():
            for node in nodes:
                self._add(node, node in written)
        self.draws = any(torch_internals.draws(node.target) for node in nodes)  # random numbers
        outputs = ", ".join(map(self._word, output.args[0]))
        self.tensors = [self.fixed[name] for name in self.used if name in self.fixed]
        inputs, targets = (node.name for node in placeholders[len(parameters) :])
        fixed = ", ".join(name for name in self.used if name in self.fixed)
        lines = "\n    ".join(self.lines)
        source = SOURCE.format(inputs=inputs, targets=targets, fixed=fixed, lines=lines, outputs=outputs)
        self.functions: Any = torch.jit.CompilationUnit(updates.SOURCE + source)
        self.values.clear()

    def __call__(self, inputs: Tensor, targets: Tensor) -> list[Tensor]:
        """Return what the traced function does for a batch; the next call writes to the same memory."""
        with torch_internals.unoptimized():
            return self.functions.step(self.tensors, inputs, targets)

    def take_steps(
        self,
        inputs: Tensor,
        targets: Tensor,
        size: int,
        seeds: list[int],
        parameters: list[Tensor],
        state: list[list[Tensor]],
        settings: list[dict[str, float]],
    ) -> tuple[Tensor, list[Tensor]]:
        """Take optimizer steps over minibatches of `size`, by a trace of loss and gradients.

        Args:
            inputs: (S * B, ...).
            targets: (S * B, ...).
            size: B, that of the traced minibatch.
            seeds: PyTorch's seed for each step; none for a trace that does not draw.
            parameters: Of the optimizer, in the order of the gradients.
            state: Of the optimizer (`updates.state_of`).
            settings: Of the optimizer (`updates.settings_of`), for each step, or one for all.

        Returns:
            The losses, (S,), and the last gradients.
        """
        seeds = [each - (each >> 63 << 64) for each in seeds]  # TorchScript's integers have a sign
        with torch_internals.unoptimized():
            losses, *gradients = self.functions.take_steps(
                self.tensors, inputs, targets, size, seeds, parameters, state, settings
            )
        return losses, gradients

    def _add(self, node: Node, is_written: bool) -> None:
        """Run an operation, and write the line that runs it at each step where one has to."""
        operation: Any = node.target
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), self.values.__getitem__)
        value = self.values[node] = operation(*args, **kwargs)
        if operation is getitem:
            return
        is_fixed = all(_name(each) in self.fixed for each in node.all_input_nodes)
        base, out = torch_internals.base_name(operation), dict[str, str]()
        is_one = isinstance(value, Tensor)
        results = [value] if is_one else [*(value or ())]
        names = [node.name] if is_one else [_element(node, index) for index in range(len(results))]
        if torch_internals.returns_alias(operation):
            if is_fixed:
                self.fixed |= zip(names, results, strict=True)
            if is_fixed and not torch_internals.written_arguments(operation):
                return
        elif base in EMPTY or (base in FILLED and not is_written):
            self.fixed[node.name] = value
            return
        elif (variant := torch_internals.out_variant(operation, args, kwargs, value)) is not None:
            operation, memory = variant
            out = dict(zip(memory, names, strict=True))
            self.fixed |= zip(names, memory.values(), strict=True)
            self.values[node] = memory.popitem()[1] if is_one else (*memory.values(),)
        kinds = [str(argument.type) for argument in operation._schema.arguments]
        words = [self._word(each, kind) for each, kind in zip(node.args, kinds, strict=False)]
        words += [f"{key}={self._word(each)}" for key, each in node.kwargs.items()]
        words += [f"{key}={self._use(name)}" for key, name in out.items()]
        result = "" if self.fixed.keys() >= {*names} else f"{', '.join(names)}{'' if is_one else ','} = "
        self.lines.append(
            f"{result}torch.ops.{operation._schema.name.replace('::', '.')}({', '.join(words)})"
        )

    def _word(self, value: Any, kind: str = "") -> str:
        """Return how TorchScript writes an argument; `kind` is its type in the schema."""
        if isinstance(value, Node):
            return self._use(_name(value))
        if isinstance(value, list | tuple):
            words = f"[{', '.join(map(self._word, value))}]"
            return words if value else f"torch.jit.annotate({kind.removeprefix('Optional[')}, [])"
        if isinstance(value, float) and not math.isfinite(value):
            return f'float("{value}")'
        return f'torch.device("{value}")' if isinstance(value, torch.device) else repr(value)

    def _use(self, name: str) -> str:
        self.used[name] = None
        return name


def _name(node: Node) -> str:
    """Return the name of a node's result: of an element, where it takes one of several."""
    source = node.args[0] if node.target is getitem else None
    return _element(source, node.args[1]) if isinstance(source, Node) else node.name


def _element(node: Node, index: Any) -> str:
    return f"{node.name}__of{index}"  # the trace itself gives no such names


def _written(node: Node) -> list[Node]:
    """Return the arguments that an operation writes in place."""
    indices = torch_internals.written_arguments(node.target)
    found = [node.args[index] if index < len(node.args) else None for index in indices]
    if not all(isinstance(each, Node) for each in found):
        raise RuntimeError("an operation that writes into what it is given by name or in a list")
    return [each for each in found if isinstance(each, Node)]


def _owner(node: Any) -> Any:
    """Return the node whose memory a node's result shares: itself, where it is no view."""
    while node.target is getitem or torch_internals.returns_alias(node.target):
        node = node.args[0]
    return node
