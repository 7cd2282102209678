"""The one door to MLflow; its usage reporting, decided while it is imported, goes off first."""

import logging
import os
import re
import sqlite3
import time
from collections.abc import Callable
from typing import TypeVar

import mlflow  # noqa: E402
import mlflow.entities  # noqa: E402
import mlflow.exceptions  # noqa: E402

from tracklight.redact import redact

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# What it prints at the end of a run shows the password of a URI that has one.
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")


# Every failed call is reported by us, once and in one line; these two print a traceback each time.
logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
logging.getLogger("alembic").setLevel(logging.WARNING)
# On import, mlflow.pytorch sets the root's level to ERROR, which would silence our warnings.
logging.getLogger("tracklight").setLevel(logging.WARNING)

__all__ = ["mlflow"]


pass

_log = logging.getLogger(__name__)

# Codes that say "not now"; every other one says that the request itself is wrong.
_PASSING = ("TEMPORARILY_UNAVAILABLE", "INTERNAL_ERROR", "REQUEST_LIMIT_EXCEEDED", "ABORTED")
_QUIET_S = 5.0  # shorter waits are not worth a line
_PAUSE_S = 0.5
_MAX_CHARS = 300
_AWAY = re.compile(r"API request to (\w+://[^/\s]+)\S* failed with exception .*retries exceeded")

T = TypeVar("T")


def passes(error: Exception) -> bool:
    """Whether the same request may succeed later."""
    if isinstance(error, mlflow.exceptions.MlflowException):
        return error.error_code in _PASSING
    return isinstance(error, OSError | sqlite3.OperationalError) or is_locked(error)


def is_locked(error: Exception) -> bool:
    """Whether another process holds the database."""
    return "is locked" in str(error)


def retry(
    call: Callable[[], T], patience_s: float, when: Callable[[Exception], bool] = passes
) -> T:
    """The call's result, tried again while it fails with what passes, for `patience_s`.

    Raises:
        Exception: What the call raised last.
    """
    start_s = time.monotonic()
    told = False
    while True:
        try:
            return call()
        except Exception as error:
            waited_s = time.monotonic() - start_s
            if not when(error) or waited_s > patience_s:
                raise
            if waited_s > _QUIET_S and not told:
                told = True
                _log.warning("MLflow is busy (%s); waiting for it", reason(error))
        time.sleep(_PAUSE_S)


def reason(error: BaseException) -> str:
    """The gist of an error of MLflow's, SQLAlchemy's or urllib3's: one short line, no passwords."""
    lines = str(error).strip().splitlines()
    if lines and (away := _AWAY.match(lines[0])):
        return redact(f"{away[1]} does not answer")
    return redact(lines[0])[:_MAX_CHARS] if lines else type(error).__name__
