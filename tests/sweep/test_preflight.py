"""The preflight of a sweep whose process does not start."""

from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from tracklight.sweep.plan import Job
from tracklight.sweep.sweeper import preflight


class Refusing:
    """A pool that cannot start a process."""

    def start(self, *_):
        raise OSError("no more processes")

    def messages(self, _):
        pytest.fail("waits for a trial that never began")


def test_a_rehearsal_that_cannot_start_says_why():
    cfg = {"seed": 0, "num_threads": 1, "resume": None, "trainer": {"devices": 1}, "tracking": {}}
    job = Job(0, {}, OmegaConf.create(cfg), [], "key")
    plan = SimpleNamespace(points=[[job]], launcher=None, metric="train/loss")
    with (
        pytest.raises(OSError, match="no more processes"),
        preflight(plan, Refusing()),  # pyright: ignore
    ):
        pass
