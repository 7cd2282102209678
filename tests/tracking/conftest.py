"""Stores, servers and processes for the tests of tracking."""

import multiprocessing
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from disturbances import Proxy, Server

from tracklight.tracking import sender


@pytest.fixture(scope="session")
def processes() -> multiprocessing.context.ForkServerContext:
    """Makes processes that have everything imported already: the first takes seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["serving", "tracklight.tracking.run"])
    with pytest.MonkeyPatch.context() as patch:  # Python 3.11's does not take over sys.path
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        first = context.Process(target=int)
        first.start()
        first.join()
    return context


@pytest.fixture
def swift(monkeypatch) -> None:
    """The sender's periods, shortened."""
    monkeypatch.setattr(sender, "_PERIOD_S", 0.05)
    monkeypatch.setattr(sender, "_MAX_BACK_OFF_S", 0.2)


@pytest.fixture
def sending_threads(monkeypatch) -> set[str]:
    """Names of the threads that have sent something to MLflow."""
    names: set[str] = set()
    send = sender.MlflowWriter.send_next

    def record(writer: sender.MlflowWriter) -> None:
        names.add(threading.current_thread().name)
        send(writer)

    monkeypatch.setattr(sender.MlflowWriter, "send_next", record)
    return names


@pytest.fixture(scope="module")
def shared_server(processes, template, tmp_path_factory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(template, folder / "mlflow.db")
    server = Server(processes, folder)
    server.start()
    yield server
    server.kill()


@pytest.fixture
def proxy(shared_server) -> Iterator[Proxy]:
    proxy = Proxy(shared_server.uri)
    yield proxy
    proxy.close()


@pytest.fixture
def short_requests(monkeypatch) -> None:
    """MLflow's own waiting for a server, shortened."""
    monkeypatch.setitem(os.environ, "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.setitem(os.environ, "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    monkeypatch.setitem(os.environ, "MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
