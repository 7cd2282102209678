"""Selects a run by its id, a prefix of it, `last` or `best`, and reads its artifacts."""

import functools
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracklight.errors import BadInput
from tracklight.paths import read_bounded
from tracklight.runs.reader import RunFilter, RunReader, reader_of
from tracklight.tracking import tags

if TYPE_CHECKING:
    from tracklight.tracking.store import Store

WORDS = ("best", "last")
MAX_TEXT_BYTES = 4_000_000  # of a config, of metadata, of a patch
MAX_CHECKPOINT_VARIABLE = "TRACKLIGHT_MAX_CHECKPOINT_GB"
MAX_CHECKPOINT_GB = "16"


def restore_command(run_id: str, display_uri: str) -> str:
    """Return the command that restores a deleted run."""
    return f"`MLFLOW_TRACKING_URI={display_uri} mlflow runs restore --run-id {run_id}`"


def select_id(reader: RunReader, word: str, experiment: str | None = None) -> str:
    """Return the id of the run that a word names, as `select_run` does."""
    if word not in WORDS:
        if not re.fullmatch(r"[0-9a-f]{4,32}", word):
            raise BadInput(
                f"run id {word[:60]!r} must be last, best or 4 to 32 hexadecimal digits, as MLflow shows it"
            )
        found = reader.find_ids(word)
        if len(found) == 1:
            return found[0]
        if not found and (deleted := reader.find_ids(word, deleted=True)):
            command = restore_command(deleted[0], reader.display_uri)
            raise BadInput(f"run {deleted[0]} is deleted; restore it with {command}")
        none = "there is no run" if tags.is_run_id(word) else "no run begins with"
        raise BadInput(f"{'several runs begin with' if found else none} {word} in {reader.display_uri}")
    runs = reader.search_scores(RunFilter(experiment), tags.SCORE)
    if word == "best":
        runs = [run for run in runs if run.value is not None]
    if not runs:
        where = ("" if experiment is None else f"experiment {experiment} of ") + reader.display_uri
        raise BadInput(f"there is no {word} run in {where}; train something first")
    if word == "last":
        return runs[0].run_id
    (newest,) = reader.get_runs([runs[0].run_id])
    params = {"score.metric": newest.params["score.metric"]}
    comparable = reader.search_scores(RunFilter(experiment, tags.same_data(newest.tags), params), tags.SCORE)
    values = {run.run_id: run.value for run in comparable if run.value is not None}
    best = max if newest.params["score.mode"] == "max" else min
    return best(values, key=values.__getitem__)


def trained_id(run_id: str, run_tags: Mapping[str, str]) -> str:
    """Return the run's own id, or that of its best trial if it is a sweep.

    Raises:
        BadInput: The sweep has no best trial, or the run is an evaluation of another.
    """
    if tags.EVALUATES_TAG in run_tags:
        raise BadInput(f"run {run_id} is an evaluation of run {run_tags[tags.EVALUATES_TAG]}; name that one")
    if not tags.is_sweep(run_tags):
        return run_id
    if not run_tags.get(tags.BEST_TAG):
        raise BadInput(f"run {run_id} is a sweep without a finished trial; name a run")
    return run_tags[tags.BEST_TAG]


def select_run(store: "Store", word: str, experiment: str | None = None) -> Any:
    """Return MLflow's run that a word names: an id, a unique prefix of one, `last` or `best`.

    `last` is the newest training run; `best` has the best score of those scored by the same metric
    on the same data as the newest, pruned trials excluded. `experiment` limits both to one.

    Raises:
        BadInput: There is no such run, it is deleted, or several ids begin so.
    """
    run = store.client.get_run(select_id(reader_of(store), word, experiment))
    store.folder(run.info.run_id)  # raises if what was answered is no id
    return run


def resolve_sweep(store: "Store", run: Any) -> Any:
    """Return the best trial of a sweep, any other run as it is; raise as `trained_id` does."""
    run_id = trained_id(run.info.run_id, run.data.tags)
    return run if run_id == run.info.run_id else select_run(store, run_id)


def fetch(store: "Store", run: Any, path: str) -> Path:
    """Return a local copy of a run's artifact, or the file itself if it lies here.

    Raises:
        BadInput: The run has no such artifact, it is too large, or it cannot be downloaded.
    """
    from tracklight.tracking.mlflow_client import download, short_reason

    run_id, max_bytes = run.info.run_id, _max_bytes(path)
    folder = store.folder(run_id)
    local = folder / tags.ARTIFACTS_FOLDER / path
    try:
        if is_here := local.exists():
            if not local.resolve().is_relative_to(folder.resolve()) or not local.is_file():
                raise BadInput(f"run {run_id}: {path} is no file of its own folder {folder}")
            size = local.stat().st_size
        else:
            listed = store.client.list_artifacts(run_id, path.rpartition("/")[0] or None)
            size = next(each.file_size or 0 for each in listed if each.path == path and not each.is_dir)
        if size > max_bytes:
            hint = f"; {MAX_CHECKPOINT_VARIABLE}=N allows N GB" if path.endswith(".ckpt") else ""
            raise BadInput(f"run {run_id}: {path} has {size:,} bytes, more than {max_bytes:,}{hint}")
        if is_here:
            return local
        target = Path(tempfile.mkdtemp(dir=_downloads().name)) / local.name
        download(run, store.uri, path, target, max_bytes, size)
        return target
    except StopIteration:
        raise BadInput(f"run {run_id} has no artifact {path}, or it was deleted") from None
    except BadInput:
        raise
    except Exception as error:
        raise BadInput(f"run {run_id}: {path} cannot be read: {short_reason(error)}") from None


def _max_bytes(path: str) -> int:
    """Return how large an artifact may be, by its name."""
    if not path.endswith(".ckpt"):
        return MAX_TEXT_BYTES
    text = os.environ.get(MAX_CHECKPOINT_VARIABLE, MAX_CHECKPOINT_GB)
    try:
        return int(float(text) * 1e9)
    except (ValueError, OverflowError):
        raise BadInput(f"{MAX_CHECKPOINT_VARIABLE}={text} must be a number of gigabytes; try 32") from None


def read_text(store: "Store", run: Any, path: str) -> str:
    """Return a run's text artifact, fetched as `fetch` does."""
    local = fetch(store, run, path)
    try:
        return read_bounded(local, MAX_TEXT_BYTES)
    except (OSError, ValueError) as error:
        raise BadInput(f"run {run.info.run_id}: {path} cannot be read: {error}") from None


def remove_downloads() -> None:
    """Remove what this process has downloaded."""
    if _downloads.cache_info().currsize:
        _downloads().cleanup()


@functools.cache
def _downloads() -> tempfile.TemporaryDirectory[str]:
    """The folder of this process's downloads; it is removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="tracklight-", ignore_cleanup_errors=True)
