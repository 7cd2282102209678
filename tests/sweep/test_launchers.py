"""Whole sweeps whose trials take several processes, or Hydra's launchers."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from commands import GRID, QUICK, Swept

ROOT = Path(__file__).resolve().parents[2]


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


def test_a_launcher_that_is_not_installed_is_told_before_anything_starts(commander, tmp_path):
    if find_spec("ray"):
        pytest.skip("needs an environment without ray")
    process = commander.sweep(tmp_path / "runs", *GRID, "hydra/launcher=ray")
    assert process.exit_code == 2 and process.stderr.count("\n") == 1
    assert process.stderr.endswith("; pip install 'tracklight[ray]'\n")
    assert Swept(tmp_path / "runs").runs == []


def test_what_this_machine_lacks_is_refused_unless_a_launcher_runs_elsewhere(commander, tmp_path):
    words = ("seed=1,2", "trainer.accelerator=cpu", "trainer.devices=999", "sweep.dry_run=true")
    process = commander.sweep(tmp_path / "runs", *words)
    assert process.exit_code == 2 and "trainer.devices=999" in process.stderr
    elsewhere = "hydra.launcher._target_=hydra_plugins.of_a_cluster.Launcher"
    process = commander.sweep(tmp_path / "runs", *words, elsewhere)
    assert process.exit_code == 0, process.stderr
    assert "this machine's cores divided by sweep.workers; num_threads=N" in process.stdout


@pytest.mark.slow
def test_launched_trials_ask_a_shared_storage_whether_they_are_pruned(tmp_path):
    pytest.importorskip(
        "hydra_plugins.hydra_joblib_launcher", reason="needs the package hydra-joblib-launcher"
    )
    words = ("optimizer.lr=0.1,0.08,1e-5", "trainer.max_epochs=6", "sweep.pruner=median")
    words += ("sweep.warmup_trials=2", "sweep.workers=1", "sweep.on_failure=stop", *QUICK[:2], *QUICK[3:])
    launcher = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2", f"tracking.dir={tmp_path}")
    storage = f"sweep.storage=sqlite:///{tmp_path}/study.db"
    command = [sys.executable, ROOT / "train.py", "-m", *words, *launcher, storage]
    process = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert process.returncode == 0, process.stderr + process.stdout
    states = {row["optimizer.lr"]: row["state"] for row in Swept(tmp_path).leaderboard()}
    assert states == {"0.1": "complete", "0.08": "complete", "1e-05": "pruned"}
    assert "sweep.pruner ignored" not in process.stdout
