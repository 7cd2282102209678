"""Several machines on one sweep: here, processes with a tracking directory each, a server and a database."""

import csv
import signal
from pathlib import Path

import pytest

from commands import BLOBS, Swept, wait_until
from process import Process, Trainees, free_port
from tracklight.errors import BadInput
from tracklight.sweep.machines import Machines
from tracklight.sweep.space import read_space
from tracklight.sweep.storage import open_storage
from tracklight.sweep.study import OptunaSettings, OptunaStudy

NUM = 8
LENGTH = "trainer.max_epochs=30"
GRID = (f"optimizer.lr={','.join(f'{number / 100}' for number in range(1, NUM + 1))}", LENGTH)
SEARCH = ("optimizer.lr=tag(log,interval(0.01,0.1))", f"sweep.trials={NUM}", "sweep.sampler=random", LENGTH)


@pytest.fixture
def start(commander: Trainees, tmp_path, request):
    """Starts the command of a sweep on a machine of this name."""
    port = free_port()
    server = commander.serve(tmp_path / "server", port)
    storage = f"sqlite:///{tmp_path}/study.db"
    if request.param == "postgres":
        storage = request.getfixturevalue("postgres").url
    shared = (f"tracking.uri=http://127.0.0.1:{port}", f"sweep.storage={storage}", "sweep.workers=1")

    def start(machine: str, *arguments: str) -> Process:
        words = ("-m", *arguments, *BLOBS, *shared)
        return commander.start(tmp_path / machine, words, log=tmp_path / f"{machine}.{free_port()}")

    yield start
    server.send(signal.SIGTERM)
    server.wait()


def check_whole(swept: Swept, num: int) -> list[dict[str, str]]:
    """Check that each trial ran once, under one parent; return the leaderboard."""
    assert len(swept.parents) == 1 and swept.parent and swept.parent.status == "FINISHED"
    assert len(swept.children) == num and {run.status for run in swept.children} == {"FINISHED"}
    assert len({run.tags["tracklight.point"] for run in swept.children}) == num
    (path,) = swept.directory.rglob(f"{swept.parent.run_id}/artifacts/leaderboard.csv")
    rows = [*csv.DictReader(path.read_text().splitlines())]
    assert sorted(row["run_id"] for row in rows) == sorted(run.run_id for run in swept.children)
    assert {row["state"] for row in rows} == {"complete"}
    return rows


def runs_of(tmp_path: Path, machine: str) -> set[str]:
    return {path.parent.name for path in (tmp_path / machine).glob("artifacts/*/points.wal")}


@pytest.mark.slow
@pytest.mark.parametrize(("start", "kind"), [("sqlite", GRID), ("postgres", SEARCH)], indirect=["start"])
def test_two_machines_that_start_at_once_share_a_sweep(start, tmp_path, kind):
    both = [start(machine, *kind) for machine in "ab"]
    assert [machine.wait() for machine in both] == [0, 0], [machine.stderr for machine in both]
    swept = Swept(tmp_path / "server")
    rows = check_whole(swept, NUM)
    children = {run.run_id for run in swept.children}
    a, b = (runs_of(tmp_path, machine) & children for machine in "ab")
    assert a | b == children and len(a) > 1 and len(b) > 1
    assert a & b <= {rows[0]["run_id"]}  # which the leader tests
    joined = [machine for machine in both if "this machine joins a sweep" in machine.stdout]
    assert len(joined) == 1 and "best  trial" not in joined[0].stdout
    for machine in both:
        assert f"{NUM} trials" in machine.stdout and rows[0]["score"][:6] in machine.stdout
        assert "Traceback" not in machine.stderr


@pytest.mark.slow
@pytest.mark.parametrize("start", ["sqlite"], indirect=True)
def test_with_on_failure_stop_a_failed_trial_stops_all_machines(start, tmp_path):
    kind = ("trainer.max_epochs=5000,5001", "optimizer.lr=0.01,1e30", "sweep.on_failure=stop")
    a = start("a", *kind)
    wait_until(lambda: len(runs_of(tmp_path, "a")) > 0)
    b = start("b", *kind)
    assert [machine.wait(120) for machine in (a, b)] == [1, 1], (a.stderr, b.stderr)
    assert a.stderr.splitlines()[-1] == b.stderr.splitlines()[-1]
    assert "error: 1 trial failed: trial" in a.stderr and "Traceback" not in a.stderr + b.stderr
    assert "runs not begun: " in a.stdout and "runs not begun: " in b.stdout
    swept = Swept(tmp_path / "server")
    assert len(swept.parents) == 1 and swept.parent and swept.parent.status == "FAILED"
    assert len(swept.children) == 2
    assert sorted(run.status for run in swept.children) == ["FAILED", "KILLED"]


@pytest.mark.slow
@pytest.mark.parametrize("start", ["sqlite"], indirect=True)
def test_a_machine_with_more_trials_than_the_leader_runs_them(start, tmp_path):
    kind = (SEARCH[0], "sweep.sampler=random", "trainer.max_epochs=200")
    a = start("a", *kind, "sweep.trials=4")
    wait_until(lambda: "trial 0" in a.stdout)
    b = start("b", *kind, f"sweep.trials={NUM}")
    assert [machine.wait(180) for machine in (a, b)] == [0, 0], (a.stderr, b.stderr)
    assert "best  trial" in a.stdout + b.stdout  # of the first, if it sees a moment without a trial
    assert "this machine joins" in b.stdout and f"{NUM} trials" in b.stdout
    check_whole(Swept(tmp_path / "server"), NUM)


@pytest.mark.slow
@pytest.mark.parametrize("start", ["sqlite"], indirect=True)
def test_a_leader_that_is_killed_while_it_runs_no_trial_is_replaced(start, tmp_path):
    kind = ("trainer.max_epochs=1,800,2400",)
    a = start("a", *kind)
    wait_until(lambda: "trial 0" in a.stdout)
    b = start("b", *kind)
    wait_until(lambda: "trial 1" in a.stdout and len(runs_of(tmp_path, "b")) > 0)
    a.send(signal.SIGKILL, group=True)
    assert b.wait(180) == 0, b.stderr
    assert "Traceback" not in b.stderr and "best  trial" in b.stdout
    check_whole(Swept(tmp_path / "server"), 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start", "kind", "killed"),
    [("postgres", GRID, "other"), ("sqlite", SEARCH, "leader")],
    indirect=["start"],
)
def test_the_trials_of_a_killed_machine_are_taken_over(start, tmp_path, kind, killed):
    a = start("a", *kind)
    wait_until(lambda: "trial 0" in a.stdout)
    b = start("b", *kind)
    wait_until(lambda: "this machine joins" in b.stdout and len(runs_of(tmp_path, "b")) > 1)
    dead, alive = (a, b) if killed == "leader" else (b, a)
    dead.send(signal.SIGKILL, group=True)
    assert alive.wait(180) == 0, alive.stderr
    assert "Traceback" not in alive.stderr and "best  trial" in alive.stdout
    check_whole(Swept(tmp_path / "server"), NUM)


def two_studies(tmp_path, typed: str, total: int | None):
    """The storage of a sweep, and its study as two machines have it."""
    storage, space = open_storage(f"sqlite:///{tmp_path}/study.db", None), read_space([typed], {}, None)
    settings = OptunaSettings("random", {}, "none", {}, 0, 4)
    return storage, *(OptunaStudy(storage, "sweep", "min", space, settings, total, name) for name in "ab")


def late(monkeypatch, study: OptunaStudy, name: str) -> None:
    """Let a study's first look find nothing: another machine is ahead by a moment."""
    real, looks = getattr(study, name), iter([lambda *_: []])
    monkeypatch.setattr(study, name, lambda *words: next(looks, real)(*words))


def test_machines_that_ask_in_the_same_instant_begin_no_trial_too_many(tmp_path, monkeypatch):
    storage, a, b = two_studies(tmp_path, "lr=interval(0,1)", 1)
    assert a.ask().number == 0
    late(monkeypatch, b, "counted_trials")
    assert b.ask() is None and len(b.get_trials()) == 2  # begun, and withdrawn
    assert len(a.counted_trials()) == 1 and b.runs_elsewhere and not a.runs_elsewhere
    a.tell(0, "complete", 0.5)
    assert [trial.number for trial in b.finished_trials()] == [0] and b.ask() is None
    storage.engine.dispose()


def test_machines_that_begin_the_same_config_in_the_same_instant_train_it_once(tmp_path, monkeypatch):
    storage, a, b = two_studies(tmp_path, "lr=1,2", None)
    assert a.ask_config({"lr": "1"}).number == 0
    late(monkeypatch, b, "_trials_of")
    assert b.ask_config({"lr": "1"}) is None and b.ask_config({"lr": "1"}) is None
    assert len(b.get_trials()) == 2 and len(b.counted_trials()) == 1
    a.tell(0, "complete", 0.5)
    assert b.ask_config({"lr": "1"}).has_ended and not b.ask_config({"lr": "2"}).has_ended
    storage.engine.dispose()


def test_no_two_machines_draw_the_same_params(tmp_path):
    storage, a, b = two_studies(tmp_path, "lr=interval(0,1)", 6)
    drawn = [study.ask().params["lr"] for _ in range(3) for study in (a, b)]
    assert len({*drawn}) == 6
    storage.engine.dispose()


def test_a_second_process_in_the_same_folder_is_refused(tmp_path):
    storage = open_storage(f"sqlite:///{tmp_path}/study.db", None)
    machines = Machines(storage, "sweep", tmp_path)
    assert machines.wait_for_leader() is None
    with pytest.raises(BadInput, match="runs in .*tracking.dir of its own"):
        Machines(storage, "sweep", tmp_path)
    machines.leave()
    again = Machines(storage, "sweep", tmp_path)
    assert again.leads and again.id == machines.id
    again.leave()
    storage.engine.dispose()


def test_of_two_machines_the_first_leads_until_it_leaves(tmp_path):
    storage = open_storage(f"sqlite:///{tmp_path}/study.db", None)
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    first, second = (Machines(storage, "sweep", tmp_path / name) for name in "ab")
    assert first.leads and not second.leads
    first.announce("run")
    assert second.wait_for_leader() == "run"
    first.leave()
    assert second.wait_for_leader() is None and not second.is_lost
    second.leave()
    storage.engine.dispose()


def test_a_machine_takes_over_unless_the_one_that_led_has_ended_the_sweep(tmp_path):
    storage = open_storage(f"sqlite:///{tmp_path}/study.db", None)
    for name in "abc":
        (tmp_path / name).mkdir()
    a, b, c = (Machines(storage, "sweep", tmp_path / name) for name in "abc")
    a.leave()  # stopped by a signal
    b._refresh(), c._refresh()
    assert b.leads and not b.is_over and not c.leads
    b.has_ended, b.num_ranked = True, 5
    b._refresh()
    assert b.leads
    b.leave()
    c._refresh()
    assert c.is_over and c.num_ranked == 5 and not c.leads and not c.is_lost
    c.is_over = False  # it has more trials than the one that led
    c._refresh()
    assert c.leads and not c.is_over
    c.leave()
    storage.engine.dispose()


def test_a_failure_that_ends_the_sweep_is_told_to_the_machines_that_run_it_but_to_none_that_comes_later(
    tmp_path,
):
    storage = open_storage(f"sqlite:///{tmp_path}/study.db", None)
    for name in "abc":
        (tmp_path / name).mkdir()
    a, b = (Machines(storage, "sweep", tmp_path / name) for name in "ab")
    b.halt(3, "too bad")
    b.leave()
    assert a.failure is None
    a._refresh()
    assert a.failure == (3, "too bad") and not a.has_ended and a.leads
    c = Machines(storage, "sweep", tmp_path / "c")  # the same command goes on with the remaining trials
    c._refresh()
    assert c.failure is None
    a.leave(), c.leave()
    storage.engine.dispose()
