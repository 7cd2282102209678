"""The process executor, its processes replaced by messages that the test sends."""

import multiprocessing
from types import SimpleNamespace

import pytest

from tracklight.sweep.executors import ProcessExecutor, _Worker
from tracklight.sweep.trial import EpochReport, TrialResult, TrialSpec


def test_the_last_messages_of_stopped_trials_are_yielded():
    executor = ProcessExecutor(1)
    ours, theirs = multiprocessing.Pipe()
    process = SimpleNamespace(join=lambda _: None, terminate=lambda: None)
    executor._workers[ours] = _Worker(process, {0: ("spec", "trial")}, 0)  # pyright: ignore
    sent = [EpochReport(3, 0.5), TrialResult("stopped")]
    for message in sent:
        theirs.send([(0, message)])
    assert list(executor.stop()) == [("trial", message) for message in sent]
    theirs.close()


@pytest.mark.parametrize(("visible", "gpus"), [("", ["0", "1", "0"]), ("GPU-a, 6", ["GPU-a", "6", "GPU-a"])])
def test_the_workers_take_turns_on_the_gpus_that_are_visible(monkeypatch, visible, gpus):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    executor, specs = ProcessExecutor(3, num_gpus=2), []
    process = SimpleNamespace(start=lambda: None)
    context = SimpleNamespace(
        Pipe=multiprocessing.Pipe, Process=lambda target, args: specs.extend(args[0]) or process
    )
    monkeypatch.setattr(executor, "_context", context)
    for _ in gpus:
        executor.start(TrialSpec({}), "trial")  # pyright: ignore
    assert [spec.gpu for spec in specs] == gpus
