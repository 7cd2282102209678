"""How large the gradients are, told every so many steps without a step of its own."""

import contextlib
import logging
import math
import threading
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from tracklight.engine.blocks import SeriesLog

STEPS_APART = 32
TINY = 1e-30  # keeps the ratio of a weight that is all zeros finite


class Gradients(Callback):
    """Logs the gradient that the last optimizer step used: of the whole model and of each layer.

    It reads what the step left, so nothing of the walk over a block changes. Of every stretch of
    `STEPS_APART` steps the last step that Lightning sees is told: a function of the steps alone,
    whatever was interrupted. Where gradients are clipped it is the clipped ones.

    Metrics: `gradient/norm`; of each parameter `gradient/NAME_norm`, `gradient/NAME_max`, the
    largest absolute value, and `gradient/NAME_ratio`, the norm over that of the weights.
    """

    listens_by_block = True

    @override
    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        self.before = trainer.global_step

    @override
    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        step, logger = trainer.global_step, trainer.logger
        if step // STEPS_APART == self.before // STEPS_APART and self.before:
            return
        if logger is None or not hasattr(logger, "log_series"):
            return
        log: SeriesLog = logger  # pyright: ignore[reportAssignmentType]
        for key, value in statistics(module).items():
            log.log_series(f"gradient/{key}", (step,), (value,))


def statistics(module: torch.nn.Module) -> dict[str, float]:
    """Return norm, maximum and ratio of each parameter's gradient, and the norm of all."""
    named = [(name, p) for name, p in module.named_parameters() if p.grad is not None]
    if not named:
        return {}
    weights = [p.detach() for _, p in named]
    gradients: list[Tensor] = [p.grad for _, p in named if p.grad is not None]
    norms, largest = _norms(gradients), _norms(gradients, math.inf)
    ratios = norms / _norms(weights).clamp(min=TINY)
    rows = torch.stack([norms, largest, ratios]).tolist()  # the one synchronisation
    found = {"norm": sum(value * value for value in rows[0]) ** 0.5}
    for at, (name, _) in enumerate(named):
        for what, row in zip(("norm", "max", "ratio"), rows, strict=True):
            found[f"{name}_{what}"] = row[at]
    return found


def _norms(tensors: list[Tensor], order: float = 2.0) -> Tensor:  # -> (len(tensors),)
    return torch.stack([torch.linalg.vector_norm(tensor, order).float() for tensor in tensors])


PERIOD_S = 2.0
_log = logging.getLogger(__name__)


class SystemMetrics(Callback):
    """Logs CPU, memory, disk, network and GPU as `system/...`, where MLflow's UI looks for them.

    MLflow's own monitor would send them past the run's file, from a client of its own; only its
    collectors are used.

    Args:
        period_s: Seconds between two points.
    """

    listens_by_block = True

    def __init__(self, period_s: float = PERIOD_S):
        self._period_s = period_s
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    @override
    def on_fit_start(self, trainer: Any, *_: Any) -> None:
        if hasattr(trainer.logger, "log_series"):
            monitors = collectors()
            for monitor in monitors:  # the first answer is about the time since the last one
                monitor.collect_metrics()
                monitor.clear_metrics()
            self._ended.clear()
            self._thread = threading.Thread(
                target=self._watch, args=(trainer.logger, monitors), daemon=True
            )
            self._thread.start()

    @override
    def on_fit_end(self, *_: Any) -> None:
        self._stop()

    @override
    def on_exception(self, *_: Any) -> None:
        self._stop()

    def _stop(self) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _watch(self, run: Any, monitors: list[Any]) -> None:
        last = False
        try:
            while not last:
                last = self._ended.wait(self._period_s)
                step = run.steps_completed()
                for monitor in monitors:
                    monitor.collect_metrics()
                    for key, value in monitor.aggregate_metrics().items():
                        run.log_series(f"system/{key}", (step,), (float(value),))
                    monitor.clear_metrics()
        except Exception as error:  # what watches a run must not end it
            _log.warning("system metrics end here: %s", str(error).splitlines()[0])


def collectors() -> list[Any]:
    """Return MLflow's collectors for what this machine has."""
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    found: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    with contextlib.suppress(Exception):  # no NVIDIA GPU, or no driver
        found.append(GPUMonitor())
    return found
