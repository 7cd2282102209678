"""SIGTERM and Ctrl-C: stop at a safe point, say so in exit code and status, go on from there."""

import os
import signal

import pytest
from configs import BATCH_END, BLOCK_END, CONFIGS, EACH_EPOCH, EPOCHS

from process import TrialResult

PLACES = {
    "before the run exists": ("tracklight.experiment.build:build_model", 1),
    "before training": ("tracklight.tracking.run:Run.log_params", 1),
    "in an epoch": (BLOCK_END, 5),
    "in validation": ("tracklight.models.supervised:Supervised.validation_step", 3),
    "in the test": ("tracklight.models.supervised:Supervised.test_step", 2),
}
JOB = {  # of one task
    **{"SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1"},
    **{"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"},
}


def test_a_run_stopped_by_sigterm_wherever_ends_in_the_same_bits(trainees, undisturbed, tmp_path):
    directory = tmp_path / "runs"
    command = (*CONFIGS["blocks"], EPOCHS, "resume=auto")
    for place, (target, call) in PLACES.items():
        strike = ["strike", target, call, ["SIGTERM"]]
        process = trainees.train(directory, *command, faults=[["spare_model"], EACH_EPOCH, strike])
        assert (process.exit_code, process.stderr) == (143, ""), place
        if place == "before the run exists":
            assert TrialResult(directory).runs == []
        else:
            stopped = TrialResult(directory)
            assert [status for _, status in stopped.runs] == ["KILLED"], place
            assert f"; resume={stopped.run_id} continues it" in process.stdout, place
        started = "a new one starts" if place == "before training" else "continues"
        assert place == "before the run exists" or f"{started}\n" in process.stdout, place
    trainees.train(directory, *command, faults=[["spare_model"]])
    assert TrialResult(directory).differences(undisturbed("blocks")) == []


@pytest.mark.slow
def test_ctrl_c_on_a_terminal_stops_a_run_and_its_workers(trainees, undisturbed, tmp_path):
    directory, mark = tmp_path / "runs", tmp_path / "mark"
    command = (*CONFIGS["foreign"], EPOCHS, "resume=auto")
    faults = [["spare_model"], EACH_EPOCH, ["meet", BATCH_END, 25, str(mark)]]
    process = trainees.start(directory, command, faults)
    process.wait_for(mark)
    process.send(signal.SIGINT, group=True)
    mark.unlink()
    assert (process.wait(), process.stderr) == (130, "")
    stopped = TrialResult(directory)
    assert stopped.status == "KILLED"
    told = f"stopped, 2 of 12 epochs done: run {stopped.run_id} "  # each has ten batches
    (line,) = [each for each in process.stdout.splitlines() if each.startswith("stopped")]
    assert line.startswith(told) and line.endswith(f"; resume={stopped.run_id} continues it")
    trainees.train(directory, *command, faults=[["spare_model"]])
    assert TrialResult(directory).differences(undisturbed("foreign")) == []


def test_a_second_ctrl_c_leaves_at_once_and_the_next_start_marks_the_run(trainees, tmp_path):
    directory, command = tmp_path / "runs", (*CONFIGS["blocks"], EPOCHS)
    strike = ["strike", BLOCK_END, 2, ["SIGINT", "SIGINT"]]
    assert trainees.train(directory, *command, faults=[strike]).exit_code == 130
    assert TrialResult(directory).status == "RUNNING"
    trainees.train(directory, *command, "seed=1", faults=[["spare_model"]])
    assert [status for _, status in TrialResult(directory).runs] == ["KILLED", "FINISHED"]


def test_sigusr1_in_a_slurm_job_stops_safely_and_leaves_nothing_for_other_runs(
    trainees, undisturbed, tmp_path
):
    """As `sbatch --signal=USR1@60` sends it; Lightning would requeue the job from a file of its own."""
    directory = tmp_path / "runs"
    trainees.furnish(directory)
    (directory / "hpc_ckpt_1.ckpt").write_bytes(b"another run's")
    before = {path.name for path in directory.iterdir()}
    command = (*CONFIGS["blocks"], EPOCHS, "resume=auto")
    strike = ["strike", BLOCK_END, 5, ["SIGUSR1"]]
    process = trainees.train(directory, *command, faults=[["spare_model"], EACH_EPOCH, strike], env=JOB)
    assert (process.exit_code, process.stderr) == (128 + signal.SIGUSR1, "")
    assert [status for _, status in TrialResult(directory).runs] == ["KILLED"]
    process = trainees.train(directory, *command, faults=[["spare_model"]], env=JOB)
    assert process.exit_code == 0, process.stderr
    assert TrialResult(directory).differences(undisturbed("blocks")) == []
    assert {path.name for path in directory.iterdir()} == before | {"artifacts"}


@pytest.mark.parametrize(
    "rank",
    [
        {"RANK": "1"},
        *(pytest.param({name: "3"}, marks=pytest.mark.slow) for name in ("NODE_RANK", "SLURM_PROCID")),
    ],
)
def test_a_rank_left_over_in_the_environment_changes_nothing(trainees, undisturbed, tmp_path, rank):
    directory = tmp_path / "runs"
    process = trainees.train(directory, *CONFIGS["blocks"], EPOCHS, faults=[["spare_model"]], env=rank)
    assert (process.exit_code, process.stderr) == (0, "")
    assert TrialResult(directory).differences(undisturbed("blocks")) == []
    assert {path.name for path in directory.iterdir()} == {"mlflow.db", "artifacts"}


def test_on_a_login_node_of_a_cluster_nothing_is_said_of_srun(trainees, tmp_path):
    (tmp_path / "bin").mkdir()
    srun = tmp_path / "bin" / "srun"
    srun.write_text("#!/bin/sh\n")
    srun.chmod(0o755)
    env = {"PATH": f"{srun.parent}:{os.environ['PATH']}"}
    process = trainees.train(tmp_path / "runs", *CONFIGS["blocks"], "trainer.max_epochs=2", env=env)
    assert (process.exit_code, process.stderr) == (0, "")
