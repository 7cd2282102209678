"""The steps of SGD, Adam and AdamW in TorchScript, operation by operation as PyTorch has them.

With them a trace takes whole optimizer steps, on the optimizer's own state: the same bits without its Python.
"""

from collections.abc import Sequence
from operator import is_

from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from tracklight.engine import torch_internals

# Without momentum, the fused kernel has the bits of single operations; with it, it differs in the last place.
# Parameters and state are arguments: TorchScript leaves out what only changes a list that it made.
SOURCE = """
def step_sgd(
    parameters: List[Tensor], gradients: List[Tensor], buffers: List[Tensor], settings: Dict[str, float]
):
    lr, weight_decay, momentum = settings["lr"], settings["weight_decay"], settings["momentum"]
    maximize = settings["maximize"] != 0.0
    none: List[Tensor] = []
    if momentum == 0.0:
        torch.ops.aten._fused_sgd_(
            parameters, gradients, none, lr=lr, weight_decay=weight_decay, momentum=0.0,
            dampening=0.0, nesterov=False, maximize=maximize, is_first_step=False
        )
    else:
        rest, nesterov = 1.0 - settings["dampening"], settings["nesterov"] != 0.0
        for parameter, buffer, gradient in zip(parameters, buffers, gradients):
            if maximize:
                gradient = gradient.neg()
            if weight_decay != 0.0:
                gradient = gradient.add(parameter, alpha=weight_decay)
            buffer.mul_(momentum).add_(gradient, alpha=rest)
            parameter.add_(gradient.add(buffer, alpha=momentum) if nesterov else buffer, alpha=-lr)

def step_adam(
    parameters: List[Tensor], gradients: List[Tensor], state: List[List[Tensor]], settings: Dict[str, float]
):
    lr, weight_decay, eps = settings["lr"], settings["weight_decay"], settings["eps"]
    beta1, beta2 = settings["beta1"], settings["beta2"]
    maximize, decoupled = settings["maximize"] != 0.0, settings["decoupled_weight_decay"] != 0.0
    for parameter, gradient, average, square, count in zip(
        parameters, gradients, state[0], state[1], state[2]
    ):
        if maximize:
            gradient = gradient.neg()
        count.add_(1)
        if weight_decay != 0.0:
            if decoupled:
                parameter.mul_(1.0 - lr * weight_decay)
            else:
                gradient = gradient.add(parameter, alpha=weight_decay)
        average.lerp_(gradient, 1.0 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1.0 - beta2)
        number = float(count.item())
        scale = (1.0 - beta2**number) ** 0.5
        size = lr / (1.0 - beta1**number)
        parameter.addcdiv_(average, (square.sqrt() / scale).add_(eps), value=-size)

def step_optimizer(
    parameters: List[Tensor], gradients: List[Tensor], state: List[List[Tensor]], settings: Dict[str, float]
):
    if len(state) == 1:
        step_sgd(parameters, gradients, state[0], settings)
    else:
        step_adam(parameters, gradients, state, settings)
"""
NAMES = {  # of what an optimizer keeps for each parameter
    SGD: ("momentum_buffer",),
    Adam: ("exp_avg", "exp_avg_sq", "step"),
}
KEYS = {  # of an optimizer's settings
    SGD: ("lr", "weight_decay", "momentum", "dampening", "nesterov", "maximize"),
    Adam: ("lr", "weight_decay", "eps", "beta1", "beta2", "maximize", "decoupled_weight_decay"),
}
NAMES[AdamW], KEYS[AdamW] = NAMES[Adam], KEYS[Adam]


def is_known(optimizer: Optimizer) -> bool:
    """Check whether there are steps of this kind of optimizer here."""
    return type(optimizer) in NAMES


def settings_of(optimizer: Optimizer) -> dict[str, float] | None:
    """Return what the next step depends on besides the state; None for a step that is not written here."""
    group = optimizer.param_groups[0]
    values = dict(group)
    if "betas" in group:
        values["beta1"], values["beta2"] = group["betas"]
    numbers = [values[key] for key in KEYS[type(optimizer)]]
    is_other = any(map(group.get, ("differentiable", "amsgrad", "capturable")))
    leaves_other_gradient = group["foreach"] and group.get("nesterov")
    has_other_bits = group["fused"] and (type(optimizer) is not SGD or group["momentum"])
    has_tensors = not all(isinstance(each, float | int) for each in numbers)
    if is_other or leaves_other_gradient or has_other_bits or has_tensors:
        return None
    return dict(zip(KEYS[type(optimizer)], map(float, numbers), strict=True))


def state_of(optimizer: Optimizer, parameters: Sequence[Tensor]) -> list[list[Tensor]] | None:
    """Return the optimizer's state as `step_optimizer` takes it, a list of each kind, one a parameter.

    Return None before the first step, for other parameters than these or several groups, and where others
    watch the steps.
    """
    group = optimizer.param_groups[0]
    is_plain = (
        len(optimizer.param_groups) == 1
        and not torch_internals.has_step_hooks(optimizer)
        and len(group["params"]) == len(parameters)
        and all(map(is_, group["params"], parameters))
        and all(each.device.type == "cpu" and each.is_floating_point() for each in parameters)
    )
    names = NAMES[type(optimizer)]
    if not is_plain:
        return None
    if "momentum" in group and not group["momentum"]:
        return [[]]
    states = [optimizer.state.get(each, {}) for each in parameters]
    if not all(isinstance(state.get(name), Tensor) for state in states for name in names):
        return None
    return [[state[name] for state in states] for name in names]
