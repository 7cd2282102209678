"""Where MLflow is: a URI as the user gave it, made whole, checked and fit to be shown."""

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from tracklight.errors import BadInput

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


def redact(text: str) -> str:
    """`text` with the user and password of every URI in it replaced."""
    text = re.sub(r"(?<=://)[^\s'\"]*@", "***@", text)
    return re.sub(r"(?i)\b(password|passwd|pwd|token|secret|key)=[^&\s]+", r"\1=***", text)
