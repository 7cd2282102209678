"""A trained model, rebuilt from what its run stored, whatever this checkout's configs say."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning import LightningDataModule, LightningModule

from tracklight import assemble, config
from tracklight.engine.checkpoint import load_weights
from tracklight.errors import BadInput
from tracklight.inputs import INPUTS, recall
from tracklight.resume import CODE_TAG, CONFIG, OURS
from tracklight.tracking import provenance, query
from tracklight.tracking.ledger import open_ledger
from tracklight.tracking.store import Store, connect


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
    open_ledger(uri, directory)  # refuses to make a store that would be empty
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
    weights = load_weights(query.fetch(store, run, query.BEST))
    if cfg.num_threads:
        torch.set_num_threads(cfg.num_threads)
    data = assemble.build_data(cfg, read=read)
    if not read and data is not None:
        recall(data, inputs_of(store, run))
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
