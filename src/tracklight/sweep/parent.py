"""The parent run of a sweep: found, taken up again, described; and the runs below it."""

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tracklight import config
from tracklight.errors import BadInput
from tracklight.sweep.changes import check_unchanged
from tracklight.sweep.plan import Plan
from tracklight.tracking import provenance
from tracklight.tracking.choice import restoring
from tracklight.tracking.layout import PARENT_TAG, SWEEP_TAG
from tracklight.tracking.lock import alone
from tracklight.tracking.patience import persist
from tracklight.tracking.quiet import mlflow
from tracklight.tracking.run import Run
from tracklight.tracking.store import Store

THREADS_TAG = "tracklight.threads"
LOCK = ".sweeps.lock"  # in the tracking directory


def children(store: Store, parent_id: str, patience_s: float | None = None) -> list[Any]:
    """Return the runs under a parent, newest first, deleted ones excluded."""
    return store.search(f"tags.`{PARENT_TAG}` = '{parent_id}'", patience_s)


def open_parent(store: Store, plan: Plan, data: str | None) -> tuple[Run, int]:
    """Continue the parent run of this very sweep, or make it.

    Args:
        store: Where it is, or will be.
        plan: The sweep.
        data: Digest of the first point's data, where it is known.

    Returns:
        The run, open, and the threads of a trial, which stay those of the sweep's start.

    Raises:
        BadInput: The sweep is in progress, its parent is deleted, or its code or data have changed.
    """
    with alone(store.directory / LOCK):  # two starts at once would make two parents
        is_fresh = plan.settings["fresh"]
        found = None if is_fresh else _find(store, plan.identity)
        if found is None and not is_fresh:
            _check_not_deleted(store, plan.identity)
        cfg = plan.points[0][0].cfg
        if found is not None and not cfg.allow_changes:  # refused, it stays as it is
            jobs = [job for jobs in plan.points for job in jobs]
            check_unchanged(jobs, children(store, found.info.run_id), data)
        threads = int(found.data.tags.get(THREADS_TAG, plan.threads)) if found else plan.threads
        tags = _tags(plan) | {THREADS_TAG: str(threads)}
        if found is not None:
            return _reopen(store, found.info.run_id, tags), threads
        name = cfg.tracking.run_name or "sweep " + " ".join(plan.space.written())
        tags |= {SWEEP_TAG: plan.identity}
        return store.create(cfg.tracking.experiment, name, tags), threads


def _find(store: Store, identity: str) -> Any | None:
    """Return the newest parent run of this very sweep, as it is."""
    return next(iter(store.search(f"tags.`{SWEEP_TAG}` = '{identity}'")), None)


def _check_not_deleted(store: Store, identity: str) -> None:
    """Refuse to run again what somebody deleted, the parent's trials perhaps still being there."""
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
            f"starts over, {restoring(run.info.run_id, store.shown_uri)} brings it back"
        )


def _reopen(store: Store, run_id: str, tags: Mapping[str, str]) -> Run:
    """Continue a parent run, unless it is in progress, here or elsewhere."""
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


def _tags(plan: Plan) -> dict[str, str]:
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
