import contextlib
import gzip
import os
import re
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import tracklight.tracking
from tracklight.errors import BadInput
from tracklight.tracking import mlflow_client
from tracklight.tracking.mlflow_client import download, mlflow, short_reason
from tracklight.tracking.store import connect

FILES = sorted(p.stem for p in Path(tracklight.tracking.__path__[0]).glob("[!_]*.py"))
CHECK = """
import importlib, logging, sys
for name in sys.argv[1:]:
    importlib.import_module(f"tracklight.tracking.{name}")
from mlflow.telemetry.client import get_telemetry_client
from mlflow.environment_variables import MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT
assert get_telemetry_client() is None
assert "torch" not in sys.modules
assert MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT.get()
"""


def importing(files: list[str], check: str = CHECK, **chosen: str) -> subprocess.CompletedProcess:
    # Without what makes MLflow think that it is in CI, where it reports nothing anyway.
    kept = ("PATH", "HOME", "PYTHONPATH", "LD_LIBRARY_PATH")
    environment = {key: os.environ[key] for key in kept if key in os.environ} | chosen
    return subprocess.run(
        [sys.executable, "-c", check, *files], env=environment, capture_output=True, text=True
    )


def test_who_imports_the_store_gets_no_usage_reporting_and_no_torch():
    done = importing(["store"])
    assert done.returncode == 0, done.stderr


def test_mlflows_own_waiting_is_bounded_unless_the_user_chose():
    show = """
import tracklight.tracking.mlflow_client
from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_MAX_RETRIES as retries
from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_TIMEOUT as timeout
print(retries.get(), timeout.get())
"""
    done = importing([], show, MLFLOW_HTTP_REQUEST_TIMEOUT="99")
    retries, timeout = map(int, done.stdout.split())
    assert timeout == 99
    assert retries <= 3


@pytest.mark.parametrize("file", FILES)
def test_no_file_of_this_room_imports_mlflow_past_the_door(file):
    source = (Path(tracklight.tracking.__path__[0]) / f"{file}.py").read_text()
    first = next(iter(re.findall(r"^(?:from|import) .*mlflow.*", source, re.M)), None)
    door = ("from tracklight.tracking.mlflow_client import ", "from tracklight.tracking.mlflow_api import ")
    door += ("from tracklight.tracking import mlflow_client",)
    copied = file == "served_model"  # lies in each logged model, where tracklight is not needed
    assert copied or file == "mlflow_client" or first is None or first.startswith(door)


def test_our_warnings_are_heard_after_mlflow_silenced_the_root():
    import logging

    import mlflow.pytorch  # noqa: F401

    assert logging.getLogger("tracklight.tracking.run").isEnabledFor(logging.WARNING)


@pytest.fixture
def answering():
    """Serve one scripted behaviour on a port: what the function writes to each connection."""
    listeners = []

    def serve(write) -> str:
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)

        def accept() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=answer, args=(connection,), daemon=True).start()

        def answer(connection) -> None:
            with connection, contextlib.suppress(OSError):
                connection.recv(65_536)
                write(connection.sendall)

        threading.Thread(target=accept, daemon=True).start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}"

    yield serve
    for listener in listeners:
        listener.close()


def drip(send, first: bytes, byte: bytes = b" ", seconds: float = 20.0) -> None:
    send(first)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        send(byte)
        time.sleep(0.02)


OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
DRIPS = {
    "headers": lambda send: drip(send, b"HTTP/1.1 200 OK\r\nX-Long: ", b"x"),
    "a body of a length": lambda send: drip(send, OK + b"Content-Length: 100000\r\n\r\n"),
    "a body to the end": lambda send: drip(send, OK + b"Connection: close\r\n\r\n"),
    "a body in chunks": lambda send: drip(send, OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
}


@pytest.mark.parametrize("write", DRIPS.values(), ids=DRIPS)
def test_a_server_that_drips_its_answer_is_given_up(write, answering, monkeypatch):
    monkeypatch.setattr(mlflow_client, "_SILENCES", 0.05)  # of ten seconds
    start_s = time.monotonic()
    with pytest.raises(mlflow.exceptions.MlflowException) as no:
        mlflow.MlflowClient(answering(write)).get_run("a" * 32)
    assert time.monotonic() - start_s < 10  # headers are asked for thrice, with pauses
    reason = short_reason(no.value)
    assert "no whole answer within" in reason or "JSON" in reason  # what came to its end is none


def test_an_answer_that_fills_the_memory_is_cut(answering, monkeypatch):
    monkeypatch.setattr(mlflow_client, "_MAX_ANSWER_BYTES", 1_000_000)
    zeros = gzip.compress(bytes(50_000_000))
    header = OK + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(zeros)
    with pytest.raises(mlflow.exceptions.MlflowException, match="an answer of more than 1,000,000 bytes"):
        mlflow.MlflowClient(answering(lambda send: send(header + zeros))).get_run("a" * 32)


def listed_as(size: int) -> SimpleNamespace:
    """MLflow's run and what the store says of the one file that it has."""
    info = SimpleNamespace(run_id="a" * 32, artifact_uri="mlflow-artifacts:/1/artifacts")
    return SimpleNamespace(info=info, size=size)


def endless(send) -> None:
    send(OK + b"Connection: close\r\n\r\n")
    for _ in range(10_000):
        send(bytes(100_000))


def test_a_file_that_is_larger_than_it_said_is_not_written_beyond_its_bound(answering, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD", "false")
    target = tmp_path / "config.yaml"
    with pytest.raises(Exception, match="(?i)too large"):
        download(listed_as(10), answering(endless), "config.yaml", target, 1_000_000, 10)
    assert target.stat().st_size <= 1_000_000
    (tmp_path / "free").write_bytes(bytes(2_000_000))  # the bound was the download's alone


def test_a_file_that_drips_is_given_up_and_never_taken_for_whole(answering, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD", "false")
    monkeypatch.setattr(mlflow_client, "_SILENCES", 0.05)
    for name in ("a body of a length", "a body to the end", "a body in chunks"):
        start_s = time.monotonic()
        with pytest.raises(Exception, match="bytes came of 100,000|Connection broken|IncompleteRead|ended"):
            download(listed_as(1), answering(DRIPS[name]), "a", tmp_path / "a", 10**6, 100_000)
        assert time.monotonic() - start_s < 10


@pytest.mark.parametrize(
    ("revision", "says"),
    [("ffffffffffff", "newer than MLflow"), ("451aebb31d03", "older than this MLflow's")],
)
def test_a_store_of_another_schema_says_which_of_the_two_is_newer(directory, revision, says):
    with contextlib.closing(sqlite3.connect(directory / "mlflow.db")) as database, database:
        database.execute("UPDATE alembic_version SET version_num = ?", (revision,))
    with pytest.raises(BadInput, match=says) as no:
        connect(None, directory)
    assert "\n" not in str(no.value)
