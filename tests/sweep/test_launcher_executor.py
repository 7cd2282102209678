"""The launcher executor with a launcher that fails, or that starts a job again."""

import logging
import signal
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from omegaconf import OmegaConf

from tracklight.errors import RunFailed
from tracklight.sweep import executors
from tracklight.sweep.executors import LauncherExecutor
from tracklight.sweep.plan import Job
from tracklight.sweep.trial import TrialResult, TrialSpec


class Broken:
    """A launcher whose cluster is away, or that forgets a job."""

    def __init__(self, error):
        self.error = error

    def launch(self, words, initial_job_idx):
        if self.error:
            raise self.error
        return []


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError("no\ncluster"), r"Broken failed \(OSError: no cluster\); the same command"),
        (None, "Broken returned 0 results for 1 trials"),
    ],
)
def test_a_launcher_that_fails_is_reported_in_a_line(monkeypatch, error, message):
    monkeypatch.setattr(Plugins, "instance", lambda: Plugins.__new__(Plugins))
    monkeypatch.setattr(Plugins, "instantiate_launcher", lambda *_, **__: Broken(error))
    executor = LauncherExecutor(None, OmegaConf.create(), None)  # pyright: ignore
    executor.start(TrialSpec({}), Job(0, {}, {}, ["seed=1"], "key"))
    with pytest.raises(RunFailed, match=message):
        list(executor.messages(0))


@pytest.fixture
def launched(monkeypatch, directory) -> Callable[..., Any]:
    """Runs a trial as a launcher's job does; what happens instead of training it is given."""
    monkeypatch.setattr(HydraConfig, "get", lambda: OmegaConf.create({"job": {"num": 3}}))
    tags = {"mlflow.parentRunId": "parent", "tracklight.point": "key"}
    cfg = {"tracking": {"uri": None, "dir": str(directory)}}

    def run(train: Callable[[TrialSpec], TrialResult], **more: Any) -> TrialResult:
        monkeypatch.setattr(executors, "run_trial", train)
        return executors._run_launched({3: TrialSpec(cfg, tags=tags, **more)}, [], OmegaConf.create())

    return run


def test_a_job_that_is_requeued_continues_the_run_of_its_trial(launched, store):
    continued = []

    def train(spec: TrialSpec) -> TrialResult:
        continued.append(spec.run_id)
        return TrialResult("complete", 1.0)

    tags = {"mlflow.parentRunId": "parent", "tracklight.point": "key"}
    launched(train)
    store.create("mine", None, tags | {"tracklight.point": "another"}).finish("KILLED")
    store.create("mine", None, tags | {"mlflow.parentRunId": "another"}).finish("KILLED")
    launched(train)
    begun = store.create("mine", None, tags)
    begun.finish("KILLED")
    launched(train)
    assert continued == [None, None, begun.run_id]
    begun = store.create("mine", None, tags)
    begun.finish("FINISHED")
    store.client.log_metric(begun.run_id, "score", 0.5)
    result = launched(train)  # it was requeued after the run's end
    assert (result.kind, result.score, result.run_id) == ("complete", 0.5, begun.run_id)
    assert len(continued) == 3


@pytest.mark.parametrize(("signum", "waits"), [(signal.SIGUSR2, []), (signal.SIGTERM, [300.0])])
def test_a_trial_that_a_cluster_stops_has_no_result_but_its_job_is_requeued(
    launched, monkeypatch, signum, waits
):
    waited = []
    monkeypatch.setattr(executors.time, "sleep", waited.append)
    stopped = TrialResult("stopped", signum=signum)
    assert launched(lambda _: stopped) == stopped  # in a process of no job
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    before = signal.signal(signal.SIGUSR2, lambda *_: sys.exit(-1))  # as submitit, which requeues it before
    try:
        with pytest.raises(SystemExit):
            launched(lambda _: stopped)
        assert launched(lambda _: TrialResult("failed")) == TrialResult("failed")
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert waited == waits


def test_what_a_trial_warns_of_and_logs_in_a_launchers_process_is_redacted(tmp_path, monkeypatch):
    """The launcher's process knows neither our log records nor our warnings, as at its start."""
    factory, log = logging.getLogRecordFactory(), tmp_path / "log"
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    monkeypatch.setattr(HydraConfig, "get", lambda: OmegaConf.create({"job": {"num": 7}}))

    def run_trial(spec):
        logger = logging.getLogger("a.library")
        logger.addHandler(handler := logging.StreamHandler())
        logger.error("password=hunter2 for %s", "http://me:hunter2@host")
        logger.removeHandler(handler)
        sys.stderr.write(warnings.formatwarning("token=hunter2", UserWarning, "lib.py", 1))
        return TrialResult("complete", 1.0)

    monkeypatch.setattr(executors, "run_trial", run_trial)
    logging.setLogRecordFactory(logging.LogRecord)
    try:
        result = executors._run_launched({7: TrialSpec({}, log=log)}, [], OmegaConf.create())
    finally:
        logging.setLogRecordFactory(factory)
    assert result.score == 1.0
    said = log.read_text()
    assert "password=*** for http://***@host" in said and "token=***" in said and "hunter2" not in said
