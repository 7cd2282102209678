"""Imports MLflow, retries its calls, and holds what we use of its internals (as of 3.17.2)."""

import contextlib
import logging
import os
import re
import sqlite3
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar
from unittest import mock

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
}
os.environ |= _ENVIRONMENT | os.environ
warnings.filterwarnings("ignore", "Failed to register a dataset source")  # python -OO: it has no docstrings

import mlflow  # noqa: E402
import mlflow.entities  # noqa: E402
import mlflow.exceptions  # noqa: E402

# We report every failed call ourselves in one line; these two print a traceback each time.
logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
logging.getLogger("alembic").setLevel(logging.WARNING)
# On import, mlflow.pytorch sets the root's level to ERROR, which would silence our warnings.
logging.getLogger("tracklight").setLevel(logging.WARNING)

_log = logging.getLogger(__name__)

_TRANSIENT = ("TEMPORARILY_UNAVAILABLE", "INTERNAL_ERROR", "REQUEST_LIMIT_EXCEEDED", "ABORTED")
# Of a disk that is full, has no inode left or is read-only: waiting is no cure.
_LASTING = re.compile("(disk is|File too) (full|large)|disk I/O error|unable to open|readonly|No space left")
_WARN_AFTER_S = 5.0
_PAUSE_S = 0.5
_MAX_CHARS = 300
_AWAY = re.compile(r"API request to (\w+://[^/\s]+)\S* failed with exception .*retries exceeded")

T = TypeVar("T")
When = Callable[[Exception], bool]


def is_transient(error: Exception) -> bool:
    """Return whether the same request may succeed soon."""
    if _LASTING.search(str(error)):
        return False
    if isinstance(error, mlflow.exceptions.MlflowException):
        return error.error_code in _TRANSIENT
    return isinstance(error, OSError | sqlite3.OperationalError) or is_locked(error)


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
    if lines and (match := _AWAY.match(lines[0])):
        return redact(f"{match[1]} does not answer")
    return redact(lines[0])[:_MAX_CHARS] if lines else type(error).__name__


def create_database(path: Path, artifact_root: str) -> None:
    """Create MLflow's tables in a new SQLite file; `MlflowClient` cannot set the artifact root."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore  # takes 0.5 s to import

    SqlAlchemyStore(f"sqlite:///{path}", artifact_root).engine.dispose()


@contextlib.contextmanager
def skip_requirements_check() -> Iterator[None]:
    """Let `save_model` trust its `pip_requirements`; MLflow has no setting for this.

    Its check lists the files of every installed package, which takes 1 s.
    """
    check = "mlflow.utils.environment.warn_dependency_requirement_mismatches"
    with mock.patch(check, lambda requirements: None):
        yield
