"""Many runs at once, by MLflow's client, wherever the store is."""

import math
from collections.abc import Sequence
from typing import Any

from typing_extensions import override

from tracklight.errors import BadInput
from tracklight.tracking.layout import (
    DATA_NAME_TAG,
    IDENTITY_TAG,
    REPRODUCES_TAG,
    SETTING_TAG,
    is_pruned,
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
from tracklight.tracking.quiet import mlflow

_MAX_RUNS = 50_000
_PAGE = 1000


class ClientLedger(Ledger):
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
    def scored(self, chosen: Chosen, metric: str) -> list[Scored]:
        wanted = None if chosen.ids is None else set(chosen.ids)
        words = [f"tags.`{key}` = '{_quoted(v)}'" for key, v in chosen.all_tags.items()]
        words += [f"params.`{key}` = '{_quoted(v)}'" for key, v in chosen.params.items()]
        words.append(f"tags.`{IDENTITY_TAG}` LIKE '%'")
        found = [
            Scored(
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
    def entries(self, ids: Sequence[str]) -> list[Entry]:
        found = []
        for part in parts(ids):
            listed = ", ".join(f"'{run_id}'" for run_id in part)
            for run in self._search(f"attributes.run_id IN ({listed})"):
                info, data = run.info, run.data
                found.append(
                    Entry(
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
