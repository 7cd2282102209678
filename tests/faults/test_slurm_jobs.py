"""Runs as jobs of a real Slurm cluster: preempted, out of time, killed."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from configs import CONFIGS

from process import TESTS, TrialResult
from slurm import Cluster

pytestmark = [pytest.mark.slow, pytest.mark.slurm]
SLOW = "+callbacks.slow={_target_: foreign.Slow, seconds: %s}"
EPOCHS = 7


@pytest.fixture(scope="module")
def whole(trainees, tmp_path_factory) -> TrialResult:
    """What the run comes to undisturbed."""
    directory = tmp_path_factory.mktemp("whole") / "runs"
    command = (*CONFIGS["blocks"], f"trainer.max_epochs={EPOCHS}", SLOW % 0.0)
    process = trainees.train(directory, *command, faults=[["spare_model"]])
    assert process.exit_code == 0, process.stderr
    return TrialResult(directory)


class Submitted:
    """A job of `scripts/slurm.sbatch`; an epoch takes a second, and leaves a checkpoint."""

    def __init__(self, cluster: Cluster, directory: Path, *options: str, words: Sequence[str] = ()):
        self.cluster, self.directory, self.output = cluster, directory, directory.parent / "output"
        epochs = (f"trainer.max_epochs={EPOCHS}", SLOW % 1.1)
        words = (*CONFIGS["blocks"], *epochs, *words, f"tracking.dir={directory}")
        self.id = cluster.submit(self.output, words, *options)

    @property
    def epochs(self) -> int:
        """How many epochs the run has validated."""
        if not (self.directory / "mlflow.db").exists():
            return 0
        result = TrialResult(self.directory)
        return sum(key == "val/loss" for key, _ in result.logged) if result.runs else 0

    @property
    def said(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    def wait_for(self, epochs: int) -> None:
        self.cluster.wait_until(lambda: self.epochs >= epochs or self._is_over)
        assert self.epochs >= epochs, self.said

    @property
    def _is_over(self) -> bool:
        return self.cluster.state(self.id) in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")

    def kill_and_requeue(self) -> None:
        """Kill the job's processes, and start it again once it has failed."""
        self.cluster.run("scancel", "--signal=KILL", f"{self.id}.0")
        self.cluster.wait_until(lambda: self.cluster.state(self.id) == "FAILED")
        self.cluster.run("scontrol", "requeue", self.id)
        self.cluster.start_now(self.id)

    def finish(self) -> None:
        self.cluster.wait_until(lambda: self._is_over)
        assert self.cluster.state(self.id) == "COMPLETED", self.said


def test_a_job_that_is_preempted_three_times_ends_in_the_bits_of_one_that_is_not(cluster, whole, tmp_path):
    job = Submitted(cluster, tmp_path / "runs", "--partition=patient")
    job.wait_for(1)
    cluster.run("scancel", "--signal=USR1", job.id)  # as `--signal=USR1@120` before the time is up
    cluster.start_now(job.id)
    job.wait_for(3)
    cluster.run("srun", "--partition=urgent", "--cpus-per-task=2", "true")  # SIGTERM, and a minute of grace
    cluster.start_now(job.id, "Partition=main")
    job.wait_for(5)
    cluster.run("srun", "--partition=urgent", "--cpus-per-task=2", "true")  # SIGTERM, SIGKILL soon after
    cluster.start_now(job.id)
    job.finish()
    assert "Restarts=3" in cluster.run("scontrol", "show", "job", job.id)
    result = TrialResult(tmp_path / "runs")
    assert result.differences(whole) == []
    assert job.said.count(f"resume=auto: run {result.run_id} ") == 3, job.said


def test_a_job_whose_process_is_killed_continues_once_it_is_requeued(cluster, whole, tmp_path):
    job = Submitted(cluster, tmp_path / "runs")
    job.wait_for(3)
    job.kill_and_requeue()
    job.finish()
    result = TrialResult(tmp_path / "runs")
    assert result.differences(whole) == []
    assert job.said.count(f"resume=auto: run {result.run_id} ") == 1, job.said


def test_a_job_of_two_tasks_is_one_run_that_continues_after_it_is_preempted(cluster, trainees, tmp_path):
    words = ("trainer.devices=2", "trainer.strategy=ddp")
    undisturbed = (*CONFIGS["blocks"], f"trainer.max_epochs={EPOCHS}", SLOW % 0.0, *words)
    env = {"PYTHONPATH": str(TESTS)}
    process = trainees.train(tmp_path / "whole", *undisturbed, faults=[["spare_model"]], env=env)
    assert process.exit_code == 0, process.stderr
    options = ("--ntasks-per-node=2", "--cpus-per-task=1")
    job = Submitted(cluster, tmp_path / "runs", *options, words=words)
    job.wait_for(1)
    cluster.run("scancel", "--signal=USR1", job.id)
    cluster.start_now(job.id)
    job.wait_for(3)
    job.kill_and_requeue()
    job.finish()
    result = TrialResult(tmp_path / "runs")
    assert result.differences(TrialResult(tmp_path / "whole")) == []
    assert job.said.count(f"resume=auto: run {result.run_id} ") == 2, job.said
