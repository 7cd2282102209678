"""The reading side of the store: runs by id, and what they left."""

import atexit
import functools
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from tracklight.errors import BadInput
from tracklight.tracking.choice import WORDS, check_id, check_trained, choose_id, deleted
from tracklight.tracking.client_ledger import ClientLedger
from tracklight.tracking.layout import BEST_TAG, is_sweep
from tracklight.tracking.ledger import Ledger
from tracklight.tracking.patience import reason
from tracklight.tracking.quiet import mlflow
from tracklight.tracking.sqlite_ledger import SqliteLedger
from tracklight.tracking.store import Store

ID_CHARS = 32
CHECKPOINTS = "checkpoints"
BEST = f"{CHECKPOINTS}/best.ckpt"
LAST = f"{CHECKPOINTS}/last.ckpt"


def find_run(store: Store, run_id: str) -> Any:
    """Return the run with this id, or with an id that begins so.

    Raises:
        BadInput: There is no such run, it is deleted, or several ids begin so.
    """
    check_id(run_id)
    if len(run_id) < ID_CHARS:
        run_id = choose_id(ledger_of(store), run_id)
    try:
        run = store.client.get_run(run_id)
    except mlflow.exceptions.MlflowException:
        raise BadInput(f"there is no run {run_id} in {store.shown_uri}") from None
    if run.info.lifecycle_stage == "deleted":
        raise BadInput(deleted(run_id, store.shown_uri))
    return run


def choose(store: Store, word: str, experiment: str | None = None) -> Any:
    """Return the run that a word names: an id, the unique beginning of one, `last` or `best`.

    Args:
        store: Holds the run.
        word: `last` is the newest run that training made; `best` the one with the best score among
            those scored by the same metric on the same data as the newest, pruned trials aside.
        experiment: Where `last` and `best` look; None for everywhere.

    Raises:
        BadInput: There is no such run.
    """
    if word in WORDS:
        return find_run(store, choose_id(ledger_of(store), word, experiment))
    return find_run(store, word)


def trained(store: Store, run: Any) -> Any:
    """Return the run itself, or of a sweep the best of its trials.

    Raises:
        BadInput: The sweep has no best trial, or the run is a mere test of another.
    """
    check_trained(run.info.run_id, run.data.tags)
    if not is_sweep(run.data.tags):
        return run
    best = run.data.tags.get(BEST_TAG)
    if not best:
        raise BadInput(f"run {run.info.run_id} is a sweep without a finished trial; name a run")
    return find_run(store, best)


def ledger_of(store: Store) -> Ledger:
    """Return what reads many runs of a store at once."""
    if store.database is not None:
        return SqliteLedger(store.database)
    return ClientLedger(store.client, store.shown_uri)


def fetch(store: Store, run: Any, path: str) -> Path:
    """Return a local copy of a run's artifact: the file itself where it lies here.

    Raises:
        BadInput: The run has no such artifact, or it cannot be had.
    """
    local = store.directory / "artifacts" / run.info.run_id / "artifacts" / path
    if local.exists():
        return local
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # one bar a file
    try:
        folder = tempfile.mkdtemp(dir=_temporary())
        return Path(store.client.download_artifacts(run.info.run_id, path, folder))
    except Exception as error:
        raise BadInput(
            f"run {run.info.run_id} has no artifact {path}, or it was deleted: {reason(error)}"
        ) from None


@functools.cache
def _temporary() -> str:
    """Return the folder of what this process fetches; it is removed when the process ends."""
    folder = tempfile.mkdtemp(prefix="tracklight-")
    atexit.register(discard)
    return folder


def discard() -> None:
    """Remove what this process fetched."""
    if _temporary.cache_info().currsize:
        shutil.rmtree(_temporary(), ignore_errors=True)


def read_text(store: Store, run: Any, path: str) -> str:
    """Return a run's text artifact."""
    return fetch(store, run, path).read_text(encoding="utf-8")
