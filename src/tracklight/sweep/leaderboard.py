"""A sweep's leaderboard, computed from its runs alone."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tracklight.statistic import half_width
from tracklight.sweep.trial import EPOCHS_RUN_TAG, REASON_TAG, SECONDS_TAG, TRIAL_TAG
from tracklight.tracking.choice import SCORE
from tracklight.tracking.layout import OUTCOME_TAG, SETTING_TAG

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
