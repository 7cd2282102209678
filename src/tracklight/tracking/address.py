"""Where MLflow is: a URI as the user gave it, made whole, checked and fit to be shown."""

import os
import socket
import ssl
import time
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import SplitResult, unquote, urlsplit, urlunsplit
from urllib.request import urlopen

from tracklight.errors import BadInput
from tracklight.redact import redact

DATABASE = "mlflow.db"
_SERVERS = ("http", "https")
_DATABASES = ("postgresql", "mysql", "mssql")
_ALLOWED = "sqlite:///FILE, http(s)://HOST:PORT, or a postgresql, mysql or mssql database"


def resolve(uri: str | None, directory: Path) -> str:
    """The full tracking URI; None stands for the SQLite file in `directory`.

    Raises:
        BadInput: No store can be there.
    """
    if uri is None:
        return _sqlite(directory / DATABASE, f"tracking.dir={directory}")
    shown = redact(uri)
    scheme, separator, rest = uri.partition(":")
    dialect = scheme.partition("+")[0].lower()
    if not separator or dialect == "file":
        raise BadInput(
            f"tracking.uri={shown}: MLflow's file store is gone since 3.13; "
            f"try tracking.uri=sqlite:///{directory / DATABASE}"
        )
    if dialect == "sqlite":
        path = rest.removeprefix("///")
        if not rest.startswith("///") or path in ("", ":memory:"):
            raise BadInput(f"tracking.uri={shown} names no file; try sqlite:////ABSOLUTE/PATH.db")
        return _sqlite(Path(path).absolute(), f"tracking.uri={shown}")
    if dialect in _SERVERS or dialect in _DATABASES:
        try:
            parts = urlsplit(uri)
            _ = parts.port
        except ValueError as error:
            raise BadInput(f"tracking.uri={shown} is no address: {error}") from None
        if not parts.hostname and dialect in _SERVERS:
            raise BadInput(f"tracking.uri={shown} names no host; try http://127.0.0.1:5000")
        return uri
    raise BadInput(f"tracking.uri={shown}: no tracking store of this kind; use {_ALLOWED}")


def _sqlite(path: Path, shown: str) -> str:
    # SQLAlchemy decodes the path and takes what follows "?" as options, MLflow does neither.
    if unquote(str(path)) != str(path) or "?" in str(path):
        raise BadInput(f"{shown}: a path with '?' or a '%' escape cannot be a URI; choose another")
    return f"sqlite:///{path}"


def is_server(uri: str) -> bool:
    """Whether `uri` is a tracking server, which decides itself where artifacts go."""
    return uri.lower().startswith(_SERVERS)


def sqlite_path(uri: str) -> Path | None:
    """The file of an SQLite URI; None for any other."""
    return Path(uri.partition(":///")[2]) if uri.startswith("sqlite") else None


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
