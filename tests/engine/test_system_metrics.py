import sys
import time
from types import SimpleNamespace

import pytest

from tracklight.engine import monitors as system_metrics


class Log:
    def __init__(self):
        self.points = []

    def steps_completed(self):
        return 7

    def log_series(self, key, steps, values):
        self.points.append((key, *steps, *values))


def watch(seconds, log):
    callback = system_metrics.SystemMetricsMonitor(period_s=0.05)
    callback.on_fit_start(SimpleNamespace(logger=log))
    time.sleep(seconds)
    return callback


def test_cpu_and_memory_are_logged_at_the_steps_completed():
    log = Log()
    watch(0.3, log).on_fit_end()
    values = {key: value for key, step, value in log.points if step == 7}
    assert 0 < values["system/system_memory_usage_percentage"] < 100
    assert 0 <= values["system/cpu_utilization_percentage"] <= 100


@pytest.mark.parametrize("ending", ["on_fit_end", "on_exception"])
def test_nothing_is_logged_after_the_end(ending):
    log = Log()
    getattr(watch(0.1, log), ending)()
    count = len(log.points)
    assert count > 0
    time.sleep(0.15)
    assert len(log.points) == count


def test_log_that_fails_ends_the_watch_with_one_warning(caplog):
    class Broken(Log):
        def log_series(self, key, steps, values):
            raise OSError("disk gone")

    watch(0.3, Broken()).on_fit_end()
    assert [record.getMessage() for record in caplog.records] == ["system metrics end here: disk gone"]


def test_gpu_is_watched_where_nvml_finds_one(monkeypatch):
    class Nvml:
        NVMLError = RuntimeError

        def __getattr__(self, name):
            return lambda *_: 1

        def nvmlDeviceGetMemoryInfo(self, handle):
            return SimpleNamespace(used=4e9, total=8e9)

        def nvmlDeviceGetUtilizationRates(self, handle):
            return SimpleNamespace(gpu=63)

    gpu_monitor = pytest.importorskip("mlflow.system_metrics.metrics.gpu_monitor")
    monkeypatch.setattr(gpu_monitor, "pynvml", Nvml(), raising=False)
    monkeypatch.setitem(sys.modules, "pynvml", gpu_monitor.pynvml)
    log = Log()
    watch(0.1, log).on_fit_end()
    values = {key: value for key, _, value in log.points}
    assert values["system/gpu_0_utilization_percentage"] == 63
    assert values["system/gpu_0_memory_usage_percentage"] == 50


def test_run_has_system_metrics_when_asked(train, spare_model):
    finished = train(
        *("trainer.max_epochs=2", "num_threads=1", "tracking.figures=false"),
        "tracking.system_metrics=true",
    )
    assert finished.history("system/cpu_utilization_percentage")
