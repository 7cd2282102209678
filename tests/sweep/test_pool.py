"""Slots, their processes replaced by what a test sends."""

import multiprocessing
from types import SimpleNamespace

from tracklight.sweep.pool import Pool, _Slot
from tracklight.sweep.trial import Epoch, Outcome


def test_what_trials_tell_as_they_stop_is_handed_on():
    pool = Pool(1)
    ours, theirs = multiprocessing.Pipe()
    pool._slots[0] = _Slot(SimpleNamespace(join=lambda _: None), ours, "trial")
    told = [Epoch(3, 0.5), Outcome("stopped")]
    for message in told:
        theirs.send(message)
    assert list(pool.drain()) == [("trial", message) for message in told]
    theirs.close()
