"""Sweeps whose trials are tasks of a real Ray cluster of two nodes."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from commands import ODD, Swept
from process import free_port

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
EPOCHS = 5
STARTED_S = 90.0
RAY = (sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1")


@pytest.fixture
def ray_address() -> Iterator[str]:
    """The address of a cluster of two nodes with a core each."""
    pytest.importorskip("hydra_plugins.hydra_ray_launcher", reason="needs the package hydra-ray-launcher")
    folder, port = Path(tempfile.mkdtemp()), free_port()  # a short name: sockets are in it
    head = ("--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={folder}")
    env = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    nodes: list[subprocess.Popen[bytes]] = []
    try:
        for number, words in enumerate((head, (f"--address=127.0.0.1:{port}",))):
            log = folder / f"node{number}.log"
            with log.open("wb") as file:
                more = {"stdout": file, "stderr": file, "env": env, "start_new_session": True}
                nodes.append(subprocess.Popen([*RAY, *words], **more))
            end = time.monotonic() + STARTED_S
            while "Ray runtime started" not in (said := log.read_text()):
                assert time.monotonic() < end and nodes[-1].poll() is None, said
                time.sleep(0.2)
        yield f"127.0.0.1:{port}"
    finally:
        for node in reversed(nodes):
            with suppress(ProcessLookupError):
                os.killpg(node.pid, signal.SIGKILL)
            node.wait()
        shutil.rmtree(folder)


def test_a_sweep_on_two_nodes_reports_the_trial_that_fails_and_continues_the_one_that_is_killed(
    ray_address, tmp_path
):
    directory, told = tmp_path / "runs", tmp_path / "told"
    for name in ("train.py", "tests/foreign.py", "tests/sweep/odd.py"):
        shutil.copy(ROOT / name, tmp_path)
    words = ("optimizer.lr=0.1,0.08,0.05,0.03,0.02,1e9", *ODD)
    killed = (
        "+model.seconds=1.1",
        "+model.mood=dies",
        "+model.at=3",
        f"+model.only_once={tmp_path}/killed",
    )  # a trial, once
    words += (*killed, f"+callbacks.told={{_target_: odd.Told, path: {told}}}", "hydra/launcher=ray")
    command = [sys.executable, "train.py", "-m", *words, f"tracking.dir={directory}"]
    env = {**os.environ, "RAY_ADDRESS": ray_address}
    ended = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    said = ended.stderr + ended.stdout
    assert ended.returncode == 1, said
    assert ended.stderr.splitlines()[-1].startswith("error: 1 trial failed: trial 5 (train/loss is inf"), said
    assert "Traceback" not in said and "is validated against" not in said
    swept = Swept(directory)
    assert len(swept.parents) == 1 and len(swept.children) == 6
    statuses = {run.tags["tracklight.trial"]: run.status for run in swept.children}
    assert statuses == {str(number): "FAILED" if number == 5 else "FINISHED" for number in range(6)}
    rows = swept.leaderboard()
    assert sorted(row["optimizer.lr"] for row in rows) == [
        "0.02",
        "0.03",
        "0.05",
        "0.08",
        "0.1",
        "1000000000.0",
    ]
    assert [row["state"] for row in rows] == ["complete"] * 5 + ["failed"]
    for run in swept.children:
        if run.status == "FINISHED":
            steps = [step for step, _ in run.metrics["train/loss_epoch"]]
            assert len(steps) == EPOCHS and len({*steps}) == EPOCHS
    assert (tmp_path / "killed").exists() and "will be retried" in said
    failed = next(run for run in swept.children if run.status == "FAILED")
    assert len(told.read_text()) <= 5 * EPOCHS + len(failed.metrics["train/loss_epoch"]) + 1  # none anew
