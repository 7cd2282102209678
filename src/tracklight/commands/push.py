"""Copies runs to another store, each once, however often it is called or killed."""

import tempfile
from argparse import Namespace
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mlflow.artifacts import download_artifacts
from mlflow.entities import DatasetInput, Metric, Param, RunTag
from mlflow.models import Model

from tracklight.errors import BadInput, RunFailed
from tracklight.runs.select import select_run
from tracklight.tracking import tags
from tracklight.tracking.address import sqlite_path
from tracklight.tracking.logged_model import store_model
from tracklight.tracking.mlflow_client import mlflow, retry, short_reason
from tracklight.tracking.store import Store, connect

MAX_ITEMS = {"metrics": 1000, "params": 100, "tags": 100}  # of one request, as MLflow allows


def run(args: Namespace) -> int:
    """Copy the runs, print what was copied and return the exit code."""
    source = connect(args.uri, args.dir, reads_only=True)
    source.recover()
    target = _open_target(args.target)
    same_file = source.database and target.database and source.database.samefile(target.database)
    if same_file or source.uri.rstrip("/") == target.uri.rstrip("/"):
        raise BadInput(f"{args.target} is the store that the runs are in; name another")
    chosen = [select_run(source, word, args.experiment).info.run_id for word in args.runs]
    runs = _with_relatives(source.search("")[::-1], chosen)  # parents first
    ended = [each for each in runs if each.info.status != "RUNNING"]
    copied, running = 0, len(runs) - len(ended)
    try:
        known = {each.data.tags.get(tags.KEY_TAG): each for each in target.search("")}
        copies = {each.info.run_id: known.get(_key(each)) or _create(source, target, each) for each in ended}
        ids = {run_id: copy.info.run_id for run_id, copy in copies.items()}
        for each in ended:
            run_id, copy = each.info.run_id, copies[each.info.run_id].info
            if (copy.status, copy.end_time) != (each.info.status, each.info.end_time):
                _copy(source, target, each, ids)
                copied += 1
                print(f"pushed  {run_id} ({each.info.run_name}) as {copy.run_id}", flush=True)
    except mlflow.exceptions.MlflowException as error:
        why = short_reason(error)
        raise RunFailed(f"{why}; {copied} runs were copied, the same command copies the others") from None
    rest = [f"{len(ended) - copied} there already"] * (len(ended) > copied)
    rest += [f"{running} in progress, left out"] * (running > 0)
    print(", ".join([f"{copied} copied to {target.display_uri}", *rest]))
    args.emit({"target": target.display_uri, "new": copied, "in_progress": running, "copies": ids})
    return 0


def _open_target(target: str) -> Store:
    """Open the store at a URI, or in a folder as `tracking.dir` names it."""
    if ":/" not in target:
        return connect(None, Path(target))
    path = sqlite_path(target)
    with_folder = path.parent if path else Path(tempfile.gettempdir())  # a server keeps its artifacts itself
    return connect(target, with_folder)


def _with_relatives(runs: Sequence[Any], chosen: Sequence[str]) -> list[Any]:
    """Return the chosen runs, those above them and all below; all if none is chosen."""
    above = {each.info.run_id: each.data.tags.get(tags.PARENT_TAG) for each in runs}
    wanted = {*chosen}
    for run_id, parent in above.items():  # a parent comes before its children
        if parent in wanted:
            wanted.add(run_id)
    for run_id in chosen:
        while run_id := above.get(run_id):
            wanted.add(run_id)
    return [each for each in runs if not chosen or each.info.run_id in wanted]


def _key(run: Any) -> str:
    """Return what a run and its copies share."""
    return run.data.tags.get(tags.KEY_TAG, run.info.run_id)


def _create(source: Store, target: Store, run: Any) -> Any:
    """Create the copy of a run, empty, and RUNNING until all of it is there."""
    experiment = source.client.get_experiment(run.info.experiment_id).name
    run_tags = run.data.tags | {tags.KEY_TAG: _key(run), tags.PUSHED_TAG: run.info.run_id}
    return target.create_once(experiment, run.info.run_name, run_tags, run.info.start_time)


def _copy(source: Store, target: Store, run: Any, ids: Mapping[str, str]) -> None:
    """Fill the copy of a run, whatever of it is there; `ids` are those of the copies of all runs."""
    copied_id = ids[run.info.run_id]
    client = target.client

    def log(kind: str, items: Sequence[Any]) -> None:
        for at in range(0, len(items), MAX_ITEMS[kind]):
            batch = {kind: items[at : at + MAX_ITEMS[kind]]}
            retry(partial(client.log_batch, copied_id, **batch), target.timeout_s)

    log("params", [Param(key, value) for key, value in run.data.params.items()])
    for name in run.data.metrics:
        points = source.client.get_metric_history(run.info.run_id, name)
        log("metrics", [Metric(name, each.value, each.timestamp, each.step) for each in points])
    others = {name: value for name, value in run.data.tags.items() if name != tags.PUSHED_TAG}
    log("tags", [RunTag(name, ids.get(value, value)) for name, value in others.items()])
    if inputs := [DatasetInput(each.dataset, each.tags) for each in run.inputs.dataset_inputs]:
        client.log_inputs(copied_id, inputs)
    with tempfile.TemporaryDirectory() as scratch:
        artifacts = source.folder(run.info.run_id) / tags.ARTIFACTS_FOLDER
        if not artifacts.is_dir():
            artifacts = Path(scratch)
            if source.client.list_artifacts(run.info.run_id):  # to download nothing would be logged
                source.client.download_artifacts(run.info.run_id, "", scratch)
        client.log_artifacts(copied_id, str(artifacts))
    for model in run.outputs.model_outputs if run.outputs else ():
        _copy_model(source, target, model, copied_id)
    client.set_terminated(copied_id, run.info.status, run.info.end_time)


def _copy_model(source: Store, target: Store, output: Any, run_id: str) -> None:
    logged = source.client.get_logged_model(output.model_id)
    if str(logged.status) != "READY":
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = download_artifacts(logged.artifact_location, dst_path=scratch, tracking_uri=source.uri)
        store_model(target.client, run_id, Model.load(folder), Path(folder), output.step)
