"""Runs ranked: settings by the mean of their seeds, and what of their parameters differs."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tracklight.config import NOT_IDENTITY
from tracklight.errors import BadInput
from tracklight.statistic import half_width
from tracklight.tracking.choice import SCORE
from tracklight.tracking.layout import DATA_NAME_TAG, DATA_TAG, PRUNED, is_pruned
from tracklight.tracking.ledger import Chosen, Entry, Ledger, Scored, distinct, finite
from tracklight.tracking.lock import is_left

LOSSES = ("train/loss_epoch", "train/loss", "val/loss", "train_loss", "val_loss", "loss")
MINIMISED = ("loss", "error", "gap", "rmse", "mse", "mae", "perplexity")
IGNORED = tuple(key for key in NOT_IDENTITY if key != "trainer.max_epochs")
COMMIT, DIRTY, CODE = "mlflow.source.git.commit", "mlflow.source.git.dirty", "tracklight.code"


@dataclass
class Place:
    """A setting's place: its runs, one a seed, and how they did."""

    rank: int | None
    runs: list[Entry]
    values: list[float]
    delta: float | None  # to the first place
    params: dict[str, str]
    flags: list[str]
    loss: list[float]

    @property
    def mean(self) -> float | None:
        """The mean over the seeds; None where no run came to a value."""
        return statistics.fmean(self.values) if self.values else None

    @property
    def half_width(self) -> float | None:
        """Half the width of the mean's 95 % interval."""
        return half_width(self.values)


@dataclass
class Leaderboard:
    """Places in order, and what they were ranked by."""

    metric: str
    mode: str
    places: list[Place]
    columns: list[str]  # the parameters that differ
    num_runs: int
    num_settings: int
    left_out: str  # runs that are no part of it, in words


def rank(
    ledger: Ledger,
    chosen: Chosen,
    metric: str | None,
    mode: str | None,
    limit: int,
    each: bool = False,
    folders: Path | None = None,
) -> Leaderboard:
    """Rank the chosen runs.

    Args:
        ledger: Reads the store.
        chosen: Which runs.
        metric: What to rank by; None for each run's own score, among those scored as the newest.
        mode: `min` or `max`; None to tell from the metric.
        limit: How many places to fill in.
        each: Whether each run has a place of its own, instead of each setting.
        folders: Where run folders lie, which tell what has died; None to believe the store.

    Raises:
        BadInput: There are no such runs.
    """
    found = ledger.scored(chosen, metric or SCORE)
    if not found:
        raise BadInput(f"no run in {ledger.shown_uri} is like that; leave a filter out")
    newest = ledger.entries([_newest(found).run_id])[0]
    shown = metric or newest.params.get("score.metric", SCORE)
    num_all = len(found)
    if metric is None and "score.metric" in newest.params:
        same = {"score.metric": newest.params["score.metric"]}
        narrowed = Chosen(
            chosen.experiment, chosen.parent, chosen.tags, chosen.params | same, chosen.ids
        )
        found = ledger.scored(narrowed, SCORE)
    if metric in (None, SCORE, newest.params.get("score.metric")):
        mode = mode or newest.params.get("score.mode")
    if metric is not None and all(run.last is None for run in found):
        there = ", ".join(sorted(newest.metrics)[:12])
        raise BadInput(f"--metric {metric}: no chosen run has it; the newest has {there}")
    if metric is not None:
        found = [run for run in found if run.last is not None]
    why = f"without a finite {metric}" if metric is not None else "scored by another metric"
    num_out = num_all - len(found)
    left_out = f"{num_out:,} runs {why} left out" if num_out else ""
    mode = mode or guess_mode(shown)
    groups = _ordered(_grouped(found, each), mode)
    kept = groups[:limit]
    entries = {
        entry.run_id: entry
        for entry in ledger.entries([run.run_id for group in kept for run in group])
    }
    kept = [[run for run in group if run.run_id in entries] for group in kept]
    kept = [group for group in kept if group]
    losses = _losses(ledger, [group[0].run_id for group in kept], shown)
    columns = _columns([[entries[run.run_id] for run in group] for group in kept])
    places: list[Place] = []
    for group in kept:
        runs = [entries[run.run_id] for run in group]
        values = [run.value for run in group if run.value is not None]
        best = places[0].mean if places else None
        mean = statistics.fmean(values) if values else None
        places.append(
            Place(
                rank=len(places) + 1 if values else None,
                runs=runs,
                values=values,
                delta=None if best is None or mean is None else mean - best,
                params={key: _value(runs, key) for key in columns},
                flags=_flags(runs, places[0].runs if places else runs) + _states(runs, folders),
                loss=losses.get(runs[0].run_id, []),
            )
        )
    return Leaderboard(shown, mode, places, columns, len(found), len(groups), left_out)


def guess_mode(metric: str) -> str:
    """Return `min` for what is named like a loss, else `max`."""
    words = metric.lower().replace("/", "_").split("_")
    return "min" if any(word in MINIMISED for word in words) else "max"


def decides(key: str) -> bool:
    """Say whether a result may depend on a parameter."""
    return not any(key == each or key.startswith(f"{each}.") for each in IGNORED)


def _newest(found: Sequence[Scored]) -> Scored:
    return next((run for run in found if run.value is not None), found[0])


def _grouped(found: Sequence[Scored], each: bool) -> list[list[Scored]]:
    if each:
        return [[run] for run in found]
    groups: dict[tuple[str, str], list[Scored]] = {}
    for run in found:
        groups.setdefault((run.setting, run.data), []).append(run)
    return [distinct(group) for group in groups.values()]


def _ordered(groups: list[list[Scored]], mode: str) -> list[list[Scored]]:
    sign = -1 if mode == "max" else 1

    def key(group: list[Scored]) -> tuple[float, int]:
        values = [run.value for run in group if run.value is not None]
        return (sign * statistics.fmean(values) if values else math.inf, -group[0].start_ms)

    return sorted(groups, key=key)


def _losses(ledger: Ledger, ids: list[str], ranked_by: str) -> dict[str, list[float]]:
    """Return of each run the first loss that it has, else the metric that it is ranked by."""
    found: dict[str, list[float]] = {}
    for metric in dict.fromkeys((*LOSSES, ranked_by)):
        missing = [run_id for run_id in ids if run_id not in found]
        if missing:
            for run_id, points in ledger.series(missing, metric).items():
                found[run_id] = [value for _, value in points if finite(value) is not None]
    return found


def _columns(groups: list[list[Entry]]) -> list[str]:
    """Return the parameters that differ between places, those first that all of them have."""
    values: dict[str, list[Any]] = {}
    for at, runs in enumerate(groups):
        for key in runs[0].params:
            values.setdefault(key, [None] * len(groups))[at] = _value(runs, key)
    several = any(len(runs) > 1 for runs in groups)
    differing = [
        key
        for key, column in values.items()
        if len(set(column)) > 1
        and decides(key)
        and not (key.endswith(".seed") or (several and key == "seed"))
    ]
    return sorted(differing, key=lambda key: values[key].count(None))


def _value(runs: list[Entry], key: str) -> str:
    return ", ".join(dict.fromkeys(run.params.get(key, "") for run in runs))


def _flags(runs: Sequence[Entry], first: Sequence[Entry]) -> list[str]:
    """Tell where runs stand on other ground than the first place's, or than one another."""
    flags = []
    for name, tag in (("git", COMMIT), ("code", CODE)):
        found = {run.tags.get(tag) for run in runs}
        if len(found) > 1:
            flags.append(f"mixed {name}")
        elif found != {first[0].tags.get(tag)}:
            flags.append(f"other {name}")
    # A seed may decide how the data are split: digests are compared seed by seed.
    digests = {run.params.get("seed"): run.tags.get(DATA_TAG) for run in first}
    names = {run.tags.get(DATA_NAME_TAG) for run in (*runs, *first)}
    if len(names) > 1 or any(
        run.tags.get(DATA_TAG) != digests.get(run.params.get("seed"), run.tags.get(DATA_TAG))
        for run in runs
    ):
        flags.append("other data")
    if any(run.tags.get(DIRTY) == "true" for run in runs):
        flags.append("uncommitted")
    return flags


def _states(runs: Sequence[Entry], folders: Path | None) -> list[str]:
    """Tell of runs that ended early; only a start of training marks those that died."""
    states = []
    for run in runs:
        died = run.status == "RUNNING" and folders is not None and is_left(folders / run.run_id)
        states += [] if run.status == "FINISHED" else ["died" if died else run.status.lower()]
        states += [PRUNED] if is_pruned(run.tags) else []
    return [*dict.fromkeys(states)]
