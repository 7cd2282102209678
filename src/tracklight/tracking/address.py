"""The address of the tracking store: resolved, checked and contacted."""

import os
import socket
import ssl
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import unquote, urlsplit, urlunsplit
from urllib.request import urlopen

from tracklight.errors import BadInput
from tracklight.paths import uri_setting
from tracklight.redact import redact

DATABASE = "mlflow.db"
_SERVERS = ("http", "https")
_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
_ALLOWED = "sqlite:///FILE, http(s)://HOST:PORT, or a postgresql, mysql or mssql database"
_MAX_BYTES, _MAX_NAME_BYTES = 504, 255  # of a database: SQLite takes a path of 512 with "-journal"
_TIMEOUT_S = 4.0


def resolve_uri(uri: str | None, directory: Path) -> str:
    """Return the full tracking URI; None stands for the SQLite file in `directory`.

    Raises:
        BadInput: MLflow has no store of this kind, or the URI names no place.
    """
    shown = f"{uri_setting(uri)}={redact(uri)}"
    if uri is None:
        uri, shown = f"sqlite:///{directory / DATABASE}", f"tracking.dir={directory}"
    scheme, separator, rest = uri.partition(":")
    dialect = scheme.partition("+")[0].lower()
    if not separator or dialect == "file":
        gone = "MLflow's file store is gone since 3.13"
        raise BadInput(f"{shown}: {gone}; try tracking.uri=sqlite:///{directory / DATABASE}")
    if dialect == "sqlite":
        if not rest.startswith("///") or rest in ("///", "///:memory:"):
            raise BadInput(f"{shown} names no file; try sqlite:////ABSOLUTE/PATH.db")
        path = str(Path(rest.removeprefix("///")).absolute())
        # SQLAlchemy decodes the path and takes what follows "?" as options, MLflow does neither.
        if unquote(path) != path or "?" in path:
            raise BadInput(f"{shown}: no path with '?' or a '%' escape can be a URI; try another")
        sizes = [len(os.fsencode(each)) for each in (path, *Path(path).parts)]
        if sizes[0] > _MAX_BYTES or max(sizes[1:]) > _MAX_NAME_BYTES:
            limits = f"a path may have {_MAX_BYTES} bytes, a name in it {_MAX_NAME_BYTES}"
            raise BadInput(f"{shown} has {sizes[0]} bytes; {limits}: try a shorter one")
        return f"sqlite:///{path}"
    if dialect in _SERVERS or dialect in _PORTS:
        try:
            parts = urlsplit(uri)
            _ = parts.port
        except ValueError as error:
            raise BadInput(f"{shown} is no address: {error}") from None
        if not parts.hostname and dialect in _SERVERS:
            raise BadInput(f"{shown} names no host; try http://127.0.0.1:5000")
        return uri
    raise BadInput(f"{shown}: no tracking store of this kind; use {_ALLOWED}")


def is_server(uri: str) -> bool:
    """Return whether `uri` is a tracking server, which itself decides where artifacts go."""
    return uri.lower().startswith(_SERVERS)


def sqlite_path(uri: str) -> Path | None:
    """Return the file of an SQLite URI; None for any other."""
    return Path(uri.partition(":///")[2]) if uri.startswith("sqlite") else None


def contact(uri: str) -> None:
    """Raise BadInput unless something answers at the URI of a server or database."""
    parts = urlsplit(uri)
    port = _PORTS.get(parts.scheme.partition("+")[0].lower())
    host = parts.netloc.rpartition("@")[2]  # any answer will do, so no password is sent
    url = urlunsplit((parts.scheme, host, parts.path.rstrip("/") + "/health", "", ""))
    try:
        if port is None:
            # That is the limit of each silence; the whole answer has one, too.
            call_in_thread(lambda: urlopen(url, timeout=_TIMEOUT_S).close()).result(2 * _TIMEOUT_S)
        elif parts.hostname:
            socket.create_connection((parts.hostname, parts.port or port), _TIMEOUT_S).close()
    except HTTPError as error:
        error.close()
    except OSError as error:
        cause = getattr(error, "reason", None) or error
        if not isinstance(cause, ssl.SSLError):  # MLflow itself reports on certificates
            problem = f"no tracking server answers at {redact(uri)} ({str(cause) or 'in time'})"
            raise BadInput(f"{problem}; start it, or choose another {uri_setting(uri)}") from None


def call_in_thread(function: Callable[[], Any]) -> Future[Any]:
    """Call a function in a daemon thread, which can be abandoned."""
    future: Future[Any] = Future()

    def call() -> None:
        try:
            future.set_result(function())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    return future
