"""The preflight of a sweep whose process does not start."""

from types import SimpleNamespace

import pytest

from tracklight.errors import BadInput
from tracklight.sweep.plan import Job
from tracklight.sweep.sweeper import preflight
from tracklight.sweep.trial import TrialResult


class FailingExecutor:
    """An executor that cannot start a process."""

    def start(self, *_):
        raise OSError("no more processes")

    def messages(self, _):
        pytest.fail("waits for a trial that never began")


class WarningExecutor:
    """An executor whose trial warns of what it ignores."""

    def start(self, spec, job):
        self.job = job

    def messages(self, _):
        said = ("Net configures its own optimizer: ignored seed.x=1, optimizer.lr=0.1",)
        yield self.job, TrialResult("complete", metrics=("train/loss",), warnings=said)


@pytest.mark.parametrize(("axis", "refused"), [("optimizer.lr", True), ("model.hidden", False)])
def test_a_key_that_varies_and_is_ignored_is_refused(axis, refused, capsys):
    cfg = {"seed": 0, "num_threads": 1, "resume": None, "trainer": {"devices": 1}, "tracking": {}}
    job = Job(0, {}, cfg, [], "key")
    space = SimpleNamespace(axes=[SimpleNamespace(name=axis)])
    plan = SimpleNamespace(configs=[[job]], launcher=None, metric="train/loss", space=space)
    if refused:
        with pytest.raises(BadInput, match="optimizer.lr cannot vary: Net configures its own"):
            preflight(plan, WarningExecutor())  # pyright: ignore
    else:
        preflight(plan, WarningExecutor())  # pyright: ignore
        assert "warning: Net configures" in capsys.readouterr().err


def test_a_preflight_that_cannot_start_raises_the_reason():
    cfg = {"seed": 0, "num_threads": 1, "resume": None, "trainer": {"devices": 1}, "tracking": {}}
    job = Job(0, {}, cfg, [], "key")
    plan = SimpleNamespace(configs=[[job]], launcher=None, metric="train/loss")
    with pytest.raises(OSError, match="no more processes"):
        preflight(plan, FailingExecutor())  # pyright: ignore
