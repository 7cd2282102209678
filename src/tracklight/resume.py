"""Which run a command continues, and whether it may."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from tracklight import config
from tracklight.assemble import depends_on_total
from tracklight.errors import BadInput
from tracklight.tracking.layout import DATA_TAG, FOLDER, PARENT_TAG, REPRODUCES_TAG, is_sweep
from tracklight.tracking.query import BEST, LAST, fetch, find_run, read_text
from tracklight.tracking.store import Store

CONFIG = "config.yaml"  # artifact that holds a run's resolved config
CODE_TAG = "tracklight.code"
EPOCHS_TAG = "tracklight.epochs"  # that the run was asked for
NON_FINITE_TAG = "tracklight.non_finite_step"
CHANGES_TAG = "tracklight.changes"
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
