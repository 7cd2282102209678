"""Many runs at once, straight from MLflow's SQLite file.

MLflow's client needs seconds where the tables answer in hundredths; a test holds both to the same
answers.
"""

import math
import sqlite3
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from typing_extensions import override

from tracklight.errors import BadInput
from tracklight.tracking.layout import (
    DATA_NAME_TAG,
    IDENTITY_TAG,
    OUTCOME_TAG,
    PRUNED,
    REPRODUCES_TAG,
    SETTING_TAG,
)
from tracklight.tracking.ledger import (
    Chosen,
    Entry,
    Ledger,
    Scored,
    finite,
    newest_first,
    parts,
    restored,
)


class SqliteLedger(Ledger):
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
    def scored(self, chosen: Chosen, metric: str) -> list[Scored]:
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
            Scored(
                *(run_id, setting or run_id, identity, data or ""),
                *(None if nan else finite(value), start_ms, outcome == PRUNED),
            )
            for run_id, setting, identity, data, value, nan, start_ms, outcome in rows
            if wanted is None or run_id in wanted
        ]

    @override
    def entries(self, ids: Sequence[str]) -> list[Entry]:
        found: dict[str, Entry] = {}
        for part in parts(ids):
            marks = ", ".join("?" * len(part))
            for row in self._ask(
                "SELECT r.run_uuid, r.name, e.name, r.status, r.start_time, r.end_time FROM runs AS"
                " r JOIN experiments AS e ON e.experiment_id = r.experiment_id"
                f" WHERE r.lifecycle_stage = 'active' AND r.run_uuid IN ({marks})",
                part,
            ):
                found[row[0]] = Entry(*row)
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
