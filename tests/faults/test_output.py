"""Whatever becomes of what a command prints, its run goes on; a terminal that closes stops it."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing

import pytest

from tracklight.paths import ROOT

TRAIN = f"{sys.executable} {ROOT / 'train.py'}"
WORDS = "num_threads=1 tracking.figures=false trainer.max_epochs=40"
WAYS = {
    "a pipe whose reader leaves": "{train} {words} | head -n 1 >/dev/null; exit ${{PIPESTATUS[0]}}",
    "a full disk": "{train} {words} > /dev/full",
    "standard output closed": "{train} {words} >&-",
    "both closed": "{train} {words} >&- 2>&-",
    "a sweep into a pipe whose reader leaves": (
        "{train} -m seed=1,2 {words} | head -n 1 >/dev/null; exit ${{PIPESTATUS[0]}}"
    ),
    "a sweep on a full disk": "{train} -m seed=1,2 {words} > /dev/full 2> /dev/full",
}

FEW = [*WAYS][:3]


def statuses(directory):
    with closing(sqlite3.connect(directory / "mlflow.db")) as connection:
        return [row[0] for row in connection.execute("SELECT status FROM runs")]


@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=[pytest.mark.slow] * (i > 2)) for i, way in enumerate(WAYS)]
)
def test_output_that_fails_ends_no_run(tmp_path, way):
    command = WAYS[way].format(train=TRAIN, words=f"tracking.dir={tmp_path}/runs {WORDS}")
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert {*statuses(tmp_path / "runs")} == {"FINISHED"}


def test_a_reader_that_leaves_ends_a_comparison_in_silence(tmp_path):
    command = f"{sys.executable} {ROOT / 'scripts' / 'compare.py'} --help | head -n 1"
    ended = subprocess.run(
        ["bash", "-c", f"{command}; exit ${{PIPESTATUS[0]}}"], capture_output=True, text=True, timeout=60
    )
    assert (ended.returncode, ended.stderr) == (0, "")


def start(tmp_path, *words, **options):
    command = [*TRAIN.split(), f"tracking.dir={tmp_path}/runs", "num_threads=1", "tracking.figures=false"]
    command += ["data.num_points=4096", "data.batch_size=8", "optimizer.lr=1e-9", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options)
    assert process.stdout is not None
    while not process.stdout.readline().startswith("epoch 2/"):
        assert process.poll() is None
    return process


def test_a_terminal_that_closes_stops_the_run_to_be_continued(tmp_path):
    process = start(tmp_path, "trainer.max_epochs=5000")
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGHUP
    assert statuses(tmp_path / "runs") == ["KILLED"]


def ignore_hang_up():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def test_under_nohup_a_run_outlives_its_terminal(tmp_path):
    process = start(tmp_path, "trainer.max_epochs=8", preexec_fn=ignore_hang_up)
    process.send_signal(signal.SIGHUP)
    time.sleep(0.1)
    os.kill(process.pid, signal.SIGHUP)
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert statuses(tmp_path / "runs") == ["FINISHED"]
