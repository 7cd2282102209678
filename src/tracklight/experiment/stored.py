"""Which run a command continues, and whether it may."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning import LightningDataModule, LightningModule

from tracklight.config import compose as config
from tracklight.data.table import Table
from tracklight.data.tensor_data import TensorData
from tracklight.engine.checkpoints import load_weights
from tracklight.errors import BadInput
from tracklight.experiment import build as assemble
from tracklight.experiment.build import depends_on_total
from tracklight.runs import select as query
from tracklight.runs.reader import open_reader
from tracklight.runs.select import fetch, find_run, read_text
from tracklight.tracking import provenance
from tracklight.tracking.store import Store, connect
from tracklight.tracking.tags import (
    BEST,
    CODE_TAG,
    CONFIG,
    DATA_TAG,
    EPOCHS_TAG,
    FOLDER,
    INPUTS,
    LAST,
    NON_FINITE_TAG,
    PARENT_TAG,
    REPRODUCES_TAG,
    is_sweep,
)

OTHERS = {PARENT_TAG, REPRODUCES_TAG}  # a sweep's and a reproduction's runs are theirs to continue
OURS = (
    "resume",
    "allow_changes",
    "tracking",
    "allowed_targets",
)  # of this command, never of the stored config


@dataclass
class Continued:
    """A run to continue, and what differs from when it was started, one line a difference.

    `checkpoint` is where to continue from if the run's own folder has nothing, `best` the best
    weights so far then; `changed` holds the values before and now of each dotted key that differs.
    """

    run: Any
    changes: list[str]
    checkpoint: Path | None = None
    best: Path | None = None
    changed: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)


def resolve(
    cfg: DictConfig, store: Store, into: str | None = None
) -> tuple[DictConfig, Continued | None]:
    """Return the config to run and the run to continue, if any.

    Args:
        cfg: The config of this command.
        store: Where the runs are.
        into: Id of a run known to be of this very config; it is continued, `resume` or not.

    Raises:
        BadInput: There is no such run, or the command asks for what cannot be continued.
    """
    if into is not None:
        run = find_run(store, into)
        try:
            found = _stored_checkpoints(store, run)
        except BadInput:  # trained again from the start, it comes to the same points
            found = None, None
        return cfg, Continued(run, [], *found)
    if cfg.resume is None:
        return cfg, None
    if cfg.resume == "auto":
        unfinished = [
            run
            for run in store.find(config.identity(cfg))
            if not OTHERS & run.data.tags.keys()
            and _is_here(store, run)  # else it may be in progress on another machine
            and (
                is_unfinished(run, cfg.trainer.max_epochs)
                or run.info.run_id in store.recovered  # killed as it closed
            )
        ]
        if depends_on_total(cfg.scheduler):  # then another total is another training
            unfinished = [run for run in unfinished if _epochs(run) == cfg.trainer.max_epochs]
        return cfg, Continued(unfinished[0], []) if unfinished else None
    run = find_run(store, str(cfg.resume))
    if is_sweep(run.data.tags):
        raise BadInput(
            f"run {run.info.run_id} is a sweep: its own command continues it; or name a trial of it"
        )
    stored = yaml.safe_load(read_text(store, run, CONFIG))
    amended = config.amend(stored, cfg.overrides)
    for key in OURS:
        OmegaConf.update(amended, key, cfg[key], force_add=True)
    config.check(amended)
    old, new = config.deciding(stored), config.deciding(amended)
    _check_epochs(stored, amended, run)
    changed = {key: (old[key], new[key]) for key in old.keys() & new.keys() if old[key] != new[key]}
    changes = config.differences(old, new)
    return amended, Continued(run, changes, *_stored_checkpoints(store, run), changed)


def _is_here(store: Store, run: Any) -> bool:
    return (store.directory / FOLDER / run.info.run_id).is_dir()


def _stored_checkpoints(store: Store, run: Any) -> tuple[Path | None, Path | None]:
    """Fetch the resume and the best checkpoint of a run that trained, if its files are not here.

    Raises:
        BadInput: The store has none either; starting afresh would not be continuing.
    """
    if not run.data.metrics or _is_here(store, run):
        return None, None
    return fetch(store, run, LAST), fetch(store, run, BEST)


def is_unfinished(run: Any, max_epochs: int) -> bool:
    """Say whether a run has epochs left: stopped, dead, failed in passing, or asked for more."""
    match run.info.status:
        case "FAILED":
            return NON_FINITE_TAG not in run.data.tags
        case "FINISHED":
            return max_epochs > (_epochs(run) or max_epochs)
        case _:
            return True


def _epochs(run: Any) -> int | None:
    asked = run.data.tags.get(EPOCHS_TAG)
    return None if asked is None else int(asked)


def check_changes(continued: Continued, code: str, data: str, allow: bool) -> list[str]:
    """Return what changed since the run was started, where that is allowed.

    Raises:
        BadInput: Something changed and `allow_changes` is not set; the message shows the
            differences.
    """
    changes = list(continued.changes)
    for tag, now in ((CODE_TAG, code), (DATA_TAG, data)):
        before = continued.run.data.tags.get(tag, now)
        if before != now:
            changes.append(f"{tag.partition('.')[2]}: digest {before[:12]} -> {now[:12]}")
    if changes and not allow:
        raise BadInput(
            f"run {continued.run.info.run_id} was started otherwise ({'; '.join(changes)});"
            " allow_changes=true continues all the same and records it"
        )
    return changes


def _check_epochs(stored: dict[str, Any], amended: DictConfig, run: Any) -> None:
    before, now = stored["trainer"]["max_epochs"], amended.trainer.max_epochs
    if now != before and depends_on_total(amended.scheduler) and not amended.allow_changes:
        raise BadInput(
            f"trainer.max_epochs={now}: the schedule of run {run.info.run_id} spans its {before}"
            " epochs and would change for the epochs already trained; start a new run"
        )


@dataclass
class Stored:
    """A run's config and, by it, its data set and its model with the best weights."""

    run: Any
    cfg: DictConfig
    data: LightningDataModule | None
    model: LightningModule


# Whatever trained it, a model is used on what this machine has.
ANYWHERE = ("trainer.accelerator=auto", "trainer.devices=1", "trainer.num_nodes=1")


def open_store(uri: str | None, directory: Path) -> Store:
    """Open a store that is there already; what died since the last start is set right in it.

    Raises:
        BadInput: There is none.
    """
    open_reader(uri, directory)  # refuses to make a store that would be empty
    store = connect(uri, directory)
    store.recover()
    return store


def stored_config(store: Store, run: Any, overrides: Sequence[str] = ()) -> DictConfig:
    """Return the config that a run was trained by, under this checkout's allow-list.

    Args:
        store: Holds the run.
        run: MLflow's.
        overrides: Dotted, `data.root=/elsewhere`.

    Raises:
        BadInput: The run has no config, or it or an override is not valid here.
    """
    try:
        tree = yaml.safe_load(query.read_text(store, run, CONFIG))
    except yaml.YAMLError:
        tree = None
    if not isinstance(tree, dict):
        raise BadInput(f"run {run.info.run_id}: its {CONFIG} is no config")
    cfg = config.amend(tree, overrides)
    now = config.compose([])
    OmegaConf.update(now, "tracking.dir", str(store.directory))
    for key in OURS:
        OmegaConf.update(cfg, key, now[key], force_add=True)
    cfg.tracking.uri = store.uri
    config.check(cfg)
    return cfg


def rebuild(store: Store, run: Any, cfg: DictConfig, *, read: bool) -> Stored:
    """Build data set and model of a run and load its best weights.

    Args:
        store: Holds the run.
        run: MLflow's.
        cfg: The run's config.
        read: Whether the data is read; without, the data set can encode new examples only.

    Raises:
        BadInput: Something of it is gone, or this checkout's code no longer fits.
    """
    weights = load_weights(query.fetch(store, run, BEST))
    if cfg.num_threads:
        torch.set_num_threads(cfg.num_threads)
    data = assemble.build_data(cfg, read=read)
    if not read and data is not None:
        restore_inputs(data, inputs_of(store, run))
    try:
        model = assemble.build_model(cfg, data)
        model.load_state_dict(weights)
    except (RuntimeError, TypeError, BadInput) as error:
        reason = " ".join(str(error).split())[:300]
        raise BadInput(
            f"run {run.info.run_id} does not fit this code: {reason}{_code_change(run, cfg)}"
        ) from None
    return Stored(run, cfg, data, model.eval())


def inputs_of(store: Store, run: Any) -> dict[str, Any]:
    """Return what the run wrote down about its model's inputs.

    Raises:
        BadInput: It wrote nothing down.
    """
    try:
        return json.loads(query.read_text(store, run, INPUTS))
    except BadInput as error:
        raise BadInput(
            f"{error}; a run on a data set of one's own (no TensorData) has none"
        ) from None


def _code_change(run: Any, cfg: DictConfig) -> str:
    now = provenance.code_digest(config.targets(cfg))
    if run.data.tags.get(CODE_TAG, now) == now:
        return ""
    commit = run.data.tags.get("mlflow.source.git.commit")
    return f"; it was trained by other code{f', of commit {commit[:12]}' if commit else ''}"


_FACTS = ("name", "in_features", "out_features", "feature_names", "class_names")


def describe_inputs(data: TensorData) -> dict[str, Any]:
    """Return, as plain values, all that turns raw rows into model input."""
    facts = {key: getattr(data, key, None) for key in _FACTS}
    facts["shape"] = list(data.splits["train"].features.shape[1:])  # of one raw example
    if data.class_names is None:
        named = getattr(data, "target", None) or ["target"]
        facts["target_names"] = [str(name) for name in named]
    if isinstance(data, Table) and data.standardise:
        facts["mean"], facts["std"] = data.mean.tolist(), data.std.tolist()
    return facts


def restore_inputs(data: Any, facts: dict[str, Any]) -> None:
    """Tell a data set that was not read what it knew when the model was trained on it."""
    for key in _FACTS:
        if facts.get(key) is not None:
            setattr(data, key, facts[key])
    if isinstance(data, Table):
        mean, std = (np.array(facts[key]) if key in facts else None for key in ("mean", "std"))
        data.recall(facts["feature_names"], mean, std)
