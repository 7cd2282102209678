"""Copies runs to another store, each once, however often it is called or killed."""

import json
import re
import tempfile
from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from mlflow.artifacts import download_artifacts
from mlflow.entities import DatasetInput, Metric, Param, RunTag
from mlflow.models import Model
from mlflow.utils.file_utils import local_file_uri_to_path

from tracklight.errors import BadInput, RunFailed
from tracklight.experiment.stored import open_store
from tracklight.runs.select import select_run
from tracklight.tracking import address, logged_model, tags
from tracklight.tracking.mlflow_client import mlflow, retry, short_reason
from tracklight.tracking.store import Store, connect, refuse_links

MAX_ITEMS = {"metrics": 1000, "params": 100, "tags": 100}  # of one request, as MLflow allows
OWN_TAGS = {tags.KEY_TAG, tags.PUSHED_TAG, tags.COPIED_TAG}  # that link a run and its copies
SETTINGS = re.compile(r"\b(tracking\.(uri|dir)|MLFLOW_TRACKING_URI)\b=?")


def run(args: Namespace) -> int:
    """Copy the runs, print what was copied and return the exit code."""
    source = open_store(args.uri, args.dir)
    target = _open_target(args.target)
    same_file = source.database and target.database and source.database.samefile(target.database)
    if same_file or source.uri.rstrip("/") == target.uri.rstrip("/"):
        raise BadInput(f"{args.target} is the store that the runs are in; name another")
    chosen = [select_run(source, word, args.experiment).info.run_id for word in args.runs]
    everything = source.search("")[::-1]
    runs, ended = _choose(everything, chosen)
    did: dict[str, list[str]] = {"copied": [], "kept": [], "diverged": []}
    try:
        known = {each.data.tags.get(tags.KEY_TAG): each for each in target.search("")}
        known |= {_key(each): _create(source, target, each) for each in ended if _key(each) not in known}
        ids = {each.info.run_id: known[_key(each)].info.run_id for each in everything if _key(each) in known}
        for each in ended:
            run_id, copy = each.info.run_id, known[_key(each)]
            if (does := _compare(each, copy, ids)) == "copied":
                _copy(source, target, each, ids)
                print(f"pushed  {run_id} ({each.info.run_name}) as {copy.info.run_id}", flush=True)
            did[does].append(run_id)
    except mlflow.exceptions.MlflowException as error:
        why = f"{short_reason(error)}; {len(did['copied'])} runs were copied"
        raise RunFailed(f"{why}, the same command copies the others") from None
    copied, kept, diverged, running = *map(len, did.values()), len(runs) - len(ended)
    rest = [f"{kept} there already"] * (kept > 0)
    rest += [f"{running} in progress, left out"] * (running > 0)
    if diverged:
        rest.append(f"{diverged} left, as they and their copies both went on: {' '.join(did['diverged'])}")
    print(", ".join([f"{copied} copied to {target.display_uri}", *rest]))
    found = {"new": copied, "in_progress": running, "diverged": did["diverged"]}
    copies = {each.info.run_id: ids[each.info.run_id] for each in ended}
    args.emit({"target": target.display_uri, **found, "copies": copies})
    return 0


def _open_target(target: str) -> Store:
    """Open the store at a URI, or in a folder as `tracking.dir` names it."""
    path = address.sqlite_path(target)
    folder = path.parent if path else Path(tempfile.gettempdir())  # a server keeps its artifacts itself
    try:
        return connect(target, folder) if ":/" in target else connect(None, Path(target))
    except BadInput as error:
        raise BadInput(SETTINGS.sub("TARGET ", str(error)).rstrip()) from None


def _choose(runs: Sequence[Any], chosen: Sequence[str]) -> tuple[list[Any], list[Any]]:
    """Return the chosen runs, or all, with those above and below; and of these those to copy now."""
    above = {each.info.run_id: each.data.tags.get(tags.PARENT_TAG) for each in runs}
    lines = {run_id: [run_id] for run_id in above}
    for line in lines.values():
        while (parent := above.get(line[-1])) and parent not in line:
            line.append(parent)
    running = {each.info.run_id for each in runs if each.info.status == "RUNNING"}
    wanted = {each for run_id in chosen for each in lines[run_id]}
    wanted |= {run_id for run_id, line in lines.items() if not chosen or {*chosen} & {*line}}
    found = [each for each in runs if each.info.run_id in wanted]
    # Below a run in progress a copy would have no parent.
    return found, [each for each in found if not running & {*lines[each.info.run_id]}]


def _key(run: Any) -> str:
    """Return what a run and its copies share."""
    return run.data.tags.get(tags.KEY_TAG, run.info.run_id)


def _state(run: Any) -> list[str]:
    return [str(run.info.end_time), run.info.status]


def _compare(run: Any, copy: Any, ids: Mapping[str, str]) -> str:
    """Return what becomes of a run: "copied" if its copy is older or not whole, else "kept" or "diverged"."""
    now, there, copy_tags = _state(run), _state(copy), copy.data.tags
    if there[1] == "RUNNING" and tags.PUSHED_TAG in copy_tags and tags.COPIED_TAG not in copy_tags:
        return "copied"  # in part; a whole one is RUNNING if it is resumed there
    own, other = (each.data.tags.get(tags.COPIED_TAG, "").split() for each in (copy, run))
    both = [record[1:] for record, of in ((own, run), (other, copy)) if of.info.run_id in record]
    last = max(both, default=[there[0], "unknown"])  # state in which they were the same
    if now == there and copy_tags.get(tags.PUSHED_TAG) == run.info.run_id:
        values = [value for name, value in copy_tags.items() if name not in OWN_TAGS]
        is_linked = all(ids.get(value, value) == value for value in values)
        return "kept" if last == now and is_linked else "copied"
    if now == there or now[0] <= last[0]:
        return "kept"
    return "copied" if there == last else "diverged"


def _create(source: Store, target: Store, run: Any) -> Any:
    """Create the copy of a run, empty, and RUNNING until all of it is there."""
    experiment = source.client.get_experiment(run.info.experiment_id).name
    run_tags = {name: value for name, value in run.data.tags.items() if name not in OWN_TAGS}
    run_tags |= {tags.KEY_TAG: _key(run), tags.PUSHED_TAG: run.info.run_id}
    return target.create_once(experiment, run.info.run_name, run_tags, run.info.start_time)


def _copy(source: Store, target: Store, run: Any, ids: Mapping[str, str]) -> None:
    """Fill the copy of a run, whatever of it is there; `ids` are those of the copies of all runs."""
    copied_id = ids[run.info.run_id]
    for folder in source.folders(run):
        refuse_links(folder)
    client = target.client

    def log(kind: str, items: Sequence[Any]) -> None:
        for at in range(0, len(items), MAX_ITEMS[kind]):
            batch = {kind: items[at : at + MAX_ITEMS[kind]]}
            retry(partial(client.log_batch, copied_id, **batch), target.timeout_s)

    log("params", [Param(key, value) for key, value in run.data.params.items()])
    for name in run.data.metrics:
        points = source.client.get_metric_history(run.info.run_id, name)
        log("metrics", [Metric(name, each.value, each.timestamp, each.step) for each in points])
    others = {name: value for name, value in run.data.tags.items() if name not in OWN_TAGS}
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
        with suppress(FileNotFoundError, ValueError):
            text = (artifacts / tags.SUMMARY).read_text("utf-8")
            summary = json.loads(re.sub("[0-9a-f]{32}", lambda found: ids.get(found[0], found[0]), text))
            if "folder" in summary:
                summary["folder"] = local_file_uri_to_path(client.get_run(copied_id).info.artifact_uri)
            client.log_text(copied_id, json.dumps(summary, indent=1) + "\n", tags.SUMMARY)
    for model in run.outputs.model_outputs if run.outputs else ():
        _copy_model(source, target, model, copied_id)
    client.set_terminated(copied_id, run.info.status, run.info.end_time)
    record = " ".join([run.info.run_id, *_state(run)])
    retry(lambda: client.set_tag(copied_id, tags.COPIED_TAG, record), target.timeout_s)


def _copy_model(source: Store, target: Store, output: Any, run_id: str) -> None:
    try:
        logged = source.client.get_logged_model(output.model_id)
    except mlflow.exceptions.MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":  # a later one of the run replaced it
            return
        raise
    if str(logged.status) != "READY":
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = download_artifacts(logged.artifact_location, dst_path=scratch, tracking_uri=source.uri)
        logged_model.store_model(target.client, run_id, Model.load(folder), Path(folder), output.step)
