"""The reading side of the store: runs by id, and what they left."""

import re
import tempfile
from pathlib import Path
from typing import Any

from tracklight.errors import BadInput
from tracklight.tracking.quiet import mlflow
from tracklight.tracking.store import Store

CHECKPOINTS = "checkpoints"
BEST = f"{CHECKPOINTS}/best.ckpt"
LAST = f"{CHECKPOINTS}/last.ckpt"


def find_run(store: Store, run_id: str) -> Any:
    """Return the run with this id, or with an id that begins so.

    Raises:
        BadInput: There is no such run, it is deleted, or several ids begin so.
    """
    if not re.fullmatch(r"[0-9a-f]{4,32}", run_id):
        raise BadInput(
            f"run id {run_id[:60]!r} must be 4 to 32 hexadecimal digits, as MLflow shows it"
        )
    if len(run_id) == 32:
        try:
            run = store.client.get_run(run_id)
        except mlflow.exceptions.MlflowException:
            raise BadInput(f"there is no run {run_id} in {store.shown_uri}") from None
        if run.info.lifecycle_stage == "deleted":
            raise BadInput(
                f"run {run_id} is deleted; restore it with `mlflow runs restore --run-id {run_id}`"
            )
        return run
    experiments = [each.experiment_id for each in store.client.search_experiments()]
    found = store.client.search_runs(
        experiments, f"attributes.run_id LIKE '{run_id}%'", max_results=2
    )
    if len(found) != 1:
        what = "several runs begin" if found else "no run begins"
        raise BadInput(f"{what} with {run_id} in {store.shown_uri}; give the whole id")
    return found[0]


def fetch(store: Store, run: Any, path: str) -> Path:
    """Return a local copy of a run's artifact: the file itself where it lies here.

    Raises:
        BadInput: The run has no such artifact, or it cannot be had.
    """
    local = store.directory / "artifacts" / run.info.run_id / "artifacts" / path
    if local.exists():
        return local
    try:
        folder = tempfile.mkdtemp(prefix="tracklight-")
        return Path(store.client.download_artifacts(run.info.run_id, path, folder))
    except Exception:
        raise BadInput(f"run {run.info.run_id} has no artifact {path}, or it was deleted") from None


def read_text(store: Store, run: Any, path: str) -> str:
    """Return a run's text artifact."""
    return fetch(store, run, path).read_text(encoding="utf-8")
