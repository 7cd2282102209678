"""Whole sweeps that were stopped, killed or changed, and are taken up again."""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from commands import BLOBS, GRID, ODD, QUICK, Swept, points, trials_of, wait_until

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_winners_test_closes_its_run_to_be_continued(commander, tmp_path, signum):
    directory = tmp_path / "runs"
    command = ("optimizer.lr=0.01,0.1", *BLOBS, "model._target_=odd.Lingering")
    process = commander.start(directory, ("-m", *command))
    logs = "artifacts/*/logs/*.log"
    wait_until(lambda: any("lingers" in log.read_text() for log in directory.glob(logs)))
    process.send(signum, group=signum == signal.SIGINT)
    assert process.wait() == 128 + signum
    before = Swept(directory)
    assert sorted(run.status for run in before.runs) == ["FINISHED", "KILLED", "KILLED"]
    assert before.parent.status == "KILLED" and not trials_of(directory)
    process = commander.sweep(directory, *command)
    assert process.exit_code == 0, process.stderr
    after = Swept(directory)
    assert {run.status for run in after.runs} == {"FINISHED"} and len(after.runs) == 3
    (winner,) = (run for run in after.children if run.run_id == after.parent.tags["best.run"])
    assert winner.metrics["test/accuracy"]


@pytest.mark.slow
def test_of_two_first_starts_at_once_one_is_refused(commander, tmp_path):
    directory = tmp_path / "runs"
    slow = ["slow", "tracklight.sweep.parent_run:_tags", 1.0]
    both = [commander.start(directory, ("-m", *GRID), faults=[slow]) for _ in range(2)]
    assert sorted(process.wait() for process in both) == [0, 2]
    assert len(Swept(directory).parents) == 1


@pytest.mark.slow
def test_changed_code_is_refused_and_the_finished_sweep_left_as_it_was(commander, tmp_path):
    directory = tmp_path / "runs"
    assert commander.sweep(directory, *GRID).exit_code == 0
    before = Swept(directory)
    process = commander.sweep(directory, *GRID, faults=[["change_code"]])
    assert process.exit_code == 2 and process.stderr.count("\n") == 1
    assert "the code has changed since this sweep began (digest" in process.stderr
    after = Swept(directory)
    assert [vars(run) for run in after.runs] == [vars(run) for run in before.runs]


@pytest.mark.slow
def test_changed_data_are_refused_unless_that_is_allowed(commander, tmp_path):
    directory, label = tmp_path / "runs", tmp_path / "label"
    blobs = [word for word in BLOBS if not word.startswith("data._target_")]
    kept = (*blobs, "data._target_=odd.Kept", f"+data.path={label}")
    label.write_text("1")
    assert commander.sweep(directory, "optimizer.lr=0.01,0.1", *kept).exit_code == 0
    before = Swept(directory)
    label.write_text("2")
    longer = ("optimizer.lr=0.01,0.1,0.05", *kept)
    process = commander.sweep(directory, *longer)
    assert process.exit_code == 2 and process.stderr.count("\n") == 1
    assert "the data has changed since this sweep began (digest" in process.stderr
    after = Swept(directory)
    assert [vars(run) for run in after.runs] == [vars(run) for run in before.runs]
    process = commander.sweep(directory, *longer, "allow_changes=true")
    assert process.exit_code == 0, process.stderr
    assert len(Swept(directory).children) == 3


@pytest.mark.parametrize("signum", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_a_signal_stops_trials_so_that_the_same_command_continues_them(commander, tmp_path, signum):
    directory = tmp_path / "runs"
    command = ("seed=1,2", "+model.seconds=0.15", "sweep.workers=2", *ODD)
    process = commander.start(directory, ("-m", *command))
    wait_until(lambda: points(directory) > 2)
    process.send(signum, group=signum == signal.SIGINT)
    assert process.wait() == 128 + signum
    assert "Traceback" not in process.stderr
    before = Swept(directory)
    assert before.parent.status == "KILLED"
    assert {run.status for run in before.children} <= {"KILLED", "FINISHED"}
    process = commander.sweep(directory, *command)
    assert process.exit_code == 0, process.stderr
    after = Swept(directory)
    assert len(after.children) == 2 and len(after.parents) == 1
    assert {run.status for run in after.runs} == {"FINISHED"}
    for child in after.children:
        assert [step for step, _ in child.metrics["train/loss_epoch"]] == [1, 2, 3, 4, 5]


@pytest.mark.slow
def test_ctrl_c_on_a_terminal_ends_no_trial_before_it_is_told(tmp_path):
    directory = tmp_path / "runs"
    command = ("seed=1,2", "+model.seconds=0.3", "sweep.workers=2", *ODD)
    words = [sys.executable, ROOT / "train.py", "-m", *command, f"tracking.dir={directory}"]
    paths = os.pathsep.join(map(str, (ROOT / "tests", ROOT / "tests" / "sweep")))
    with subprocess.Popen(  # with a forkserver of its own, which gets the signal, too
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=os.environ | {"PYTHONPATH": paths}, cwd=tmp_path,
    ) as process:  # fmt: skip
        wait_until(lambda: points(directory) > 2)
        os.killpg(process.pid, signal.SIGINT)
        stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr + stdout and "stopping 2 running" in stdout
    assert {run.status for run in Swept(directory).runs} == {"KILLED"}


@pytest.mark.slow
def test_a_storage_that_fails_in_passing_is_one_line_and_the_sweep_continues(commander, tmp_path):
    directory, path = tmp_path / "runs", tmp_path / "study.db"
    command = (
        "optimizer.lr=interval(0.01,0.1)",
        "sweep.trials=3",
        f"sweep.storage=sqlite:///{path}",
    )
    command = (*command, "+model.seconds=0.2", *ODD)
    process = commander.start(directory, ("-m", *command))
    wait_until(lambda: points(directory) > 2)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        wait_until(lambda: process.stderr)
    assert process.wait() == 0, process.stderr
    assert "waiting for sweep.storage: " in process.stderr and "database is locked" in process.stderr
    assert process.stderr.count("\n") == 1
    swept = Swept(directory)
    assert {run.status for run in swept.runs} == {"FINISHED"} and len(swept.children) == 3


@pytest.mark.slow
def test_a_sweep_that_runs_on_another_machine_is_left_alone(commander, tmp_path):
    directory = tmp_path / "runs"
    assert commander.sweep(directory, *GRID).exit_code == 0
    parent = Swept(directory).parent.run_id
    shutil.rmtree(directory / "artifacts" / parent)
    with closing(sqlite3.connect(directory / "mlflow.db")) as connection, connection:
        connection.execute("UPDATE runs SET status = 'RUNNING' WHERE run_uuid = ?", [parent])
    process = commander.sweep(directory, *GRID)
    assert process.exit_code == 2 and process.stderr.count("\n") == 1
    assert f"this very sweep is RUNNING elsewhere, as run {parent}" in process.stderr
    assert len(Swept(directory).runs) == 4


@pytest.mark.slow
def test_a_killed_sweep_leaves_no_orphans_and_continues_to_the_same_best(commander, tmp_path):
    search = (
        *("optimizer.lr=tag(log,interval(1e-3,1e-1))", "sweep.trials=4", "sweep.pruner=median"),
        *("sweep.pruner_options={n_startup_trials: 2}", "+model.seconds=0.05", *ODD),
    )
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert commander.sweep(whole, *search).exit_code == 0
    for moment in (2, 9):
        process = commander.start(killed, ("-m", *search))
        wait_until(lambda moment=moment: points(killed) >= moment)
        process.send(signal.SIGKILL)
        process.wait()
        wait_until(lambda: not trials_of(killed))
    process = commander.sweep(killed, *search)
    assert process.exit_code == 0, process.stderr
    a, b = Swept(whole), Swept(killed)
    assert len(b.parents) == 1 and {run.status for run in b.runs} == {"FINISHED"}
    told = [
        [
            (
                run.tags["optimizer.lr"],
                run.tags["tracklight.outcome"],
                run.metrics["train/loss_epoch"],
            )
            for run in sorted(each.children, key=lambda run: int(run.tags["tracklight.trial"]))
        ]
        for each in (a, b)
    ]
    assert told[0] == told[1]
    assert a.parent.tags["best.score"] == b.parent.tags["best.score"]


def test_a_sweep_in_progress_refuses_a_second_of_the_same(commander, tmp_path):
    directory = tmp_path / "runs"
    command = ("seed=1,2", "+model.seconds=0.3", *ODD)
    process = commander.start(directory, ("-m", *command))
    wait_until(lambda: points(directory) > 0)
    second = commander.sweep(directory, *command)
    assert second.exit_code == 2
    assert "is in progress (pid" in second.stderr and second.stderr.count("\n") == 1
    process.send(signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_a_sweep_whose_parent_was_deleted_says_so_and_runs_nothing(commander, tmp_path):
    directory = tmp_path / "runs"
    assert commander.sweep(directory, *GRID).exit_code == 0
    parent = Swept(directory).parent.run_id
    with closing(sqlite3.connect(directory / "mlflow.db")) as connection, connection:
        connection.execute("UPDATE runs SET lifecycle_stage = 'deleted' WHERE run_uuid = ?", [parent])
    process = commander.sweep(directory, *GRID)
    assert process.exit_code == 2 and process.stderr.count("\n") == 1
    assert f"the parent run of this sweep, {parent}, was deleted" in process.stderr
    assert len(Swept(directory).runs) == 3


@pytest.mark.slow
def test_another_fixed_value_in_the_space_is_another_sweep(commander, tmp_path):
    directory = tmp_path / "runs"
    others = [word for word in QUICK if not word.startswith("trainer.max_epochs")]
    for epochs in (1, 2, 2):
        space = f"{{optimizer.lr: '0.01,0.1', trainer.max_epochs: {epochs}}}"
        process = commander.sweep(directory, f"sweep.space={space}", *others)
        assert process.exit_code == 0, process.stderr
    swept = Swept(directory)
    assert len(swept.parents) == 2
    assert [row["epochs"] for row in swept.leaderboard()] == [2, 2]


@pytest.mark.slow
def test_a_sweep_is_resumed_by_its_own_command_and_not_as_a_run(commander, tmp_path):
    directory = tmp_path / "runs"
    assert commander.sweep(directory, *GRID).exit_code == 0
    parent = Swept(directory).parent.run_id
    process = commander.train(directory, f"resume={parent}")
    assert process.exit_code == 2 and process.stderr.count("\n") == 1
    assert f"run {parent} is a sweep: its own command continues it" in process.stderr
    seeded = commander.sweep(directory, *GRID, "sweep.seeds=2")
    assert seeded.exit_code == 0 and len(Swept(directory).parents) == 2  # means are ranked apart
