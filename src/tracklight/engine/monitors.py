"""Callbacks that report gradients, the use of the machine, and a trial's score to its pruner."""

import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from tracklight.engine.blocks import NonFinite
from tracklight.engine.progress import AfterEpoch
from tracklight.tracking.tags import EPOCHS_RUN_TAG, OUTCOME_TAG, PRUNED, SECONDS_TAG

GRADIENT_STEPS = 32  # from one logged gradient to the next
TINY = 1e-30  # keeps the ratio of a weight that is all zeros finite
_log = logging.getLogger(__name__)


class GradientMonitor(Callback):
    """Logs the gradient that the last optimizer step used: of the whole model and of each layer.

    It reads what a step left, clipped if gradients are clipped. Of every `GRADIENT_STEPS` steps it
    logs the last one of a block, or one that Lightning sees: a function of the steps alone, whatever was
    interrupted.

    Metrics: `gradient/norm`; of each parameter `gradient/NAME_norm`, `gradient/NAME_max`, the
    largest absolute value, and `gradient/NAME_ratio`, the norm over that of the weights.
    """

    supports_blocks = True
    max_steps_per_block = GRADIENT_STEPS

    @override
    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        self.step = trainer.global_step

    @override
    def on_train_batch_end(self, trainer: Any, module: LightningModule, *_: Any) -> None:
        before, self.step = self.step, (step := trainer.global_step)
        if step == before or (step // GRADIENT_STEPS == before // GRADIENT_STEPS and before):
            return  # a batch without a step leaves a part of a gradient
        if hasattr(trainer.logger, "log_series"):
            for key, value in gradient_statistics(module).items():
                trainer.logger.log_series(f"gradient/{key}", (step,), (value,))

    on_block_end = on_train_batch_end


def gradient_statistics(module: torch.nn.Module) -> dict[str, float]:
    """Return norm, maximum and ratio of each parameter's gradient, and the norm of all."""
    named = {name: p for name, p in module.named_parameters() if p.grad is not None}
    if not named:
        return {}
    gradients = [p.grad for p in named.values() if p.grad is not None]
    norms, largest = _norms(gradients), _norms(gradients, math.inf)
    ratios = norms / _norms([p.detach() for p in named.values()]).clamp(min=TINY)
    columns = torch.stack([norms, largest, ratios], dim=1).tolist()  # the one synchronisation
    statistics = {"norm": sum(norm * norm for norm, _, _ in columns) ** 0.5}
    for name, (norm, most, ratio) in zip(named, columns, strict=True):
        statistics |= {f"{name}_norm": norm, f"{name}_max": most, f"{name}_ratio": ratio}
    return statistics


def _norms(tensors: list[Tensor], order: float = 2.0) -> Tensor:  # -> (len(tensors),)
    return torch.stack([torch.linalg.vector_norm(tensor, order).float() for tensor in tensors])


class SystemMetricsMonitor(Callback):
    """Logs CPU, memory, disk, network and GPU as `system/...`, where MLflow's UI looks for them.

    MLflow's own monitor would bypass the run's write-ahead file; only its collectors are used.
    """

    supports_blocks = True

    def __init__(self, period_s: float = 2.0):
        self.period_s = period_s
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    @override
    def on_fit_start(self, trainer: Any, *_: Any) -> None:
        if hasattr(trainer.logger, "log_series"):
            self._ended.clear()
            arguments = (trainer.logger, _collectors())
            self._thread = threading.Thread(target=self._measure, args=arguments, daemon=True)
            self._thread.start()

    @override
    def on_fit_end(self, *_: Any, **__: Any) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    on_exception = on_fit_end

    def _measure(self, run: Any, collectors: list[Any]) -> None:
        last = False
        try:
            while not last:
                last = self._ended.wait(self.period_s)
                step = run.steps_completed()
                for collector in collectors:
                    collector.collect_metrics()
                    for key, value in collector.aggregate_metrics().items():
                        run.log_series(f"system/{key}", (step,), (float(value),))
                    collector.clear_metrics()
        except Exception as error:  # monitoring must not end the run
            _log.warning("system metrics end here: %s", str(error).splitlines()[0])


def _collectors() -> list[Any]:
    """Return MLflow's collectors for what this machine has."""
    from mlflow.system_metrics.metrics import cpu_monitor, disk_monitor, gpu_monitor, network_monitor

    monitors = cpu_monitor.CPUMonitor, disk_monitor.DiskMonitor, network_monitor.NetworkMonitor
    collectors: list[Any] = [monitor() for monitor in monitors]
    with contextlib.suppress(Exception):  # no NVIDIA GPU, or no driver
        collectors.append(gpu_monitor.GPUMonitor())
    for collector in collectors:  # the first answer is about the time since the last one
        collector.collect_metrics()
        collector.clear_metrics()
    return collectors


class ScoreMonitor(AfterEpoch):
    """Says at once that the score of an epoch is NaN or infinite: such a one is never best, nor recorded."""

    def __init__(self, metric: str | None):
        super().__init__()
        self.metric = metric
        self.since: tuple[float, int, int] | None = None  # not finite since: value, epoch from 1, step

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"since": self.since}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.since = state_dict["since"]

    @override
    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        value = self.measured(trainer).get(self.metric or "")
        if value is None:
            return
        if trainer.strategy.reduce_boolean_decision(math.isfinite(value)):
            self.since = None
        elif self.since is None:
            value, epoch = float(value), trainer.current_epoch + 1
            self.since = value, epoch, trainer.global_step
            if trainer.is_global_zero:
                print(f"{self.metric} is {value} in epoch {epoch}: no score, and never the best", flush=True)

    def check(self, has_score: bool) -> None:
        """Raise NonFinite for a run that has no score because its last values were not finite."""
        if self.since is not None and not has_score:
            value, epoch, step = self.since
            told = f"{self.metric} is {value} in epoch {epoch} and finite in no later one: there is no score"
            raise NonFinite(step, told)


class PruningCallback(AfterEpoch):
    """Reports the score after each epoch, stops a pruned trial, and tags its run.

    The report precedes the epoch's checkpoint: the pruner has seen every epoch of a checkpoint.
    """

    def __init__(self, metric: str, report: Callable[[int, float], bool], one_epoch: bool = False):
        super().__init__()
        self.metric = metric
        self.report = report  # takes the epoch, from 1, and the metric's value; returns whether to prune
        self.one_epoch = one_epoch  # as in a preflight
        self.pruned = False
        self.run_id: str | None = None
        self.metrics: set[str] = set()
        self.data: str | None = None
        self.epochs = 0
        self.earlier_s = 0.0
        self.started_s = math.nan

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"pruned": self.pruned, "seconds": self.seconds}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.pruned = state_dict["pruned"]
        self.earlier_s = state_dict["seconds"]

    @property
    def seconds(self) -> float:
        """Training time over all starts of the trial."""
        now_s = 0.0 if math.isnan(self.started_s) else time.monotonic() - self.started_s
        return self.earlier_s + now_s

    @override
    def setup(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        self.run_id = getattr(trainer.logger, "run_id", None)
        if self.one_epoch:
            self.data = getattr(getattr(trainer, "datamodule", None), "digest", None)

    @override
    def on_fit_start(self, *_: Any) -> None:
        self.started_s = time.monotonic()

    @override
    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        self.metrics |= set(trainer.callback_metrics)
        value = self.measured(trainer).get(self.metric)
        if value is not None and math.isfinite(value) and trainer.is_global_zero:
            self.pruned = self.report(trainer.current_epoch + 1, float(value))
        if self.pruned or self.one_epoch:
            trainer.should_stop = True

    @override
    def on_fit_end(self, trainer: Trainer, *_: Any) -> None:
        self._log_end(trainer, {OUTCOME_TAG: PRUNED if self.pruned else "complete"})

    @override
    def on_exception(self, trainer: Trainer, *_: Any) -> None:
        if not math.isnan(self.started_s):
            with contextlib.suppress(OSError):  # the disk itself may be what failed
                self._log_end(trainer, {})

    def _log_end(self, trainer: Trainer, outcome: dict[str, str]) -> None:
        self.epochs = trainer.current_epoch
        if trainer.logger is not None:
            spent = {EPOCHS_RUN_TAG: str(self.epochs), SECONDS_TAG: f"{self.seconds:.3f}"}
            trainer.logger.set_tags(spent | outcome)  # pyright: ignore[reportAttributeAccessIssue]
