"""The launcher executor with a launcher that fails."""

import pytest
from hydra.core.plugins import Plugins
from omegaconf import OmegaConf

from tracklight.errors import RunFailed
from tracklight.sweep.executors import LauncherExecutor
from tracklight.sweep.plan import Job
from tracklight.sweep.trial import TrialSpec


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
