"""Sweeps whose trials are jobs of a real Slurm cluster, some of them preempted."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from commands import ODD, Swept, points

pytestmark = [pytest.mark.slow, pytest.mark.slurm]
ROOT = Path(__file__).resolve().parents[2]
EPOCHS = 5
TRIALS = ("seed=range(1,9)", *ODD)


def scores(swept: Swept) -> dict[str, list]:
    return {run.tags["tracklight.trial"]: run.metrics.get("train/loss_epoch", []) for run in swept.children}


def test_trials_that_are_preempted_continue_and_the_sweep_ends_as_if_undisturbed(
    cluster, commander, tmp_path
):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="needs hydra-submitit-launcher")
    directory, told = tmp_path / "runs", tmp_path / "told"
    for name in ("train.py", "tests/foreign.py", "tests/sweep/odd.py"):
        shutil.copy(ROOT / name, tmp_path)
    words = (f"+callbacks.told={{_target_: odd.Told, path: {told}}}", f"tracking.dir={directory}")
    words += ("hydra/launcher=slurm", "hydra.launcher.timeout_min=5", "+model.seconds=1.1")
    command = [sys.executable, "train.py", "-m", *TRIALS, *words]

    def training() -> str:
        """The number of a trial that has an epoch or two behind it."""
        runs = Swept(directory).children if (directory / "mlflow.db").exists() else []
        early = (run for run in runs if len(run.metrics.get("train/loss_epoch", ())) in (1, 2))
        return next((run.tags["tracklight.trial"] for run in early if run.status == "RUNNING"), "")

    def jobs(state: str) -> dict[str, str]:
        """The job of each trial, by its number, in a state or waiting for a reason."""
        told = cluster.run("squeue", "-h", "-r", "-p", "main", "-o", "%K %A %T %r").splitlines()
        return {trial: job for trial, job, *states in map(str.split, told) if state in states}

    with (tmp_path / "said").open("w") as file:
        sweep = subprocess.Popen(command, cwd=tmp_path, env=cluster.env, stdout=file, stderr=file)
    try:
        cluster.wait_until(lambda: training() in jobs("RUNNING"))
        job = jobs("RUNNING")[training()]
        cluster.run("scancel", "--signal=USR2", f"{job}.0")  # as before its time is up
        cluster.wait_until(lambda: jobs("BeginTime") != {})
        cluster.wait_until(lambda: training() in jobs("RUNNING"))
        cluster.run("srun", "--partition=urgent", "--cpus-per-task=2", "true")
        cluster.wait_until(lambda: len(jobs("BeginTime")) >= 2)
        for job in jobs("BeginTime").values():
            cluster.start_now(job)
        assert sweep.wait(600) == 0, (tmp_path / "said").read_text()
    finally:
        sweep.kill()
        sweep.wait()
    swept = Swept(directory)
    assert {run.status for run in swept.runs} == {"FINISHED"} and len(swept.children) == 8
    assert [row["state"] for row in swept.leaderboard()] == ["complete"] * 8
    restarts = re.findall(r"Restarts=(\d)", cluster.run("scontrol", "show", "jobs"))
    assert sum(map(int, restarts)) >= 2
    assert len(told.read_text()) <= 8 * EPOCHS + 2  # none begins anew
    process = commander.sweep(tmp_path / "whole", *TRIALS)
    assert process.exit_code == 0, process.stderr
    assert scores(swept) == scores(Swept(tmp_path / "whole"))


def test_a_sweep_in_one_job_continues_once_the_job_is_requeued(cluster, tmp_path):
    directory, output = tmp_path / "runs", tmp_path / "output"
    words = ("-m", "seed=1,2", "sweep.workers=2", "+model.seconds=1.1", *ODD, f"tracking.dir={directory}")
    job = cluster.submit(output, words)
    cluster.wait_until(lambda: points(directory) >= 2)
    cluster.run("scancel", "--signal=USR1", f"{job}.0")
    cluster.start_now(job)
    cluster.wait_until(lambda: cluster.state(job) in ("COMPLETED", "FAILED"))
    swept, said = Swept(directory), output.read_text()
    assert {run.status for run in swept.runs} == {"FINISHED"} and len(swept.runs) == 3, said
    assert said.count("goes on in run") == 2, said
