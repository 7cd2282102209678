"""Makes MLflow's SQLite file, so that it is whole or not there, whoever is killed meanwhile."""

import os
import sqlite3
from contextlib import closing
from pathlib import Path

from tracklight.errors import BadInput
from tracklight.tracking.lock import alone

_MAGIC = b"SQLite format 3\0"


def ensure(path: Path, artifact_root: str) -> None:
    """Return with an MLflow database at `path`, made now if it was not there.

    MLflow itself migrates a new file in place under no lock; two processes at once, or a kill in
    the first second, leave it broken for good.

    Raises:
        BadInput: There is something else, or nothing can be made there.
    """
    try:
        if _exists(path):
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with alone(path.with_name(f".{path.name}.lock")):
            if not _exists(path):
                _create(path, artifact_root)
    except OSError as error:
        raise BadInput(f"cannot make {path}: {error.strerror}; try another tracking.dir") from None


def _exists(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            head = file.read(len(_MAGIC))
    except FileNotFoundError:
        return False
    if not head:  # an empty file is what SQLite itself takes for a new database
        return False
    if head != _MAGIC:
        raise BadInput(f"{path} is no SQLite database; try another tracking.uri")
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as connection:
        try:
            tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master")}
        except sqlite3.OperationalError:  # locked: then it is in use, and MLflow will tell
            return True
        except sqlite3.DatabaseError as error:
            raise BadInput(f"{path} is no whole SQLite database ({error})") from None
    if not {"alembic_version", "runs", "latest_metrics"} <= tables:
        raise BadInput(f"{path} is no MLflow database, or was left half made; move it away")
    return True


def _create(path: Path, artifact_root: str) -> None:
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore  # 0.5 s that only this needs

    prefix = f".{path.name}.new-"
    for stale in path.parent.glob(f"{prefix}*"):  # of one who was killed: we hold the lock
        stale.unlink()
    temporary = path.with_name(f"{prefix}{os.getpid()}")
    SqlAlchemyStore(f"sqlite:///{temporary}", artifact_root).engine.dispose()
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Return once the folder's names are on the disk."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
