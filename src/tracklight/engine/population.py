"""Several models of one shape, trained together: each parameter has a leading member dimension.

Shapes: `M` members; `G` is 1 where they share their batches, else `M`; `S` steps in a block, `B` minibatch
size, `...` an example's own shape.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from tracklight.engine.cuda_graphs import CapturedStep, Step
from tracklight.engine.replay import trace
from tracklight.engine.seeding import seed_step
from tracklight.models.supervised import Supervised

MOMENTS = {SGD: ("momentum_buffer",), Adam: ("exp_avg", "exp_avg_sq"), AdamW: ("exp_avg", "exp_avg_sq")}
UNSTACKED = ("amsgrad", "maximize", "differentiable")  # settings of an optimizer
SHARED = ("nesterov", "decoupled_weight_decay")  # equal in all members


def shared_shape(model: Supervised, optimizer: Optimizer) -> str:
    """Return, as text, what members of one population share: all but weights and settings of their own."""
    parts = []
    for name, module in model.named_modules():
        own = {k: v for k, v in vars(module).items() if k[0] != "_" and not isinstance(v, Tensor | nn.Module)}
        plain = {k: v for k, v in own.items() if isinstance(v, str | int | float | list | tuple | dict)}
        plain |= {"p": module.p > 0} if isinstance(module, nn.Dropout) else {}
        parts.append((name, type(module), sorted(plain.items())))
    weights = [(name, tuple(each.shape), each.dtype) for name, each in model.named_parameters()]
    return repr((parts, weights, type(optimizer), [optimizer.param_groups[0].get(key) for key in SHARED]))


def why_not_stacked(optimizer: Optimizer) -> str | None:
    """Return why an optimizer takes no step for several members at once; None if it does."""
    if type(optimizer) not in MOMENTS:
        return f"{type(optimizer).__name__} is not SGD, Adam or AdamW"
    used = [key for key in UNSTACKED if optimizer.param_groups[0].get(key)]
    return f"optimizer.{used[0]}=true" if used else None


class Population:
    """Trains members together; their models and optimizers hold views of the stacked tensors.

    So each of them is at any time what a run of its own would have. Its arithmetic is PyTorch's, in the same
    order, batched over members.
    """

    def __init__(self, models: Sequence[Supervised], optimizers: Sequence[Optimizer], device: torch.device):
        self.device = device
        self.names = [name for name, _ in models[0].named_parameters()]
        stacks = (_stack([each.get_parameter(name) for each in models], device) for name in self.names)
        self.parameters = [nn.Parameter(stack) for stack in stacks]
        self.optimizer = StackedOptimizer(optimizers, self.parameters)
        self.template = copy.deepcopy(models[0]).to(device)  # its own weights are not used
        self.rates: dict[str, Tensor] = {}  # of dropout, (M,), where they differ
        for name, module in [*self.template.named_modules()]:
            if isinstance(module, nn.Dropout) and len({each.get_submodule(name).p for each in models}) > 1:
                rates = [each.get_submodule(name).p for each in models]
                self.template.set_submodule(name, _Dropout())
                self.rates[f"{name}.rate"] = torch.tensor(rates).to(self.parameters[0])
        self.traces: dict[Any, Callable[..., Sequence[Tensor]] | None] = {}
        self.step: Step = self._step
        if device.type == "cuda" and self.parameters[0].dtype == torch.float32:
            self.step = CapturedStep(self._step, self.optimizer, self.parameters)  # pyright: ignore

    def train_block(
        self, inputs: Tensor, targets: Tensor, size: int, seed: int, schedulers: Sequence[Any]
    ) -> Tensor:
        """Take a block's steps, minibatches of `size`, and those of schedulers; return the losses (S, M).

        `inputs` are (G, S * B, ...).
        """
        losses = []
        self.optimizer.read_settings()
        for x, y in zip(inputs.split(size, dim=1), targets.split(size, dim=1), strict=True):
            seed_step(seed, self.optimizer.num_steps)
            self.optimizer.write_table()
            losses.append(self.step(x, y))
            self.optimizer.num_steps += 1
            for scheduler in schedulers:
                scheduler.step()
            if schedulers:
                self.optimizer.read_settings()
        return torch.stack(losses)

    def _step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Take a step, (G, B, ...) -> (M,); on the CPU by a trace.

        It rounds otherwise than the eager step, so it is made at once: members that go on after a kill would
        take other steps than those that were not killed.
        """
        key, state = (inputs.shape, inputs.stride(), targets.shape), self.optimizer.state
        if key not in self.traces and self.device.type == "cpu":
            self.traces[key] = trace(self._update, state, (inputs, targets), fuse_updates)
        if (replay := self.traces.get(key)) is None:
            return self._update(*state, inputs, targets)[0]
        with torch.no_grad():
            return replay(inputs, targets)[0].clone()  # the next step writes to the same memory

    def _update(self, *tensors: Tensor) -> tuple[Tensor]:
        """Change the optimizer's state by a step; return the losses."""
        *state, inputs, targets = tensors
        parameters = state[: len(self.names)]
        losses = self._map(self._loss, parameters, inputs, targets)
        gradients = torch.autograd.grad(losses, parameters, torch.ones_like(losses))
        with torch.no_grad():
            self.optimizer.update(state, gradients)
        return (losses.detach(),)

    @torch.no_grad()
    def evaluate(self, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return the loss and the metrics of a batch (G, B, ...) by name, each (M,)."""
        return self._map(self._metrics, self.parameters, inputs, targets)

    def _map(self, function: Any, parameters: Sequence[Tensor], inputs: Tensor, targets: Tensor) -> Any:
        """Call a function of named weights and a batch for each member."""
        named = dict(zip(self.names, parameters, strict=True)) | self.rates
        batch, dim = ((inputs[0], targets[0]), None) if len(inputs) == 1 else ((inputs, targets), 0)
        return torch.vmap(function, in_dims=(0, dim, dim), randomness="different")(named, *batch)

    def _loss(self, named: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        outputs = torch.func.functional_call(self.template.train(), named, (inputs,))
        return self.template.loss(outputs, targets)

    def _metrics(self, named: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        outputs = torch.func.functional_call(self.template.eval(), named, (inputs,))
        return {"loss": self.template.loss(outputs, targets)} | self.template.metrics(outputs, targets)


class _Dropout(nn.Module):
    """Dropout whose rate is a tensor, so that each member can have its own."""

    rate: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rate", torch.zeros(()))

    def forward(self, inputs: Tensor) -> Tensor:
        kept = 1 - self.rate
        return inputs * (torch.rand_like(inputs) < kept) / kept if self.training else inputs


class StackedOptimizer:
    """SGD, Adam and AdamW with a value of each setting for each member.

    The settings are those of the members' own optimizers, which schedulers change; a table of them lies on
    the device, where a captured step reads it.
    """

    param_groups: Sequence[Any] = ()  # nothing here is a constant of a captured step

    def __init__(self, optimizers: Sequence[Optimizer], parameters: Sequence[Tensor]):
        self.optimizers = optimizers
        self.num_steps = 0  # set by the caller: SGD does not count its steps
        self.groups = [optimizer.param_groups[0] for optimizer in optimizers]
        kind, shared = type(optimizers[0]), self.groups[0]
        self.is_sgd, self.is_nesterov = kind is SGD, shared.get("nesterov", False)
        self.is_decoupled = kind is AdamW or shared.get("decoupled_weight_decay", False)
        self.has_decay = any(group["weight_decay"] for group in self.groups)
        has_moments = not self.is_sgd or any(group["momentum"] for group in self.groups)
        self.moments = MOMENTS[kind] if has_moments else ()
        self.state = [*parameters]  # then each moment of each parameter, then the table
        for name in self.moments:
            for index, parameter in enumerate(parameters):
                states = [
                    o.state[group["params"][index]] for o, group in zip(optimizers, self.groups, strict=True)
                ]
                found = [state.get(name) for state in states]
                own = [torch.zeros_like(parameter[0]) if each is None else each for each in found]
                self.state.append(_stack(own, parameter.device))
                for group, state, tensor in zip(self.groups, states, own, strict=True):
                    if not self.is_sgd or group["momentum"]:
                        state[name] = tensor
        self.read_settings()
        self.state.append(torch.zeros(self._rows().shape).to(parameters[0]))
        self.written: np.ndarray | None = None

    def read_settings(self) -> None:
        """Take up the members' settings, which schedulers may have changed."""
        keys = ("lr", "weight_decay", *(("momentum", "dampening") if self.is_sgd else ("betas", "eps")))
        self.settings = {key: np.array([group[key] for group in self.groups]) for key in keys}

    def _rows(self) -> np.ndarray:
        """Return what the next step multiplies by, a row each."""
        lr, decay, *own = self.settings.values()
        if self.is_sgd:
            momentum, dampening = own
            kept = np.where((momentum == 0) | (self.num_steps == 0), 1.0, 1.0 - dampening)
            return np.stack([-lr, decay, momentum, kept])
        (beta1, beta2), eps, step = own[0].T, own[1], self.num_steps + 1
        size, root = lr / (1 - beta1**step), np.sqrt(1 - beta2**step)
        return np.stack([-size, decay, 1 - lr * decay, 1 - beta1, beta2, 1 - beta2, root, eps])

    def write_table(self) -> None:
        """Copy what the next step multiplies by to the device, if it has changed."""
        rows = self._rows()
        if self.written is None or not np.array_equal(rows, self.written):
            self.state[-1].copy_(torch.from_numpy(rows))
            self.written = rows

    def update(self, state: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """Change the state by the gradients of all members' parameters."""
        step = self._update_sgd if self.is_sgd else self._update_adam
        *tensors, table = state
        for index, gradient in enumerate(gradients):
            parameter, *moments = tensors[index :: len(gradients)]
            step(parameter, gradient, moments, [row.view(-1, *[1] * (parameter.ndim - 1)) for row in table])

    def _update_sgd(self, parameter: Tensor, gradient: Tensor, moments: Any, rows: Sequence[Tensor]) -> None:
        minus_lr, decay, momentum, kept = rows
        if self.has_decay:
            gradient = torch.addcmul(gradient, parameter, decay)
        for buffer in moments:
            buffer.mul_(momentum).addcmul_(gradient, kept)
            gradient = torch.addcmul(gradient, buffer, momentum) if self.is_nesterov else buffer
        parameter.addcmul_(gradient, minus_lr)

    def _update_adam(self, parameter: Tensor, gradient: Tensor, moments: Any, rows: Sequence[Tensor]) -> None:
        minus_size, decay, shrinking, weight, beta2, weight2, root, eps = rows
        mean, square = moments
        if self.has_decay and self.is_decoupled:
            parameter.mul_(shrinking)
        elif self.has_decay:
            gradient = torch.addcmul(gradient, parameter, decay)
        mean.lerp_(gradient, weight)
        square.mul_(beta2).addcmul_(gradient * weight2, gradient)
        parameter.addcdiv_(mean * minus_size, square.sqrt().div_(root).add_(eps))

    def export_state(self) -> None:
        """Write into the members' optimizers what is no view of a stacked tensor: Adam's number of steps."""
        for optimizer in () if self.is_sgd else self.optimizers:
            for state in optimizer.state.values():
                state["step"] = torch.tensor(float(self.num_steps))


def fuse_updates(graph: torch.fx.Graph) -> None:
    """Compute gradients of weights in the layout of the weights, and add a product to its weight at once.

    Of many members they are larger than the caches: to write such a gradient and read it again, or to read it
    across its rows, takes longer than to compute it.
    """
    aten = torch.ops.aten
    for node in [*graph.nodes]:
        with graph.inserting_before(node):
            if node.target is aten.transpose.int and node.args[1:] == (1, 2):
                product = _product(node.args[0])
                if product is None:
                    continue
                left, right = (graph.call_function(node.target, (each, 1, 2)) for each in product.args)
                node.replace_all_uses_with(graph.call_function(aten.bmm.default, (right, left)))
            if node.target is aten.addcmul_.default and (product := _product(node.args[1])) is not None:
                left, right = product.args
                scaled = graph.call_function(aten.mul.Tensor, (left, node.args[2]))
                fused = graph.call_function(aten.baddbmm_.default, (node.args[0], scaled, right))
                node.replace_all_uses_with(fused)
                graph.erase_node(node)


def _product(node: Any) -> Any:
    """Return the batched matrix product that a node is, used nowhere else; None if it is none."""
    aten = torch.ops.aten
    while node.target is aten.view.default and [*node.args[0].meta["tensor_meta"].shape] == node.args[1]:
        if len(node.users) > 1:
            return None
        node = node.args[0]
    return node if node.target is aten.bmm.default and len(node.users) == 1 else None


def _stack(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Stack tensors on a device and turn each of them into a view of its part."""
    stacked = torch.stack([each.detach().to(device) for each in tensors])
    for tensor, part in zip(tensors, stacked, strict=True):
        tensor.data = part
    return stacked
