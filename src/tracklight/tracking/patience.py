"""Which failures of MLflow pass by themselves, and waiting for that within bounds."""

import logging
import re
import sqlite3
import time
from collections.abc import Callable
from typing import TypeVar

from tracklight.tracking.address import redact
from tracklight.tracking.quiet import mlflow

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


def persist(
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
