"""How a run begins: made or taken up again, and described so that it can be rebuilt."""

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import yaml
from omegaconf import DictConfig
from pytorch_lightning import LightningDataModule, LightningModule

from tracklight.config import compose as config
from tracklight.data.tensor_data import TensorData
from tracklight.errors import BadInput
from tracklight.experiment import stored as resume
from tracklight.figures.choose import FOLDER, illustrate
from tracklight.redact import redact
from tracklight.tracking.logged_model import log_model
from tracklight.tracking.provenance import Provenance
from tracklight.tracking.run import Run
from tracklight.tracking.store import Store, connect
from tracklight.tracking.tags import (
    CHANGES_TAG,
    CONFIG,
    DATA_NAME_TAG,
    EPOCHS_TAG,
    IDENTITY_TAG,
    INPUTS,
    SCORE,
    SETTING_TAG,
)

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
        EPOCHS_TAG: str(cfg.trainer.max_epochs),
    }
    if continued is None:
        name = redact(cfg.tracking.run_name) or _name(model, data)
        return store.create(cfg.tracking.experiment, name, {**facts.tags(), **own, **tags})
    changes = resume.check_changes(continued, facts.code, digest, cfg.allow_changes)
    if changes:
        own[CHANGES_TAG] = "; ".join(changes)
    run = store.reopen(continued.run.info.run_id)
    run.set_tags({**facts.tags(), **own, **tags})
    return run


def describe(
    run: Run, cfg: DictConfig, data: LightningDataModule | None, facts: Provenance
) -> None:
    """Record the run's parameters, data set, config and provenance."""
    tree = redact(config.plain(cfg))
    if not run.described:  # a run killed just after it was made is not
        if isinstance(data, TensorData):
            run.log_input(data.name, data.digest, data.source, "training")
        told = {key: value for key, value in tree.items() if key not in OF_THE_COMMAND}
        run.log_params(config.flatten(told))  # last: with them the run counts as described
    run.log_text(yaml.safe_dump(tree, sort_keys=False), CONFIG)
    if isinstance(data, TensorData):
        run.log_text(json.dumps(resume.describe_inputs(data), indent=1) + "\n", INPUTS)
    for path, text in facts.texts().items():
        run.log_text(text, path)
    run.publish()  # a run that dies can be rebuilt from its store, too


def _name(model: LightningModule, data: LightningDataModule | None) -> str:
    """Return what tells runs apart in a list; MLflow's own names repeat with the seed."""
    parts = [type(model).__name__, time.strftime("%m%d-%H%M%S")]
    if data is not None:
        parts.insert(1, getattr(data, "name", None) or type(data).__name__)
    return "-".join(parts)


def log_final(
    store: Store,
    run: Run,
    model: LightningModule,
    data: LightningDataModule | None,
    step: int,
    score: float | None,
    tested: bool,
    figures: bool,
) -> None:
    """Log what a run leaves.

    Args:
        store: Holds the run.
        run: Open.
        model: With the best weights.
        data: What it was trained on.
        step: The optimizer step of the best weights.
        score: The best value of the monitored metric.
        tested: Whether the run was tested; trials of a sweep are not, and leave their score alone.
        figures: Whether to draw.
    """
    if score is not None:
        run.log_series(SCORE, (step,), (score,))
    if figures:
        illustrate(model, data, run.series(), run.artifacts / FOLDER, step, tested)
    if tested and isinstance(data, TensorData):
        rows = data.splits["train"].features[:2]
        log_model(store.client, run.run_id, model, data.transform(rows), step=step)


def log_failed(run: Run, model: LightningModule) -> None:
    """Draw how far a run came that failed: its curves often show why.

    Args:
        run: Open.
        model: As it was left.
    """
    with suppress(OSError):  # what made it fail may be the disk
        series = run.series()
        if any(len(steps) > 1 for steps, _ in series.values()):
            illustrate(model, None, series, run.artifacts / FOLDER)
