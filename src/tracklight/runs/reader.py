"""Readers of many runs at once: MLflow's SQLite file directly, any other store by its client."""

import math
import operator
import sqlite3
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracklight.errors import BadInput
from tracklight.tracking import address, tags

if TYPE_CHECKING:
    from tracklight.tracking.store import Store

BATCH_SIZE = 500  # ids of one SQL statement, and of one of MLflow's filters


@dataclass
class RunRecord:
    """One run; a metric is its last value."""

    run_id: str
    name: str
    experiment: str
    status: str
    start_ms: int
    end_ms: int | None
    params: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RunScore:
    """What ranking needs of a run."""

    run_id: str
    setting: str  # digest of the config without its seeds; the run's id where it is not known
    identity: str  # digest of the config with its seeds
    data: str  # digest of the data set, or its name where that is unknown
    last: float | None  # last value of the metric, if finite
    start_ms: int
    is_pruned: bool

    @property
    def value(self) -> float | None:
        """The value that counts: None for a pruned trial, which did not get to its end."""
        return None if self.is_pruned else self.last


@dataclass(frozen=True)
class RunFilter:
    """Which training runs to read; the defaults filter nothing.

    Reproductions are no new evidence and are left out, unless `tags` ask for them.
    """

    experiment: str | None = None  # its name
    tags: dict[str, str] = field(default_factory=dict)
    params: dict[str, str] = field(default_factory=dict)
    since_ms: int = 0  # of the start


def finite(value: float | None) -> float | None:
    """Return the value; None if it is not finite. MLflow stores infinity as the largest float."""
    return value if value is not None and abs(value) < sys.float_info.max else None


def latest_seeds(scores: Iterable[RunScore]) -> list[RunScore]:
    """Keep one run per seed of a setting: the newest that has a value, if one has."""
    kept: dict[str, RunScore] = {}
    for run in sorted(scores, key=lambda run: run.value is None):
        kept.setdefault(run.identity, run)
    return [*kept.values()]


def batches(ids: Sequence[str]) -> Iterator[Sequence[str]]:
    """Split ids into batches that one query can hold."""
    return (ids[at : at + BATCH_SIZE] for at in range(0, len(ids), BATCH_SIZE))


def _as_logged(value: float) -> float:
    """Return infinity where MLflow stored the largest float."""
    return math.copysign(math.inf, value) if abs(value) >= sys.float_info.max else value


def _with_epochs(runs: Iterable[RunRecord]) -> list[RunRecord]:
    """Give each run the number of epochs of its tag: a run is extended, but its param stays."""
    found = list(runs)
    for run in found:
        if tags.EPOCHS_TAG in run.tags and "trainer.max_epochs" in run.params:
            run.params["trainer.max_epochs"] = run.tags[tags.EPOCHS_TAG]
    return found


class SqliteReader:
    """Reads MLflow's SQLite file without importing MLflow; any other file is refused.

    Runs come newest first, deleted ones excluded; `display_uri` holds no password.
    """

    def __init__(self, path: Path):
        self.display_uri = f"sqlite:///{path}"
        self._path = path
        tables = {row[0] for row in self._query("SELECT name FROM sqlite_master")}
        if not {"runs", "params", "tags", "latest_metrics", "metrics", "experiments"} <= tables:
            raise BadInput(f"{path} is no MLflow database; name another: --uri")

    def _query(self, sql: str, values: Iterable[Any] = ()) -> list[Any]:
        try:
            with closing(sqlite3.connect(f"{self._path.as_uri()}?mode=ro", uri=True)) as connection:
                connection.execute("PRAGMA busy_timeout = 30000")
                return connection.execute(sql, tuple(values)).fetchall()
        except sqlite3.DatabaseError as error:
            raise BadInput(f"{self._path} cannot be read: {error}") from None

    def _query_batches(self, sql: str, ids: Sequence[str], *values: str) -> Iterator[Any]:
        """Yield the rows for all ids, whose list stands in the statement as {ids}."""
        for batch in batches(ids):
            yield from self._query(sql.format(ids=", ".join("?" * len(batch))), (*values, *batch))

    def find_ids(self, prefix: str, deleted: bool = False) -> list[str]:
        """Return up to two ids with this prefix, of runs of any kind, or of deleted ones."""
        sql = "SELECT run_uuid FROM runs WHERE lifecycle_stage = ? AND run_uuid LIKE ? LIMIT 2"
        return [row[0] for row in self._query(sql, ("deleted" if deleted else "active", f"{prefix}%"))]

    def search_scores(self, run_filter: RunFilter, metric: str) -> list[RunScore]:
        """Return the last value of a metric of all training runs that pass the filter."""
        value = "(SELECT value FROM {} WHERE run_uuid = r.run_uuid AND key = ?)"
        tag, param = value.format("tags"), value.format("params")
        where, values = [f"{tag} IS NOT NULL"], [tags.IDENTITY_TAG]
        for column, wanted in ((tag, run_filter.tags), (param, run_filter.params)):
            for pair in wanted.items():
                where.append(f"{column} = ?")
                values += pair
        if tags.REPRODUCES_TAG not in run_filter.tags:
            where.append(f"{tag} IS NULL")
            values.append(tags.REPRODUCES_TAG)
        if run_filter.experiment is not None:
            where.append("r.experiment_id = (SELECT experiment_id FROM experiments WHERE name = ?)")
            values.append(run_filter.experiment)
        columns = (tags.SETTING_TAG, tags.IDENTITY_TAG, tags.DATA_SET_TAG, tags.DATA_NAME_TAG)
        rows = self._query(
            f"SELECT r.run_uuid, coalesce({tag}, r.run_uuid), {tag}, coalesce({tag}, {tag}, ''),"
            f" CASE m.is_nan WHEN 0 THEN m.value END, r.start_time, {tag} FROM runs AS r"
            " LEFT JOIN latest_metrics AS m ON m.run_uuid = r.run_uuid AND m.key = ?"
            f" WHERE r.lifecycle_stage = 'active' AND {' AND '.join(where)}"
            " AND r.start_time >= ? ORDER BY r.rowid DESC",
            (*columns, tags.OUTCOME_TAG, metric, *values, run_filter.since_ms),
        )
        return [
            RunScore(run_id, setting, identity, data, finite(value), start, outcome == tags.PRUNED)
            for run_id, setting, identity, data, value, start, outcome in rows
        ]

    def get_runs(self, ids: Sequence[str]) -> list[RunRecord]:
        """Return the runs with these ids."""
        rows = self._query_batches(
            "SELECT r.run_uuid, r.name, e.name, r.status, r.start_time, r.end_time, r.rowid FROM runs AS r"
            " JOIN experiments AS e ON e.experiment_id = r.experiment_id"
            " WHERE r.lifecycle_stage = 'active' AND r.run_uuid IN ({ids})",
            ids,
        )
        newest_first = sorted(rows, key=operator.itemgetter(-1), reverse=True)
        runs = {row[0]: RunRecord(*row[:-1]) for row in newest_first}
        for table in ("params", "tags"):
            sql = f"SELECT run_uuid, key, value FROM {table} WHERE run_uuid IN ({{ids}})"
            for run_id, key, value in self._query_batches(sql, [*runs]):
                getattr(runs[run_id], table)[key] = value
        sql = "SELECT run_uuid, key, value, is_nan FROM latest_metrics WHERE run_uuid IN ({ids})"
        for run_id, key, value, is_nan in self._query_batches(sql, [*runs]):
            runs[run_id].metrics[key] = math.nan if is_nan else _as_logged(value)
        return _with_epochs(runs.values())

    def get_histories(self, ids: Sequence[str], metric: str) -> dict[str, list[tuple[int, float]]]:
        """Return the steps and values of a metric, by id of the runs that have it."""
        found: dict[str, list[tuple[int, float]]] = {}
        sql = "SELECT run_uuid, step, value FROM metrics WHERE key = ? AND run_uuid IN ({ids})"
        sql += " AND is_nan = 0 ORDER BY step, timestamp"
        for run_id, step, value in self._query_batches(sql, ids, metric):
            found.setdefault(run_id, []).append((step, value))
        return found


class ClientReader:
    """Reads any store by MLflow's client."""

    def __init__(self, store: "Store"):
        self.display_uri = store.display_uri
        self._store = store
        self._names = {e.experiment_id: e.name for e in store.client.search_experiments()}

    def _search(self, query: str, experiment: str | None = None, deleted: bool = False) -> list[RunRecord]:
        return _with_epochs(
            RunRecord(
                *(run.info.run_id, run.info.run_name, self._names.get(run.info.experiment_id, "")),
                *(run.info.status, run.info.start_time, run.info.end_time, run.data.params),
                {key: _as_logged(value) for key, value in run.data.metrics.items()},
                run.data.tags,
            )
            for run in self._store.search(query, experiment=experiment, deleted=deleted)
        )

    def find_ids(self, prefix: str, deleted: bool = False) -> list[str]:
        """See `SqliteReader`."""
        found = self._search(f"attributes.run_id LIKE '{prefix}%'", deleted=deleted)
        return [run.run_id for run in found[:2]]

    def search_scores(self, run_filter: RunFilter, metric: str) -> list[RunScore]:
        """See `SqliteReader`."""
        query = [f"tags.`{key}` = '{_quoted(v)}'" for key, v in run_filter.tags.items()]
        query += [f"params.`{key}` = '{_quoted(v)}'" for key, v in run_filter.params.items()]
        query += [f"tags.`{tags.IDENTITY_TAG}` LIKE '%'", f"attributes.start_time >= {run_filter.since_ms}"]
        return [
            RunScore(
                run.run_id,
                run.tags.get(tags.SETTING_TAG, run.run_id),
                run.tags[tags.IDENTITY_TAG],
                next(iter(tags.same_data(run.tags).values()), ""),
                finite(run.metrics.get(metric)),
                run.start_ms,
                tags.is_pruned(run.tags),
            )
            for run in self._search(" AND ".join(query), run_filter.experiment)
            if tags.REPRODUCES_TAG in run_filter.tags or tags.REPRODUCES_TAG not in run.tags
        ]

    def get_runs(self, ids: Sequence[str]) -> list[RunRecord]:
        """See `SqliteReader`."""
        queries = (f"attributes.run_id IN ({', '.join(map(repr, ids))})" for ids in batches(ids))
        found = (run for query in queries for run in self._search(query))
        return sorted(found, key=lambda run: -run.start_ms)

    def get_histories(self, ids: Sequence[str], metric: str) -> dict[str, list[tuple[int, float]]]:
        """See `SqliteReader`."""
        found: dict[str, list[tuple[int, float]]] = {}
        for run_id in ids:
            history = self._store.client.get_metric_history(run_id, metric)
            for point in sorted(history, key=lambda point: (point.step, point.timestamp)):
                if not math.isnan(point.value):
                    found.setdefault(run_id, []).append((point.step, point.value))
        return found


def _quoted(value: str) -> str:
    if "'" in value:
        raise BadInput(f"{value!r}: a value with a quote cannot be asked for on a server")
    return value


RunReader = SqliteReader | ClientReader


def open_reader(uri: str | None, directory: Path) -> RunReader:
    """Open a store for reading; a missing one is refused, not created."""
    path = address.sqlite_path(address.resolve_uri(uri, directory.absolute()))
    if path is None:
        from tracklight.tracking.store import connect  # imports MLflow, which takes seconds

        return ClientReader(connect(uri, directory, reads_only=True))
    try:
        if path.is_file():
            return SqliteReader(path)
    except OSError as error:  # of a folder above
        raise BadInput(f"{path} cannot be read ({error.strerror})") from None
    raise BadInput(f"there is no store {path} yet; train something first, or name it: --uri")


def reader_of(store: "Store") -> RunReader:
    """Return a reader of an open store."""
    return ClientReader(store) if store.database is None else SqliteReader(store.database)
