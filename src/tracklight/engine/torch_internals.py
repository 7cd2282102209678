"""PyTorch's private state and kernels that the engine uses, as of torch 2.14."""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.fx.experimental.proxy_tensor import make_fx
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CyclicLR, LambdaLR, MultiplicativeLR
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.utils.data import DataLoader

__all__ = ["make_fx"]

MODULE_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
PARAMETER_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


def count_hooks(module: nn.Module) -> list[int]:
    """Count the hooks of each submodule and parameter, which PyTorch lists nowhere publicly."""
    owners = [(part, MODULE_HOOKS) for part in module.modules()]
    owners += [(parameter, PARAMETER_HOOKS) for parameter in module.parameters()]
    return [len(getattr(owner, name, None) or ()) for owner, names in owners for name in names]


def has_step_hooks(optimizer: Optimizer) -> bool:
    """Check for hooks before or after the optimizer's step or all of them, or a step that replaces it."""
    step = vars(optimizer).get("step")  # schedulers put a counting one there
    is_replaced = step is not None and not hasattr(step, "_wrapped_by_lr_sched")
    hooks = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
    return is_replaced or any((*hooks, _global_optimizer_pre_hooks, _global_optimizer_post_hooks))


def counts_steps_only(scheduler: Any) -> bool:
    """Check that a schedule depends on the number of steps alone, and so can be asked for ahead of them."""
    inner = getattr(scheduler, "_schedulers", None)
    if inner is not None:
        return all(map(counts_steps_only, inner))
    is_torchs = type(scheduler).__module__ == LambdaLR.__module__
    calls_users = isinstance(scheduler, LambdaLR | MultiplicativeLR | CyclicLR)
    return is_torchs and not calls_users


def is_compiled(module: nn.Module) -> bool:
    """Check whether `module.compile()` was called."""
    return module._compiled_call_impl is not None


def restart_workers(loader: DataLoader) -> None:
    """Have a data loader with persistent workers start new ones when it is next iterated."""
    loader._iterator = None


def skip_capture_check(optimizer: Optimizer) -> None:
    """Keep an optimizer on the CPU from looking for a CUDA graph capture at each step.

    To find a driver takes longer than Adam's step of a small model; no argument turns it off.
    """
    optimizer.__dict__["_accelerator_graph_capture_health_check"] = lambda: None


def unoptimized() -> contextlib.AbstractContextManager[None]:
    """Run TorchScript as it is written: what it makes faster may round otherwise."""
    return torch.jit.optimized_execution(False)  # pyright: ignore[reportPrivateImportUsage]


def base_name(operation: Any) -> str:
    """Return the name of an operation of a trace, whatever its overload."""
    return operation.overloadpacket.__name__ if isinstance(operation, OpOverload) else ""


def written_arguments(operation: Any) -> list[int]:
    """Return the positions of the arguments that an operation writes in place."""
    arguments = operation._schema.arguments if isinstance(operation, OpOverload) else []
    return [i for i, each in enumerate(arguments) if each.alias_info is not None and each.alias_info.is_write]


def returns_alias(operation: Any) -> bool:
    """Check whether an operation returns an argument's memory: a view of it, or the argument."""
    returns = operation._schema.returns if isinstance(operation, OpOverload) else []
    return any(each.alias_info is not None for each in returns)


def draws(operation: Any) -> bool:
    """Check whether an operation draws random numbers."""
    return isinstance(operation, OpOverload) and torch.Tag.nondeterministic_seeded in operation.tags


def out_variant(
    operation: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any
) -> tuple[OpOverload, dict[str, Tensor]] | None:
    """Return the variant that writes into given tensors, and tensors that it wrote to; None without one.

    Only one with a kernel of its own on the CPU: the others compute into a new tensor and copy. Nor
    for a scalar: some losses resize it to a minibatch in between, with a warning each time.
    """
    if not isinstance(operation, OpOverload):
        return None
    names = [(argument.name, str(argument.type)) for argument in operation._schema.arguments]
    for overload in operation.overloadpacket.overloads():
        variant = getattr(operation.overloadpacket, overload)
        arguments = variant._schema.arguments
        into = [argument.name for argument in arguments if argument.is_out]
        same = names == [(each.name, str(each.type)) for each in arguments if not each.is_out]
        if into and same and torch._C._dispatch_has_kernel_for_dispatch_key(variant.name(), "CPU"):
            results = result if isinstance(result, tuple) else (result,)
            if all(each.ndim for each in results):
                out = {key: torch.empty_like(each) for key, each in zip(into, results, strict=True)}
                variant(*args, **kwargs, **out)
                return variant, out
    return None
