"""Frees the disk of runs that are deleted, failed or replaced by a later one; first it only says how much."""

import shutil
from argparse import Namespace
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from tracklight.errors import BadInput
from tracklight.runs.reader import open_reader
from tracklight.tracking import tags
from tracklight.tracking.lock import LockHeld, RunLock
from tracklight.tracking.mlflow_client import hard_delete, mlflow
from tracklight.tracking.store import MODELS, Store, connect

SAME = (tags.IDENTITY_TAG, tags.EPOCHS_TAG, tags.CODE_TAG, tags.DATA_TAG, tags.PARENT_TAG)
ENDED = ("FINISHED", "FAILED", "KILLED")


def run(args: Namespace) -> int:
    """Say what each kind of run holds, delete the kinds asked for, and return the exit code."""
    open_reader(args.uri, args.dir)  # raises if there is no store, where `connect` creates one
    store = connect(args.uri, args.dir, reads_only=not args.delete)
    if store.database is None:
        raise BadInput(f"the runs are on {store.display_uri}, whose disk `mlflow gc` there frees")
    store.recover()
    kinds = _kinds(store)
    freed, sizes = 0, {}
    for kind, found in kinds.items():
        sizes[kind] = sum(map(_size, found.values()))
        print(f"{kind:<10}  {len(found):>5}  {sizes[kind] / 1e6:>9,.1f} MB  {_MEANING[kind]}")
        if kind in args.delete:
            freed += _delete(store, found)
    if args.delete:
        print(f"freed {freed / 1e6:,.1f} MB")
    else:
        print(f"nothing was deleted; to delete: --delete {' '.join(kinds)}, or some of them")
    args.emit({"bytes_freed": freed, "bytes": sizes} | {kind: [*found] for kind, found in kinds.items()})
    return 0


_MEANING = {
    "deleted": "runs deleted in MLflow, and what `mlflow gc` leaves of runs and their models",
    "failed": "runs that FAILED",
    "superseded": "runs of which a later one with the same config, epochs, seed, code and data is FINISHED",
}


def _kinds(store: Store) -> dict[str, dict[str, list[Path]]]:
    """Return, by kind, the ids of runs with their folders on this disk."""
    deleted, active = (store.search("", deleted=is_deleted) for is_deleted in (True, False))
    folders = {run.info.run_id: store.folders(run) for run in (*deleted, *active)}
    known = {path for paths in folders.values() for path in paths}
    runs = (path for path in store.runs_folder.iterdir() if tags.is_run_id(path.name))
    models = (store.runs_folder / MODELS).glob("m-*")
    models = (path for path in models if _lost_its_run(store, path.name, folders))
    kinds: dict[str, dict[str, list[Path]]] = {kind: {} for kind in _MEANING}
    kinds["deleted"] = {run.info.run_id: folders[run.info.run_id] for run in deleted}
    kinds["deleted"] |= {path.name: [path] for path in (*runs, *models) if path not in known}
    later: set[tuple[str | None, ...]] = set()
    for each in active:  # newest first
        run_id, run_tags = each.info.run_id, each.data.tags
        key = tuple(map(run_tags.get, SAME))
        if key[0] is None or tags.REPRODUCES_TAG in run_tags or each.info.status not in ENDED:
            continue
        if each.info.status == "FAILED":
            kinds["failed"][run_id] = folders[run_id]
        elif key in later:
            kinds["superseded"][run_id] = folders[run_id]
        elif each.info.status == "FINISHED":
            later.add(key)
    for each in reversed(active):  # evaluations go with their run, and before it, so that none is ever alone
        for kind in ("failed", "superseded"):
            if each.data.tags.get(tags.PARENT_TAG) in kinds[kind]:
                kinds[kind] = {each.info.run_id: folders[each.info.run_id]} | kinds[kind]
    return kinds


def _size(paths: Sequence[Path]) -> int:
    files = (file for path in paths for file in path.rglob("*"))
    return sum(file.lstat().st_size for file in files if not file.is_dir())


def _lost_its_run(store: Store, model_id: str, runs: Collection[str]) -> bool:
    """Return whether MLflow knows neither a model nor the run that it was logged to; some are of no run."""
    try:
        source = store.client.get_logged_model(model_id).source_run_id
    except mlflow.exceptions.MlflowException:
        return True
    return bool(source) and source not in runs


def _delete(store: Store, found: Mapping[str, Sequence[Path]]) -> int:
    """Delete runs, their files first, so that what is cut short is found again; return the bytes freed."""
    freed = 0
    for name, paths in found.items():
        folder = store.folder(name) if tags.is_run_id(name) else None
        try:
            lock = RunLock(folder, content={}) if folder and folder.is_dir() else None
        except LockHeld:  # somebody has just resumed it
            print(f"run {name} is in progress and stays")
            continue
        before = _size(paths)
        for path in paths:
            if path.name.startswith("m-"):
                hard_delete(store.client, model_id=path.name)
            shutil.rmtree(path, ignore_errors=True)
        if folder:
            hard_delete(store.client, run_id=name)
        if lock:
            lock.close()
        freed += before - _size(paths)
    return freed
