"""Imports MLflow, retries its calls, and holds what we use of its internals (as of 3.17.2)."""

import contextlib
import io
import itertools
import logging
import os
import re
import resource
import socket
import sqlite3
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import requests

from tracklight.redact import redact

# MLflow decides whether it reports usage while it is imported. The line that it prints at the end
# of a run shows the password of a URI that has one. With its own time limits one call to a dead
# server lasts four minutes, while our sender repeats its calls anyway.
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",  # there would be one for each file
}
os.environ |= _ENVIRONMENT | os.environ
warnings.filterwarnings("ignore", "Failed to register a dataset source")  # python -OO: it has no docstrings

import mlflow  # noqa: E402
import mlflow.entities  # noqa: E402
import mlflow.exceptions  # noqa: E402
from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_TIMEOUT  # noqa: E402
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository  # noqa: E402
from mlflow.tracking._tracking_service import utils as _tracking  # noqa: E402
from mlflow.utils import request_utils  # noqa: E402
from mlflow.utils.async_logging.run_operations import RunOperations  # noqa: E402, F401

# We report every failed call ourselves in one line; these two print a traceback each time.
logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
logging.getLogger("alembic").setLevel(logging.WARNING)
# On import, mlflow.pytorch sets the root's level to ERROR, which would silence our warnings.
logging.getLogger("tracklight").setLevel(logging.WARNING)

_log = logging.getLogger(__name__)

_TRANSIENT = ("TEMPORARILY_UNAVAILABLE", "INTERNAL_ERROR", "REQUEST_LIMIT_EXCEEDED", "ABORTED")
# Two runs that record the same data set at once: a server's answer to the second one.
_CONFLICT = re.compile("IntegrityError|UniqueViolation|Duplicate entry")
# Of a disk that is full, has no inode left or is read-only: waiting is no cure.
_LASTING = re.compile("(disk is|File too) (full|large)|disk I/O error|unable to open|readonly|No space left")
_WARN_AFTER_S = 5.0
_PAUSE_S = 0.5
_MAX_CHARS = 300
_ADVICE = "(raised as a result of"  # SQLAlchemy's, before the error itself
_AWAY = re.compile(r"API request to (\w+://[^/\s]+)\S* failed with exception .*retries exceeded")
_REFUSED = re.compile(r"API request to endpoint \S+ failed with error code 401")
_numbers = itertools.count()  # of the stores registered

_SCHEMA = re.compile(r"Detected out-of-date database schema \(found version (\w+)")
_MIGRATIONS = Path(mlflow.__file__).parent / "store" / "db_migrations" / "versions"

# MLflow's time limit is that of each silence: a server that sends a byte now and then would hold a
# command for ever. A whole answer gets so many of them, and a download more, by its size.
_SILENCES = 6
_DOWNLOAD_BYTES = 64_000_000  # in the time of one answer
_MAX_ANSWER_BYTES = 256_000_000

T = TypeVar("T")
When = Callable[[Exception], bool]


class _Deadline:
    """Mixin of urllib3's connections: shuts one whose answer takes longer, in all, than it may."""

    num_answers = 1.0  # that the answer takes the time of: more in a download

    @classmethod
    def seconds(cls) -> float:
        return _SILENCES * (MLFLOW_HTTP_REQUEST_TIMEOUT.get() or 0) * cls.num_answers

    def request(self: Any, *args: Any, **kwargs: Any) -> None:
        if timer := getattr(self, "_timer", None):
            timer.cancel()
        super().request(*args, **kwargs)  # type: ignore[misc]

    def getresponse(self: Any) -> Any:
        self._timer = threading.Timer(_Deadline.seconds(), _shut, (self.sock,))
        self._timer.daemon = True
        self._timer.start()
        return super().getresponse()  # type: ignore[misc]


def _shut(connected: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connected.shutdown(socket.SHUT_RDWR)


class _BoundedAdapter(request_utils.TCPKeepAliveHTTPAdapter):
    """Bounds each answer of a server in time and, as it is held in memory, in size."""

    def get_connection_with_tls_context(self, *args: Any, **kwargs: Any) -> Any:
        pool: Any = super().get_connection_with_tls_context(*args, **kwargs)
        if not issubclass(pool.ConnectionCls, _Deadline):
            pool.ConnectionCls = type("Connection", (_Deadline, pool.ConnectionCls), {})
        return pool

    def send(self, request: Any, stream: bool = False, *args: Any, **kwargs: Any) -> requests.Response:
        start_s, within_s = time.monotonic(), _Deadline.seconds()
        try:
            response = super().send(request, stream, *args, **kwargs)
            if not stream:
                body = response.raw.read(_MAX_ANSWER_BYTES + 1, decode_content=True)
                if len(body) > _MAX_ANSWER_BYTES:
                    response.close()
                    raise requests.ConnectionError(f"an answer of more than {_MAX_ANSWER_BYTES:,} bytes")
                response.raw = io.BytesIO(body)
                if time.monotonic() - start_s > within_s and not hasattr(request.body, "read"):
                    raise requests.ConnectionError("cut off")  # where the answer gave no length
            return response
        except Exception as error:
            if time.monotonic() - start_s < within_s:
                raise
            raise requests.Timeout(f"no whole answer within {within_s:.0f} s") from error


# MLflow offers no hook for its connections; it makes its sessions with the class of this name.
request_utils.TCPKeepAliveHTTPAdapter = _BoundedAdapter


def download(run: Any, uri: str, path: str, target: Path, max_bytes: int, size: int) -> None:
    """Download one artifact of a run; MLflow's own call takes folders, too, and has no bound.

    No more than `max_bytes` are written, whatever comes. How long that may take follows from `size`,
    as the store gives it. What does not come whole and within its bounds is an error.
    """
    repository = get_artifact_repository(run.info.artifact_uri, tracking_uri=uri)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)  # holds for MLflow's threads, too
    lower = max_bytes if soft == resource.RLIM_INFINITY else min(soft, max_bytes)
    resource.setrlimit(resource.RLIMIT_FSIZE, (lower, hard))
    _Deadline.num_answers = 1 + size / _DOWNLOAD_BYTES
    start_s, within_s = time.monotonic(), _Deadline.seconds()
    try:
        repository._download_file(path, str(target))
    finally:
        _Deadline.num_answers = 1.0
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    if time.monotonic() - start_s > within_s or (target.stat().st_size != size and size):
        raise OSError(f"{target.stat().st_size:,} bytes came of {size:,}, within {within_s:.0f} s at most")


def is_transient(error: Exception) -> bool:
    """Return whether the same request may succeed soon."""
    if _LASTING.search(str(error)):
        return False
    if isinstance(error, mlflow.exceptions.MlflowException):
        return error.error_code in _TRANSIENT
    return isinstance(error, OSError | sqlite3.OperationalError) or is_locked(error)


def is_conflict(error: Exception) -> bool:
    """Return whether another process stored the same row at the same time: now it is there."""
    return _CONFLICT.search(str(error)) is not None


def is_locked(error: Exception) -> bool:
    """Return whether another process holds the database."""
    return "is locked" in str(error)


def retry(call: Callable[[], T], timeout_s: float, when: When = is_transient, what: str = "MLflow") -> T:
    """Return the result of `call`, repeated for `timeout_s` while `when` holds for its error."""
    start_s = time.monotonic()
    warned = False
    while True:
        try:
            return call()
        except Exception as error:
            waited_s = time.monotonic() - start_s
            if not when(error) or waited_s > timeout_s:
                raise
            if waited_s > _WARN_AFTER_S and not warned:
                warned = True
                _log.warning("waiting for %s: %s", what, short_reason(error.__cause__ or error))
        time.sleep(_PAUSE_S)


def short_reason(error: BaseException) -> str:
    """Return the first line of an error, shortened and without passwords."""
    lines = str(error).strip().splitlines()
    lines = [line for line in lines if not line.startswith(_ADVICE)] or lines
    if lines and (match := _AWAY.match(lines[0])):
        return redact(f"{match[1]} does not answer")
    if lines and _REFUSED.match(lines[0]):
        keys = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        return f"it knows no such user and password (HTTP 401); set {keys}"
    if lines and (match := _SCHEMA.match(lines[0])):  # MLflow calls a newer one out of date, too
        if any(_MIGRATIONS.glob(f"{match[1]}_*.py")):
            return "its schema is older than this MLflow's; back it up, then run `mlflow db upgrade URI`"
        return f"its schema is newer than MLflow {mlflow.__version__} here; run `pip install -U mlflow`"
    return redact(lines[0])[:_MAX_CHARS] if lines else type(error).__name__


def create_database(path: Path, artifact_root: str) -> None:
    """Create MLflow's tables in a new SQLite file; `MlflowClient` cannot set the artifact root.

    Nothing is synced to the disk yet: that takes half of the time of MLflow's migrations.
    """
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore  # takes 0.5 s to import
    from sqlalchemy import Engine, event

    def no_sync(connection: Any, record: Any) -> None:
        if not isinstance(connection, sqlite3.Connection):  # of another thread, as to all else
            return
        if connection.execute("PRAGMA database_list").fetchone()[2] == os.path.realpath(path):
            connection.execute("PRAGMA synchronous = OFF")

    event.listen(Engine, "connect", no_sync)
    try:
        SqlAlchemyStore(f"sqlite:///{path}", artifact_root).engine.dispose()
    finally:
        event.remove(Engine, "connect", no_sync)


def hard_delete(client: Any, *, run_id: str | None = None, model_id: str | None = None) -> None:
    """Delete a run or a logged model from a database for good, as `mlflow gc` does, if it is there."""
    database = client._tracking_client.store
    with contextlib.suppress(mlflow.exceptions.MlflowException):
        if model_id is not None:
            database._hard_delete_logged_model(model_id)
        if run_id is not None:
            database._hard_delete_run(run_id)


@contextlib.contextmanager
def skip_requirements_check() -> Iterator[None]:
    """Let `save_model` trust its `pip_requirements`; MLflow has no setting for this.

    Its check lists the files of every installed package, which takes 1 s.
    """
    check = "mlflow.utils.environment.warn_dependency_requirement_mismatches"
    with mock.patch(check, lambda requirements: None):
        yield


def register(store: Any, client: Any) -> tuple[str, Any]:
    """Register a store; return the tracking URI by which MLflow finds it, and the store behind a client."""
    scheme, found = f"tracklight{next(_numbers)}", weakref.proxy(store)  # MLflow keeps what it has found
    _tracking._register(scheme, lambda store_uri, artifact_uri=None: found)
    return f"{scheme}://", client._tracking_client.store


@contextlib.contextmanager
def use_store(store: Any, run_id: str) -> Iterator[None]:
    """Let MLflow's fluent functions use a store; the model registry and other processes use the real one."""
    with mock.patch.dict(os.environ), _tracking._use_tracking_uri(store.uri):
        if store.real_uri:
            os.environ["MLFLOW_TRACKING_URI"] = store.real_uri
            os.environ.setdefault("MLFLOW_REGISTRY_URI", store.real_uri)
        else:  # nothing is tracked, here or below
            os.environ.pop("MLFLOW_TRACKING_URI", None)
        try:
            yield
        finally:
            while (active := mlflow.active_run()) and active.info.run_id == run_id:
                mlflow.end_run()
            _tracking._artifact_repos_cache.pop(run_id, None)  # else MLflow takes the run's folder for good
