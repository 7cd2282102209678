"""Two processes of one run: whichever goes, both end, and continuing gives the same bits."""

import signal
from pathlib import Path

import psutil
import pytest
from configs import CONFIGS, EPOCHS

from process import TESTS, TrialResult

pytestmark = pytest.mark.slow

ENDED_S = 30.0
HERE = {"PYTHONPATH": str(TESTS)}  # where the second process finds the data
TWO = ("trainer.devices=2", "trainer.strategy=ddp")
COMMAND = (*CONFIGS["blocks"], *TWO, EPOCHS, "resume=auto")


@pytest.fixture(scope="module")
def whole(trainees, tmp_path_factory) -> TrialResult:
    directory = tmp_path_factory.mktemp("undisturbed") / "ddp"
    process = trainees.train(directory, *COMMAND, faults=[["spare_model"]], env=HERE)
    assert process.exit_code == 0, process.stderr
    return TrialResult(directory)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_when_one_process_goes_all_end_and_the_run_continues_to_the_same_bits(
    trainees, whole, tmp_path, rank, signum
):
    directory, mark = tmp_path / "runs", tmp_path / "mark"
    meet = ["meet", "tracklight.engine.blocks:Blocks.on_train_batch_end", 50, str(mark)]
    process = trainees.start(directory, COMMAND, [["spare_model"], meet], env=HERE)
    process.wait_for(mark)
    leader = psutil.Process(process.pid)
    (follower,) = [each for each in leader.children() if _trains(each)]
    (follower if rank else leader).send_signal(signum)
    mark.unlink()
    assert process.wait(ENDED_S) != 0
    _, alive = psutil.wait_procs([follower], ENDED_S)
    assert alive == []
    process = trainees.train(directory, *COMMAND, faults=[["spare_model"]], env=HERE)
    assert process.exit_code == 0, process.stderr
    assert TrialResult(directory).differences(whole) == []


def test_all_processes_are_one_run_and_share_the_examples(whole):
    assert [status for _, status in whole.runs] == ["FINISHED"]
    # 600 training examples in two halves, in minibatches of 16
    assert whole.steps("train/loss")[-1] == 12 * 19


def test_a_strategy_that_copies_the_process_is_refused(trainees, tmp_path):
    words = (*CONFIGS["blocks"], "trainer.devices=2", "trainer.strategy=ddp_spawn")
    process = trainees.train(tmp_path / "runs", *words)
    assert process.exit_code == 2 and "try trainer.strategy=ddp" in process.stderr
    assert TrialResult(tmp_path / "runs").runs == []


def _trains(process: psutil.Process) -> bool:
    return any(Path(word).name == "train.py" for word in process.cmdline())
