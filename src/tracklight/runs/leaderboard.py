"""Mean, interval and difference of scores under several seeds, without importing SciPy."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

from tracklight.config.compose import NOT_IDENTITY
from tracklight.errors import BadInput
from tracklight.runs.reader import RunFilter, RunReader, RunRecord, RunScore, distinct, finite
from tracklight.tracking.lock import is_left
from tracklight.tracking.tags import (
    CODE_TAG,
    COMMIT_TAG,
    DATA_NAME_TAG,
    DATA_TAG,
    DIRTY_TAG,
    EPOCHS_RUN_TAG,
    OUTCOME_TAG,
    PRUNED,
    REASON_TAG,
    SCORE,
    SECONDS_TAG,
    SETTING_TAG,
    TRIAL_TAG,
    is_pruned,
)

CONFIDENCE = 0.95
MIN_PAIRS = 3  # of two, the interval would be wider than what it compares, almost always
# Two-sided 95 % quantiles of Student's t for 1 to 30 degrees of freedom; from scipy.stats.t.ppf.
_QUANTILES = (
    *(12.706204736, 4.302652730, 3.182446305, 2.776445105, 2.570581836, 2.446911851),
    *(2.364624252, 2.306004135, 2.262157163, 2.228138852, 2.200985160, 2.178812830),
    *(2.160368656, 2.144786688, 2.131449546, 2.119905299, 2.109815578, 2.100922040),
    *(2.093024054, 2.085963447, 2.079613845, 2.073873068, 2.068657610, 2.063898562),
    *(2.059538553, 2.055529439, 2.051830516, 2.048407142, 2.045229642, 2.042272456),
)


@dataclass(frozen=True)
class Difference:
    """How far apart two means are, and the interval that holds the true distance."""

    value: float
    low: float
    high: float
    is_paired: bool = False

    @property
    def is_real(self) -> bool:
        """Whether chance alone is an unlikely reason: the interval leaves zero out."""
        return self.low > 0 or self.high < 0


def quantile(freedom: float) -> float:
    """Return the 97.5 % quantile of Student's t.

    Args:
        freedom: Degrees of freedom, 1 or more; rounded down, which widens the interval.

    Source: Abramowitz and Stegun 26.7.5 beyond 30 degrees of freedom.
    """
    whole = int(freedom)
    if whole <= len(_QUANTILES):
        return _QUANTILES[max(whole, 1) - 1]
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    return z + (z**3 + z) / (4 * whole) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * whole**2)


def half_width(values: Sequence[float]) -> float | None:
    """Return half the width of the mean's 95 % interval; None for a single value.

    Source: Student 1908, "The probable error of a mean".
    """
    if len(values) < 2:
        return None
    return quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


def difference(before: Sequence[float], after: Sequence[float]) -> Difference | None:
    """Compare two means whose spreads may differ; None unless there are two values of each.

    Source: Welch 1947, "The generalization of 'Student's' problem when several different
    population variances are involved".
    """
    if len(before) < 2 or len(after) < 2:
        return None
    value = statistics.fmean(after) - statistics.fmean(before)
    parts = [statistics.variance(each) / len(each) for each in (before, after)]
    if sum(parts) == 0:
        return Difference(value, value, value)
    sizes = (len(before) - 1, len(after) - 1)
    freedom = sum(parts) ** 2 / sum(p**2 / n for p, n in zip(parts, sizes, strict=True))
    half = quantile(freedom) * math.sqrt(sum(parts))
    return Difference(value, value - half, value + half)


def between(before: Mapping[str, float], after: Mapping[str, float]) -> Difference | None:
    """Compare scores by seed: pairs where enough seeds are shared, else two independent means.

    A seed decides initial weights, order and perhaps the split of the data for both sides alike;
    what it does to both is no part of their difference.

    Args:
        before: Score by seed.
        after: Likewise.

    Source: Student 1908, "The probable error of a mean", for pairs.
    """
    deltas = [after[seed] - before[seed] for seed in before if seed in after]
    if len(deltas) < MIN_PAIRS:
        return difference([*before.values()], [*after.values()])
    value, half = statistics.fmean(deltas), half_width(deltas) or 0.0
    return Difference(value, value - half, value + half, is_paired=True)


pass

LOSSES = ("train/loss_epoch", "train/loss", "val/loss", "train_loss", "val_loss", "loss")
MINIMISED = ("loss", "error", "gap", "rmse", "mse", "mae", "perplexity")
IGNORED = tuple(key for key in NOT_IDENTITY if key != "trainer.max_epochs")


@dataclass
class Place:
    """A setting's place: its runs, one a seed, and how they did."""

    rank: int | None
    runs: list[RunRecord]
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
    ledger: RunReader,
    chosen: RunFilter,
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
        narrowed = RunFilter(
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


def _newest(found: Sequence[RunScore]) -> RunScore:
    return next((run for run in found if run.value is not None), found[0])


def _grouped(found: Sequence[RunScore], each: bool) -> list[list[RunScore]]:
    if each:
        return [[run] for run in found]
    groups: dict[tuple[str, str], list[RunScore]] = {}
    for run in found:
        groups.setdefault((run.setting, run.data), []).append(run)
    return [distinct(group) for group in groups.values()]


def _ordered(groups: list[list[RunScore]], mode: str) -> list[list[RunScore]]:
    sign = -1 if mode == "max" else 1

    def key(group: list[RunScore]) -> tuple[float, int]:
        values = [run.value for run in group if run.value is not None]
        return (sign * statistics.fmean(values) if values else math.inf, -group[0].start_ms)

    return sorted(groups, key=key)


def _losses(ledger: RunReader, ids: list[str], ranked_by: str) -> dict[str, list[float]]:
    """Return of each run the first loss that it has, else the metric that it is ranked by."""
    found: dict[str, list[float]] = {}
    for metric in dict.fromkeys((*LOSSES, ranked_by)):
        missing = [run_id for run_id in ids if run_id not in found]
        if missing:
            for run_id, points in ledger.series(missing, metric).items():
                found[run_id] = [value for _, value in points if finite(value) is not None]
    return found


def _columns(groups: list[list[RunRecord]]) -> list[str]:
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


def _value(runs: list[RunRecord], key: str) -> str:
    return ", ".join(dict.fromkeys(run.params.get(key, "") for run in runs))


def _flags(runs: Sequence[RunRecord], first: Sequence[RunRecord]) -> list[str]:
    """Tell where runs stand on other ground than the first place's, or than one another."""
    flags = []
    for name, tag in (("git", COMMIT_TAG), ("code", CODE_TAG)):
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
    if any(run.tags.get(DIRTY_TAG) == "true" for run in runs):
        flags.append("uncommitted")
    return flags


def _states(runs: Sequence[RunRecord], folders: Path | None) -> list[str]:
    """Tell of runs that ended early; only a start of training marks those that died."""
    states = []
    for run in runs:
        died = run.status == "RUNNING" and folders is not None and is_left(folders / run.run_id)
        states += [] if run.status == "FINISHED" else ["died" if died else run.status.lower()]
        states += [PRUNED] if is_pruned(run.tags) else []
    return [*dict.fromkeys(states)]


pass

SEED_PARAM = "seed"
ENDED = {"FAILED": "failed", "KILLED": "stopped", "RUNNING": "running"}


@dataclass(frozen=True)
class Row:
    """One run of a sweep, as MLflow has it."""

    trial: int
    params: dict[str, str]
    seed: int
    state: str
    score: float | None
    epochs: int = 0
    seconds: float = 0.0
    run_id: str = ""
    reason: str = ""
    setting: str = ""  # digest of the config without its seeds; empty where it is not known
    start_ms: int = 0


def short_names(keys: Sequence[str]) -> list[str]:
    """Return the last part of each dotted key; the whole of one that would not be told apart."""
    last = [key.rpartition(".")[2] for key in keys]
    return [
        key if last.count(short) > 1 or short == "_target_" else short
        for key, short in zip(keys, last, strict=True)
    ]


def row(run: Any, names: Iterable[str]) -> Row:
    """Read a child run.

    Args:
        run: MLflow's.
        names: What the sweep varies; the run's tags hold the values.
    """
    tags, info = run.data.tags, run.info
    state = ENDED.get(info.status) or tags.get(OUTCOME_TAG, "complete")
    score = run.data.metrics.get(SCORE) if info.status == "FINISHED" else None
    lasted_s = ((info.end_time or info.start_time) - info.start_time) / 1000
    return Row(
        trial=int(tags.get(TRIAL_TAG, -1)),
        params={name: tags[name] for name in names if name in tags},
        seed=int(run.data.params.get(SEED_PARAM, 0)),
        state=state,
        score=None if score is None or math.isnan(score) else score,
        epochs=int(tags.get(EPOCHS_RUN_TAG, 0)),
        seconds=float(tags.get(SECONDS_TAG, lasted_s)),
        run_id=info.run_id,
        reason=tags.get(REASON_TAG, "") if state == "failed" else "",
        setting=tags.get(SETTING_TAG, ""),
        start_ms=info.start_time,
    )


@dataclass
class Standing:
    """A point of a sweep: its runs, one a seed, and where it stands."""

    trial: int
    params: dict[str, str]
    runs: list[Row]
    state: str
    rank: int | None = None
    score: float | None = None
    std: float | None = None
    interval: tuple[float, float] | None = None

    @property
    def reason(self) -> str:
        """Why it failed, as the first run that did tells it."""
        return next((row.reason for row in self.runs if row.reason), "")

    def flat(self) -> dict[str, Any]:
        """Return it as a row of a table."""
        low, high = self.interval or (None, None)
        spread = {"std": self.std, "ci95_low": low, "ci95_high": high, "seeds": len(self.runs)}
        return {
            "rank": self.rank,
            "trial": self.trial,
            **self.params,
            "score": self.score,
            **(spread if len(self.runs) > 1 else {}),
            "state": self.state,
            "epochs": sum(row.epochs for row in self.runs),
            "seconds": round(sum(row.seconds for row in self.runs), 2),
            "reason": self.reason,
            "run_id": " ".join(row.run_id for row in self.runs),
        }


def standings(rows: Sequence[Row], mode: str, seeds: int) -> list[Standing]:
    """Rank the points: complete ones by their mean score, then the others by trial.

    Args:
        rows: Every run of the sweep.
        mode: `min` or `max`.
        seeds: Runs that make a point complete.
    """
    points: dict[tuple[tuple[str, str], ...], list[Row]] = {}
    for each in sorted(rows, key=lambda each: (each.trial, each.seed)):
        points.setdefault(tuple(sorted(each.params.items())), []).append(each)
    found = [_standing(_of_one_config(runs), seeds) for runs in points.values()]
    sign = 1 if mode == "min" else -1
    complete = [each for each in found if each.state == "complete" and each.score is not None]
    complete.sort(key=lambda each: (sign * (each.score or 0.0), each.trial))
    for rank, each in enumerate(complete, 1):
        each.rank = rank
    others = [each for each in found if each.rank is None]
    return complete + sorted(others, key=lambda each: each.trial)


def _of_one_config(runs: list[Row]) -> list[Row]:
    """Keep the newest config's: a value such as `adam` may have come to stand for another one."""
    known = [each for each in runs if each.setting]
    newest = max(known, key=lambda each: each.start_ms, default=None)
    return [each for each in runs if newest is None or each.setting in ("", newest.setting)]


def _standing(runs: list[Row], seeds: int) -> Standing:
    states = {each.state for each in runs}
    told = ("failed", "pruned", "running", "stopped")
    state = next((state for state in told if state in states), "complete")
    if state == "complete" and len(runs) < seeds:
        state = "stopped"
    scores = [each.score for each in runs if each.score is not None]
    standing = Standing(min(each.trial for each in runs), runs[0].params, runs, state)
    if scores:
        standing.score = statistics.fmean(scores) if len(scores) > 1 else scores[0]
    if (half := half_width(scores)) is not None and standing.score is not None:
        standing.std = statistics.stdev(scores)
        standing.interval = (standing.score - half, standing.score + half)
    return standing
