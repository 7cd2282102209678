"""Whole sweeps, as typed: real processes, a real database."""

import sqlite3
from contextlib import closing

import numpy as np
import pytest

from commands import BLOBS, GRID, QUICK, Swept


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
    kept = (directory / "artifacts").glob("*/artifacts/checkpoints/*.ckpt")
    assert sorted((path.parts[-4], path.name) for path in kept) == sorted(
        [*((child.run_id, "best.ckpt") for child in swept.children), (ranked[0].run_id, "last.ckpt")]
    )
    assert not list(directory.glob("artifacts/*/run.lock"))  # a lock file left behind is an unclean end
    assert [row["run_id"] for row in swept.csv()] == [child.run_id for child in ranked]
    assert swept.parent.tags["best.optimizer.lr"] == ranked[0].tags["optimizer.lr"]
    assert swept.parent.tags["best.run"] == ranked[0].run_id
    assert swept.parent.metrics["score"][-1][1] == ranked[0].score
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


@pytest.mark.slow
def test_repeated_draws_are_said_and_counted(commander, tmp_path):
    directory = tmp_path / "runs"
    command = ("seed=range(0,2)", "sweep.trials=4", "sweep.sampler=random", *QUICK)
    process = commander.sweep(directory, *command)
    assert process.exit_code == 0, process.stderr
    assert process.stdout.count("  same as trial ") == 2
    assert "4 trials, 2 of them different" in process.stdout
    assert len(Swept(directory).children) == 2


@pytest.mark.parametrize(
    ("values", "num"), [pytest.param("3,3.0,3e0", 1, marks=pytest.mark.slow), ("3,2,3.0", 2)]
)
def test_points_of_a_grid_that_are_equal_numbers_are_one_and_that_is_said(commander, tmp_path, values, num):
    words = (f"data.slope={values}", "tracking=none", *QUICK)
    said = commander.sweep(tmp_path / "runs", *words).stdout
    assert said.splitlines()[0] == f"3 points of the grid, {num} of them different: each of these trains once"
    assert said.count("\ntrial ") == num and "slope=3 seed=0  complete" in said


@pytest.mark.slow
def test_points_of_a_grid_that_are_equal_lists_of_numbers_are_one_and_train(commander, tmp_path):
    words = ("optimizer=adam", "optimizer.betas=[0,0.9],[0.0,0.9]", "tracking=none", *QUICK)
    process = commander.sweep(tmp_path / "runs", *words)
    assert process.exit_code == 0, process.stderr
    assert process.stdout.splitlines()[0].startswith("2 points of the grid, 1 of them different")


@pytest.mark.slow
def test_what_the_data_warn_of_is_said_by_a_sweep_too(commander, tmp_path):
    words = ("model=mlp", "data.download=false", f"data.root={tmp_path}", "model.hidden=[2]")
    short = ("seed=1,2", "data.fallback=true", "trainer.max_epochs=1", "tracking=none", *QUICK[:2])
    process = commander.sweep(tmp_path / "runs", *words, *short)
    assert process.exit_code == 0, process.stderr
    assert process.stderr.startswith("warning: ") and process.stderr.count("\n") == 1
    assert "USING 5000 IMAGES" in process.stderr


def test_settings_without_effect_are_said(commander, tmp_path):
    def said(*words):
        return commander.sweep(tmp_path / "runs", *words, "sweep.dry_run=true").stdout

    assert "sweep.sampler needs sweep.trials" in said("seed=1,2", "sweep.sampler=random")
    mixed = ("optimizer.lr=interval(0.1,1)", "optimizer.momentum=range(0.0,0.9,0.1)", "seed=1,2")
    assert "cmaes draws seed at random" in said(*mixed, "sweep.sampler=cmaes")
    assert "at random" not in said(*mixed[:2], "sweep.sampler=cmaes")
    assert "cmaes draws optimizer.lr at random" in said(*mixed[:1], "sweep.sampler=cmaes")


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
        assert row["ci95_high"] - row["score"] == pytest.approx(half, rel=1e-8)
    assert table[0]["score"] <= table[1]["score"]
    assert swept.parent.metrics["score"][-1][1] == table[0]["score"]


@pytest.mark.slow
def test_each_point_on_several_folds_is_ranked_by_its_mean_and_tested_on_each(commander, tmp_path):
    directory = tmp_path / "runs"
    command = ("data=table", "optimizer.lr=0.01,0.1", "sweep.folds=3", *QUICK)
    for _ in range(2):  # the second time, all is done
        process = commander.sweep(directory, *command)
        assert process.exit_code == 0, process.stderr
    swept = Swept(directory)
    assert sorted(run.name for run in swept.children) == [
        *(f"0 lr=0.01 seed=0 fold={fold}" for fold in range(3)),
        *(f"1 lr=0.1 seed=0 fold={fold}" for fold in range(3)),
    ]
    best = swept.leaderboard()[0]
    runs = [run for run in swept.children if run.run_id in best["run_id"].split()]
    assert len({run.score for run in runs}) == 3
    assert best["score"] == pytest.approx(sum(run.score for run in runs) / 3, rel=1e-12)
    assert len({run.tags["tracklight.setting"] for run in swept.children}) == 2  # one for each point
    losses = [run.metrics["test/loss"][-1][1] for run in runs]
    assert float(swept.parent.tags["best.test/loss"]) == pytest.approx(sum(losses) / 3, rel=1e-12)


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
    assert float(swept.parent.tags["best.test/accuracy"]) == tested[0].metrics["test/accuracy"][0][1]


@pytest.mark.slow
def test_a_sweep_may_start_from_the_weights_of_a_run(commander, tmp_path):
    directory = tmp_path / "runs"
    commander.train(directory, *QUICK, faults=[["spare_model"]])
    first = Swept(directory).runs[0].run_id
    for word in ("best", "last"):
        process = commander.sweep(directory, *GRID, f"init_from={word}")
        changes = f"error: init_from={word} changes with each run of a sweep; take init_from={first}\n"
        assert (process.exit_code, process.stderr) == (2, changes)
    process = commander.sweep(directory, *GRID, f"init_from={first[:12]}")
    assert process.exit_code == 0, process.stderr
    swept = Swept(directory)
    assert [run.tags["tracklight.init_from"] for run in swept.children] == [first] * 3
    process = commander.sweep(directory, *GRID, "init_from=ffff")
    assert process.exit_code == 2 and "no run begins with ffff" in process.stderr
    assert len(Swept(directory).runs) == 5


@pytest.mark.slow
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
    preflight = 1
    assert len(told.read_text()) == 3 * 6 + 2 * 2 + preflight  # warm-up: 0.3 of 6 epochs, rounded up
    assert [row["epochs"] for row in swept.leaderboard() if row["state"] == "pruned"] == [2, 2]
    process = commander.sweep(directory, *command)  # pruned ones are not taken up again
    assert process.exit_code == 0 and len(Swept(directory).runs) == 6


def test_an_untracked_sweep_ranks_its_points_and_leaves_nothing(commander, tmp_path):
    directory = tmp_path / "runs"
    process = commander.sweep(directory, *GRID, "tracking=none")
    assert process.exit_code == 0, process.stderr
    assert "train/loss (min), 3 trials" in process.stdout and Swept(directory).runs == []
    assert process.stdout.count(" complete       5  ") == 3  # epochs


def test_the_dry_run_lists_the_points_and_leaves_nothing(commander, tmp_path):
    directory = tmp_path / "runs"
    process = commander.sweep(directory, *GRID, "sweep.dry_run=true")
    assert process.exit_code == 0 and Swept(directory).runs == []
    assert [f"optimizer.lr={lr}" in process.stdout for lr in ("0.01", "0.05", "0.1")] == [True] * 3


@pytest.mark.slow
def test_trials_take_the_threads_that_omp_says(commander, tmp_path):
    words = [word for word in QUICK if not word.startswith("num_threads")]
    directory = tmp_path / "runs"
    process = commander.sweep(directory, "seed=1,2", *words, env={"OMP_NUM_THREADS": "3"})
    assert process.exit_code == 0, process.stderr
    with closing(sqlite3.connect(directory / "mlflow.db")) as connection:
        recorded = connection.execute("SELECT value FROM params WHERE key = 'num_threads'").fetchall()
    assert recorded == [("3",)] * 2
