"""Makes MLflow's SQLite file, so that it is whole or not there, whoever is killed meanwhile."""

import math
import os
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from tracklight.errors import BadInput
from tracklight.paths import sync_folder
from tracklight.tracking.lock import alone
from tracklight.tracking.tags import SCORE
from tracklight.tracking.wal import Points

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


_BUSY_S = 20.0  # as MLflow's own sessions
_MAX_FLOAT = 1.7976931348623157e308  # what MLflow stores for infinity
_COLUMNS = {"key", "value", "timestamp", "run_uuid", "step", "is_nan"}
_ROWS = 150  # of one statement: SQLite before 3.32 binds 999 values

Row = tuple[str, float, int, int, bool]  # key, value, timestamp, step, is_nan


class PointTable:
    """The tables `metrics` and `latest_metrics`, for the points of one run.

    Args:
        path: The database file.
        run_id: The run, which must be active.
    """

    def __init__(self, path: Path, run_id: str):
        self._run_id = run_id
        self._connection = _connect(path)
        self._connection.execute("PRAGMA foreign_keys = ON")

    def write(self, points: Sequence[Points]) -> None:
        """Add the points; those that are there already stay as they are.

        Raises:
            sqlite3.Error: The database is locked, full or gone, or the run is not active in it.
        """
        rows = [row for record in points for row in _rows(record)]
        latest: dict[str, Row] = {}
        for row in rows:
            best = latest.get(row[0])
            if best is None or _age(row) > _age(best):
                latest[row[0]] = row
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            self._check_active()
            for at in range(0, len(rows), _ROWS):
                self._insert("INSERT OR IGNORE INTO metrics", rows[at : at + _ROWS])
            for row in latest.values():
                # MLflow's comparison of runs opens on the metric whose row comes first.
                rowid = _BEFORE_ALL if row[0] == SCORE else "NULL"
                self._insert("INSERT INTO latest_metrics", [row], _UPSERT, rowid)
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise

    def _check_active(self) -> None:
        stage = self._connection.execute(
            "SELECT lifecycle_stage FROM runs WHERE run_uuid = ?", (self._run_id,)
        ).fetchone()
        if stage != ("active",):
            raise sqlite3.IntegrityError(f"run {self._run_id} is deleted")

    def _insert(
        self, insert: str, rows: list[Row], conflict: str = "", rowid: str = "NULL"
    ) -> None:
        # One statement for many rows: SQLite then works without holding Python's lock.
        values = ",".join([f"({rowid},?1,?,?,?,?,?)"] * len(rows))
        columns = "rowid, run_uuid, key, value, timestamp, step, is_nan"
        self._connection.execute(
            f"{insert} ({columns}) VALUES {values}{conflict}",
            [self._run_id, *(field for row in rows for field in row)],
        )

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


_BEFORE_ALL = "(SELECT min(rowid) - 1 FROM latest_metrics)"
_UPSERT = """
    ON CONFLICT (key, run_uuid) DO UPDATE SET
        value = excluded.value, timestamp = excluded.timestamp,
        step = excluded.step, is_nan = excluded.is_nan
    WHERE (excluded.step, excluded.timestamp, excluded.value)
        > (latest_metrics.step, latest_metrics.timestamp, latest_metrics.value)"""


def _rows(record: Points) -> list[Row]:
    return [
        (record.key, _stored(value), record.timestamp_ms, step, value != value)
        for step, value in zip(record.steps, record.values, strict=True)
    ]


def _stored(value: float) -> float:
    if math.isfinite(value):
        return value
    return 0.0 if value != value else math.copysign(_MAX_FLOAT, value)


def _age(row: Row) -> tuple[int, int, float]:
    _, value, timestamp, step, _ = row
    return step, timestamp, value


def _connect(path: Path) -> sqlite3.Connection:
    # Never makes the file; the feeder's thread uses what another one may have opened.
    return sqlite3.connect(
        f"{path.as_uri()}?mode=rw",
        uri=True,
        timeout=_BUSY_S,
        isolation_level=None,
        check_same_thread=False,
    )


def is_known(path: Path) -> bool:
    """Whether the database at `path` has the tables that this file knows how to fill."""
    with closing(_connect(path)) as connection:
        return all(
            {row[1] for row in connection.execute(f"PRAGMA table_info({table})")} == _COLUMNS
            for table in ("metrics", "latest_metrics")
        )
