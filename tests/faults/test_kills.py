"""Kill -9 at named points of a real run: the same command ends in an undisturbed one's bits."""

import pytest
from configs import CONFIGS, EACH_EPOCH, EPOCHS

from process import Outcome

CHECKPOINT = "tracklight.engine.checkpoint"
IO = f"{CHECKPOINT}:DurableCheckpointIO"
TRACKING = "tracklight.tracking"
DURING = {
    "after the run is created": ("tracklight.tracking.creation:create_once", 1, True),
    "before its config is logged": ("tracklight.tracking.run:Run.log_params", 1, False),
    "before the first epoch": ("tracklight.engine.blocks:Blocks.on_fit_start", 1, True),
    "within the first epoch": ("tracklight.engine.blocks:Blocks.on_train_batch_end", 2, False),
    "within the second epoch": ("tracklight.engine.blocks:Blocks.on_train_batch_end", 3, True),
    "before a checkpoint": (f"{IO}.save_checkpoint", 3, False),
    "in a checkpoint's write": (f"{CHECKPOINT}:_HashingFile.write", 40, "half"),
    "before the metrics are durable": ("tracklight.tracking.run:Run.sync", 3, False),
    "after the metrics are durable": ("tracklight.tracking.run:Run.sync", 3, True),
    "before a checkpoint's rename": (f"{CHECKPOINT}:write_checksum", 3, True),
    "after a checkpoint's rename": (f"{CHECKPOINT}:sync_folder", 3, False),
    "before the oldest checkpoint goes": (f"{IO}.remove_checkpoint", 1, False),
    "after the oldest checkpoint went": (f"{IO}.remove_checkpoint", 1, True),
    "before metrics are logged": ("tracklight.tracking.run:Run.log_metrics", 3, False),
    "after metrics are logged": ("tracklight.tracking.run:Run.log_metrics", 3, True),
    "before points are sent": (f"{TRACKING}.feeder:Delivery._send", 1, False),
    "after points are sent": (f"{TRACKING}.feeder:Delivery._send", 1, True),
}
CLOSING = {
    "before the test": ("pytorch_lightning:Trainer.test", 1, False),
    "after the test": ("pytorch_lightning:Trainer.test", 1, True),
    "before the last checkpoint is named so": ("tracklight.experiment:keep_last", 1, False),
    "after the last checkpoint is named so": (
        "tracklight.engine.resume_checkpoint:sync_folder",
        1,
        False,
    ),
    "after the model is logged": ("tracklight.experiment:leave", 1, True),
    "before the run is finished": (f"{TRACKING}.run:Run.finish", 1, False),
    "before its end is sent": (f"{TRACKING}.feeder:Feeder.drain", 2, False),
    "before its lock is removed": (f"{TRACKING}.lock:RunLock.remove", 1, False),
}


def live_and_die(trainees, directory, config, points) -> None:
    """Start the same command again and again, killed at one point after the other."""
    for point, (target, call, after) in points.items():
        fault = (
            ["halve", target, call]
            if after == "half"
            else ["strike", target, call, ["SIGKILL"], after]
        )
        process = trainees.train(
            directory, *config, EPOCHS, "resume=auto", faults=[["spare_model"], EACH_EPOCH, fault]
        )
        assert process.exit_code == -9, f"{point}: {process.stdout}{process.stderr}"


@pytest.mark.parametrize("name", ["blocks", "foreign"])
def test_a_run_killed_at_every_named_point_ends_in_the_same_bits(
    trainees, undisturbed, tmp_path, name
):
    directory = tmp_path / "runs"
    live_and_die(trainees, directory, CONFIGS[name], DURING | CLOSING)
    process = trainees.train(
        directory, *CONFIGS[name], EPOCHS, "resume=auto", faults=[["spare_model"]]
    )
    assert process.exit_code == 0, process.stderr
    assert Outcome(directory).differences(undisturbed(name)) == []
