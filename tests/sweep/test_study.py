"""What Optuna remembers of a sweep, through restarts."""

import fcntl
import signal
import subprocess
import sys

import pytest

from tracklight.sweep.space import read_space
from tracklight.sweep.storage import open_storage
from tracklight.sweep.study import PRUNERS, SAMPLERS, OptunaSettings, OptunaStudy

SPACE = read_space(["lr=tag(log,interval(1e-3,1))", "width=8,16,32"], {}, None)
METHODS = OptunaSettings("tpe", {"n_startup_trials": 3}, "median", {"n_startup_trials": 2}, 7, 10)


def trials(path, total=8, methods=METHODS, space=SPACE):
    return OptunaStudy(open_storage(None, path), "study", "min", space, methods, total)


def score(params):
    return (float(params["lr"]) - 0.1) ** 2 + int(params["width"]) / 100


def drive(path, total=8, restarts=False):
    """Run all trials; with restarts, open the journal anew before each step."""
    found, study = [], trials(path, total)
    while asked := study.ask():
        if restarts:  # a kill after the question: the same trial is asked for again
            study = trials(path, total)
            assert study.ask() == asked
        study.tell(asked.number, "complete", score(asked.params))
        found.append(asked)
        if restarts:
            study = trials(path, total)
    return found


def test_a_search_through_restarts_asks_for_the_same_points(tmp_path):
    assert drive(tmp_path / "a") == drive(tmp_path / "b", restarts=True)


def test_the_total_is_the_total(tmp_path):
    assert len(drive(tmp_path / "a", total=3)) == 3
    assert len(drive(tmp_path / "a", total=5)) == 2
    assert drive(tmp_path / "a", total=5) == []


def test_parallel_trials_are_asked_for_different_points(tmp_path):
    study = trials(tmp_path / "a", total=4, methods=OptunaSettings("random", {}, "none", {}, 0, 1))
    asked = [study.ask() for _ in range(4)]
    assert len({each.params["lr"] for each in asked}) == 4


def test_a_trial_half_drawn_when_killed_is_drawn_anew_as_it_would_have_been(tmp_path):
    whole = drive(tmp_path / "whole", total=5)
    path = tmp_path / "torn"
    study = trials(path, total=5)
    for asked in whole[:3]:
        assert study.ask() == asked
        study.tell(asked.number, "complete", score(asked.params))
    lines = path.read_bytes().splitlines(keepends=True)
    study.ask()
    drawn = path.read_bytes().splitlines(keepends=True)[len(lines) :]
    for kept in range(1, len(drawn)):
        path.write_bytes(b"".join([*lines, *drawn[:kept]]) + drawn[kept][:7])
        study = trials(path, total=5)
        found = []
        while asked := study.ask():
            study.tell(asked.number, "complete", score(asked.params))
            found.append(asked.params)
        assert found == [each.params for each in whole[3:]]
        assert len(study.counted_trials()) == 5


def test_a_retry_takes_the_place_of_the_failed_trial(tmp_path):
    study = trials(tmp_path / "a", total=2)
    first = study.ask()
    study.tell(first.number, "failed", None)
    study.enqueue_retry(first.number)
    again = study.ask()
    assert again.params == first.params and again.number == first.number
    study.tell(again.number, "complete", 1.0)
    assert study.ask() is not None and study.ask() is None
    assert len(study.counted_trials()) == 2


def test_a_grids_points_are_taken_in_its_own_order_and_once(tmp_path):
    space = read_space(["lr=1,2,3"], {}, None)
    study = trials(tmp_path / "a", None, space=space)
    first = study.ask_config({"lr": "1"})
    study.ask_config({"lr": "2"})
    study.tell(first.number, "complete", 0.1)
    again = trials(tmp_path / "a", None, space=space)
    assert again.ask_config({"lr": "1"}).has_ended
    assert (again.ask_config({"lr": "2"}).number, again.ask_config({"lr": "3"}).number) == (1, 2)


def test_to_ask_for_a_grids_point_does_not_take_longer_the_more_there_are(tmp_path, monkeypatch):
    study = trials(tmp_path / "a", None, space=read_space(["lr=1,2"], {}, None))
    read, trial_params = [], study.trial_params
    monkeypatch.setattr(study, "trial_params", lambda trial: read.append(trial) or trial_params(trial))
    for number in range(30):
        assert study.ask_config({"lr": str(number)}).number == number
    assert len(read) == 2 * 30  # each when it is new, and in the request


def test_a_report_made_again_changes_nothing_and_gets_the_same_answer(tmp_path):
    study = trials(tmp_path / "a", total=3)
    for _ in range(2):
        asked = study.ask()
        study.report(asked.number, 1, 0.1)
        study.tell(asked.number, "complete", 0.1)
    asked = study.ask()
    assert study.report(asked.number, 1, 0.9)
    study = trials(tmp_path / "a", total=3)
    assert study.ask() == asked
    assert study.report(asked.number, 1, 0.9)


def test_an_epoch_run_again_is_judged_no_more(tmp_path):
    study = trials(tmp_path / "a", total=3)
    asked = study.ask()
    for epoch in (1, 2, 3):
        assert not study.report(asked.number, epoch, 0.5)
    for _ in range(2):
        other = study.ask()
        for epoch in (1, 2, 3):
            study.report(other.number, epoch, 0.1)
        study.tell(other.number, "complete", 0.1)
    study = trials(tmp_path / "a", total=3)
    assert study.ask() == asked
    judged = [study.report(asked.number, epoch, 0.5) for epoch in (1, 2, 3)]
    assert judged == [False, False, True]


def test_a_quasi_random_search_whose_trials_fail_draws_other_points(tmp_path):
    methods = OptunaSettings("qmc", {}, "none", {}, 0, 1)
    study, drawn = trials(tmp_path / "a", total=4, methods=methods), []
    while asked := study.ask():
        study.tell(asked.number, "failed", None)
        drawn.append(asked.params["lr"])
    assert len(set(drawn)) == 4


def test_a_killed_process_leaves_no_lock(tmp_path):
    program = (
        "import os, signal; from pathlib import Path;"
        "from tracklight.sweep.storage import open_storage;"
        f"backend = open_storage(None, Path({str(tmp_path / 'a.journal')!r}))._backend;"
        "backend._lock.acquire(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == -signal.SIGKILL
    with (tmp_path / "a.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises where it is held
    drive(tmp_path / "a.journal", total=2)


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "grid"])
def test_each_sampler_draws_within_the_space(tmp_path, name):
    study = trials(tmp_path / "a", total=4, methods=OptunaSettings(name, {}, "none", {}, 0, 1))
    while asked := study.ask():
        assert 1e-3 <= float(asked.params["lr"]) <= 1 and asked.params["width"] in SPACE.axes[1].texts
        study.tell(asked.number, "complete", score(asked.params))
    assert len(study.counted_trials()) == 4


def test_the_grid_sampler_visits_each_cell_once(tmp_path):
    space = read_space(["a=1,2", "b=range(0,3)"], {}, None)
    study = trials(tmp_path / "a", 6, OptunaSettings("grid", {}, "none", {}, 0, 1), space)
    seen = []
    while asked := study.ask():
        study.tell(asked.number, "complete", 0.0)
        seen.append((asked.params["a"], asked.params["b"]))
        study = trials(tmp_path / "a", 6, OptunaSettings("grid", {}, "none", {}, 0, 1), space)
    assert sorted(seen) == [(a, b) for a in "12" for b in "012"]


@pytest.mark.parametrize("name", PRUNERS)
def test_each_pruner_prunes_what_is_hopeless_or_nothing(tmp_path, name):
    study = trials(tmp_path / "a", total=12, methods=OptunaSettings("random", {}, name, {}, 0, 9))
    pruned = []
    for index in range(12):
        asked = study.ask()
        value = 10.0 + index if index > 6 else 0.1 * index
        stop = any(study.report(asked.number, epoch, value) for epoch in range(1, 10))
        study.tell(asked.number, "pruned" if stop else "complete", value)
        pruned.append(stop)
    assert any(pruned[7:]) == (name != "none")


@pytest.mark.parametrize(("warmup", "first"), [(0, 1), (0.25, 3), (4, 4), (0.3, 3)])
@pytest.mark.parametrize("name", ["median", "percentile", "asha", "hyperband"])
def test_no_trial_is_pruned_before_its_warm_up_is_over(tmp_path, name, warmup, first):
    methods = OptunaSettings("random", {}, name, {}, 0, 9, warmup_trials=4, warmup_epochs=warmup)
    study, ends = trials(tmp_path / "a", total=20, methods=methods), []
    while asked := study.ask():
        value = float(100 * len(ends))  # each is worse than all before
        reports = (epoch for epoch in range(1, 10) if study.report(asked.number, epoch, value))
        ends.append(next(reports, None))
        study.tell(asked.number, "complete" if ends[-1] is None else "pruned", value)
    pruned = [epoch for epoch in ends if epoch]
    assert min(pruned) == first
    if name in ("median", "percentile"):
        assert ends[:4] == [None] * 4 and set(ends[4:]) == {first}


def test_a_retry_half_sampled_when_killed_is_enqueued_again_from_the_failed_trial(tmp_path):
    path = tmp_path / "a"
    study = trials(path, total=1)
    first = study.ask()
    study.tell(first.number, "failed", None)
    study.enqueue_retry(first.number)
    lines = path.read_bytes().splitlines(keepends=True)
    assert study.ask() == first
    sampled = path.read_bytes().splitlines(keepends=True)[len(lines) :]
    path.write_bytes(b"".join([*lines, *sampled[:2]]))  # it runs, and one of its params is set

    study = trials(path, total=1)
    assert [trial.state.name for trial in study.counted_trials()] == ["FAIL"]
    study.enqueue_retry(first.number)
    assert study.ask() == first and study.ask() is None
    study.tell(first.number, "complete", 1.0)
    assert [trial.state.name for trial in study.counted_trials()] == ["COMPLETE"]
