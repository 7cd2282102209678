"""Whatever becomes of what a command prints, its run goes on; a terminal that closes stops it."""

import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing

import pytest

from process import ENDED_S
from tracklight.paths import ROOT

TRAIN = f"{sys.executable} {ROOT / 'train.py'}"
WORDS = ("num_threads=1", "tracking.figures=false", "trainer.max_epochs=40")
SHELL = {
    "a pipe whose reader leaves": "{train} {words} | head -n 1 >/dev/null; exit ${{PIPESTATUS[0]}}",
    "both closed": "{train} {words} >&- 2>&-",
    "a sweep into a pipe whose reader leaves": (
        "{train} -m seed=1,2 {words} | head -n 1 >/dev/null; exit ${{PIPESTATUS[0]}}"
    ),
    "a sweep on a full disk": "{train} -m seed=1,2 {words} > /dev/full 2> /dev/full",
}
WAYS = {
    "a pipe whose reader has left": [["lead", 1, "left"]],
    "a full disk": [["lead", 1, "/dev/full"]],
    "standard output closed": [["lead", 1, "closed"]],
    "both closed": [["lead", 1, "closed"], ["lead", 2, "closed"]],
    "both full": [["lead", 1, "/dev/full"], ["lead", 2, "/dev/full"]],
}


def statuses(directory):
    with closing(sqlite3.connect(directory / "mlflow.db")) as connection:
        return [row[0] for row in connection.execute("SELECT status FROM runs")]


@pytest.mark.parametrize("way", WAYS)
def test_output_that_fails_ends_no_run(trainees, tmp_path, way):
    ended = trainees.train(tmp_path / "runs", *WORDS, faults=[["spare_model"], *WAYS[way]])
    assert (ended.exit_code, ended.stderr) == (0, "")
    assert statuses(tmp_path / "runs") == ["FINISHED"]


@pytest.mark.slow
@pytest.mark.parametrize("way", SHELL)
def test_output_that_a_shell_leads_elsewhere_ends_no_run(tmp_path, way):
    command = SHELL[way].format(train=TRAIN, words=" ".join([f"tracking.dir={tmp_path}/runs", *WORDS]))
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert {*statuses(tmp_path / "runs")} == {"FINISHED"}


def test_a_reader_that_leaves_ends_a_comparison_in_silence(tmp_path):
    command = f"{sys.executable} {ROOT / 'scripts' / 'compare.py'} --help | head -n 1"
    ended = subprocess.run(
        ["bash", "-c", f"{command}; exit ${{PIPESTATUS[0]}}"], capture_output=True, text=True, timeout=60
    )
    assert (ended.returncode, ended.stderr) == (0, "")


def start(trainees, tmp_path, *words, faults=()):
    long = ("data.num_points=4096", "data.batch_size=8", "optimizer.lr=1e-9", "tracking.figures=false")
    process = trainees.start(tmp_path / "runs", (*long, "num_threads=1", *words), [["spare_model"], *faults])
    end = time.monotonic() + ENDED_S
    while "\nepoch 2/" not in process.stdout:
        assert process.exit_code is None and time.monotonic() < end, process.stderr
        time.sleep(0.01)
    return process


def test_a_terminal_that_closes_stops_the_run_to_be_continued(trainees, tmp_path):
    process = start(trainees, tmp_path, "trainer.max_epochs=100")
    process.send(signal.SIGHUP)
    assert process.wait() == 128 + signal.SIGHUP
    assert statuses(tmp_path / "runs") == ["KILLED"]


def test_under_nohup_a_run_outlives_its_terminal(trainees, tmp_path):
    process = start(trainees, tmp_path, "trainer.max_epochs=8", faults=[["ignore", "SIGHUP"]])
    process.send(signal.SIGHUP)
    time.sleep(0.1)
    assert process.exit_code is None
    process.send(signal.SIGHUP)
    assert process.wait() == 0
    assert statuses(tmp_path / "runs") == ["FINISHED"]
