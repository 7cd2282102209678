"""What a sweep prints and plots: a line for each ended trial, the closing table, Optuna's plots."""

import math
import sys
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState
from rich.console import Console
from rich.status import Status
from rich.table import Table

from tracklight.runs.leaderboard import RIGHT, Column, LeaderboardRow, score_columns, short_names, to_table
from tracklight.sweep.plan import Job, format_number, format_params
from tracklight.sweep.study import DIRECTIONS, optuna
from tracklight.sweep.trial import TrialResult

MAX_ROWS = 20
PLAIN_WIDTH = 140  # of output that is no terminal
LOG_RATIO = 30.0  # the axis of positive numbers that differ by more than this factor is logarithmic


class Progress:
    """Counts trials, prints those that end, and shows a status line on a terminal."""

    def __init__(self, metric: str, mode: str, num_workers: int):
        self._metric = metric
        self._sign = 1 if mode == "min" else -1
        self._num_workers = num_workers
        self._counts: Counter[str] = Counter()
        self._seconds: list[float] = []
        self._started_s: dict[str, float] = {}
        self._epochs: dict[str, str] = {}  # of runs that have not ended
        self._best: tuple[float, str] | None = None
        self._num_remaining = 0
        is_terminal = sys.stdout.isatty()
        self._console = Console(width=None if is_terminal else PLAIN_WIDTH, highlight=False)
        self._status = Status("", console=self._console) if is_terminal else None
        if self._status:
            self._status.start()

    def note(self, text: str) -> None:
        """Print a line."""
        self._console.print(text, markup=False, soft_wrap=True)

    def resumed(self, earlier: Sequence[TrialResult | None]) -> None:
        """Print how many runs of a continued sweep have ended; an unfinished one is None."""
        num_open = sum(result is None for result in earlier)
        num_ended = len(earlier) - num_open
        ended = "1 run has ended" if num_ended == 1 else f"{num_ended} runs have ended"
        more = f", {num_open} to be taken up again" if num_open else ""
        if earlier:
            self.note(f"the sweep goes on: {ended}{more}")

    def started(self, job: Job) -> None:
        """Count a run as running."""
        self._started_s[job.key] = time.monotonic()
        self.update()

    def epoch_ended(self, job: Job, epoch: int) -> None:
        """Note how far a run is."""
        self._epochs[job.key] = f"{epoch}/{job.cfg['trainer']['max_epochs']}"
        self.update()

    def finished_earlier(self, result: TrialResult) -> None:
        """Count a run that had ended before."""
        self._counts[result.kind] += 1

    def ended(self, job: Job, result: TrialResult, log: Path | None) -> None:
        """Count a run that has ended and print its result."""
        seconds = time.monotonic() - self._started_s.pop(job.key, time.monotonic())
        self._epochs.pop(job.key, None)
        self._counts[result.kind] += 1
        if result.kind != "stopped":
            self._seconds.append(seconds)
        value = f"{result.reason} ({log})" if result.reason and log else result.reason
        if result.score is not None:
            value = f"{self._metric} {result.score:.5g}"
        self._print_trial(job.name, result.kind, f"{value}  {seconds:.1f} s")

    def invalid(self, number: int, reason: str) -> None:
        """Count and print a trial that failed because its config is invalid."""
        self._counts["failed"] += 1
        self._print_trial(str(number), "failed", reason)

    def combined(self, number: int, params: Mapping[str, str], kind: str, score: float | None) -> None:
        """Compare the mean score of a complete trial with the best so far."""
        if kind != "complete" or score is None:
            return
        if self._best is None or self._sign * score < self._sign * self._best[0]:
            self._best = (score, f"trial {number} {format_params(params)}")

    def update(self, num_remaining: int | None = None) -> None:
        """Update the status line, and the number of runs that have not started if it is given."""
        if num_remaining is not None:
            self._num_remaining = num_remaining
        if self._status:
            self._status.update(self._summary())

    def close(self) -> None:
        """Remove the status line."""
        if self._status:
            self._status.stop()

    def _print_trial(self, name: str, kind: str, text: str) -> None:
        summary = "" if self._status else f"  | {self._summary()}"
        self.note(f"trial {name}  {kind}  {text}{summary}")
        self.update()

    def _summary(self) -> str:
        states = ("complete", "pruned", "failed")
        parts = [f"{self._counts[state]} {state}" for state in states if self._counts[state]]
        distinct = ", ".join(dict.fromkeys(self._epochs.values()))  # those trained together share one
        epochs = f" (epoch {distinct})" if distinct else ""
        parts += [f"{len(self._started_s)} running{epochs}"] if self._started_s else []
        parts += [f"{self._num_remaining} to go"] if self._num_remaining else []
        if self._best:
            parts.append(f"best {self._best[0]:.5g} ({self._best[1]})")
        if self._seconds and (left_s := round(self._seconds_left())):
            parts.append(f"about {timedelta(seconds=left_s)} left")
        return ", ".join(parts)

    def _seconds_left(self) -> float:
        mean = sum(self._seconds) / len(self._seconds)
        now = time.monotonic()
        running = sum(max(0.0, mean - (now - start)) for start in self._started_s.values())
        return (mean * self._num_remaining + running) / self._num_workers

    def table(self, rows: Sequence[LeaderboardRow], title: str) -> None:
        """Print the closing table: the best trials, and all that failed."""
        self.close()
        failed = [row for row in rows if row.state == "failed"]
        others = [row for row in rows if row.state != "failed"]
        self.note(title)
        self._console.print(_closing_table(others[:MAX_ROWS] + failed, self._metric))
        if len(others) > MAX_ROWS:
            self.note(f"and {len(others) - MAX_ROWS} more; all are in leaderboard.csv")


def _closing_table(rows: Sequence[LeaderboardRow], metric: str) -> Table:
    fold = {"overflow": "fold"}
    names = [*dict.fromkeys(name for row in rows for name in row.params)]
    columns: list[Column] = [
        *score_columns(metric, any(row.half_width is not None for row in rows)),
        ("trial", fold, lambda row: str(row.trial)),
        *(
            (label, fold, lambda row, name=name: format_number(row.params.get(name, "")))
            for label, name in zip(short_names(names), names, strict=True)
        ),
        ("state", fold, lambda row: row.state),
        ("epochs", RIGHT, lambda row: str(row.epochs)),
        ("s", RIGHT, lambda row: f"{row.seconds:.1f}"),
    ]
    if any(row.state == "failed" for row in rows):
        columns.append(("reason", fold, lambda row: row.reason))
    return to_table(rows, columns)


def plot_page(rows: Sequence[LeaderboardRow], metric: str, mode: str) -> str | None:
    """Return an HTML page of Optuna's plots; None without a complete trial."""
    from optuna import visualization

    study = _to_study(rows, mode)
    num_complete = len(study.get_trials(states=(TrialState.COMPLETE,)))
    if not num_complete:
        return None
    names = list(study.best_trial.params)
    plots = [
        lambda: visualization.plot_optimization_history(study, target_name=metric),
        lambda: visualization.plot_parallel_coordinate(study, params=names, target_name=metric),
        lambda: visualization.plot_slice(study, params=names, target_name=metric),
    ]
    if num_complete > 2 and len(names) > 1:
        plots.insert(1, lambda: visualization.plot_param_importances(study, target_name=metric))
    parts = []
    for plot in plots:
        with warnings.catch_warnings(action="ignore"), suppress(ValueError, RuntimeError):  # too few values
            parts.append(plot().to_html(full_html=False, include_plotlyjs=not parts, default_height=480))
    return f"<html><head><meta charset='utf-8'></head><body>{''.join(parts)}</body></html>"


def _to_study(rows: Sequence[LeaderboardRow], mode: str) -> optuna.Study:
    """Return a study in memory that holds the complete and the pruned trials."""
    study = optuna.create_study(direction=DIRECTIONS[mode])
    space = {
        name: _distribution([row.params[name] for row in rows if name in row.params])
        for name in (rows[0].params if rows else ())
    }
    numeric = {name for name, each in space.items() if isinstance(each, FloatDistribution)}
    states = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED}
    for row in sorted(rows, key=lambda row: row.trial):
        state, value = states.get(row.state), row.score
        if state is not None and value is not None and row.params.keys() == space.keys():
            params = {key: float(text) if key in numeric else text for key, text in row.params.items()}
            study.add_trial(optuna.create_trial(state=state, value=value, params=params, distributions=space))
    return study


def _distribution(values: Sequence[str]) -> BaseDistribution:
    """Return a range that holds the values if all are finite numbers, else a list of them."""
    try:
        numbers = [float(value) for value in values]
    except ValueError:
        numbers = [math.nan]
    if not all(map(math.isfinite, numbers)):
        return CategoricalDistribution(tuple(dict.fromkeys(values)))
    low, high = min(numbers), max(numbers)
    return FloatDistribution(low, high, log=low > 0 and high / low > LOG_RATIO)
