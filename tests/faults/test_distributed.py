"""Two processes of one run: whichever goes, both end, and continuing gives the same bits."""

import re
import shutil
import signal
import sqlite3
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest
from configs import ALLOWED, BATCH_END, CONFIGS, EPOCHS

from process import TESTS, Process, TrialResult, free_port

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
    meet = ["meet", BATCH_END, 50, str(mark)]
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
    assert whole.steps("train/loss")[-1] == 12 * 75


def test_a_strategy_that_copies_the_process_is_refused(trainees, tmp_path):
    words = (*CONFIGS["blocks"], "trainer.devices=2", "trainer.strategy=ddp_spawn")
    process = trainees.train(tmp_path / "runs", *words)
    assert process.exit_code == 2 and "try trainer.strategy=auto" in process.stderr
    assert TrialResult(tmp_path / "runs").runs == []


def _trains(process: psutil.Process) -> bool:
    return any(Path(word).name == "train.py" for word in process.cmdline())


def test_a_process_that_is_stopped_is_not_waited_for_for_ever(trainees, whole, tmp_path):
    directory, mark = tmp_path / "runs", tmp_path / "mark"
    meet = ["meet", BATCH_END, 50, str(mark)]
    impatient = ["put", "tracklight.engine.distributed:WAIT_S", 30.0]  # the other one's imports take ten
    process = trainees.start(directory, COMMAND, [["spare_model"], meet, impatient], env=HERE)
    process.wait_for(mark)
    (follower,) = [each for each in psutil.Process(process.pid).children() if _trains(each)]
    follower.suspend()
    mark.unlink()
    assert process.wait() == 1
    line = process.stderr.splitlines()[-1]
    assert line.startswith(
        "error: another of the 2 processes of this run is gone, or has not answered for 30 s;"
    )
    assert psutil.wait_procs([follower], ENDED_S)[1] == []
    assert TrialResult(directory).status == "FAILED"
    process = trainees.train(directory, *COMMAND, faults=[["spare_model"]], env=HERE)
    assert process.exit_code == 0, process.stderr
    assert TrialResult(directory).differences(whole) == []


NODES = (*CONFIGS["blocks"], "trainer.num_nodes=2", EPOCHS, "resume=auto")


def test_a_node_that_does_not_come_is_named_and_waited_for_for_a_while(trainees, tmp_path):
    impatient = ["put", "tracklight.engine.distributed:WAIT_S", 3.0]
    env = {**HERE, "MASTER_PORT": str(free_port())}
    process = trainees.train(tmp_path / "runs", *NODES, faults=[["spare_model"], impatient], env=env)
    said = f"waiting up to 3 s for all 2 nodes; this is NODE_RANK=0, .* MASTER_PORT={env['MASTER_PORT']}\n"
    assert process.exit_code == 1 and re.search(said, process.stdout)
    assert process.stderr.splitlines()[-1].startswith("error: another of the 2 processes of this run is gone")
    assert "Traceback" not in process.stderr and TrialResult(tmp_path / "runs").status == "FAILED"


@pytest.mark.parametrize("signals", [[signal.SIGTERM], [signal.SIGINT, signal.SIGINT]])
def test_a_signal_ends_the_wait_for_another_node(trainees, tmp_path, signals):
    directory = tmp_path / "runs"
    soon = ["put", "tracklight.engine.signals:STUCK_S", 2.0]
    process = trainees.start(directory, NODES, [["spare_model"], soon], env=HERE)
    while "waiting" not in process.stdout:
        time.sleep(0.05)
    time.sleep(1)  # it is inside of PyTorch now
    for number in signals:
        process.send(number)
        time.sleep(0.2)
    assert process.wait(ENDED_S) == 128 + signals[-1]
    trainees.train(directory, *CONFIGS["blocks"], EPOCHS, faults=[["spare_model"]])
    assert [status for _, status in TrialResult(directory).runs] == ["KILLED", "FINISHED"]


def torchrun(rank: int, port: int) -> dict[str, str]:
    ranks = {name: str(rank) for name in ("RANK", "LOCAL_RANK")}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return {**HERE, **ranks, **address, "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "a"}


@pytest.mark.parametrize("by_id", [False, True])
def test_processes_that_torchrun_launched_are_one_run_which_they_continue_to_the_same_bits(
    trainees, whole, tmp_path, by_id
):
    directory, mark = tmp_path / "runs", tmp_path / "mark"
    meet = ["meet", BATCH_END, 200, str(mark)]

    def start(*command: str, at_rank_one: Sequence[Any] = ()) -> list[Process]:
        port = free_port()
        faults = [["spare_model"]], [["spare_model"], *at_rank_one]
        return [trainees.start(directory, command, faults[r], env=torchrun(r, port)) for r in (0, 1)]

    command = (*CONFIGS["blocks"], *TWO, EPOCHS)
    both = start(*command, at_rank_one=[meet])
    both[1].wait_for(mark)
    for process in both:
        process.send(signal.SIGKILL)
    mark.unlink()
    assert [process.wait(ENDED_S) for process in both] == [-signal.SIGKILL] * 2
    run_id = TrialResult(directory).run_id
    both = start(*((f"resume={run_id}", ALLOWED) if by_id else (*command, "resume=auto")))
    assert [process.wait() for process in both] == [0, 0], both[0].stderr + both[1].stderr
    assert TrialResult(directory).differences(whole) == []
    assert by_id or f"resume=auto: run {run_id}" in both[0].stdout
    assert both[1].stdout == ""


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_torchrun_launched_does_not_wait_for_ever_for_one_that_resumes_nothing(
    trainees, whole, tmp_path, rank
):
    impatient = ["put", "tracklight.engine.distributed:WAIT_S", 3.0]
    command = (*CONFIGS["blocks"], *TWO, EPOCHS, "resume=auto")
    process = trainees.train(tmp_path / "runs", *command, faults=[impatient], env=torchrun(rank, free_port()))
    assert process.exit_code == 1 and "Traceback" not in process.stderr
    gone = "the first process" if rank else "another of the 2 processes"
    line = process.stderr.splitlines()[-1]
    assert line.startswith(f"error: {gone} of this run is gone, or has not answered for 3 s; ")


def test_processes_that_torchrun_launched_start_from_the_best_weights_of_another_run(
    trainees, whole, tmp_path
):
    directory, port = tmp_path / "runs", free_port()
    shutil.copytree(whole.directory, directory)
    still = ("optimizer.lr=1e-30", "trainer.max_epochs=1", f"init_from={whole.run_id}")
    command = (*CONFIGS["blocks"], *TWO, *still)
    both = [
        trainees.start(directory, command, [["spare_model"]], env=torchrun(rank, port)) for rank in (0, 1)
    ]
    assert [process.wait() for process in both] == [0, 0], both[1].stderr
    best, last = whole.checkpoint("best"), TrialResult(directory).checkpoint("last")
    assert all(last["state_dict"][name].equal(weight) for name, weight in best["state_dict"].items())


def test_a_finished_run_is_left_alone_by_resume_auto_under_torchrun_with_more_epochs(trainees, tmp_path):
    directory, kept = tmp_path / "runs", {}
    for epochs in (2, 3):
        port, command = (
            free_port(),
            (*CONFIGS["plateau"], *TWO, f"trainer.max_epochs={epochs}", "resume=auto"),
        )
        both = [
            trainees.start(directory, command, [["spare_model"]], env=torchrun(rank, port)) for rank in (0, 1)
        ]
        assert [process.wait() for process in both] == [0, 0], both[0].stderr
        assert "resume=auto: no unfinished run of this config, a new one starts" in both[0].stdout
        folder = directory / "artifacts"
        kept = kept or {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    runs = TrialResult(directory).runs
    assert kept == {path: path.read_bytes() for path in kept}
    assert {path for path in (folder / runs[0][0]).rglob("*") if path.is_file()} <= kept.keys()
    assert [status for _, status in runs] == ["FINISHED"] * 2
    with closing(sqlite3.connect(directory / "mlflow.db")) as connection:
        query = "SELECT run_uuid, max(step) FROM metrics WHERE key = 'train/loss' GROUP BY run_uuid"
        assert dict(connection.execute(query)) == {runs[0][0]: 2 * 75, runs[1][0]: 3 * 75}


@pytest.mark.parametrize("rank", [0, 1])
def test_processes_that_torchrun_launched_for_a_run_of_one_are_refused(trainees, tmp_path, rank):
    process = trainees.train(tmp_path / "runs", *CONFIGS["blocks"], EPOCHS, env=torchrun(rank, 1))
    assert process.exit_code == 2 and process.stderr.count("\n") == 1
    assert "torchrun launched 2 processes" in process.stderr and TrialResult(tmp_path / "runs").runs == []
