"""What fails while training: the loss, the memory, the checkpoints themselves."""

import pytest
from configs import BLOBS, CONFIGS, EACH_EPOCH, EPOCHS, LISTENER, MLP, QUICK

from process import TrialResult

COMMIT = "tracklight.engine.checkpoints:ResumeCheckpoint._commit"
SPARE = [["spare_model"]]
SCORED = ("score.metric=val/loss", "score.mode=min")
OF_MLP = ("~model.hidden", "~model.dropout", "~model.activation")


@pytest.mark.parametrize("further", [(), (LISTENER,)], ids=["blocks", "plain"])
def test_a_non_finite_loss_stops_the_run_at_its_step(trainees, tmp_path, further):
    directory = tmp_path / "runs"
    command = ("model=mlp", "model._target_=foreign.Diverging", "+model.nan_at=340", *OF_MLP)
    command = (*command, *BLOBS, *QUICK, EPOCHS, *further, *SCORED)
    process = trainees.train(directory, *command, faults=SPARE)
    run = TrialResult(directory)
    assert process.exit_code == 1
    assert process.stderr.startswith("error: train/loss is nan at step 340: stopped there")
    assert process.stderr.count("\n") == 1
    assert (run.status, run.tags["tracklight.non_finite_step"]) == ("FAILED", "340")
    steps = run.steps("train/loss")
    assert steps[:339] == list(range(1, 340)) and set(steps[339:]) <= {340}
    assert max(step for _, step, *_ in run.points) <= 340
    best = run.checkpoint("best")
    assert best["global_step"] in (150, 300)
    assert all(tensor.isfinite().all() for tensor in best["state_dict"].values())
    trainees.train(directory, *command, "resume=auto", faults=SPARE)
    assert [status for _, status in TrialResult(directory).runs] == ["FAILED", "FAILED"]


def test_memory_that_runs_out_is_one_line_with_the_batch_size(trainees, tmp_path):
    directory = tmp_path / "runs"
    command = (
        "model=mlp",
        "model._target_=foreign.Greedy",
        *OF_MLP,
        *BLOBS,
        *QUICK,
        EPOCHS,
        *SCORED,
    )
    for _ in range(2):  # the second time continues the same run
        process = trainees.train(directory, *command, "resume=auto", faults=SPARE)
        assert process.exit_code == 1
        assert process.stderr == ("error: out of memory; make data.batch_size=16 smaller first\n")
        assert [status for _, status in TrialResult(directory).runs] == ["FAILED"]


def test_a_damaged_checkpoint_costs_a_warning_and_the_one_before_is_used(trainees, undisturbed, tmp_path):
    directory = tmp_path / "runs"
    command = (*CONFIGS["blocks"], EPOCHS, "resume=auto")
    die = ["strike", COMMIT, 4, ["SIGKILL"], True]
    trainees.train(directory, *command, faults=[*SPARE, EACH_EPOCH, die])
    newest = max(TrialResult(directory).checkpoints.glob("step-*.ckpt"))
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 16
    newest.write_bytes(content)
    process = trainees.train(directory, *command, faults=[*SPARE, EACH_EPOCH])
    assert process.exit_code == 0
    assert f"{newest} is damaged" in process.stderr
    assert TrialResult(directory).differences(undisturbed("blocks")) == []


def test_where_no_checkpoint_is_whole_nothing_starts_afresh(trainees, tmp_path):
    directory = tmp_path / "runs"
    command = (*MLP, EPOCHS, "resume=auto")
    die = ["strike", COMMIT, 2, ["SIGKILL"], True]
    trainees.train(directory, *command, faults=[*SPARE, EACH_EPOCH, die])
    before = TrialResult(directory)
    for path in before.checkpoints.glob("*.ckpt"):
        path.write_bytes(b"")
    process = trainees.train(directory, *command)
    assert process.exit_code == 1
    assert process.stderr.splitlines()[-1] == (
        f"error: no checkpoint in {before.checkpoints} is intact; not starting afresh"
    )
    assert max(step for _, step, *_ in TrialResult(directory).points) < 700  # of 1,800: none anew
    assert len(TrialResult(directory).runs) == 1
