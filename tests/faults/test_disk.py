"""Disks that are full or closed: a clear line, nothing broken, and the run goes on afterwards."""

import re
import shutil
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from configs import BLOCK_END, CONFIGS, EACH_EPOCH, EPOCHS, MLP

from process import TrialResult
from tracklight.engine.checkpoint_io import newest_resume_checkpoint

COMMIT = "tracklight.engine.checkpoints:ResumeCheckpoint._commit"
SPARE = [["spare_model"]]
WIDE = [word.replace("hidden=[16]", "hidden=[20000]") for word in MLP]
INSTANTS = {
    "before the run is made": ("tracklight.tracking.store:Store.create", 1),
    "before it is described": ("tracklight.experiment.record:Recorder.describe", 1),
    "in training": (BLOCK_END, 20),
    "before its results are logged": ("tracklight.experiment.record:Recorder.log_final", 1),
    "at its end": ("tracklight.tracking.run:Run.finish", 1),
}


@pytest.mark.parametrize("instant", INSTANTS)
def test_a_disk_that_fills_up_at_whatever_instant_is_one_line_and_the_run_goes_on_later(
    trainees, undisturbed, small_disk, instant
):
    directory = small_disk / "runs"
    trainees.furnish(directory)
    command = (*CONFIGS["blocks"], EPOCHS, "resume=auto")
    fill = ["fill", *INSTANTS[instant], str(small_disk)]
    process = trainees.start(directory, command, [*SPARE, fill], log=small_disk.parent / "first")
    began_s = time.monotonic()
    assert process.wait() == 1 + (instant == "before the run is made"), process.stderr
    assert time.monotonic() - began_s < 30  # nothing waits for what cannot pass
    assert process.stderr.splitlines()[-1].startswith("error: ") and "Traceback" not in process.stderr
    left = [path.name for path in directory.rglob("*") if path.name.startswith(".") or path.suffix == ".tmp"]
    assert left == []
    (small_disk / "ballast").unlink()
    process = trainees.start(directory, command, SPARE, log=small_disk.parent / "second")
    assert process.wait() == 0, process.stderr
    assert TrialResult(directory).differences(undisturbed("blocks")) == []


def test_a_disk_too_full_for_a_checkpoint_leaves_the_one_before(trainees, tmp_path):
    directory = tmp_path / "runs"
    command = (*WIDE, "optimizer=adam", "trainer.max_epochs=4", "resume=auto")
    die = ["strike", COMMIT, 2, ["SIGKILL"], True]
    trainees.train(directory, *command, faults=[*SPARE, EACH_EPOCH, die])
    kept = newest_resume_checkpoint(TrialResult(directory).checkpoints)
    process = trainees.train(directory, *command, faults=[*SPARE, EACH_EPOCH, ["limit_files", 2_000_000]])
    assert process.exit_code == 1
    folder = re.escape(str(TrialResult(directory).checkpoints))
    assert re.search(
        rf"^error: checkpoint {folder}/step-\d+\.ckpt could not be written "
        r"\([\d,]{7,} bytes so far\): File too large; the previous one is untouched\n$",
        process.stderr,
    )
    assert newest_resume_checkpoint(TrialResult(directory).checkpoints) == kept
    assert TrialResult(directory).status == "FAILED"
    assert trainees.train(directory, *command, faults=SPARE).exit_code == 0
    assert [status for _, status in TrialResult(directory).runs] == ["FINISHED"]


@pytest.mark.slow
def test_a_disk_too_full_for_the_database_breaks_neither_it_nor_the_run(trainees, undisturbed, tmp_path):
    directory = tmp_path / "runs"
    trainees.furnish(directory)
    with closing(sqlite3.connect(directory / "mlflow.db")) as connection:
        connection.execute("VACUUM")
    size = (directory / "mlflow.db").stat().st_size
    impatient = ["put", "tracklight.tracking.store:_TIMEOUT_S", {"database": 1.0}]
    command = (*CONFIGS["blocks"], EPOCHS, "resume=auto")
    process = trainees.train(
        directory, *command, faults=[*SPARE, impatient, ["limit_files", size + 24 * 1024]]
    )
    assert "Traceback" not in process.stderr
    assert re.search("database or disk is full|disk I/O error", process.stderr)
    with closing(sqlite3.connect(directory / "mlflow.db")) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert trainees.train(directory, *command, faults=SPARE).exit_code == 0
    assert TrialResult(directory).differences(undisturbed("blocks")) == []


@pytest.fixture
def writable_again(tmp_path) -> Iterator[None]:
    yield
    for path in (tmp_path, *tmp_path.rglob("*")):
        if path.is_dir():
            path.chmod(0o755)


@pytest.mark.usefixtures("writable_again")
def test_a_read_only_run_folder_is_refused_before_training(trainees, tmp_path):
    directory = tmp_path / "runs"
    die = ["strike", COMMIT, 2, ["SIGKILL"], True]
    command = (*CONFIGS["blocks"], EPOCHS, "resume=auto")
    trainees.train(directory, *command, faults=[*SPARE, EACH_EPOCH, die])
    run = directory / "artifacts" / TrialResult(directory).run_id
    for path in (run, *run.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    process = trainees.train(directory, *command, faults=[["respect_modes"]])
    assert process.exit_code == 2, process.stderr
    line = process.stderr.splitlines()[-1]
    assert line == f"error: cannot write run folder {run}: Permission denied"
    assert max((step for _, step, *_ in TrialResult(directory).points), default=0) <= 2 * 150

    directory.chmod(0o555)
    process = trainees.train(directory, *command, faults=[["respect_modes"]])
    assert process.exit_code == 2
    assert process.stderr.startswith(f"error: tracking.dir={directory}: ")
    assert process.stderr.count("\n") == 1


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of its own, of eight megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system (root)")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def full_folder(small_disk) -> Path:
    """A file system of its own with not a byte left."""
    with pytest.raises(OSError, match="No space"), (small_disk / "ballast").open("wb") as file:
        while True:
            file.write(bytes(4096))
            file.flush()
    return small_disk


def test_a_full_temporary_folder_has_no_effect(trainees, undisturbed, tmp_path, full_folder):
    directory = tmp_path / "runs"
    process = trainees.train(*(directory, *CONFIGS["blocks"], EPOCHS), env={"TMPDIR": str(full_folder)})
    assert process.exit_code == 0
    assert "not logged" not in process.stderr
    assert [path.name for path in full_folder.iterdir()] == ["ballast"]
    assert TrialResult(directory).differences(undisturbed("blocks")) == []
