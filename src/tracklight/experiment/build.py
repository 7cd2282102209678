"""From a config to the objects of a run: data, model, optimizer, callbacks, trainer."""

import difflib
import inspect
import itertools
import json
import logging
import math
import re
import sys
import warnings
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from types import MethodType
from typing import Any, cast

import torch
from omegaconf import DictConfig
from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer
from pytorch_lightning import callbacks as kinds
from pytorch_lightning.profilers import PassThroughProfiler, Profiler
from pytorch_lightning.strategies import Strategy
from pytorch_lightning.utilities.model_helpers import is_overridden
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, ReduceLROnPlateau
from typing_extensions import override

from tracklight.config.compose import to_plain
from tracklight.config.instantiate import build, instantiate, naming
from tracklight.data.tensor_data import TensorData
from tracklight.engine import distributed
from tracklight.engine.checkpoint_io import DurableCheckpointIO
from tracklight.engine.lightning_internals import limit_waiting
from tracklight.engine.monitors import GradientMonitor, SystemMetricsMonitor
from tracklight.engine.progress import progress_callback
from tracklight.engine.seeding import seed_run
from tracklight.errors import BadInput
from tracklight.models.supervised import Supervised
from tracklight.redact import redact

TOTALS = ("T_max", "total_steps", "total_iters")  # scheduler arguments that mean the whole run
UNRECORDED, FOREIGN = "train with values that are not recorded", "start a run from the weights of another"
REFUSED = {  # callbacks, what they would do, and what to use instead
    kinds.BatchSizeFinder: (UNRECORDED, "-m data.batch_size=32,64,128"),
    kinds.LearningRateFinder: (UNRECORDED, "-m sweep=lr"),
    kinds.OnExceptionCheckpoint: (FOREIGN, "resume=auto"),
}
STEPS = {"train": "training_step", "val": "validation_step", "test": "test_step"}
OPTIMIZER_KEYS = ("optimizer", "scheduler")  # not used by a model that configures its own
HALF = {"16": torch.float16, "bf16": torch.bfloat16}  # by the first part of trainer.precision
STOPS = ("max_time", "max_steps", "min_epochs", "min_steps")  # Trainer arguments beside max_epochs


def build_data(cfg: DictConfig, read: bool = True) -> LightningDataModule | None:
    """Build the data module and read it if it is a `TensorData`, before any run exists.

    Raises:
        BadInput: The data cannot be read, or have no validation part to monitor.
    """
    if cfg.data.get("_target_") is None:
        return None
    seed_run(cfg.seed)  # foreign data may be split as they are made
    data = instantiate(cfg.data, cfg.allowed_targets, LightningDataModule)
    if isinstance(data, TensorData):
        data.dtype = torch.float64 if cfg.trainer.precision == "64-true" else data.dtype
        data.half = HALF.get(str(cfg.trainer.precision).partition("-")[0])
    if read and isinstance(data, TensorData):
        with naming("data"):
            data.setup()
        metric = str(cfg.score.metric)
        if metric.startswith("val/") and "val" not in data.splits:
            cure = "try score.metric=train/loss_epoch score.mode=min, or data.num_val=500"
            raise BadInput(f"score.metric={metric}: {data.name} has no validation part here; {cure}")
    return data


def build_model(cfg: DictConfig, data: LightningDataModule | None) -> LightningModule:
    """Build the model directly after seeding; arguments that are null come from the data."""
    empty = [str(key) for key, value in cfg.model.items() if value is None]
    from_data = {key: getattr(data, key) for key in empty if hasattr(data, key)}
    for key in ("in_features", "out_features") if isinstance(data, TensorData) else ():
        given, needed = cfg.model.get(key), getattr(data, key, None)
        if type(given) is int and needed not in (None, given):
            raise BadInput(f"model.{key}={given} must be {needed}, as the data have; try model.{key}=null")
    seed_run(cfg.seed)
    model = instantiate(cfg.model, cfg.allowed_targets, LightningModule, **from_data)
    if cfg.trainer.precision == "64-true":
        model.double()  # Lightning does so later: after it has loaded a checkpoint, rounded to float32
    _set_optimizer(cfg, model)
    if cfg.compile:
        model.compile()
    return model


def _set_optimizer(cfg: DictConfig, model: Any) -> None:
    """Give the model the config's optimizer, unless it is a foreign one that configures its own."""
    if not isinstance(model, Supervised):
        if is_overridden("configure_optimizers", model):
            used = re.compile(rf"\+*({'|'.join(OPTIMIZER_KEYS)})[@.=]")
            if ignored := [word for word in sys.argv[1:] if used.match(word)]:
                own = f"{type(model).__name__} configures its own optimizer"
                warnings.warn(f"{own}: ignored {', '.join(ignored)}", stacklevel=2)
            return
        # Lightning asks only the module for its optimizer; LightningCLI sets this method, too.
        model.configure_optimizers = MethodType(Supervised.configure_optimizers, model)
        if not is_overridden("lr_scheduler_step", model):
            model.lr_scheduler_step = MethodType(Supervised.lr_scheduler_step, model)
    allowed = cfg.allowed_targets
    model.optimizer_factory = instantiate(cfg.optimizer, allowed, Optimizer, partial=True)
    model.scheduler_factory = _scheduler_factory(cfg, model)


def _scheduler_factory(cfg: DictConfig, model: Any) -> Callable[..., dict[str, Any]] | None:
    if cfg.scheduler.get("_target_") is None:
        return None
    node = to_plain(cfg.scheduler)
    settings = {"interval": "epoch", "monitor": cfg.score.metric}
    settings |= {key: node.pop(key) for key in (*settings, "frequency", "strict", "name") if key in node}

    def factory(optimizer: Optimizer, num_batches: int | None = None) -> dict[str, Any]:
        missing = [key for key in TOTALS if key in node and node[key] is None]
        how_often = settings["interval"], num_batches, settings.get("frequency", 1)
        totals = {key: _run_length(model.trainer, *how_often) for key in missing}
        make = instantiate(node | totals, cfg.allowed_targets, LRScheduler, partial=True, where="scheduler")
        scheduler = make(optimizer)
        if isinstance(scheduler, OneCycleLR):
            length = _run_length(model.trainer, *how_often)
            if scheduler.total_steps < length:
                got = f"scheduler.total_steps={scheduler.total_steps}"
                raise BadInput(f"{got} must not be below {length}, the run's length; try null for that")
        # Where validation is rarer than its steps, a plateau's metric may be yet to come.
        is_measured = settings["interval"] == "epoch" and model.trainer.check_val_every_n_epoch == 1
        return {"scheduler": scheduler, "strict": is_measured, **settings}

    return factory


def rehearse(cfg: DictConfig, model: Any, data: LightningDataModule | None, trainer: Any) -> None:
    """Use, before any run exists, what a library may refuse no earlier than in use.

    A parameter of its own takes a step of optimizer and scheduler; two rows of each part pass the
    model without a gradient, and tell which metrics it logs.

    Raises:
        BadInput: A value is refused, or a metric that is monitored is never logged.
    """
    model.trainer, num_batches = trainer, 1
    if isinstance(data, TensorData):
        data.trainer, limit = trainer, trainer.limit_train_batches
        num_batches = len(data.train_dataloader())
        num_batches = min(num_batches, limit) if type(limit) is int else int(num_batches * limit)
        for part in data.splits:
            _check_limit(cfg, part, len(getattr(data, f"{part}_dataloader")()))
        interval = getattr(trainer, "val_check_interval", None)
        most = num_batches if trainer.check_val_every_n_epoch else math.inf
        if type(interval) is int and not 0 < interval <= most:
            cure = "try 1.0, or trainer.check_val_every_n_epoch=null to count on through the epochs"
            limits = f"must be from 1 to {num_batches}, the batches of an epoch; {cure}"
            raise BadInput(f"trainer.val_check_interval={interval} {limits}")
        num_grouped = trainer.accumulate_grad_batches
        every = interval if type(interval) is int else int(num_batches * (interval or 1.0))
        if every < num_batches and every % num_grouped:
            cure = f"try trainer.val_check_interval={max(num_grouped, every - every % num_grouped)}"
            amid = f"would validate amid the {num_grouped} batches of a step"
            raise BadInput(f"trainer.val_check_interval={interval} {amid}; {cure}")
        if is_plain(model) and not cfg.compile:  # which would take seconds
            parts = [each for each in ("train", "val") if getattr(trainer, f"limit_{each}_batches")]
            _check_monitored(cfg, trainer, _logged_names(model, data, parts))
    if not hasattr(model, "optimizer_factory"):
        return
    with naming("trainer.strategy"):
        weight = torch.nn.Parameter(torch.ones(1, 1, device=trainer.strategy.root_device))
    weight.grad, closure = torch.ones_like(weight), cast(Any, weight.sum)
    make: Any = model.scheduler_factory
    can_make = make and (isinstance(data, TensorData) or not depends_on_total(cfg.scheduler))
    with naming("optimizer"):
        optimizer = model.optimizer_factory([weight])
    with naming("scheduler"):
        scheduler = make(optimizer, num_batches)["scheduler"] if can_make else None
    with naming("optimizer"):
        optimizer.step(closure)
    with naming("scheduler"):
        if scheduler is not None:
            scheduler.step(*[0.0] * isinstance(scheduler, ReduceLROnPlateau))


def is_plain(model: LightningModule) -> bool:
    """Return whether a model has no steps or hooks of its own, which may do and log anything."""
    hooks = [name for name in dir(Supervised) if re.match("on_.*|.*_step$", name)]
    hooks = [name for name in hooks if inspect.isfunction(getattr(Supervised, name))]
    return isinstance(model, Supervised) and not any(is_overridden(n, model, Supervised) for n in hooks)


def _check_limit(cfg: DictConfig, part: str, num_batches: int) -> None:
    """Refuse a fraction of a part's batches that leaves none."""
    for key in (f"limit_{part}_batches", *(["overfit_batches"] if part != "test" else [])):
        limit = cfg.trainer[key]
        if type(limit) is float and 0 < limit < 1 and limit * num_batches < 1:
            raise BadInput(f"trainer.{key}={limit} leaves none of {num_batches} batches to {part}; try 1")


def _logged_names(model: Supervised, data: TensorData, parts: Sequence[str]) -> set[str]:
    """Take the model's own steps on two rows of each part; return the names that those of `parts` log."""
    names, dtype = dict[str, str](), next(model.parameters()).dtype
    model.eval()
    with naming("model"), torch.no_grad(), torch.random.fork_rng(devices=[]):
        for part, split in data.splits.items():
            model.log_recorder = lambda name, *_, part=part, **__: names.update({name: part})
            rows = data.transform(split.features[:2].cpu()), split.targets[:2].cpu()
            rows = [each.to(dtype) if each.is_floating_point() else each for each in rows]
            getattr(model, STEPS[part])(rows, 0)
    model.log_recorder = None
    model.train()
    return {name for name, part in names.items() if part in parts}


def _check_monitored(cfg: DictConfig, trainer: Any, names: set[str]) -> None:
    """Refuse to monitor what no step logs, unless there are callbacks of other people."""
    known = (kinds.EarlyStopping, kinds.ModelCheckpoint, kinds.ProgressBar, kinds.Timer)
    if not all(isinstance(c, known) or "tracklight" in type(c).__module__ for c in trainer.callbacks):
        return
    monitored = {f"{type(c).__name__}.monitor": getattr(c, "monitor", None) for c in trainer.callbacks}
    monitored |= {"scheduler.monitor": cfg.scheduler.get("monitor"), "score.metric": cfg.score.metric}
    for key, metric in reversed(monitored.items()):
        if metric and metric not in names:
            raise BadInput(f"{key}={metric} is {never_logged(metric, names)}")


def never_logged(metric: str, names: Collection[str]) -> str:
    """Say that a metric is never logged, what is, and which of these is most like it."""
    similar = difflib.get_close_matches(metric, names, n=1, cutoff=0.0)
    logged = ", ".join(sorted(names)) or "no metrics"
    return f"never logged; logged are {logged}" + "".join(f"; try score.metric={name}" for name in similar)


def depends_on_total(scheduler: Any) -> bool:
    """Return whether a scheduler's learning rates depend on the run's number of epochs."""
    return any(key in scheduler and scheduler[key] is None for key in TOTALS)


def _run_length(trainer: Any, interval: str, known: int | None, frequency: int) -> int:
    """Return how many steps a scheduler takes that steps at every `frequency`th epoch or optimizer step.

    `max_epochs` or `max_steps` ends the run, whichever comes first. What may end it earlier, as
    `max_time` and early stopping, is not known. The Trainer tells the batches of an epoch unless
    they are `known`.
    """
    if known is None:
        _ = trainer.estimated_stepping_batches  # loads the training data
    num_batches: float = trainer.num_training_batches if known is None else known
    epochs = max_epochs = trainer.max_epochs or 0
    steps = max_steps = math.inf if trainer.max_steps == -1 else trainer.max_steps
    groups = [trainer.accumulate_grad_batches] * max_epochs
    if num_batches < math.inf:
        by_epoch = [c for c in trainer.callbacks if isinstance(c, kinds.GradientAccumulationScheduler)]
        if by_epoch:
            groups = [by_epoch[0].get_accumulate_grad_batches(epoch) for epoch in range(max_epochs)]
        taken = [*itertools.accumulate(math.ceil(num_batches / group) for group in groups)]
        epochs = next((epoch for epoch, total in enumerate(taken, 1) if total >= max_steps), max_epochs)
        steps = min(max_steps, taken[-1] if taken else math.inf)
    total = epochs if interval == "epoch" else steps
    if not 0 < total < math.inf:
        raise BadInput("this scheduler needs the run's length; set trainer.max_epochs or trainer.max_steps")
    if interval == "epoch" or frequency == 1 or num_batches == math.inf:
        return max(1, int(total) // frequency)
    last = int(num_batches)  # Lightning counts the batches of each epoch anew, and asks those that end a step
    asked = (i % frequency == 0 for n in groups for i in range(1, last + 1) if i % n == 0 or i == last)
    return max(1, sum(itertools.islice(asked, int(total))))


def has_test(model: LightningModule, data: LightningDataModule | None) -> bool:
    """Return whether there is a test part and a model that can be tested on it."""
    if isinstance(data, TensorData):
        return "test" in data.splits and is_overridden("test_step", model)
    return is_overridden("test_step", model) and is_overridden("test_dataloader", data or model)


def early_stops(cfg: Any) -> str:
    """Return, as text, the settings that may end a run before its last epoch."""
    tree = to_plain(cfg)
    settings = {key: tree["trainer"].get(key) for key in STOPS}
    return json.dumps(redact(settings | {"callbacks": tree["callbacks"]}), sort_keys=True)


def check_callback(callback: Callback, place: str) -> None:
    """Raise BadInput for a callback after which the run is not the one that is recorded."""
    for kind, (effect, instead) in REFUSED.items():
        if isinstance(callback, kind):
            raise BadInput(f"{place}{kind.__name__} would {effect}; leave it out and use {instead}")


def check_module_callbacks(model: LightningModule) -> None:
    """Refuse the same callbacks where a module of somebody's own brings them along."""
    brought: Any = []
    with suppress(Exception):  # asked before it has a trainer, which it may need; Lightning asks again
        brought = model.configure_callbacks()
    for callback in brought if isinstance(brought, Sequence) else [brought]:
        check_callback(callback, f"{type(model).__name__}'s callback ")


def _config_callbacks(cfg: DictConfig) -> list[Callback]:
    nodes = {key: node for key, node in (cfg.callbacks or {}).items() if node}
    callbacks = [instantiate(node, cfg.allowed_targets, Callback) for node in nodes.values()]
    for key, callback in zip(nodes, callbacks, strict=True):
        check_callback(callback, f"callbacks.{key}=")
        if isinstance(callback, kinds.EarlyStopping) and "check_finite" not in nodes[key]:
            callback.check_finite = False  # a score that is no number is said, and is no reason to stop
    callbacks += [GradientMonitor()] if cfg.tracking.enabled and cfg.tracking.gradients else []
    callbacks += [SystemMetricsMonitor()] if cfg.tracking.enabled and cfg.tracking.system_metrics else []
    return callbacks


class _NoProfiler(PassThroughProfiler):
    """Measures nothing, without the eighty generators that Lightning's own makes in an epoch for it."""

    _nothing = nullcontext()

    @override
    def profile(self, action_name: str) -> Any:
        return self._nothing


def build_trainer(
    cfg: DictConfig,
    data: LightningDataModule | None,
    first: Sequence[Callback],  # whose hooks precede those of the config's callbacks
    callbacks: Sequence[Callback],  # whose hooks follow them
    io: DurableCheckpointIO,  # of a tracked run
) -> Trainer:
    """Build Lightning's Trainer, without a logger yet.

    Raises:
        BadInput: Lightning refuses an argument, or the hardware is missing.
    """
    tracked = cfg.tracking.enabled
    arguments = instantiate(cfg.trainer, cfg.allowed_targets)  # its profiler, strategy, plugins
    for key, kind in {"strategy": Strategy, "profiler": Profiler}.items():
        if not isinstance(arguments.get(key), str | kind | None):
            raise BadInput(f"trainer.{key}._target_={cfg.trainer[key]._target_} is no {kind.__name__}")
    arguments["profiler"] = arguments.get("profiler") or _NoProfiler()
    callbacks = [*first, *_config_callbacks(cfg), *callbacks]
    if cfg.trainer.enable_progress_bar:
        is_own = any(isinstance(callback, kinds.ProgressBar) for callback in callbacks)
        callbacks += [] if is_own else [progress_callback(cfg.score.metric)]
        arguments["enable_progress_bar"] = is_own
    if isinstance(data, TensorData):
        data.use_distributed_sampler = cfg.trainer.use_distributed_sampler
        if "val" not in data.splits:
            arguments["limit_val_batches"] = 0
    plugins = arguments.pop("plugins", None) or []
    plugins = plugins if isinstance(plugins, list) else [plugins]
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    trainer = partial(
        Trainer,
        **arguments,
        callbacks=callbacks,
        plugins=[*([io] if tracked else []), distributed.cluster_environment(), *plugins],
        default_root_dir=f"{cfg.tracking.dir}/artifacts",  # above it, another job's checkpoints may lie
        enable_checkpointing=tracked,
        logger=False,
    )
    built = build(trainer, "trainer")
    limit_waiting(built, distributed.WAIT_S)
    return built
