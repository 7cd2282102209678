"""From a config to the objects of a run: data, model, trainer."""

import logging
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer
from pytorch_lightning.callbacks import GradientAccumulationScheduler
from pytorch_lightning.profilers import Profiler
from pytorch_lightning.utilities.model_helpers import is_overridden
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from tracklight.config.instantiate import build
from tracklight.data.tensor_data import TensorData
from tracklight.engine.eligibility import trainer_obstacle
from tracklight.engine.monitors import Gradients, SystemMetrics
from tracklight.engine.seeding import seed_epochs_of, seed_run
from tracklight.errors import BadInput
from tracklight.models.supervised import Supervised

TOTALS = ("T_max", "total_steps", "total_iters")  # scheduler arguments that mean the whole run
FORKING = ("_spawn", "_fork", "_notebook")  # ends of the names of Lightning's strategies that do


def build_data(cfg: DictConfig, read: bool = True) -> LightningDataModule | None:
    """Build the data set and, if it is ours, read it: its errors come before any run exists."""
    if cfg.data.get("_target_") is None:
        return None
    data = build(cfg.data, cfg.allowed_targets, LightningDataModule)
    if read and isinstance(data, TensorData):
        data.setup()
        metric = str(cfg.score.metric)
        if metric.startswith("val/") and "val" not in data.splits:
            raise BadInput(
                f"score.metric={metric}: {data.name} has no validation part here;"
                " try score.metric=train/loss_epoch score.mode=min, or data.num_val=500"
            )
    return data


def build_model(cfg: DictConfig, data: LightningDataModule | None) -> LightningModule:
    """Build the model directly after seeding; arguments left null are filled from the data."""
    known = {
        key: getattr(data, str(key))
        for key, value in cfg.model.items()
        if value is None and hasattr(data, key)
    }
    seed_run(cfg.seed)
    model = build(cfg.model, cfg.allowed_targets, LightningModule, **known)
    _attach_optimizer(cfg, model)
    for owner in (model, data):
        if (
            owner is not None
            and not isinstance(owner, TensorData)
            and is_overridden("train_dataloader", owner)
        ):
            seed_epochs_of(owner, cfg.seed)
    if cfg.compile:
        model.compile()
    return model


def _attach_optimizer(cfg: DictConfig, model: Any) -> None:
    if not isinstance(model, Supervised):
        if is_overridden("configure_optimizers", model):
            if any(word.startswith(("optimizer=", "optimizer.")) for word in sys.argv[1:]):
                warnings.warn(
                    f"{type(model).__name__} configures its own optimizer: optimizer= is ignored",
                    stacklevel=2,
                )
            return
        model.configure_optimizers = MethodType(Supervised.configure_optimizers, model)
    model.optimizer_factory = build(cfg.optimizer, cfg.allowed_targets, Optimizer, partial=True)
    model.scheduler_factory = _scheduler_factory(cfg, model)


def _scheduler_factory(
    cfg: DictConfig, model: LightningModule
) -> Callable[[Optimizer], dict[str, Any]] | None:
    if cfg.scheduler.get("_target_") is None:
        return None
    node = OmegaConf.to_container(cfg.scheduler, resolve=True)
    assert isinstance(node, dict)
    settings = {key: node.pop(key) for key in ("interval", "monitor") if key in node}

    def factory(optimizer: Optimizer) -> dict[str, Any]:
        totals = {
            key: _total(model.trainer, settings["interval"])
            for key in TOTALS
            if key in node and node[key] is None
        }
        scheduler = build(node | totals, cfg.allowed_targets, LRScheduler, partial=True)(optimizer)
        return {"scheduler": scheduler, **settings}

    return factory


def depends_on_total(scheduler: Any) -> bool:
    """Say whether the learning rates of a run change with the number of epochs it is to have."""
    return any(key in scheduler and scheduler[key] is None for key in TOTALS)


def _total(trainer: Any, interval: str) -> int:
    if interval == "epoch":
        total = trainer.max_epochs
    elif (
        isinstance(trainer.datamodule, TensorData)
        and trainer_obstacle(trainer) is None
        and not any(isinstance(each, GradientAccumulationScheduler) for each in trainer.callbacks)
    ):
        data = trainer.datamodule  # Lightning would count blocks
        num_rows = len(data.splits["train"])
        total = (trainer.max_epochs or 0) * math.ceil(num_rows / (data.batch_size or num_rows))
    else:
        total = trainer.estimated_stepping_batches
    if total is None or not 0 < total < math.inf:
        raise BadInput(
            "this scheduler needs the run's length; set trainer.max_epochs or trainer.max_steps"
        )
    return int(total)


def has_test(model: LightningModule, data: LightningDataModule | None) -> bool:
    """Say whether there is a test part, and a model that can be tested on it."""
    if isinstance(data, TensorData):
        return "test" in data.splits
    return is_overridden("test_step", model, LightningModule) and is_overridden(
        "test_dataloader", data or model
    )


def build_callbacks(cfg: DictConfig) -> list[Callback]:
    """Build the callbacks that the config names, and those that watch for what it asks to see."""
    named = [
        build(node, cfg.allowed_targets, Callback)
        for node in (cfg.callbacks or {}).values()
        if node
    ]
    watching: list[Callback] = []
    if cfg.tracking.enabled and cfg.tracking.gradients:
        watching.append(Gradients())
    if cfg.tracking.enabled and cfg.tracking.system_metrics:
        watching.append(SystemMetrics())
    return named + watching


def build_trainer(
    cfg: DictConfig, callbacks: Sequence[Callback], plugins: list[Any], root: str, **ours: Any
) -> Trainer:
    """Build Lightning's Trainer.

    Raises:
        BadInput: Lightning refuses an argument, or the hardware asked for is not there.
    """
    arguments = OmegaConf.to_container(cfg.trainer, resolve=True)
    assert isinstance(arguments, dict)
    _check_hardware(arguments)
    profiler = arguments.pop("profiler", None)
    if isinstance(profiler, dict):
        profiler = build(profiler, cfg.allowed_targets, Profiler)
    own = arguments.pop("plugins", None) or []
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        return Trainer(
            **{str(key): value for key, value in arguments.items()} | ours,
            profiler=profiler,
            callbacks=list(callbacks),
            plugins=[*plugins, *(own if isinstance(own, list) else [own])],
            default_root_dir=root,
            logger=False,
        )
    except (
        ValueError,
        TypeError,
        RuntimeError,
    ) as error:  # MisconfigurationException is a plain Exception
        raise BadInput(f"trainer: {_first_line(error)}") from error
    except Exception as error:
        if type(error).__name__ != "MisconfigurationException":
            raise
        raise BadInput(f"trainer: {_first_line(error)}") from error


def _check_hardware(arguments: dict[Any, Any]) -> None:
    accelerator, devices = arguments.get("accelerator"), arguments.get("devices")
    if accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        if accelerator == "gpu" and torch.backends.mps.is_available():
            return
        raise BadInput(
            f"trainer.accelerator={accelerator}: no GPU found on this machine;"
            " try trainer.accelerator=auto"
        )
    strategy = arguments.get("strategy")
    if isinstance(strategy, str) and strategy.endswith(FORKING):
        raise BadInput(
            f"trainer.strategy={strategy} copies a process that writes to MLflow already;"
            " try trainer.strategy=ddp"
        )
    found = torch.cuda.device_count()
    wanted = devices if isinstance(devices, int) else 1
    on_gpu = accelerator in ("gpu", "cuda") or (accelerator == "auto" and found > 0)
    if on_gpu and wanted > found:
        raise BadInput(
            f"trainer.devices={devices}: only {found} on this machine; try trainer.devices={found}"
        )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].strip()
