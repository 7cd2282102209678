"""The preflight of a sweep whose process does not start."""

from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from tracklight.sweep.plan import Job
from tracklight.sweep.sweeper import preflight


class FailingExecutor:
    """An executor that cannot start a process."""

    def start(self, *_):
        raise OSError("no more processes")

    def messages(self, _):
        pytest.fail("waits for a trial that never began")


def test_a_preflight_that_cannot_start_raises_the_reason():
    cfg = {"seed": 0, "num_threads": 1, "resume": None, "trainer": {"devices": 1}, "tracking": {}}
    job = Job(0, {}, OmegaConf.create(cfg), [], "key")
    plan = SimpleNamespace(configs=[[job]], launcher=None, metric="train/loss")
    with pytest.raises(OSError, match="no more processes"):
        preflight(plan, FailingExecutor())  # pyright: ignore
