"""Runs that were never trained, but look so to who reads many."""

import uuid

from tracklight.tracking.store import Store
from tracklight.tracking.tags import DATA_NAME_TAG, DATA_TAG, IDENTITY_TAG, SETTING_TAG


def add_run(store: Store, score: float | None, setting: str | None = None, seed: int = 0, **more) -> str:
    """Add a run and return its id."""
    identity = f"{setting} {seed}" if setting is not None else uuid.uuid4().hex
    tags = {
        IDENTITY_TAG: identity,
        DATA_TAG: more.get("data", "d"),
        DATA_NAME_TAG: more.get("data_name", "n"),
        **more.get("tags", {}),
    }
    if setting is not None:
        tags[SETTING_TAG] = setting
    run = store.create(more.get("experiment", "tracklight"), more.get("name"), tags)
    params = {"seed": seed, "score.metric": "val/accuracy", "score.mode": "max"}
    run.log_params(params | more.get("params", {}))
    for at, value in enumerate(more.get("losses", ())):
        run.log_series("train/loss_epoch", (at + 1,), (value,))
    if score is not None:
        run.log_series("score", (9,), (score,))
    run.finish(more.get("status", "FINISHED"))
    return run.run_id
