"""Trains a run again by its stored config and says whether the same came out."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from tracklight.commands.parser import RUN_HELP, Parser
from tracklight.config import compose as config
from tracklight.data.tensor_data import TensorData
from tracklight.engine.checkpoints import load_plain
from tracklight.errors import BadInput
from tracklight.experiment import build as assemble
from tracklight.runs import select as query
from tracklight.tracking import provenance
from tracklight.tracking.store import Store
from tracklight.tracking.tags import (
    BEST,
    CHANGES_TAG,
    CODE_TAG,
    DATA_NAME_TAG,
    DATA_TAG,
    EPOCHS_TAG,
    IDENTITY_TAG,
    LAST,
)

EPILOG = """\
Nothing is checked out and nothing is installed: differences of code, packages, machine and data are
told, and the run is made again as a new run beside the old one. KEY=VALUE may change what no result
depends on, such as data.root or trainer.enable_progress_bar, and trainer.accelerator or
trainer.devices where this machine has not those of the run. A sweep stands for its best trial; a
trial that was pruned ends after as many epochs again.
Exit codes: 0 identical to the bit, 1 not, 2 bad input."""


ELSEWHERE = ("trainer.accelerator:", "trainer.devices:")  # what another machine may force


def main(argv: Sequence[str]) -> int:
    """Reproduce as the command line says; return the exit code."""
    parser = Parser("Train a run again and compare metrics and final weights.", EPILOG)
    parser.add_argument("run", metavar="RUN", help=RUN_HELP)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the stored config")
    return reproduce(parser.parse_intermixed_args(argv))


def reproduce(asked: Any) -> int:
    """Train again, compare, and print what was found; return the exit code.

    Raises:
        BadInput: The run is not to be had, did not finish, or an override would change its result.
    """
    from tracklight.errors import BadInput, RunFailed
    from tracklight.experiment import stored
    from tracklight.experiment import train as experiment
    from tracklight.runs import select as query
    from tracklight.tracking.tags import (
        EPOCHS_RUN_TAG,
        POINT_TAG,
        REPRODUCES_TAG,
        TESTED_TAG,
        is_pruned,
    )

    store = stored.open_store(asked.uri, asked.dir)
    run = query.trained(store, query.choose(store, asked.run, asked.experiment))
    if run.info.status != "FINISHED":
        raise BadInput(
            f"run {run.info.run_id} is {run.info.status}; only a FINISHED run has an end to compare"
        )
    query.fetch(store, run, LAST)  # without weights there is nothing to compare with
    cfg = stored.stored_config(store, run, asked.overrides)
    changed = _changes(stored.stored_config(store, run), cfg)
    refused = [line for line in changed if not line.startswith(ELSEWHERE)]
    if refused:
        raise BadInput(f"{refused[0]} changes the result; that is a new run: use train.py")
    cfg.tracking.experiment = store.client.get_experiment(run.info.experiment_id).name
    name = (run.info.run_name or "").removeprefix("reproduce-")
    cfg.tracking.run_name = f"reproduce-{name}"[:250]
    reasons = [f"config: {line}" for line in changed] + known_differences(store, run, cfg)
    reasons += data_reasons(run, cfg)
    tags = run.data.tags
    pruner = [_pruner(run, cfg)] if is_pruned(tags) else []
    ended = f", pruned by its sweep after epoch {tags[EPOCHS_RUN_TAG]}" if pruner else ""
    print(f"reproducing {run.info.run_id} ({run.info.run_name}){ended}")
    for reason in reasons:
        print(f"warning: {reason}")
    tested = POINT_TAG not in tags or TESTED_TAG in tags  # a sweep tests but one trial
    experiment.run(cfg, tags={REPRODUCES_TAG: run.info.run_id}, callbacks=pruner, test=tested)
    made = store.search(f"tags.`{REPRODUCES_TAG}` = '{run.info.run_id}'")
    if not made:
        raise RunFailed(f"the new run is not in {store.shown_uri}")
    found = compare(store, run, made[0])
    print(f"\n{found.said()}")
    if not found.identical:
        for line in explained(reasons, cfg):
            print(f"  why: {line}")
    return 0 if found.identical else 1


def _changes(stored: Any, cfg: Any) -> list[str]:
    """Tell where overrides change what the result depends on."""
    from tracklight.config import compose as config

    trained_by = [
        config.deciding(each) | {"trainer.max_epochs": each.trainer.max_epochs}
        for each in (stored, cfg)
    ]
    return config.differences(*trained_by)


def _pruner(run: Any, cfg: Any) -> Any:
    """Return the callback that ends the training where a sweep ended that of a run.

    The number of epochs asked for stays as it was: schedules may depend on it.
    """
    from tracklight.sweep.pruning import PruningCallback
    from tracklight.tracking.tags import EPOCHS_RUN_TAG

    epochs = int(run.data.tags[EPOCHS_RUN_TAG])
    return PruningCallback(cfg.score.metric, lambda epoch, _: epoch.number >= epochs, asks=True)


MAX_TOLD = 8
NO_RESULT = re.compile(r"(system|gradient|evaluate)/")  # metrics that say nothing of a training
AT_THE_END = re.compile(r"test|score|ols")  # a run given more epochs has a point for each end
MACHINE = ("python", "torch", "cuda", "cpu", "usable_cores", "gpus", "system")


@dataclass
class Likeness:
    """What two runs have in common; `differences` is empty where all of it is the same."""

    num_weights: int = 0
    num_points: int = 0
    differences: list[str] = field(default_factory=list)

    @property
    def identical(self) -> bool:
        """Whether weights and metrics are the same to the bit."""
        return not self.differences

    def said(self) -> str:
        """Tell it in a line, or in one more for each difference."""
        if self.identical:
            return (
                f"identical: {self.num_weights:,} final weights and {self.num_points:,} metric "
                "points are the same to the bit"
            )
        return "\n  ".join(["not identical", *self.differences])


def compare(store: Store, old: Any, new: Any) -> Likeness:
    """Compare the final and the best weights and the metric points of two runs.

    What is measured at the end of training alone counts by its last point.
    """
    found = Likeness()
    for path in (LAST, BEST):
        before, after = (load_plain(query.fetch(store, run, path)) for run in (old, new))
        _compare_weights(found, path, before["state_dict"], after["state_dict"])
    keys = {key for run in (old, new) for key in run.data.metrics if not NO_RESULT.match(key)}
    ledger = query.reader_of(store)
    ids = [old.info.run_id, new.info.run_id]
    for key in sorted(keys):
        series = ledger.series(ids, key)
        first = -1 if AT_THE_END.match(key) else 0
        _compare_series(found, key, *(series.get(run_id, [])[first:] for run_id in ids))
    return found


def _compare_weights(
    found: Likeness, path: str, before: dict[str, Tensor], after: dict[str, Tensor]
) -> None:
    for name in dict.fromkeys((*before, *after)):
        one, other = before.get(name), after.get(name)
        if one is None or other is None or one.shape != other.shape:
            found.differences.append(f"{path}: {name} has another shape, or is there only once")
            continue
        if path == LAST:
            found.num_weights += one.numel()
        if not torch.equal(one, other):
            far = (one.double() - other.double()).abs()
            found.differences.append(
                f"{path}: {name} differs in {int((far > 0).sum()):,} of {far.numel():,} values, "
                f"by up to {far.max():.3g}"
            )


def _compare_series(
    found: Likeness, key: str, before: list[tuple[int, float]], after: list[tuple[int, float]]
) -> None:
    found.num_points += len(before)
    if before == after:
        return
    if len(before) != len(after):
        found.differences.append(f"{key}: {len(before):,} points and {len(after):,}")
    for (step, one), (other_step, other) in zip(before, after, strict=False):
        if (step, one) != (other_step, other):
            told = f"{key}: first differs at step {step}, {one:.9g} and {other:.9g}"
            last_one, last_other = before[-1][1], after[-1][1]
            found.differences.append(f"{told}; at the end {last_one:.6g} and {last_other:.6g}")
            return


def known_differences(store: Store, run: Any, cfg: DictConfig) -> list[str]:
    """Tell what differs between a run's time and now, before anything is trained."""
    told = config_reasons(run, cfg)
    code, commit = provenance.code_digest(config.targets(cfg)), run.data.tags.get(CODE_TAG)
    if commit and commit != code:
        git = run.data.tags.get("mlflow.source.git.commit", "an unknown commit")[:12]
        dirty = run.data.tags.get("mlflow.source.git.dirty") == "true"
        told.append(f"code: other than the run's, of {git}{' and a patch' if dirty else ''}")
    told += package_reasons(_text(store, run, "provenance/packages.txt"))
    told += machine_reasons(_text(store, run, "provenance/machine.json"))
    if CHANGES_TAG in run.data.tags:
        told.append(f"the run was continued under changes: {run.data.tags[CHANGES_TAG]}")
    return told


def config_reasons(run: Any, cfg: DictConfig) -> list[str]:
    """Tell where a run's stored config is not the one that the run was made by."""
    now = config.flatten(config.deciding(cfg))
    told = [
        f"config: the run was made by {key}={run.data.params[key]}, its stored config says {value}"
        for key, value in now.items()
        if run.data.params.get(key, str(value)) != str(value)
    ]
    epochs = str(cfg.trainer.max_epochs)
    if (asked := run.data.tags.get(EPOCHS_TAG, epochs)) != epochs:
        told.append(f"config: the run was asked for {asked} epochs, its stored config for {epochs}")
    if not told and run.data.tags.get(IDENTITY_TAG) not in (None, config.identity(cfg)):
        told.append("config: the stored one is not that of the run's identity")
    return told


def package_reasons(listed: str) -> list[str]:
    """Tell the packages that have other versions now than a `packages.txt` says."""
    now = provenance.installed_packages()
    before = dict(line.split("==", 1) for line in listed.splitlines() if "==" in line)
    changed = [
        f"{name} {before.get(name, 'absent')} -> {now.get(name, 'absent')}"
        for name in sorted({*before, *now})
        if before and before.get(name) != now.get(name)
    ]
    return [f"packages: {_first(changed)}"] if changed else []


def machine_reasons(text: str) -> list[str]:
    """Tell what is different on this machine from what a `machine.json` says."""
    before = json.loads(text) if text else {}
    now = provenance.machine()
    changed = [
        f"{key} {before[key]} -> {now.get(key)}"
        for key in MACHINE
        if key in before and before[key] != now.get(key)
    ]
    return [f"machine: {_first(changed)}"] if changed else []


def data_reasons(run: Any, cfg: DictConfig) -> list[str]:
    """Tell whether a config's data, read now, are the bytes that a run was trained on."""
    data = assemble.build_data(cfg)
    before = run.data.tags.get(DATA_TAG)
    now = data.digest if isinstance(data, TensorData) else before
    if before in (None, now):
        return []
    names = run.data.tags.get(DATA_NAME_TAG, "data"), getattr(data, "name", "data")
    return [f"data: {names[0]} {before[:12]} -> {names[1]} {str(now)[:12]}"]


def explained(known: list[str], cfg: DictConfig) -> list[str]:
    """Return the reasons there may be for a difference; known ones first."""
    told = list(known)
    if cfg.trainer.accelerator != "cpu" and torch.cuda.is_available():
        told.append("GPU: kernels need not add in the same order; trainer.deterministic=true")
    return told or ["nothing known differs; the run may have used what no config says"]


def _text(store: Store, run: Any, path: str) -> str:
    try:
        return query.read_text(store, run, path)
    except BadInput:
        return ""


def _first(items: list[str]) -> str:
    more = f" and {len(items) - MAX_TOLD} more" if len(items) > MAX_TOLD else ""
    return ", ".join(items[:MAX_TOLD]) + more
