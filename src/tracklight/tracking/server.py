"""Whether anything answers where the tracking server should be, asked within bounds."""

import os
import socket
import ssl
import time
from urllib.error import HTTPError, URLError
from urllib.parse import SplitResult, urlsplit, urlunsplit
from urllib.request import urlopen

from tracklight.errors import BadInput
from tracklight.tracking.address import redact

_DEADLINE_S = 8.0
_ATTEMPT_S = 4.0
_PAUSE_S = 1.0
_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}

# MLflow's own defaults make one call to a dead server last four minutes. Our feeder tries again
# anyway, so a single call may end soon.
_HTTP_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}


def bound_requests() -> None:
    """Bound MLflow's own waiting, where the user has not chosen otherwise."""
    for name, value in _HTTP_DEFAULTS.items():
        os.environ.setdefault(name, value)


def await_answer(uri: str) -> None:
    """Return when something answers at `uri`.

    Raises:
        BadInput: Nothing does, for some seconds.
    """
    parts = urlsplit(uri)
    dialect = parts.scheme.partition("+")[0].lower()
    start_s = time.monotonic()
    while True:
        try:
            return _ask_port(parts, dialect) if dialect in _PORTS else _ask_http(parts)
        except OSError as error:
            if time.monotonic() - start_s > _DEADLINE_S - _ATTEMPT_S:
                cause = getattr(error, "reason", None) or error
                raise BadInput(
                    f"no tracking server answers at {redact(uri)} ({cause}); start it, or choose "
                    "another tracking.uri"
                ) from None
        time.sleep(_PAUSE_S)


def _ask_http(parts: SplitResult) -> None:
    host = parts.netloc.rpartition("@")[2]  # any answer will do, so nobody's password is needed
    url = urlunsplit((parts.scheme, host, parts.path.rstrip("/") + "/health", "", ""))
    try:
        urlopen(url, timeout=_ATTEMPT_S).close()
    except HTTPError as error:
        error.close()
    except URLError as error:
        if not isinstance(error.reason, ssl.SSLError):  # MLflow has its own say on certificates
            raise


def _ask_port(parts: SplitResult, dialect: str) -> None:
    if parts.hostname:
        address = (parts.hostname, parts.port or _PORTS[dialect])
        socket.create_connection(address, timeout=_ATTEMPT_S).close()
