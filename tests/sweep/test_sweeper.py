"""Whole sweeps, as typed: real processes, a real database."""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from commands import BLOBS, ODD, QUICK, Swept

ROOT = Path(__file__).resolve().parents[2]
GRID = ("optimizer.lr=0.01,0.05,0.1", *QUICK)


def test_a_grid_is_a_parent_with_a_child_a_point_and_its_leaderboard(commander, tmp_path):
    directory = tmp_path / "runs"
    drawn = [word for word in GRID if word != "tracking.figures=false"]
    process = commander.sweep(directory, *drawn)
    assert process.exit_code == 0, process.stderr
    swept = Swept(directory)
    assert len(swept.parents) == 1 and swept.parent.status == "FINISHED"
    assert [child.status for child in swept.children] == ["FINISHED"] * 3
    assert [child.tags["optimizer.lr"] for child in swept.children] == ["0.01", "0.05", "0.1"]
    ranked = sorted(swept.children, key=lambda child: child.score)
    table = swept.leaderboard()
    assert [(row["run_id"], row["score"], row["rank"]) for row in table] == [
        (child.run_id, child.score, rank) for rank, child in enumerate(ranked, 1)
    ]
    for child in swept.children:
        assert child.score == min(value for _, value in child.metrics["train/loss"])
        figures = directory / "artifacts" / child.run_id / "artifacts" / "figures"
        assert {path.stem for path in figures.iterdir()} == {"learning_curves", "fit", "residuals"}
    assert [row["run_id"] for row in swept.csv()] == [child.run_id for child in ranked]
    assert swept.parent.tags["best.optimizer.lr"] == ranked[0].tags["optimizer.lr"]
    assert swept.parent.tags["best.run"] == ranked[0].run_id
    assert swept.parent.metrics["best/train/loss"][-1][1] == ranked[0].score
    assert "plotly" in (swept.artifacts / "plots.html").read_text()


@pytest.mark.slow
def test_the_same_grid_again_runs_nothing_and_a_longer_one_what_is_new(commander, tmp_path):
    directory = tmp_path / "runs"
    commander.sweep(directory, "optimizer.lr=0.01,0.05", *QUICK)
    before = Swept(directory)
    process = commander.sweep(directory, "optimizer.lr=0.01,0.05", *QUICK)
    again = Swept(directory)
    assert process.exit_code == 0, process.stderr
    assert [run.run_id for run in again.runs] == [run.run_id for run in before.runs]
    process = commander.sweep(directory, "optimizer.lr=0.1,0.05", *QUICK)
    longer = Swept(directory)
    assert process.exit_code == 0, process.stderr
    assert [run.run_id for run in longer.runs[:-1]] == [run.run_id for run in before.runs]
    assert longer.runs[-1].tags["optimizer.lr"] == "0.1"
    assert len(longer.leaderboard()) == 3
    process = commander.sweep(directory, "optimizer.lr=0.01,0.05", "sweep.fresh=true", *QUICK)
    assert process.exit_code == 0, process.stderr
    fresh = Swept(directory)
    assert len(fresh.parents) == 2 and len(fresh.children) == 2 and len(fresh.runs) == 7


def test_one_bad_trial_fails_alone_and_is_told_with_its_reason(commander, tmp_path):
    directory = tmp_path / "runs"
    command = ("+model.mood=good,raises,dies,exits,refuses", "sweep.workers=2", *ODD)
    process = commander.sweep(directory, *command)
    assert process.exit_code == 1
    assert process.stderr.startswith("error: 4 trials failed: trial 1 (")
    assert process.stderr.count("\n") == 1
    swept = Swept(directory)
    status = {child.tags["model.mood"]: child.status for child in swept.children}
    assert status == {
        **dict.fromkeys(("raises", "dies", "exits", "refuses"), "FAILED"),
        "good": "FINISHED",
    }
    reasons = {row["model.mood"]: row["reason"] for row in swept.leaderboard()}
    assert reasons["raises"] == "ArithmeticError: in a bad mood"
    assert reasons["dies"] == "killed by SIGKILL"
    assert reasons["exits"] == "its process ended with exit code 3"
    assert "refused by the constructor" in reasons["refuses"]
    assert all(reason in process.stdout for reason in reasons.values())
    assert swept.parent.status == "FAILED"


@pytest.mark.slow
def test_a_diverged_trial_is_failed_for_good_and_its_siblings_are_not(commander, tmp_path):
    directory = tmp_path / "runs"
    command = ("optimizer.lr=0.01,1e30", *QUICK)
    process = commander.sweep(directory, *command)
    assert process.exit_code == 1
    assert "trial 1 (" in process.stderr and "step" in process.stderr
    status = {run.tags["optimizer.lr"]: run.status for run in Swept(directory).children}
    assert status == {"0.01": "FINISHED", "1e+30": "FAILED"}
    process = commander.sweep(directory, *command)
    assert process.exit_code == 1 and "trial 1 (" in process.stderr
    assert len(Swept(directory).children) == 2


@pytest.mark.slow
def test_a_trial_that_failed_in_passing_goes_on_in_its_own_run(commander, tmp_path):
    directory = tmp_path / "runs"
    mark = f"+model.only_once={tmp_path / 'mark'}"
    command = ("+model.mood=good,dies", "+model.at=3", mark, *ODD)
    assert commander.sweep(directory, *command).exit_code == 1
    before = Swept(directory)
    process = commander.sweep(directory, *command)
    after = Swept(directory)
    assert process.exit_code == 0, process.stderr
    assert [run.run_id for run in after.children] == [run.run_id for run in before.children]
    assert [run.tags["tracklight.trial"] for run in after.children] == ["0", "1"]
    assert {run.status for run in after.children} == {"FINISHED"}
    for child in after.children:
        assert [step for step, _ in child.metrics["train/loss_epoch"]] == [1, 2, 3, 4, 5]


@pytest.mark.slow
def test_a_trial_that_never_logs_the_score_fails_alone_wherever_it_stands(commander, tmp_path):
    directory = tmp_path / "runs"
    command = ("+model.mood=quiet,good", *ODD[:1], "score.metric=odd/mood", *QUICK)
    process = commander.sweep(directory, *command)
    assert process.exit_code == 1
    assert process.stderr == "error: 1 trial failed: trial 0 (odd/mood was never logged)\n"
    swept = Swept(directory)
    assert [(row["state"], row["epochs"]) for row in swept.leaderboard()] == [
        ("complete", 5),
        ("failed", 5),
    ]
    assert sorted(run.status for run in swept.children) == ["FAILED", "FINISHED"]


@pytest.mark.slow
def test_a_sweep_all_of_whose_trials_fail_says_where_it_is_and_what_was_done(commander, tmp_path):
    directory = tmp_path / "runs"
    command = ("+model.mood=raises,dies", "+model.at=3", *ODD)
    process = commander.sweep(directory, *command)
    assert process.exit_code == 1
    swept = Swept(directory)
    assert f"sweep  {swept.parent.run_id}  {directory}" in process.stdout
    epochs = {row["model.mood"]: row["epochs"] for row in swept.leaderboard()}
    assert epochs == {"raises": 3, "dies": 0}  # a killed one has told nobody
    process = commander.sweep(directory, *command)
    assert "the sweep goes on: 0 runs have ended, 2 to be taken up again" in process.stdout
    assert sorted(run.tags["tracklight.trial"] for run in Swept(directory).children) == ["0", "1"]


@pytest.mark.slow
def test_repeated_draws_are_said_and_counted(commander, tmp_path):
    directory = tmp_path / "runs"
    command = ("seed=range(0,2)", "sweep.trials=4", "sweep.sampler=random", *QUICK)
    process = commander.sweep(directory, *command)
    assert process.exit_code == 0, process.stderr
    assert process.stdout.count("  same as trial ") == 2
    assert "4 trials, 2 of them different" in process.stdout
    assert len(Swept(directory).children) == 2


@pytest.mark.slow
def test_what_the_data_warn_of_is_said_by_a_sweep_too(commander, tmp_path):
    words = ("model=mlp", "data.download=false", f"data.root={tmp_path}", "model.hidden=[2]")
    short = ("seed=1,2", "trainer.max_epochs=1", "tracking=none", *QUICK[:2])
    process = commander.sweep(tmp_path / "runs", *words, *short)
    assert process.exit_code == 0, process.stderr
    assert process.stderr.startswith("warning: ") and process.stderr.count("\n") == 1
    assert "USING 5000 IMAGES" in process.stderr


def test_settings_without_effect_are_said(commander, tmp_path):
    def said(*words):
        return commander.sweep(tmp_path / "runs", *words, "sweep.dry_run=true").stdout

    assert "sweep.sampler=random needs sweep.trials" in said("seed=1,2", "sweep.sampler=random")
    mixed = ("optimizer.lr=interval(0.1,1)", "optimizer.momentum=range(0.0,0.9,0.1)", "seed=1,2")
    assert "cmaes draws seed at random" in said(*mixed, "sweep.sampler=cmaes")
    assert "at random" not in said(*mixed[:2], "sweep.sampler=cmaes")
    assert "cmaes draws optimizer.lr at random" in said(*mixed[:1], "sweep.sampler=cmaes")


def test_the_first_failure_stops_a_sweep_that_is_told_so(commander, tmp_path):
    directory = tmp_path / "runs"
    command = ("+model.mood=raises,good", "seed=1,2", "sweep.on_failure=stop", *ODD)
    process = commander.sweep(directory, *command)
    assert process.exit_code == 1
    assert [run.status for run in Swept(directory).children] == ["FAILED"]


@pytest.mark.slow
def test_a_point_of_a_search_that_is_no_valid_config_is_a_failed_trial(commander, tmp_path):
    directory = tmp_path / "runs"
    command = ("trainer.min_epochs=1,4", "trainer.max_epochs=5,2", "sweep.sampler=grid")
    for _ in range(2):  # nor is it tried again
        process = commander.sweep(directory, *command, "sweep.trials=4", *QUICK[:2], QUICK[3])
        assert process.exit_code == 1, process.stderr
        assert "1 trial failed: trial" in process.stderr and process.stderr.count("\n") == 1
        assert "trainer.min_epochs=4 must not be above" in process.stderr
        swept = Swept(directory)
        assert swept.parent.status == "FAILED"
        assert [run.status for run in swept.children].count("FINISHED") == 3
        (failed,) = (row for row in swept.leaderboard() if row["state"] == "failed")
        assert (failed["trainer.min_epochs"], failed["trainer.max_epochs"]) == ("4", "2")
        assert failed["reason"].startswith("trainer.min_epochs=4 must not be above")
        assert len(swept.children) == 4


@pytest.mark.slow
def test_a_search_runs_the_trials_asked_for_and_extends_to_the_same(commander, tmp_path):
    search = ("optimizer.lr=tag(log,interval(1e-3,1e-1))", "optimizer.momentum=0.0,0.9", *QUICK)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    process = commander.sweep(whole, *search, "sweep.trials=5")
    assert process.exit_code == 0, process.stderr
    commander.sweep(parts, *search, "sweep.trials=2")
    assert len(Swept(parts).children) == 2
    commander.sweep(parts, *search, "sweep.trials=5")
    a, b = Swept(whole), Swept(parts)
    assert len(a.parents) == len(b.parents) == 1
    told = [[(run.tags["optimizer.lr"], run.score) for run in each.children] for each in (a, b)]
    assert told[0] == told[1] and len(set(told[0])) == 5
    assert a.parent.tags["best.score"] == b.parent.tags["best.score"]


@pytest.mark.slow
def test_each_point_under_several_seeds_is_ranked_by_its_mean(commander, tmp_path):
    directory = tmp_path / "runs"
    command = ("optimizer.lr=0.01,0.05", "sweep.seeds=3", "seed=10", *QUICK)
    process = commander.sweep(directory, *command)
    assert process.exit_code == 0, process.stderr
    swept = Swept(directory)
    assert len(swept.children) == 6
    table = swept.leaderboard()
    for row in table:
        runs = [run for run in swept.children if run.run_id in row["run_id"].split()]
        scores = np.array([run.score for run in runs])
        assert len(scores) == 3
        assert row["score"] == pytest.approx(scores.mean(), rel=1e-12)
        assert row["std"] == pytest.approx(scores.std(ddof=1), rel=1e-12)
        half = 4.302652729911275 * scores.std(ddof=1) / np.sqrt(3)  # t of 2 degrees, 97.5 %
        assert row["ci95_high"] - row["score"] == pytest.approx(half, rel=1e-9)
    assert table[0]["score"] <= table[1]["score"]
    assert swept.parent.metrics["best/train/loss"][-1][1] == table[0]["score"]


def test_only_the_winner_meets_the_test_set_and_only_once(commander, tmp_path):
    directory = tmp_path / "runs"
    command = ("optimizer.lr=0.01,0.1", "trainer.max_epochs=3", *BLOBS)
    process = commander.sweep(directory, *command)
    assert process.exit_code == 0, process.stderr
    commander.sweep(directory, *command)
    swept = Swept(directory)
    tested = [run for run in swept.children if "test/accuracy" in run.metrics]
    assert [run.run_id for run in tested] == [swept.parent.tags["best.run"]]
    assert len(tested[0].metrics["test/accuracy"]) == 1
    assert {run.status for run in swept.children} == {"FINISHED"}
    assert (
        float(swept.parent.tags["best.test/accuracy"]) == tested[0].metrics["test/accuracy"][0][1]
    )


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
    slow = ["slow", "tracklight.sweep.parent:_tags", 1.0]
    both = [commander.start(directory, ("-m", *GRID), faults=[slow]) for _ in range(2)]
    assert sorted(process.wait() for process in both) == [0, 2]
    assert len(Swept(directory).parents) == 1


@pytest.mark.slow
def test_a_sweep_whose_winner_fails_its_test_has_failed(commander, tmp_path):
    directory = tmp_path / "runs"
    command = ("optimizer.lr=0.01,0.1", *BLOBS, "model._target_=odd.Untestable")
    process = commander.sweep(directory, *command)
    assert process.exit_code == 1
    assert "could not be tested: ArithmeticError: no test for me" in process.stderr
    assert process.stderr.count("\n") == 1
    assert Swept(directory).parent.status == "FAILED"


@pytest.mark.slow
def test_a_sweep_may_start_from_the_weights_of_a_run(commander, tmp_path):
    directory = tmp_path / "runs"
    commander.train(directory, *QUICK, faults=[["spare_model"]])
    first = Swept(directory).runs[0].run_id
    process = commander.sweep(directory, *GRID, f"init_from={first[:12]}")
    assert process.exit_code == 0, process.stderr
    swept = Swept(directory)
    assert [run.tags["tracklight.init_from"] for run in swept.children] == [first] * 3
    process = commander.sweep(directory, *GRID, "init_from=ffff")
    assert process.exit_code == 2 and "no run begins with ffff" in process.stderr
    assert len(Swept(directory).runs) == 5


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


def test_a_pruned_trial_ends_cleanly_and_costs_no_more_epochs(commander, tmp_path):
    directory, told = tmp_path / "runs", tmp_path / "epochs"
    command = (
        *("optimizer.lr=0.1,0.08,0.06,1e-6,1e-5", "trainer.max_epochs=6", "sweep.pruner=median"),
        *("sweep.pruner_options={n_startup_trials: 3}", *BLOBS),
        f"+callbacks.told={{_target_: odd.Told, path: {told}}}",
    )
    process = commander.sweep(directory, *command)
    assert process.exit_code == 0, process.stderr
    swept = Swept(directory)
    outcome = {run.tags["optimizer.lr"]: run.tags["tracklight.outcome"] for run in swept.children}
    assert outcome == {
        **dict.fromkeys(("0.1", "0.08", "0.06"), "complete"),
        **dict.fromkeys(("1e-06", "1e-05"), "pruned"),
    }
    assert {run.status for run in swept.children} == {"FINISHED"}
    rehearsal = 1
    assert len(told.read_text()) == 3 * 6 + 2 * 1 + rehearsal
    assert [row["epochs"] for row in swept.leaderboard() if row["state"] == "pruned"] == [1, 1]
    process = commander.sweep(directory, *command)  # pruned ones are not taken up again
    assert process.exit_code == 0 and len(Swept(directory).runs) == 6


@pytest.mark.parametrize(
    "signum", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM]
)
def test_a_signal_stops_trials_so_that_the_same_command_continues_them(commander, tmp_path, signum):
    directory = tmp_path / "runs"
    command = ("seed=1,2,3", "+model.seconds=0.15", "sweep.workers=2", *ODD)
    process = commander.start(directory, ("-m", *command))
    wait_until(lambda: points(directory) > 3)
    process.send(signum, group=signum == signal.SIGINT)
    assert process.wait() == 128 + signum
    assert "Traceback" not in process.stderr
    before = Swept(directory)
    assert before.parent.status == "KILLED"
    assert {run.status for run in before.children} <= {"KILLED", "FINISHED"}
    process = commander.sweep(directory, *command)
    assert process.exit_code == 0, process.stderr
    after = Swept(directory)
    assert len(after.children) == 3 and len(after.parents) == 1
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
        assert process.wait() == 1
    assert process.stderr.startswith("error: sweep.storage fails (")
    assert "database is locked" in process.stderr and process.stderr.count("\n") == 1
    process = commander.sweep(directory, *command)
    assert process.exit_code == 0, process.stderr
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


def test_an_untracked_sweep_ranks_its_points_and_leaves_nothing(commander, tmp_path):
    directory = tmp_path / "runs"
    process = commander.sweep(directory, *GRID, "tracking=none")
    assert process.exit_code == 0, process.stderr
    assert "train/loss (min), 3 trials" in process.stdout and Swept(directory).runs == []
    assert process.stdout.count(" complete       5  ") == 3  # epochs


@pytest.mark.slow
def test_a_sweep_whose_parent_was_deleted_says_so_and_runs_nothing(commander, tmp_path):
    directory = tmp_path / "runs"
    assert commander.sweep(directory, *GRID).exit_code == 0
    parent = Swept(directory).parent.run_id
    with closing(sqlite3.connect(directory / "mlflow.db")) as connection, connection:
        connection.execute(
            "UPDATE runs SET lifecycle_stage = 'deleted' WHERE run_uuid = ?", [parent]
        )
    process = commander.sweep(directory, *GRID)
    assert process.exit_code == 2 and process.stderr.count("\n") == 1
    assert f"the parent run of this sweep, {parent}, was deleted" in process.stderr
    assert len(Swept(directory).runs) == 3


@pytest.mark.slow
def test_a_first_point_that_is_refused_does_not_refuse_the_others(commander, tmp_path):
    directory = tmp_path / "runs"
    process = commander.sweep(directory, "+model.mood=refuses,good", *ODD)
    assert process.exit_code == 1, process.stderr
    assert [row["state"] for row in Swept(directory).leaderboard()] == ["complete", "failed"]


@pytest.mark.slow
def test_a_trial_of_several_processes_runs_only_its_own_point(commander, tmp_path):
    directory = tmp_path / "runs"
    two = ("trainer.devices=2", "trainer.strategy=ddp", "trainer.max_epochs=2")
    process = commander.sweep(directory, "seed=1,2", *two, *QUICK[:2], QUICK[3])
    assert process.exit_code == 0, process.stderr + process.stdout
    assert {run.status for run in Swept(directory).runs} == {"FINISHED"}
    assert len(Swept(directory).runs) == 3


@pytest.mark.slow
def test_a_launcher_of_hydras_runs_a_grid(commander, tmp_path):
    pytest.importorskip(
        "hydra_plugins.hydra_joblib_launcher", reason="needs the package hydra-joblib-launcher"
    )
    launcher = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2", f"tracking.dir={tmp_path}")
    words = [sys.executable, ROOT / "train.py", "-m", *GRID, *launcher]
    # A process of its own: joblib's do not end with one that was forked.
    process = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert process.returncode == 0, process.stderr + process.stdout
    swept = Swept(tmp_path)
    assert {run.status for run in swept.runs} == {"FINISHED"}
    assert [row["state"] for row in swept.leaderboard()] == ["complete"] * 3
    process = commander.sweep(tmp_path, *GRID)  # its trials are those of any sweep
    assert process.exit_code == 0 and len(Swept(tmp_path).runs) == 4


def test_a_metric_that_is_never_logged_is_told_before_a_launcher_starts(commander, tmp_path):
    pytest.importorskip(
        "hydra_plugins.hydra_joblib_launcher", reason="needs the package hydra-joblib-launcher"
    )
    directory = tmp_path / "runs"
    process = commander.sweep(directory, *GRID, "hydra/launcher=joblib", "score.metric=train/f1")
    assert process.exit_code == 2 and process.stderr.count("\n") == 1
    assert "score.metric=train/f1 is never logged" in process.stderr
    assert Swept(directory).runs == []


def test_what_this_machine_lacks_is_refused_unless_a_launcher_runs_elsewhere(commander, tmp_path):
    words = ("seed=1,2", "trainer.accelerator=cpu", "trainer.devices=999", "sweep.dry_run=true")
    process = commander.sweep(tmp_path / "runs", *words)
    assert process.exit_code == 2 and "trainer.devices=999" in process.stderr
    elsewhere = "hydra.launcher._target_=of_a_cluster.Launcher"
    process = commander.sweep(tmp_path / "runs", *words, elsewhere)
    assert process.exit_code == 0, process.stderr


def test_the_dry_run_lists_the_points_and_leaves_nothing(commander, tmp_path):
    directory = tmp_path / "runs"
    process = commander.sweep(directory, *GRID, "sweep.dry_run=true")
    assert process.exit_code == 0 and Swept(directory).runs == []
    assert [f"optimizer.lr={lr}" in process.stdout for lr in ("0.01", "0.05", "0.1")] == [True] * 3


BAD = {
    "empty": ((), "nothing varies"),
    "reversed": (("optimizer.lr=interval(1,0)",), "optimizer.lr=interval(1,0) is empty"),
    "no values": (("seed=range(5,5)",), "seed=range(5,5) has no values"),
    "log of zero": (("optimizer.lr=tag(log,interval(0,1))",), "must start above 0"),
    "a corner": (("optimizer.lr=interval(-1,1)",), "optimizer.lr=-1.0 must be"),
    "a point": (("optimizer.lr=0.1,-1",), "optimizer.lr=-1 must be"),
    "sampler": (("optimizer.lr=interval(0.1,1)", "sweep.sampler=magic"), "sweep.sampler=magic"),
    "pruner": (("optimizer.lr=0.1,0.2", "sweep.pruner=axe"), "sweep.pruner=axe must be"),
    "option": (
        ("optimizer.lr=interval(0.1,1)", "sweep.sampler_options={speed: 3}"),
        "sweep.sampler_options.speed",
    ),
    "storage": (
        ("optimizer.lr=interval(0.1,1)", "sweep.storage=sqlite:////nowhere/at/all.db"),
        "sweep.storage=sqlite:////nowhere/at/all.db cannot be opened",
    ),
    "metric": (("optimizer.lr=0.1,0.2", "score.metric=train/f1"), "score.metric=train/f1 is never"),
    "key": (("optimizer.rl=0.1,0.2",), "did you mean optimizer.lr"),
    "own settings": (("sweep.workers=1,2",), "sweep.workers is of the command as a whole"),
    "tracking": (("tracking.experiment=a,b",), "tracking.experiment is of the command as a whole"),
    "untracked": (
        ("seed=1,2", "tracking=none", "sweep.storage=sqlite:///study.db"),
        "sweep.storage remembers trials whose runs MLflow has",
    ),
    "function": (("optimizer.lr=intervall(0,1)",), "did you mean interval?"),
    "two scores": (("model=linear,mlp",), "scored by different metrics"),
    "seeds": (("seed=1,2", "sweep.seeds=3"), "seed varies already"),
    "resume": (("seed=1,2", "resume=0123abcd"), "resume=0123abcd is one run"),
    "walk": (("optimizer.lr=interval(0.1,1)", "sweep.sampler=grid"), "cannot walk the interval"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_no_run(commander, tmp_path, case):
    arguments, told = BAD[case]
    directory = tmp_path / "runs"
    process = commander.sweep(directory, *arguments, *QUICK)
    assert process.exit_code == 2, process.stdout + process.stderr
    assert told in process.stderr and process.stderr.count("\n") == 1
    assert process.stderr.startswith("error: ")
    assert Swept(directory).runs == []


def points(directory: Path) -> int:
    """Count the epochs that trials have logged so far."""
    count = 0
    for path in directory.glob("artifacts/*/points.wal"):
        count += path.read_bytes().count(b"train/loss_epoch")
    return count


def trials_of(directory: Path) -> list[int]:
    """Return processes, the sweep's own gone, that hold a run folder below the directory."""
    found = []
    for path in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if str(path.readlink()).startswith(f"{directory}/artifacts"):
                found.append(int(path.parts[2]))
        except OSError:
            continue
    return found


def wait_until(holds, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)
