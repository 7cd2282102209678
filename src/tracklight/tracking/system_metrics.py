"""What the machine does while a run trains: MLflow's own collectors, into the run's own file."""

import contextlib
import logging
import threading
from typing import Any

from pytorch_lightning import Callback
from typing_extensions import override

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
