"""Kill -9 at named points of a real run: the same command ends in an undisturbed one's bits."""

import pytest
from configs import BATCH_END, BLOCK_END, CONFIGS, EACH_EPOCH, EPOCHS, FURTHER_CONFIGS

from process import TrialResult

CHECKPOINT = "tracklight.engine.checkpoint_io"
IO = f"{CHECKPOINT}:DurableCheckpointIO"
TRACKING = "tracklight.tracking"
DURING = {
    "after the run is created": ("tracklight.tracking.store:Store.create_once", 1, True),
    "before its config is logged": ("tracklight.tracking.run:Run.log_params", 1, False),
    "before the first epoch": ("tracklight.engine.blocks:Blocks.on_fit_start", 1, True),
    "within the first epoch": (BLOCK_END, 2, False),
    "within the second epoch": (BLOCK_END, 3, True),
    "before a checkpoint": (f"{IO}.save_checkpoint", 3, False),
    "in a checkpoint's write": (f"{CHECKPOINT}:_write_synced", 3, "half"),
    "before the metrics are durable": ("tracklight.tracking.run:Run.sync", 3, False),
    "after the metrics are durable": ("tracklight.tracking.run:Run.sync", 3, True),
    "before a checkpoint's rename": (f"{CHECKPOINT}:write_checksum", 3, True),
    "after a checkpoint's rename": (f"{CHECKPOINT}:sync_folder", 3, False),
    "before the oldest checkpoint goes": (f"{IO}.remove_checkpoint", 1, False),
    "after the oldest checkpoint went": (f"{IO}.remove_checkpoint", 1, True),
    "before metrics are logged": ("tracklight.tracking.run:Run.log_metrics", 3, False),
    "after metrics are logged": ("tracklight.tracking.run:Run.log_metrics", 3, True),
    "before points are sent": (f"{TRACKING}.sender:MlflowWriter._log", 1, False),
    "after points are sent": (f"{TRACKING}.sender:MlflowWriter._log", 1, True),
}
CLOSING = {
    "before the test": ("pytorch_lightning:Trainer.test", 1, False),
    "after the test": ("pytorch_lightning:Trainer.test", 1, True),
    "before the last checkpoint is named so": ("tracklight.engine.checkpoints:keep_last", 1, False),
    "after the last checkpoint is named so": (
        "tracklight.engine.checkpoint_io:sync_folder",
        1,
        False,
    ),
    "after the model is logged": ("tracklight.experiment.record:Recorder.log_final", 1, True),
    "before the run is finished": (f"{TRACKING}.run:Run.finish", 1, False),
    "before its end is sent": (f"{TRACKING}.sender:Sender.drain", 2, False),
    "before its lock is removed": (f"{TRACKING}.lock:RunLock.remove", 1, False),
}


POINTS = DURING | CLOSING
IN_BLOCKS = ("blocks", "plateau", "early_stopping")
QUICK = (
    *("after the run is created", "before its config is logged", "within the second epoch"),
    *("in a checkpoint's write", "before the metrics are durable", "before a checkpoint's rename"),
    *("after a checkpoint's rename", "after metrics are logged", "before points are sent"),
    *("after points are sent", "after the last checkpoint is named so"),
    "before its end is sent",
)  # `make torture` visits all points with every kind of run


def kill_at(trainees, directory, name, points, faults=()) -> None:
    """Start the same command again and again, killed at one point after the other; let it end."""
    command = (*(CONFIGS | FURTHER_CONFIGS)[name], EPOCHS, "resume=auto")
    for point in points:
        target, call, after = POINTS[point]
        strike = ["strike", target, call, ["SIGKILL"], after]
        fault = ["halve", target, call] if after == "half" else strike
        struck = [fault]
        if target == BLOCK_END and name not in IN_BLOCKS:  # where there are blocks, they end first
            struck.append(["strike", BATCH_END, call, ["SIGKILL"], after])
        process = trainees.train(directory, *command, faults=[["spare_model"], EACH_EPOCH, *faults, *struck])
        assert process.exit_code == -9, f"{point}: {process.stdout}{process.stderr}"
    process = trainees.train(directory, *command, faults=[["spare_model"], EACH_EPOCH, *faults])
    assert process.exit_code == 0, process.stderr


def test_a_run_killed_at_named_points_ends_in_the_same_bits(trainees, undisturbed, tmp_path):
    kill_at(trainees, tmp_path / "runs", "blocks", QUICK)
    assert TrialResult(tmp_path / "runs").differences(undisturbed("blocks")) == []


@pytest.mark.slow
def test_what_was_logged_beyond_a_later_runs_checkpoint_comes_once(trainees, undisturbed, tmp_path):
    # The second process saves the epoch in which training stops; the first has tested already.
    points = ("after the test", "before the last checkpoint is named so")
    kill_at(trainees, tmp_path / "runs", "early_stopping", points)
    assert TrialResult(tmp_path / "runs").differences(undisturbed("early_stopping")) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", FURTHER_CONFIGS)
def test_every_further_kind_of_run_killed_where_it_writes_ends_in_the_same_bits(
    trainees, undisturbed, tmp_path, name
):
    points = ("after metrics are logged", "before a checkpoint's rename", "within the second epoch")
    points += ("after a checkpoint's rename", "before the metrics are durable", "before the run is finished")
    kill_at(trainees, tmp_path / "runs", name, points)
    assert TrialResult(tmp_path / "runs").differences(undisturbed(name)) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mutation", "seen"),
    [
        ("forget_epoch_order", "last.ckpt: state_dict"),
        ("forget_step_seeding", "last.ckpt: state_dict"),
        ("forget_replay_filter", "doubled: train/loss at 151"),
    ],
)
def test_without_this_mechanism_one_kill_shows(trainees, tmp_path, mutation, seen):
    whole = tmp_path / "whole"
    trainees.train(whole, *CONFIGS["blocks"], EPOCHS, faults=[["spare_model"], [mutation]])
    kill_at(trainees, tmp_path / "runs", "blocks", ["within the second epoch"], [[mutation]])
    assert seen in TrialResult(tmp_path / "runs").differences(TrialResult(whole))
