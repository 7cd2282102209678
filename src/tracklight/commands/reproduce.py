"""Trains a run again from its stored config and compares weights and metrics bit for bit."""

import re
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from tracklight.config import compose, hardware
from tracklight.data.tensor_data import TensorData
from tracklight.engine.checkpoint_io import load_plain
from tracklight.engine.monitors import PruningCallback
from tracklight.errors import BadInput, RunFailed
from tracklight.experiment import build, train
from tracklight.experiment.stored import load_config, open_store
from tracklight.paths import ROOT
from tracklight.runs import diff
from tracklight.runs.reader import reader_of
from tracklight.runs.select import fetch, resolve_sweep, select_run
from tracklight.tracking import provenance, tags
from tracklight.tracking.store import Store, connect

MACHINE_KEYS = ("trainer.accelerator:", "trainer.devices:")  # another machine may need others
POPULATION_REL = 1e-4  # relative difference of a run of a population from the run alone
MAX_LISTED = 8  # changed packages in one line
NOT_A_RESULT = re.compile(r"(system|gradient|evaluate)/")  # metrics that do not depend on training
LOGGED_AT_END = re.compile(r"test|score|ols")  # a run given more epochs has a point for each end


def run(args: Namespace) -> int:
    """Train a run again, compare, and print the result; return the exit code."""
    store = open_store(args.uri, args.dir)
    old = resolve_sweep(store, select_run(store, args.run, args.experiment))
    run_id, run_tags = old.info.run_id, old.data.tags
    if old.info.status != "FINISHED":
        raise BadInput(f"run {run_id} is {old.info.status}; only a FINISHED run can be compared")
    kept = _kept_checkpoints(store, old)  # without weights there is nothing to compare with
    cfg, changes = _rebuild_config(store, old, args.overrides)
    reasons = [f"config: {line}" for line in changes] + _known_differences(store, old, cfg)
    callbacks, ended = [], ""
    if tags.is_pruned(run_tags):  # a smaller trainer.max_epochs would change schedules
        last = tags.read_count(run_tags, tags.EPOCHS_RUN_TAG, 1)
        callbacks = [PruningCallback(cfg.score.metric, lambda epoch, _: epoch >= last)]
        ended = f", pruned by its sweep after epoch {last}"
    print(f"reproducing {run_id} ({old.info.run_name}){ended}")
    for reason in reasons:
        print(f"warning: {reason}")
    # A sweep tests only its best trial.
    tested = tags.POINT_TAG not in run_tags or tags.TESTED_TAG in run_tags
    with tempfile.TemporaryDirectory(prefix="tracklight-") as folder:
        there = store
        if store.why_read_only:
            print(f"note: the new run is not kept: {store.why_read_only}")
            there = connect(None, Path(folder))
            cfg.tracking.uri, cfg.tracking.dir = None, folder
        compose.check_config(cfg)
        train.run(cfg, tags={tags.REPRODUCES_TAG: run_id}, callbacks=callbacks, test=tested)
        reproductions = there.search(f"tags.`{tags.REPRODUCES_TAG}` = '{run_id}'")
        if not reproductions:
            raise RunFailed(f"the new run is not in {there.display_uri}")
        # Others were trained with it, by other kernels: the bits are not the same.
        rel = POPULATION_REL if tags.POPULATION_TAG in run_tags else 0.0
        pair = (store, old), (there, reproductions[0])
        num_weights, num_points, differences = compare_runs(kept, *pair, rel=rel)
    found = {"run": run_id, "new": reproductions[0].info.run_id, "identical": not differences}
    found |= {"weights": num_weights, "points": num_points, "differences": differences, "known": reasons}
    args.emit(found)
    if not differences:
        which = "final" if tags.LAST in kept else "best"
        compared = f"{num_weights:,} {which} weights and {num_points:,} metric points"
        how = f"equal: {compared} agree to {rel:g}, as a member of a population should"
        print(f"\n{how}" if rel else f"\nidentical: {compared} are the same to the bit")
        return 0
    print("\nnot identical", *differences, sep="\n  ")
    if cfg.trainer.accelerator != "cpu" and torch.cuda.is_available():
        reasons.append("GPU: kernels need not add in the same order; trainer.deterministic=true")
    for line in reasons or ["nothing known differs; the run may have used what no config says"]:
        print(f"  why: {line}")
    return 1


def _rebuild_config(store: Store, run: Any, overrides: list[str]) -> tuple[DictConfig, list[str]]:
    """Return the config of the reproduction and how it differs from the stored one."""
    stored, cfg = load_config(store, run), load_config(store, run, overrides, trains=True)
    before, after = (
        compose.result_keys(each) | {"trainer.max_epochs": each.trainer.max_epochs} for each in (stored, cfg)
    )
    changes = compose.diff_configs(before, after)
    for line in changes:
        if not line.startswith(MACHINE_KEYS):
            raise BadInput(f"{line} changes the result; that is a new run: use train.py")
    cfg.tracking.experiment = store.client.get_experiment(run.info.experiment_id).name
    name = (run.info.run_name or "").removeprefix("reproduce-")
    cfg.tracking.run_name = f"reproduce-{name}"[:250]
    return cfg, changes


def _kept_checkpoints(store: Store, run: Any) -> list[str]:
    """Return the checkpoints to compare, the last one first; a trial may have kept its best weights alone."""
    try:
        fetch(store, run, tags.LAST)
    except BadInput:
        if tags.POINT_TAG not in run.data.tags:
            raise
        fetch(store, run, tags.BEST)
        return [tags.BEST]
    return [tags.LAST, tags.BEST]


def compare_runs(
    checkpoints: Sequence[str], *pair: tuple[Store, Any], rel: float = 0.0
) -> tuple[int, int, list[str]]:
    """Compare the weights in these checkpoints and the metrics of two runs, each with its store.

    Returns the number of weights, the number of metric points, and a line for each difference, by more than
    `rel`, relative to the size of a weight tensor or to the largest value of a metric.
    """
    num_weights, num_points, differences = 0, 0, []
    for path in checkpoints:
        before, after = (load_plain(fetch(*each, path))["state_dict"] for each in pair)
        num_weights = sum(tensor.numel() for tensor in before.values())
        differences += _diff_weights(path, before, after, rel)
    readers = [(reader_of(store), run.info.run_id) for store, run in pair]
    for key in sorted({key for _, run in pair for key in run.data.metrics}):
        if NOT_A_RESULT.match(key):
            continue
        start = -1 if LOGGED_AT_END.match(key) else 0
        found = [reader.get_histories([run_id], key).get(run_id, []) for reader, run_id in readers]
        before, after = (history[start:] for history in found)
        num_points += len(before)
        differences += _diff_histories(key, before, after, rel)
    return num_weights, num_points, differences


def _diff_weights(path: str, before: dict[str, Tensor], after: dict[str, Tensor], rel: float) -> list[str]:
    lines = []
    for name in dict.fromkeys((*before, *after)):
        one, other = before.get(name), after.get(name)
        if one is None or other is None or one.shape != other.shape:
            lines.append(f"{path}: {name} has another shape, or is there only once")
        elif not torch.equal(one, other):
            gap = (one.double() - other.double()).abs()
            if gap.norm() <= rel * one.double().norm():
                continue
            number = f"{int((gap > 0).sum()):,} of {gap.numel():,} values"
            lines.append(f"{path}: {name} differs in {number}, by up to {gap.max():.3g}")
    return lines


def _diff_histories(key: str, before: Sequence[Any], after: Sequence[Any], rel: float) -> list[str]:
    lines = [f"{key}: {len(before):,} points and {len(after):,}"] if len(before) != len(after) else []
    most = rel * max((abs(value) for _, value in before), default=0.0)
    for one, other in zip(before, after, strict=False):
        if one != other and not (one[0] == other[0] and abs(one[1] - other[1]) <= most):
            first = f"first differs at step {one[0]}, {one[1]:.9g} and {other[1]:.9g}"
            end = f"at the end {before[-1][1]:.6g} and {after[-1][1]:.6g}"
            return [*lines, f"{key}: {first}; {end}"]
    return lines


def _known_differences(store: Store, run: Any, cfg: DictConfig) -> list[str]:
    """List what differs between a run's config, code, environment and data and those of now."""
    run_tags, params = run.data.tags, run.data.params
    lines = [
        f"config: the run was made by {key}={params[key]}, its stored config says {value}"
        for key, value in compose.flatten(compose.result_keys(cfg)).items()
        if params.get(key, str(value)) != str(value)
    ]
    epochs = str(cfg.trainer.max_epochs)
    if (asked := run_tags.get(tags.EPOCHS_TAG, epochs)) != epochs:
        lines.append(f"config: the run was asked for {asked} epochs, its stored config for {epochs}")
    if not lines and run_tags.get(tags.IDENTITY_TAG) not in (None, compose.config_digest(cfg)):
        lines.append("config: the stored one is not that of the run's identity")
    code = provenance.code_digest(compose.list_targets(cfg))
    if run_tags.get(tags.CODE_TAG, code) != code:
        patch = " and a patch" if run_tags.get(tags.DIRTY_TAG) == "true" else ""
        commit = run_tags.get(tags.COMMIT_TAG, "an unknown commit")[:12]
        lines.append(f"code: other than the run's, of {commit}{patch}")
    before = diff.read_environment(store.uri, store.directory, run.info.run_id)
    now = provenance.collect(ROOT, "", (), hardware.describe_machine()).texts
    for name, changed in diff.diff_environments(before, now).items():
        if changed:
            more = f" and {len(changed) - MAX_LISTED} more" if len(changed) > MAX_LISTED else ""
            lines.append(f"{name}: {', '.join(changed[:MAX_LISTED])}{more}")
    if tags.CHANGES_TAG in run_tags:
        lines.append(f"the run was continued under changes: {run_tags[tags.CHANGES_TAG]}")
    data = build.build_data(cfg)
    digest = run_tags.get(tags.DATA_TAG)
    if isinstance(data, TensorData) and digest not in (None, data.digest):
        name = run_tags.get(tags.DATA_NAME_TAG, "data")
        lines.append(f"data: {name} {digest[:12]} -> {data.name} {data.digest[:12]}")
    return lines
