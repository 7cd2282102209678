"""Many runs at once, read for comparison."""

import math
import sqlite3
import sys
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from typing_extensions import override

from tracklight.errors import BadInput
from tracklight.tracking import address
from tracklight.tracking.mlflow_client import mlflow
from tracklight.tracking.tags import (
    DATA_NAME_TAG,
    IDENTITY_TAG,
    OUTCOME_TAG,
    PARENT_TAG,
    PRUNED,
    REPRODUCES_TAG,
    SETTING_TAG,
    is_pruned,
)

_MAX_VARIABLES = 500  # of one SQL statement, and of one of the client's filters


@dataclass
class RunRecord:
    """One training run as a leaderboard shows it; a metric is its last value."""

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
    """What ranking needs of a run: which setting it is an example of, and how it did.

    A trial that was pruned came to no value: its sweep compared it with others of its age, and
    others went on.
    """

    run_id: str
    setting: str  # the config without its seeds; the run itself where that is not known
    identity: str  # the config with its seeds: the same again is no new evidence
    data: str  # name of the data set
    last: float | None  # value of the metric
    start_ms: int
    is_pruned: bool

    @property
    def value(self) -> float | None:
        """What the run came to; None where it has no finite value, or did not get to its end."""
        return None if self.is_pruned else self.last


@dataclass(frozen=True)
class RunFilter:
    """Which training runs are asked for; None and empty leave all of them in.

    Reproductions, which are no new evidence, are left out unless ids or their tag ask for them.

    Attributes:
        experiment: Name of their experiment.
        parent: Id of the sweep they are trials of.
        tags: Values of their tags.
        params: Values of their parameters.
        ids: Their ids.
    """

    experiment: str | None = None
    parent: str | None = None
    tags: dict[str, str] = field(default_factory=dict)
    params: dict[str, str] = field(default_factory=dict)
    ids: Sequence[str] | None = None

    @property
    def with_reproductions(self) -> bool:
        """Whether runs made again are asked for."""
        return self.ids is not None or REPRODUCES_TAG in self.tags

    @property
    def all_tags(self) -> dict[str, str]:
        """The tags, the one that names the parent among them."""
        return self.tags | ({PARENT_TAG: self.parent} if self.parent else {})


class RunReader(Protocol):
    """The reading side of a store. Runs that training did not make, and deleted ones, are no part.

    Every list is newest first.
    """

    shown_uri: str

    def ids(self, prefix: str, deleted: bool = False) -> list[str]:
        """Return up to two ids that begin so, of runs of any kind, or of deleted ones."""
        ...

    def scored(self, chosen: RunFilter, metric: str) -> list[RunScore]:
        """Return all chosen runs with their last value of a metric."""
        ...

    def entries(self, ids: Sequence[str]) -> list[RunRecord]:
        """Return these runs."""
        ...

    def series(self, ids: Sequence[str], metric: str) -> dict[str, list[tuple[int, float]]]:
        """Return steps and values of a metric, by rising step, of the runs that have it."""
        ...


def open_reader(uri: str | None, directory: Path) -> RunReader:
    """Open a store for reading; nothing is made.

    Raises:
        BadInput: There is none.
    """
    full = address.resolve(uri, directory.absolute())
    path = address.sqlite_path(full)
    if path is None:
        from tracklight.tracking.store import connect  # imports MLflow, in seconds

        store = connect(uri, directory)
        pass

        return ClientReader(store.client, store.shown_uri)
    if not path.is_file():
        raise BadInput(f"there is no store {path} yet; train something first, or name it: --uri")
    pass

    return SqliteReader(path)


def finite(value: float | None) -> float | None:
    """Return the value, or None where it is no finite number."""
    # SQL has no infinity: MLflow stores the largest float instead.
    is_finite = value is not None and abs(value) < sys.float_info.max
    return value if is_finite else None


def restored(value: float) -> float:
    """Return a metric's value as it was logged: infinite, where MLflow stored the largest float."""
    return value if finite(value) is not None else math.copysign(math.inf, value)


def distinct(found: Iterable[RunScore]) -> list[RunScore]:
    """Keep of the runs of one config, seeds included, the newest that has a value."""
    kept: dict[str, RunScore] = {}
    for run in sorted(found, key=lambda each: each.value is None):
        kept.setdefault(run.identity, run)
    return [*kept.values()]


def newest_first(entries: Iterable[RunRecord]) -> list[RunRecord]:
    """Return the runs in the order of every list here."""
    return sorted(entries, key=lambda each: (-each.start_ms, each.run_id))


def parts(ids: Sequence[str]) -> Iterable[Sequence[str]]:
    """Cut a list of ids so that one question holds each part."""
    return (ids[at : at + _MAX_VARIABLES] for at in range(0, len(ids), _MAX_VARIABLES))


pass


class SqliteReader(RunReader):
    """Reads MLflow's SQLite file.

    Args:
        path: The file.

    Raises:
        BadInput: It is none of MLflow's.
    """

    def __init__(self, path: Path):
        self.shown_uri = f"sqlite:///{path}"
        self._path = path
        known = {row[0] for row in self._ask("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if not {"runs", "params", "tags", "latest_metrics", "metrics", "experiments"} <= known:
            raise BadInput(f"{path} is no MLflow database; name another: --uri")

    def _ask(self, query: str, values: Iterable[Any] = ()) -> list[Any]:
        try:
            with closing(sqlite3.connect(f"{self._path.as_uri()}?mode=ro", uri=True)) as connection:
                connection.execute("PRAGMA busy_timeout = 30000")
                return connection.execute(query, tuple(values)).fetchall()
        except sqlite3.DatabaseError as error:
            raise BadInput(f"{self._path} cannot be read: {error}") from None

    @override
    def ids(self, prefix: str, deleted: bool = False) -> list[str]:
        query = (
            "SELECT run_uuid FROM runs WHERE lifecycle_stage = ? AND run_uuid LIKE ?"
            " ORDER BY start_time DESC LIMIT 2"
        )
        stage = "deleted" if deleted else "active"
        return [row[0] for row in self._ask(query, [stage, f"{prefix}%"])]

    @override
    def scored(self, chosen: RunFilter, metric: str) -> list[RunScore]:
        joins = [
            "JOIN tags AS own ON own.run_uuid = r.run_uuid AND own.key = ?",
            "LEFT JOIN tags AS s ON s.run_uuid = r.run_uuid AND s.key = ?",
            "LEFT JOIN tags AS d ON d.run_uuid = r.run_uuid AND d.key = ?",
            "LEFT JOIN tags AS o ON o.run_uuid = r.run_uuid AND o.key = ?",
            "LEFT JOIN latest_metrics AS m ON m.run_uuid = r.run_uuid AND m.key = ?",
        ]
        values: list[Any] = [IDENTITY_TAG, SETTING_TAG, DATA_NAME_TAG, OUTCOME_TAG, metric]
        pairs = [("tags", pair) for pair in chosen.all_tags.items()]
        pairs += [("params", pair) for pair in chosen.params.items()]
        for at, (table, pair) in enumerate(pairs):
            joins.append(
                f"JOIN {table} AS f{at} ON f{at}.run_uuid = r.run_uuid"
                f" AND f{at}.key = ? AND f{at}.value = ?"
            )
            values += pair
        where = "r.lifecycle_stage = 'active'"
        if not chosen.with_reproductions:
            joins.append("LEFT JOIN tags AS a ON a.run_uuid = r.run_uuid AND a.key = ?")
            where += " AND a.value IS NULL"
            values.append(REPRODUCES_TAG)
        if chosen.experiment is not None:
            joins.append("JOIN experiments AS e ON e.experiment_id = r.experiment_id")
            where += " AND e.name = ?"
            values.append(chosen.experiment)
        rows = self._ask(
            "SELECT r.run_uuid, s.value, own.value, d.value, m.value, m.is_nan, r.start_time,"
            f" o.value FROM runs AS r {' '.join(joins)} WHERE {where}"
            " ORDER BY r.start_time DESC, r.run_uuid",
            values,
        )
        wanted = None if chosen.ids is None else set(chosen.ids)
        return [
            RunScore(
                *(run_id, setting or run_id, identity, data or ""),
                *(None if nan else finite(value), start_ms, outcome == PRUNED),
            )
            for run_id, setting, identity, data, value, nan, start_ms, outcome in rows
            if wanted is None or run_id in wanted
        ]

    @override
    def entries(self, ids: Sequence[str]) -> list[RunRecord]:
        found: dict[str, RunRecord] = {}
        for part in parts(ids):
            marks = ", ".join("?" * len(part))
            for row in self._ask(
                "SELECT r.run_uuid, r.name, e.name, r.status, r.start_time, r.end_time FROM runs AS"
                " r JOIN experiments AS e ON e.experiment_id = r.experiment_id"
                f" WHERE r.lifecycle_stage = 'active' AND r.run_uuid IN ({marks})",
                part,
            ):
                found[row[0]] = RunRecord(*row)
            for table in ("params", "tags"):
                query = f"SELECT run_uuid, key, value FROM {table} WHERE run_uuid IN ({marks})"
                for run_id, key, value in self._ask(query, part):
                    if run_id in found:
                        getattr(found[run_id], table)[key] = value
            query = (
                "SELECT run_uuid, key, value, is_nan FROM latest_metrics"
                f" WHERE run_uuid IN ({marks})"
            )
            for run_id, key, value, nan in self._ask(query, part):
                if run_id in found:
                    found[run_id].metrics[key] = math.nan if nan else restored(value)
        return newest_first(found.values())

    @override
    def series(self, ids: Sequence[str], metric: str) -> dict[str, list[tuple[int, float]]]:
        found: dict[str, list[tuple[int, float]]] = {}
        for part in parts(ids):
            query = (
                "SELECT run_uuid, step, value FROM metrics WHERE key = ? AND is_nan = 0"
                f" AND run_uuid IN ({', '.join('?' * len(part))}) ORDER BY step, timestamp"
            )
            for run_id, step, value in self._ask(query, [metric, *part]):
                found.setdefault(run_id, []).append((step, value))
        return found


pass

_MAX_RUNS = 50_000
_PAGE = 1000


class ClientReader(RunReader):
    """Asks MLflow.

    Args:
        client: MLflow's.
        shown_uri: Where it asks, as it may be printed.
    """

    def __init__(self, client: Any, shown_uri: str):
        self.shown_uri = shown_uri
        self._client = client
        self._experiments = {e.experiment_id: e.name for e in client.search_experiments()}

    def _search(
        self,
        query: str,
        experiment: str | None = None,
        limit: int = _MAX_RUNS,
        deleted: bool = False,
    ) -> list:
        view = mlflow.entities.ViewType
        stage = view.DELETED_ONLY if deleted else view.ACTIVE_ONLY
        ids = [i for i, name in self._experiments.items() if experiment in (None, name)]
        runs: list[Any] = []
        token = None
        while ids and len(runs) < limit:
            newest = ["attributes.start_time DESC"]
            size = min(_PAGE, limit - len(runs))
            page = self._client.search_runs(
                ids, query, stage, max_results=size, order_by=newest, page_token=token
            )
            runs += page
            token = page.token
            if not token:
                break
        return runs

    @override
    def ids(self, prefix: str, deleted: bool = False) -> list[str]:
        found = self._search(f"attributes.run_id LIKE '{prefix}%'", limit=2, deleted=deleted)
        return [run.info.run_id for run in found]

    @override
    def scored(self, chosen: RunFilter, metric: str) -> list[RunScore]:
        wanted = None if chosen.ids is None else set(chosen.ids)
        words = [f"tags.`{key}` = '{_quoted(v)}'" for key, v in chosen.all_tags.items()]
        words += [f"params.`{key}` = '{_quoted(v)}'" for key, v in chosen.params.items()]
        words.append(f"tags.`{IDENTITY_TAG}` LIKE '%'")
        found = [
            RunScore(
                run.info.run_id,
                run.data.tags.get(SETTING_TAG, run.info.run_id),
                run.data.tags[IDENTITY_TAG],
                run.data.tags.get(DATA_NAME_TAG, ""),
                finite(run.data.metrics.get(metric)),
                run.info.start_time,
                is_pruned(run.data.tags),
            )
            for run in self._search(" AND ".join(words), chosen.experiment)
            if wanted is None or run.info.run_id in wanted
            if chosen.with_reproductions or REPRODUCES_TAG not in run.data.tags
        ]
        return sorted(found, key=lambda each: (-each.start_ms, each.run_id))

    @override
    def entries(self, ids: Sequence[str]) -> list[RunRecord]:
        found = []
        for part in parts(ids):
            listed = ", ".join(f"'{run_id}'" for run_id in part)
            for run in self._search(f"attributes.run_id IN ({listed})"):
                info, data = run.info, run.data
                found.append(
                    RunRecord(
                        *(info.run_id, info.run_name, self._experiments[info.experiment_id]),
                        *(info.status, info.start_time, info.end_time),
                        dict(data.params),
                        {
                            key: value if math.isnan(value) else restored(value)
                            for key, value in data.metrics.items()
                        },
                        dict(data.tags),
                    )
                )
        return newest_first(found)

    @override
    def series(self, ids: Sequence[str], metric: str) -> dict[str, list[tuple[int, float]]]:
        found = {}
        for run_id in ids:
            points = self._client.get_metric_history(run_id, metric)
            steps = sorted((p.step, p.timestamp, p.value) for p in points if p.value == p.value)
            if steps:
                found[run_id] = [(step, value) for step, _, value in steps]
        return found


def _quoted(value: str) -> str:
    if "'" in value:
        raise BadInput(f"{value!r}: a value with a quote cannot be asked for on a server")
    return value
