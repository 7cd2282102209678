"""Whether optimizer steps can be taken in blocks: only if nothing could tell the difference."""

from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer, callbacks
from pytorch_lightning.profilers import PassThroughProfiler
from pytorch_lightning.strategies import SingleDeviceStrategy
from pytorch_lightning.utilities.model_helpers import is_overridden
from torch.optim import LBFGS

from tracklight.data.tensor_data import TensorData
from tracklight.engine.lightning_internals import detects_anomaly
from tracklight.models.supervised import Supervised

TRANSFER_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
MODULE_HOOKS = (
    *("on_train_batch_start", "on_train_batch_end", *TRANSFER_HOOKS),
    *("on_before_zero_grad", "optimizer_zero_grad"),
    *("on_before_backward", "backward", "on_after_backward"),
    *("on_before_optimizer_step", "optimizer_step", "configure_gradient_clipping"),
    "lr_scheduler_step",
)
CALLBACK_HOOKS = tuple(hook for hook in MODULE_HOOKS if hasattr(Callback, hook))
# These change what a step is, though they override no hook of one.
UNSUPPORTED_CALLBACKS = (
    *(callbacks.BatchSizeFinder, callbacks.LearningRateFinder),
    *(callbacks.GradientAccumulationScheduler, callbacks.StochasticWeightAveraging),
)


def why_no_blocks(trainer: Any, module: LightningModule, data: object) -> str | None:
    """Return the first reason against blocks; None if they can be used."""
    if not isinstance(module, Supervised):
        return f"{type(module).__name__} is not a tracklight model (Supervised)"
    if not isinstance(data, TensorData):
        return f"{type(data).__name__} is not a tracklight data set (TensorData)"
    return (
        unsupported_argument(trainer)
        or overridden_hook(module, data)
        or next(filter(None, map(_unsupported_callback, trainer.callbacks)), None)
        or _unsupported_optimizer(trainer)
    )


def unsupported_argument(trainer: Any) -> str | None:
    """Return the first Trainer argument for which an epoch is not one step for each minibatch."""
    required = {
        "num_nodes": (trainer.num_nodes, (1,)),
        "devices": (trainer.num_devices, (1,)),
        "precision": (trainer.precision, ("32-true", "64-true")),
        "gradient_clip_val": (trainer.gradient_clip_val, (None,)),
        "accumulate_grad_batches": (trainer.accumulate_grad_batches, (1,)),
        "max_steps": (trainer.max_steps, (-1,)),
        "min_steps": (trainer.min_steps, (None,)),
        "limit_train_batches": (trainer.limit_train_batches, (1.0,)),
        "overfit_batches": (trainer.overfit_batches, (0.0,)),
        # Lightning leaves the attribute out where the interval is a time.
        "val_check_interval": (getattr(trainer, "val_check_interval", None), (1.0,)),
        "check_val_every_n_epoch": (trainer.check_val_every_n_epoch is None, (False,)),
        "profiler": (isinstance(trainer.profiler, PassThroughProfiler), (True,)),
        "detect_anomaly": (detects_anomaly(trainer), (False,)),
        "strategy": (type(trainer.strategy), (SingleDeviceStrategy,)),
    }
    for key, (value, allowed) in required.items():
        # The int 1 of val_check_interval or limit_train_batches means one batch, 1.0 all of them.
        if value not in allowed or (isinstance(allowed[0], float) and not isinstance(value, float)):
            given = getattr(trainer, key, value)
            is_plain = isinstance(given, str | float | int | None)
            return f"trainer.{key}={given if is_plain else type(given).__name__}"
    return None


def overridden_hook(module: Supervised, data: TensorData) -> str | None:
    """Return the first hook of a step that a model or its data override, in words."""
    if is_overridden("training_step", module, Supervised) or not module.automatic_optimization:
        return f"{type(module).__name__} takes its training steps in its own way"
    hooks = [(module, Supervised, hook) for hook in MODULE_HOOKS]
    hooks += [(data, TensorData, hook) for hook in (*TRANSFER_HOOKS, "train_dataloader")]
    for owner, base, hook in hooks:
        if is_overridden(hook, owner, base):
            return f"{type(owner).__name__} overrides {hook}"
    return None


def _unsupported_callback(callback: Callback) -> str | None:
    name = type(callback).__name__
    if isinstance(callback, callbacks.Timer):
        return "trainer.max_time"
    if isinstance(callback, UNSUPPORTED_CALLBACKS):
        return f"callback {name}"
    if isinstance(callback, callbacks.ProgressBar) or getattr(callback, "supports_blocks", False):
        return None
    if type(callback) is callbacks.ModelCheckpoint:
        return None if callback.every_n_epochs else "ModelCheckpoint by step or time"
    for hook in CALLBACK_HOOKS:  # LambdaCallback has functions of its own as attributes
        if getattr(getattr(callback, hook), "__func__", None) is not getattr(Callback, hook):
            return f"callback {name} overrides {hook}"
    return None


def _unsupported_optimizer(trainer: Trainer) -> str | None:
    if len(trainer.optimizers) != 1 or isinstance(trainer.optimizers[0], LBFGS):
        return "the optimizer needs a closure, or there are several"
    for config in trainer.lr_scheduler_configs:
        if config.interval == "step" and (config.reduce_on_plateau or config.frequency != 1):
            name = type(config.scheduler).__name__
            return f"scheduler {name} steps on a metric or not every step"
    return None
