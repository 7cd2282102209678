"""The parent run of a sweep: found, taken up again, described; and the runs below it."""

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tracklight import config
from tracklight.errors import BadInput
from tracklight.sweep.plan import Plan
from tracklight.sweep.trial import PARENT_TAG
from tracklight.tracking import provenance
from tracklight.tracking.layout import SWEEP_TAG
from tracklight.tracking.patience import persist
from tracklight.tracking.quiet import mlflow
from tracklight.tracking.run import Run
from tracklight.tracking.store import Store

THREADS_TAG = "tracklight.threads"
PAGE = 1000  # runs an answer of MLflow's holds at most


def children(store: Store, parent_id: str) -> list[Any]:
    """Return the runs under a parent, newest first, deleted ones excluded."""
    client = store.client
    query = f"tags.`{PARENT_TAG}` = '{parent_id}'"

    def search() -> list[Any]:
        experiments = [each.experiment_id for each in client.search_experiments()]
        found: list[Any] = []
        token = None
        while True:
            answer = client.search_runs(
                experiments,
                query,
                max_results=PAGE,
                order_by=["attributes.start_time DESC"],
                page_token=token,
            )
            found += answer
            token = answer.token
            if not token:
                return found

    return persist(search, store.patience_s)


def find_parent(store: Store, identity: str) -> Any | None:
    """Return the newest parent run of this very sweep, as it is."""
    return next(iter(store.search(f"tags.`{SWEEP_TAG}` = '{identity}'")), None)


def check_not_deleted(store: Store, identity: str) -> None:
    """Refuse to run again what somebody deleted, the parent's trials perhaps still being there.

    Raises:
        BadInput: This sweep has a parent run, which is deleted.
    """
    client = store.client

    def search() -> list[Any]:
        experiments = [each.experiment_id for each in client.search_experiments()]
        query = f"tags.`{SWEEP_TAG}` = '{identity}'"
        return client.search_runs(
            experiments, query, mlflow.entities.ViewType.DELETED_ONLY, max_results=1
        )

    for run in persist(search, store.patience_s):
        raise BadInput(
            f"the parent run of this sweep, {run.info.run_id}, was deleted; sweep.fresh=true "
            f"starts over, `MLFLOW_TRACKING_URI={store.shown_uri} mlflow runs restore --run-id "
            f"{run.info.run_id}` brings it back"
        )


def reopen_parent(store: Store, run_id: str, tags: Mapping[str, str]) -> Run:
    """Continue a parent run.

    Raises:
        BadInput: The sweep is in progress, here or elsewhere.
    """
    is_here = (store.root / run_id).is_dir()
    if not is_here and store.client.get_run(run_id).info.status == "RUNNING":
        raise BadInput(
            f"this very sweep is RUNNING elsewhere, as run {run_id}; wait for it, or "
            "sweep.fresh=true"
        )
    try:
        run = store.reopen(run_id)
    except BadInput as error:
        raise BadInput(f"this very sweep: {error}; wait for it, or sweep.fresh=true") from None
    run.set_tags(tags)
    return run


def parent_tags(plan: Plan) -> dict[str, str]:
    """Return the tags that say what a sweep varies, how, and what made it."""
    kept = ("sampler", "pruner", "trials", "seeds", "workers")
    told = {f"sweep.{key}": str(plan.settings[key]) for key in kept}
    space = {f"space.{name}": values for name, values in plan.space.written().items()}
    command = config.redact(shlex.join(sys.argv))
    facts = provenance.collect(config.ROOT, command, provenance.code_digest())
    return facts.tags() | told | space | {"tracklight.kind": "sweep"}


def journal(run: Run) -> Path:
    """Return where Optuna's journal of a sweep lies."""
    return run.folder / "study.journal"
