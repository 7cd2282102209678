"""Executor, their processes replaced by what a test sends."""

import multiprocessing
from types import SimpleNamespace

from tracklight.sweep.executors import ProcessExecutor, _Slot
from tracklight.sweep.trial import EpochReport, TrialResult


def test_what_trials_tell_as_they_stop_is_handed_on():
    pool = ProcessExecutor(1)
    ours, theirs = multiprocessing.Pipe()
    pool._slots[0] = _Slot(SimpleNamespace(join=lambda _: None), ours, "trial")
    told = [EpochReport(3, 0.5), TrialResult("stopped")]
    for message in told:
        theirs.send(message)
    assert list(pool.drain()) == [("trial", message) for message in told]
    theirs.close()
