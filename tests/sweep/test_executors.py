"""The process executor, its processes replaced by messages that the test sends."""

import multiprocessing
from types import SimpleNamespace

from tracklight.sweep.executors import ProcessExecutor, _Worker
from tracklight.sweep.trial import EpochReport, TrialResult


def test_the_last_messages_of_stopped_trials_are_yielded():
    executor = ProcessExecutor(1)
    ours, theirs = multiprocessing.Pipe()
    process = SimpleNamespace(join=lambda _: None, terminate=lambda: None)
    executor._workers[ours] = _Worker(process, "trial", 0)  # pyright: ignore
    sent = [EpochReport(3, 0.5), TrialResult("stopped")]
    for message in sent:
        theirs.send(message)
    assert list(executor.stop()) == [("trial", message) for message in sent]
    theirs.close()
