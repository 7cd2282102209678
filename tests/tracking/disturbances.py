"""What goes wrong on purpose: a writer that holds on, servers that die, answers that are lost."""

import contextlib
import resource
import socket
import sqlite3
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from serving import serve

from tracklight.tracking.store import Store


def points_of(store: Store, run_id: str, key: str) -> list[tuple[int, float]]:
    """What MLflow holds: step and value of every point, doubled ones included."""
    history = store.client.get_metric_history(run_id, key)
    return sorted((metric.step, metric.value) for metric in history)


def wait_for(condition: Callable[[], object], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def locked(database: Path) -> Iterator[None]:
    """Another writer that sits in a transaction."""
    connection = sqlite3.connect(database, isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        connection.execute("ROLLBACK")
        connection.close()


@contextlib.contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file of this process can grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class Server:
    """A real MLflow server in a process of its own; it can be killed and started again."""

    def __init__(self, processes, folder: Path):
        self._context, self._folder = processes, folder
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self._process = self._context.Process(target=serve, args=(str(self._folder), self.port), daemon=True)
        self._process.start()
        wait_for(self._answers, 60)

    def _answers(self) -> bool:
        try:
            urllib.request.urlopen(f"{self.uri}/health", timeout=5).close()
        except OSError:
            return False
        return True

    def kill(self) -> None:
        self._process.kill()
        self._process.join()


class Proxy:
    """Stands before a server and can spoil its answers.

    Attributes:
        spoil: Given method and path, says what becomes of the answer once the server has acted:
            None passes it on, `500` replaces it, `hang` keeps it back until `release` is set.
    """

    def __init__(self, target: str):
        self.spoil: Callable[[str, str], str | None] = lambda method, path: None
        self.release = threading.Event()
        self.requests: list[str] = []
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            def handle_any(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(length) if length else None
                headers = {k: v for k, v in self.headers.items() if k.lower() != "host"}
                request = urllib.request.Request(target + self.path, body, headers, method=self.command)
                proxy.requests.append(self.path)
                try:
                    with urllib.request.urlopen(request, timeout=30) as answer:
                        status, content = answer.status, answer.read()
                except urllib.error.HTTPError as error:
                    status, content = error.code, error.read()
                    error.close()
                spoilt = proxy.spoil(self.command, self.path)
                if spoilt == "hang":
                    proxy.release.wait(30)
                elif spoilt == "500":
                    status, content = 500, b"lost"
                with contextlib.suppress(OSError):
                    self.send_response(status)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)

            do_GET = do_POST = do_PUT = do_PATCH = handle_any

            def log_message(self, format, *args) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.uri = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.release.set()
        self._server.shutdown()
        self._server.server_close()


@contextlib.contextmanager
def clock_set_back(seconds: float) -> Iterator[None]:
    """The wall clock shows an earlier time; what has passed is measured as before."""
    now, now_ns = time.time, time.time_ns
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "time", lambda: now() - seconds)
        patch.setattr(time, "time_ns", lambda: now_ns() - int(seconds * 1e9))
        yield
