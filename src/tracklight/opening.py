"""How a run begins: made or taken up again, and described so that it can be rebuilt."""

import json
import time
from collections.abc import Mapping
from pathlib import Path

import yaml
from omegaconf import DictConfig
from pytorch_lightning import LightningDataModule, LightningModule

from tracklight import config, inputs, resume
from tracklight.data.tensor_data import TensorData
from tracklight.errors import BadInput
from tracklight.tracking.layout import DATA_NAME_TAG, IDENTITY_TAG, SETTING_TAG
from tracklight.tracking.provenance import Provenance
from tracklight.tracking.run import Run
from tracklight.tracking.store import Store, connect

# Sections of the config that say nothing of what was trained: no params, or they would be axes of
# every comparison. The stored config has them.
OF_THE_COMMAND = ("tracking", "resume", "allow_changes", "overrides", "allowed_targets")


def open_store(cfg: DictConfig) -> Store | None:
    """Open where runs are recorded and set right what died since; None where nothing is to be.

    Raises:
        BadInput: The store cannot be opened, or an untracked run is to be resumed.
    """
    if not cfg.tracking.enabled:
        if cfg.resume is not None:
            raise BadInput(
                f"resume={cfg.resume} needs tracking=mlflow: untracked runs leave nothing behind"
            )
        return None
    store = connect(cfg.tracking.uri, Path(cfg.tracking.dir))
    store.recover()
    return store


def open_run(
    store: Store,
    cfg: DictConfig,
    model: LightningModule,
    data: LightningDataModule | None,
    continued: resume.Continued | None,
    facts: Provenance,
    tags: Mapping[str, str],
) -> Run:
    """Make a run, or take the continued one up again, with all that identifies it as tags.

    Args:
        store: Where to.
        cfg: Its config.
        model: Named in the run's name.
        data: Likewise; ours is known by its digest.
        continued: The run to continue, if any.
        facts: Where this command comes from.
        tags: Further tags.

    Raises:
        BadInput: The continued run was started with other code, data or settings.
    """
    digest = data.digest if isinstance(data, TensorData) else "unknown"
    own = {
        IDENTITY_TAG: config.identity(cfg),
        SETTING_TAG: config.setting(cfg),
        resume.DATA_TAG: digest,
        DATA_NAME_TAG: getattr(data, "name", None) or type(data).__name__,
        resume.EPOCHS_TAG: str(cfg.trainer.max_epochs),
    }
    if continued is None:
        name = config.redact(cfg.tracking.run_name) or _name(model, data)
        return store.create(cfg.tracking.experiment, name, {**facts.tags(), **own, **tags})
    changes = resume.check_changes(continued, facts.code, digest, cfg.allow_changes)
    if changes:
        own[resume.CHANGES_TAG] = "; ".join(changes)
    run = store.reopen(continued.run.info.run_id)
    run.set_tags({**facts.tags(), **own, **tags})
    return run


def describe(
    run: Run, cfg: DictConfig, data: LightningDataModule | None, facts: Provenance
) -> None:
    """Record the run's parameters, data set, config and provenance."""
    tree = config.redact(config.plain(cfg))
    if not run.described:  # a run killed just after it was made is not
        if isinstance(data, TensorData):
            run.log_input(data.name, data.digest, data.source, "training")
        told = {key: value for key, value in tree.items() if key not in OF_THE_COMMAND}
        run.log_params(config.flatten(told))  # last: with them the run counts as described
    run.log_text(yaml.safe_dump(tree, sort_keys=False), resume.CONFIG)
    if isinstance(data, TensorData):
        run.log_text(json.dumps(inputs.describe(data), indent=1) + "\n", inputs.INPUTS)
    for path, text in facts.texts().items():
        run.log_text(text, path)
    run.publish()  # a run that dies can be rebuilt from its store, too


def _name(model: LightningModule, data: LightningDataModule | None) -> str:
    """Return what tells runs apart in a list; MLflow's own names repeat with the seed."""
    parts = [type(model).__name__, time.strftime("%m%d-%H%M%S")]
    if data is not None:
        parts.insert(1, getattr(data, "name", None) or type(data).__name__)
    return "-".join(parts)
