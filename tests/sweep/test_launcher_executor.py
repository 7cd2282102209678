"""The launcher executor with a launcher that fails."""

import logging
import sys
import warnings

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
    executor.start(TrialSpec({}), Job(0, {}, OmegaConf.create(), ["seed=1"], "key"))
    with pytest.raises(RunFailed, match=message):
        list(executor.messages(0))


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
        result = executors._run_launched({7: TrialSpec({}, log=log)}, OmegaConf.create())
    finally:
        logging.setLogRecordFactory(factory)
    assert result.score == 1.0
    said = log.read_text()
    assert "password=*** for http://***@host" in said and "token=***" in said and "hunter2" not in said
