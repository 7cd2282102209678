"""When steps may be taken several at a time: only where nobody could tell the difference."""

from typing import Any

from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer
from pytorch_lightning.callbacks import (
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    ProgressBar,
    StochasticWeightAveraging,
    Timer,
)
from pytorch_lightning.profilers import PassThroughProfiler
from pytorch_lightning.strategies import SingleDeviceStrategy
from pytorch_lightning.utilities.model_helpers import is_overridden
from torch.optim import LBFGS

from tracklight.data.tensor_data import TensorData
from tracklight.models.supervised import Supervised

MODULE_HOOKS = (
    "on_train_batch_start",
    "on_train_batch_end",
    "on_before_batch_transfer",
    "transfer_batch_to_device",
    "on_after_batch_transfer",
    "on_before_zero_grad",
    "optimizer_zero_grad",
    "on_before_backward",
    "backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "optimizer_step",
    "configure_gradient_clipping",
    "lr_scheduler_step",
)
CALLBACK_HOOKS = (
    "on_train_batch_start",
    "on_train_batch_end",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
)


def obstacle(
    trainer: Trainer, module: LightningModule, data: LightningDataModule | None
) -> str | None:
    """Name the first setting that needs plain Lightning; None where blocks may be used."""
    if not isinstance(module, Supervised):
        return f"{type(module).__name__} is not a tracklight model (Supervised)"
    if not isinstance(data, TensorData):
        return f"{type(data).__name__} is not a tracklight data set (TensorData)"
    return (
        trainer_obstacle(trainer)
        or _hook_obstacle(trainer, module, data)
        or _optimizer_obstacle(trainer)
    )


# Callbacks that change what a step is, though they override no hook of one.
CHANGERS = (
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    StochasticWeightAveraging,
)


def trainer_obstacle(trainer: Any) -> str | None:
    """Name the first Trainer argument for which an epoch is not all minibatches, one step each."""
    required = {
        "devices": (trainer.world_size, (1,)),
        "precision": (trainer.precision, ("32-true", "64-true")),
        "gradient_clip_val": (trainer.gradient_clip_val, (None,)),
        "accumulate_grad_batches": (trainer.accumulate_grad_batches, (1,)),
        "max_steps": (trainer.max_steps, (-1,)),
        "min_steps": (trainer.min_steps, (None,)),
        "limit_train_batches": (trainer.limit_train_batches, (1.0,)),
        "overfit_batches": (trainer.overfit_batches, (0.0,)),
        "fast_dev_run": (trainer.fast_dev_run, (False,)),
        # Lightning sets none where it is a time.
        "val_check_interval": (getattr(trainer, "val_check_interval", None), (1.0,)),
        "check_val_every_n_epoch": (trainer.check_val_every_n_epoch is None, (False,)),
        "profiler": (type(trainer.profiler), (PassThroughProfiler,)),
        "detect_anomaly": (trainer._detect_anomaly, (False,)),
        "strategy": (type(trainer.strategy), (SingleDeviceStrategy,)),
    }
    for key, (value, allowed) in required.items():
        # the int 1 of val_check_interval or limit_train_batches means one batch, 1.0 all of them
        if value not in allowed or (isinstance(allowed[0], float) and not isinstance(value, float)):
            return f"trainer.{key}={getattr(trainer, key, value)}"
    return None


def _hook_obstacle(trainer: Any, module: Supervised, data: TensorData) -> str | None:
    if (
        type(module).training_step is not Supervised.training_step
        or not module.automatic_optimization
    ):
        return f"{type(module).__name__} takes its training steps in its own way"
    for owner, base, hooks in (
        (module, LightningModule, MODULE_HOOKS),
        (data, LightningDataModule, MODULE_HOOKS[2:5]),
    ):
        for hook in hooks:
            if is_overridden(hook, owner, base):
                return f"{type(owner).__name__} overrides {hook}"
    if type(data).train_dataloader is not TensorData.train_dataloader:
        return f"{type(data).__name__} overrides train_dataloader"
    for callback in trainer.callbacks:
        if isinstance(callback, Timer):
            return "trainer.max_time"
        if isinstance(callback, CHANGERS):
            return f"callback {type(callback).__name__}"
        if isinstance(callback, ProgressBar) or getattr(callback, "listens_by_block", False):
            continue
        if type(callback) is ModelCheckpoint:
            if callback._every_n_train_steps or callback._train_time_interval:
                return "ModelCheckpoint by step or time"
            continue
        for hook in CALLBACK_HOOKS:
            own = vars(callback).get(hook) or getattr(type(callback), hook, None)
            if own is not getattr(Callback, hook):
                return f"callback {type(callback).__name__} overrides {hook}"
    return None


def _optimizer_obstacle(trainer: Trainer) -> str | None:
    if len(trainer.optimizers) != 1 or isinstance(trainer.optimizers[0], LBFGS):
        return "the optimizer needs a closure, or there are several"
    for config in trainer.lr_scheduler_configs:
        if config.interval == "step" and (config.reduce_on_plateau or config.frequency != 1):
            return (
                f"scheduler {type(config.scheduler).__name__} steps on a metric or not every step"
            )
    return None
