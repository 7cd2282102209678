"""Callbacks that log the size of the gradients, and the use of the machine."""

import contextlib
import logging
import math
import threading
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

GRADIENT_STEPS = 32  # from one logged gradient to the next
TINY = 1e-30  # keeps the ratio of a weight that is all zeros finite
PERIOD_S = 2.0
_log = logging.getLogger(__name__)


class GradientMonitor(Callback):
    """Logs the gradient that the last optimizer step used: of the whole model and of each layer.

    It reads what a step left, clipped if gradients are clipped. Of every `GRADIENT_STEPS` steps it
    logs the last one that Lightning sees: a function of the steps alone, whatever was interrupted.

    Metrics: `gradient/norm`; of each parameter `gradient/NAME_norm`, `gradient/NAME_max`, the
    largest absolute value, and `gradient/NAME_ratio`, the norm over that of the weights.
    """

    supports_blocks = True

    @override
    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        self.before = trainer.global_step

    @override
    def on_train_batch_end(self, trainer: Any, module: LightningModule, *_: Any) -> None:
        step = trainer.global_step
        if step // GRADIENT_STEPS == self.before // GRADIENT_STEPS and self.before:
            return
        if hasattr(trainer.logger, "log_series"):
            for key, value in gradient_statistics(module).items():
                trainer.logger.log_series(f"gradient/{key}", (step,), (value,))


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

    def __init__(self, period_s: float = PERIOD_S):
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
            self._thread = None

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
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    collectors: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    with contextlib.suppress(Exception):  # no NVIDIA GPU, or no driver
        collectors.append(GPUMonitor())
    for collector in collectors:  # the first answer is about the time since the last one
        collector.collect_metrics()
        collector.clear_metrics()
    return collectors
