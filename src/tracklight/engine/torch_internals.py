"""PyTorch's private state and kernels that the engine uses, as of torch 2.14."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

MODULE_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
PARAMETER_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
NO_MOMENTUM = {"momentum": 0.0, "dampening": 0.0, "nesterov": False, "is_first_step": False}


def count_hooks(module: nn.Module) -> list[int]:
    """Count the hooks of each submodule and parameter, which PyTorch lists nowhere publicly."""
    owners = [(part, MODULE_HOOKS) for part in module.modules()]
    owners += [(parameter, PARAMETER_HOOKS) for parameter in module.parameters()]
    return [len(getattr(owner, name, None) or ()) for owner, names in owners for name in names]


def has_step_hooks(optimizer: Optimizer) -> bool:
    """Check for hooks before or after the optimizer's step."""
    return bool(optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks)


def is_compiled(module: nn.Module) -> bool:
    """Check whether `module.compile()` was called."""
    return module._compiled_call_impl is not None


def skip_capture_check(optimizer: Optimizer) -> None:
    """Keep an optimizer on the CPU from looking for a CUDA graph capture at each step.

    To find a driver takes longer than Adam's step of a small model; no argument turns it off.
    """
    optimizer.__dict__["_accelerator_graph_capture_health_check"] = lambda: None


def fused_sgd(parameters: list[Tensor], gradients: list[Tensor], group: dict[str, Any]) -> None:
    """Update parameters by SGD without momentum, by the kernel alone.

    What `SGD.step` adds (profiling, hooks, grouping) takes a fifth of a small model's step.
    """
    lr, decay, maximize = group["lr"], group["weight_decay"], group["maximize"]
    torch._fused_sgd_(  # pyright: ignore[reportPrivateImportUsage]
        parameters, gradients, [], lr=lr, weight_decay=decay, maximize=maximize, **NO_MOMENTUM
    )
