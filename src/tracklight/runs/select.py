"""Which run a word means: an id, the beginning of one, `last` or `best`."""

import atexit
import functools
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tracklight.errors import BadInput
from tracklight.runs.reader import ClientReader, RunFilter, RunReader, SqliteReader
from tracklight.tracking.mlflow_client import mlflow, reason
from tracklight.tracking.store import Store
from tracklight.tracking.tags import BEST_TAG, DATA_NAME_TAG, EVALUATES_TAG, SCORE, is_sweep

WORDS = ("best", "last")


def check_id(word: str) -> None:
    """Refuse what can be neither a run's id nor the beginning of one.

    Raises:
        BadInput: It is no such word.
    """
    if not re.fullmatch(r"[0-9a-f]{4,32}", word):
        raise BadInput(
            f"run id {word[:60]!r} must be 4 to 32 hexadecimal digits, as MLflow shows it"
        )


def check_trained(run_id: str, tags: Mapping[str, str]) -> None:
    """Refuse a run that holds but a repeated test.

    Raises:
        BadInput: It does; the message names the run that was tested.
    """
    if EVALUATES_TAG in tags:
        raise BadInput(f"run {run_id} is an evaluation of run {tags[EVALUATES_TAG]}; name that one")


def deleted(run_id: str, shown_uri: str) -> str:
    """Say of a run that it is deleted, and how it is brought back."""
    return f"run {run_id} is deleted; restore it with {restoring(run_id, shown_uri)}"


def restoring(run_id: str, shown_uri: str) -> str:
    """Return the command that brings a deleted run back."""
    return f"`MLFLOW_TRACKING_URI={shown_uri} mlflow runs restore --run-id {run_id}`"


def choose_id(ledger: RunReader, word: str, experiment: str | None = None) -> str:
    """Return the id of the run that a word names, as `choose` does.

    Raises:
        BadInput: There is no such run.
    """
    if word not in WORDS:
        check_id(word)
        found = ledger.ids(word)
        if len(found) == 1:
            return found[0]
        if not found and (gone := ledger.ids(word, deleted=True)):
            raise BadInput(deleted(gone[0], ledger.shown_uri))
        what = "several runs begin" if found else "no run begins"
        raise BadInput(f"{what} with {word} in {ledger.shown_uri}")
    runs = ledger.scored(RunFilter(experiment), SCORE)
    if word == "best":  # of what is comparable with the newest run that came to a score
        runs = [run for run in runs if run.value is not None]
    if not runs:
        where = "" if experiment is None else f" experiment {experiment} of"
        raise BadInput(
            f"there is no {word} run in{where} {ledger.shown_uri}; train something first"
        )
    if word == "last":
        return runs[0].run_id
    newest = ledger.entries([runs[0].run_id])[0]
    tags = {key: newest.tags[key] for key in (DATA_NAME_TAG,) if key in newest.tags}
    params = {"score.metric": newest.params["score.metric"]}
    sign = 1 if newest.params["score.mode"] == "max" else -1
    rivals = ledger.scored(RunFilter(experiment, tags=tags, params=params), SCORE)
    values = {run.run_id: sign * run.value for run in rivals if run.value is not None}
    return max(values, key=values.__getitem__)


pass

ID_CHARS = 32


def find_run(store: Store, run_id: str) -> Any:
    """Return the run with this id, or with an id that begins so.

    Raises:
        BadInput: There is no such run, it is deleted, or several ids begin so.
    """
    check_id(run_id)
    if len(run_id) < ID_CHARS:
        run_id = choose_id(reader_of(store), run_id)
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
        return find_run(store, choose_id(reader_of(store), word, experiment))
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


def reader_of(store: Store) -> RunReader:
    """Return what reads many runs of a store at once."""
    if store.database is not None:
        return SqliteReader(store.database)
    return ClientReader(store.client, store.shown_uri)


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
