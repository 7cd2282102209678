"""`make ui` and `mlflow models serve` as the README has them, on a free port of this machine."""

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from process import free_port

ROOT = Path(__file__).resolve().parents[1]
STARTED_S = 90.0


@contextmanager
def ui(directory: Path, prefix: Sequence[str] = ()) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Run what `make ui` runs, by the command `prefix`; give the address that it prints."""
    with subprocess.Popen(
        [*prefix, sys.executable, str(ROOT / "scripts" / "ui.py"), "--port", str(free_port())]
        + ["--dir", str(directory)],
        env={key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            lines = [process.stdout.readline(), process.stdout.readline()]
            assert lines[1].startswith("MLflow UI: "), lines
            yield lines[1].split()[2], process
        finally:
            process.terminate()
            process.wait(30)


@contextmanager
def mlflow(*words: str, health: str, log: Path, **environment: str) -> Iterator[str]:
    """Run an mlflow command that serves; give its address once it answers."""
    port = free_port()
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    # MLflow starts uvicorn by name, which an activated environment has on PATH.
    quiet["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    uri = f"http://127.0.0.1:{port}"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", *words, "--host", "127.0.0.1", "--port", str(port)],
            env={**os.environ, **quiet, "PYTHONWARNINGS": "ignore", **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            end = time.monotonic() + STARTED_S
            while not answers(uri + health):
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < end, log.read_text()
                time.sleep(0.2)
            yield uri
        finally:
            with suppress(ProcessLookupError):  # it ended by itself
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return response.status == 200
    except OSError:
        return False
