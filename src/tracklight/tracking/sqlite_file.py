"""MLflow's SQLite file: created whole or not at all, and the tables of runs written directly."""

import json
import operator
import os
import re
import sqlite3
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from tracklight.errors import BadInput
from tracklight.paths import sync_folder
from tracklight.tracking.lock import exclusive_lock
from tracklight.tracking.mlflow_client import create_database, mlflow, short_reason
from tracklight.tracking.tags import ARTIFACTS_FOLDER, NAME_TAG, RUNS_FOLDER, SCORE, USER_TAG
from tracklight.tracking.wal import Call, Points

_BUSY_S = 20.0  # as MLflow's own sessions
_MAX = sys.float_info.max  # what MLflow stores for infinity
_METRIC = {"key", "value", "timestamp", "run_uuid", "step", "is_nan"}
_TEXT = {"key", "value", "run_uuid"}
_COLUMNS = {"metrics": _METRIC, "latest_metrics": _METRIC, "params": _TEXT, "tags": _TEXT}
_OTHERS = {
    "experiments": "experiment_id name workspace artifact_location lifecycle_stage creation_time"
    " last_update_time",
    "runs": "run_uuid name source_type source_name source_version entry_point_name user_id experiment_id"
    " status start_time end_time deleted_time lifecycle_stage artifact_uri",
    "datasets": "dataset_uuid experiment_id name digest dataset_source_type dataset_source dataset_schema"
    " dataset_profile",
    "inputs": "input_uuid source_type source_id destination_type destination_id step",
    "input_tags": "input_uuid name value",
}
_ALL_COLUMNS = _COLUMNS | {table: {*names.split()} for table, names in _OTHERS.items()}
_ROWS = 150  # of one statement: SQLite before 3.32 binds 999 values
_BEFORE_ALL = "(SELECT min(rowid) - 1 FROM latest_metrics)"
_UPSERT = """
    ON CONFLICT (key, run_uuid) DO UPDATE SET
        value = excluded.value, timestamp = excluded.timestamp,
        step = excluded.step, is_nan = excluded.is_nan
    WHERE (excluded.step, excluded.timestamp, excluded.value)
        > (latest_metrics.step, latest_metrics.timestamp, latest_metrics.value)"""

# Tables and columns that hold absolute addresses of artifacts.
_LOCATIONS = [("experiments", "artifact_location"), ("runs", "artifact_uri"), ("model_versions", "source")]
_LOCATIONS += [("logged_models", "artifact_location"), ("model_versions", "storage_location")]
_BELOW = "substr({} || '/', 1, ?) = ? || '/'"  # a prefix, and its length with the slash

Row = tuple[str, float, int, int, bool]  # key, value, timestamp, step, is_nan
_AGE = operator.itemgetter(3, 2, 1)


def ensure_database(path: Path, artifact_root: str, setting: str = "tracking.dir") -> None:
    """Create an MLflow database at `path`, which `setting` has named, unless there is one.

    MLflow itself migrates a new file in place under no lock; two processes at once, or a kill in
    the first second, leave it broken for good.

    Raises:
        BadInput: There is something else, or nothing can be created there.
    """
    try:
        if _exists(path, setting):
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with exclusive_lock(path.with_name(f".{path.name}.lock")):
            if _exists(path, setting):
                return
            prefix = f".{path.name}.new-"
            temporary = path.with_name(f"{prefix}{os.getpid()}")
            temporary.touch()  # with the mode of the umask, where SQLite gives 0644
            try:
                with closing(sqlite3.connect(temporary)) as connection:
                    connection.execute("PRAGMA user_version = 1")  # fails now, and MLflow after a minute
                create_database(temporary, artifact_root)
                with temporary.open("rb+") as file:
                    os.fsync(file.fileno())
                temporary.replace(path)
            finally:
                for left in path.parent.glob(f"{prefix}*"):  # of a killed process, too: we hold the lock
                    left.unlink()
            sync_folder(path.parent)
    except BadInput:
        raise
    except Exception as error:  # SQLAlchemy's and MLflow's own for a full disk, after a page of SQL
        reason = getattr(error, "strerror", None) or short_reason(getattr(error, "orig", error))
        raise BadInput(f"cannot make {path}: {reason}; try another {setting}") from None


def _exists(path: Path, setting: str) -> bool:
    if path.exists() and not path.is_file():  # as root, a device would be replaced
        raise BadInput(f"{path} is no regular file; try another {setting}")
    try:
        with path.open("rb") as file:
            if not file.read(1):  # SQLite itself takes an empty file for a new database
                return False
    except FileNotFoundError:
        return False
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as connection:
        try:
            tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master")}
        except sqlite3.OperationalError:  # locked, so in use; MLflow reports what is wrong with it
            return True
        except sqlite3.DatabaseError as error:
            reason = f"is no SQLite database, or was damaged ({error})"
            raise BadInput(f"{path} {reason}; try another {setting}") from None
    if not {"alembic_version", "runs", "latest_metrics"} <= tables:
        cure = f"move it away, or try another {setting}"
        raise BadInput(f"{path} is no MLflow database, or was left half made; {cure}")
    return True


def find_former_root(path: Path, root: Path) -> str:
    """Return the URI that `root`, the folder of the runs, had elsewhere; "" for a store that did not move.

    A store that is renamed, copied or mounted elsewhere keeps absolute addresses; that of the default
    experiment, which no run of ours uses, tells where it was made.
    """
    with closing(_connect(path, "ro")) as connection:
        query = "SELECT artifact_location FROM experiments WHERE experiment_id = 0"
        row = connection.execute(query).fetchone()
        former = str(row[0] if row else "").removesuffix("/0")
        if not re.fullmatch(f"file:///.*/{RUNS_FOLDER}", former) or former == root.as_uri():
            return ""
        is_below = _BELOW.format("artifact_uri")
        newest = f"SELECT run_uuid FROM runs WHERE {is_below} ORDER BY rowid DESC LIMIT 20"
        ids = [row[0] for row in connection.execute(newest, (len(former) + 1, former)).fetchall()]
    with suppress(OSError):  # it is no longer there
        if root.samefile(url2pathname(urlsplit(former).path)):  # by another name
            return ""
    return former if not ids or any((root / each).is_dir() for each in ids) else ""


def relocate_artifacts(path: Path, former: str, root: Path) -> int:
    """Let all addresses of artifacts below `former` lead to `root`; return how many were changed of runs."""
    size = len(former) + 1
    with closing(_connect(path)) as connection, connection:  # ends in COMMIT, or in ROLLBACK
        connection.execute("BEGIN IMMEDIATE")  # of two at once, the second finds nothing to change
        counts: dict[str, int] = {}
        for table, column in _LOCATIONS:
            change = f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE {_BELOW.format(column)}"
            counts[table] = connection.execute(change, (root.as_uri(), size, size, former)).rowcount
        return counts["runs"]


class RunTables:
    """The tables of runs, their points, params, tags and data sets."""

    def __init__(self, path: Path):
        self._connection = _connect(path)
        self._connection.execute("PRAGMA foreign_keys = ON")

    def create_run(
        self, run_id: str, experiment: str, location: str, name: str, tags: Mapping[str, str]
    ) -> Any | None:
        """Create a run as MLflow does, and return it.

        None, and no run, unless one experiment has that name, is active and has its artifacts in `location`.
        """
        of, tags, start_ms = mlflow.entities, {**tags, NAME_TAG: name}, time.time_ns() // 1_000_000
        state = {"user_id": tags.get(USER_TAG, "unknown"), "status": "RUNNING", "start_time": start_ms}
        state |= {"lifecycle_stage": "active", "artifact_uri": f"{location}/{run_id}/{ARTIFACTS_FOLDER}"}
        unknown = dict.fromkeys(("source_name", "entry_point_name", "source_version"), "")
        with self._connection:
            self._connection.execute("BEGIN IMMEDIATE")
            query = "SELECT experiment_id, artifact_location, lifecycle_stage FROM experiments WHERE name = ?"
            found = self._connection.execute(query, (experiment,)).fetchall()
            if [each[1:] for each in found] != [(location, "active")]:
                return None
            ids = {"run_uuid": run_id, "experiment_id": found[0][0], "name": name, "source_type": "UNKNOWN"}
            self._add("runs", **ids, **state, **unknown, conflict="ABORT")
            self._call(run_id, "tags", {"values": tags})
        info = of.RunInfo(run_id, str(found[0][0]), end_time=None, run_name=name, **state)
        return of.Run(info, of.RunData(tags=[of.RunTag(*each) for each in tags.items()]))

    def write(self, run_id: str, records: Sequence[Points | Call]) -> None:
        """Add points of an active run and make calls, all or none; points and params already there stay."""
        rows = [
            (each.key, max(-_MAX, min(value, _MAX)), each.timestamp_ms, step, False)
            if value == value
            else (each.key, 0.0, each.timestamp_ms, step, True)
            for each in records
            if isinstance(each, Points)
            for step, value in zip(each.steps, each.values, strict=True)
        ]
        latest: dict[str, Row] = {}
        for row in rows:
            latest[row[0]] = max(latest.get(row[0], row), row, key=_AGE)
        with self._connection:  # ends in COMMIT, or in ROLLBACK
            self._connection.execute("BEGIN IMMEDIATE")
            query = "SELECT lifecycle_stage FROM runs WHERE run_uuid = ?"
            if self._connection.execute(query, (run_id,)).fetchone() != ("active",):
                raise sqlite3.IntegrityError(f"run {run_id} is deleted")
            for at in range(0, len(rows), _ROWS):
                self._insert(run_id, "INSERT OR IGNORE INTO metrics", rows[at : at + _ROWS])
            for row in latest.values():
                # MLflow's comparison of runs opens on the metric whose row comes first.
                rowid = _BEFORE_ALL if row[0] == SCORE else "NULL"
                self._insert(run_id, "INSERT INTO latest_metrics", [row], _UPSERT, rowid)
            for each in records:
                if isinstance(each, Call):
                    self._call(run_id, each.name, each.arguments)

    def _call(self, run_id: str, name: str, arguments: dict[str, Any]) -> None:
        if name == "status":
            ended = (arguments["status"], arguments["end_ms"], run_id)
            self._connection.execute("UPDATE runs SET status = ?, end_time = ? WHERE run_uuid = ?", ended)
            return
        if name == "input":
            self._log_input(run_id, **arguments)
            return
        of_known = "IGNORE" if name == "params" else "REPLACE"
        insert = f"INSERT OR {of_known} INTO {name} (key, value, run_uuid) VALUES (?, ?, ?)"
        self._connection.executemany(insert, [(*item, run_id) for item in arguments["values"].items()])

    def _log_input(self, run_id: str, name: str, digest: str, source: str, context: str) -> None:
        experiment_id = self._find("runs", "experiment_id", run_uuid=run_id)
        of_data = {"experiment_id": experiment_id, "name": name, "digest": digest}
        made = {"dataset_uuid": uuid.uuid4().hex, "dataset_source_type": "local", "dataset_source": source}
        self._add("datasets", **of_data, **made)
        data_id = self._find("datasets", "dataset_uuid", **of_data)
        use = {"source_type": "DATASET", "source_id": data_id}
        use |= {"destination_type": "RUN", "destination_id": run_id}
        self._add("inputs", input_uuid=uuid.uuid4().hex, **use)
        input_id = self._find("inputs", "input_uuid", **use)
        self._add("input_tags", input_uuid=input_id, name="mlflow.data.context", value=context)

    def _add(self, table: str, conflict: str = "IGNORE", **row: Any) -> None:
        """Add a row, by default unless there is one of its key."""
        into = f"{table} ({', '.join(row)}) VALUES ({', '.join('?' * len(row))})"
        self._connection.execute(f"INSERT OR {conflict} INTO {into}", (*row.values(),))

    def _find(self, table: str, column: str, **row: Any) -> Any:
        is_it = " AND ".join(f"{key} = ?" for key in row)
        query = f"SELECT {column} FROM {table} WHERE {is_it}"
        return self._connection.execute(query, (*row.values(),)).fetchone()[0]

    def _insert(
        self, run_id: str, insert: str, rows: list[Row], conflict: str = "", rowid: str = "NULL"
    ) -> None:
        # One statement for many rows: SQLite then works without holding Python's lock.
        values = ",".join([f"({rowid},?1,?,?,?,?,?)"] * len(rows))
        columns = "rowid, run_uuid, key, value, timestamp, step, is_nan"
        fields = [run_id, *(field for row in rows for field in row)]
        self._connection.execute(f"{insert} ({columns}) VALUES {values}{conflict}", fields)

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


def _connect(path: Path, mode: str = "rw") -> sqlite3.Connection:
    # Never creates the file; the sender's thread uses what another one may have opened.
    options: Any = {"isolation_level": None, "check_same_thread": False}
    return sqlite3.connect(f"{path.as_uri()}?mode={mode}", uri=True, timeout=_BUSY_S, **options)


def has_known_columns(path: Path, fills_all: bool = False) -> bool:
    """Return whether the tables at `path` have the columns that `RunTables` knows: of points, or of all."""
    known = _ALL_COLUMNS if fills_all else _COLUMNS
    with closing(_connect(path)) as connection:
        rows = {name: connection.execute(f"PRAGMA table_info({name})").fetchall() for name in known}
    return known == {name: {row[1] for row in found} for name, found in rows.items()}


def creation_order(path: Path, run_ids: Sequence[str]) -> dict[str, int]:
    """Return a number for each of the runs at `path`; that of a run is higher than those of earlier ones."""
    query = "SELECT run_uuid, rowid FROM runs WHERE run_uuid IN (SELECT value FROM json_each(?))"
    with closing(_connect(path)) as connection:
        return dict(connection.execute(query, (json.dumps(run_ids),)).fetchall())
