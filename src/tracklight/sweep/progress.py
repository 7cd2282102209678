"""What a sweep prints: a line for each trial that ends, where it stands, and the closing table."""

import math
import sys
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.status import Status
from rich.table import Table
from rich.text import Text

from tracklight.runs.leaderboard import Standing, short_names
from tracklight.sweep.plan import Job, short_value, shown
from tracklight.sweep.study import direction
from tracklight.sweep.trial import TrialResult

MAX_ROWS = 20
PLAIN_WIDTH = 140


class Progress:
    """Counts trials and tells of them.

    Args:
        metric: `score.metric`.
        mode: `score.mode`.
        slots: OptunaStudy at once.
    """

    def __init__(self, metric: str, mode: str, slots: int):
        self._metric = metric
        self._sign = 1 if mode == "min" else -1
        self._slots = slots
        self._counts: Counter[str] = Counter()
        self._kept = 0
        self._seconds: list[float] = []
        self._began: dict[str, float] = {}
        self._best: tuple[float, str] | None = None
        self._left = 0
        is_terminal = sys.stdout.isatty()
        self._console = Console(width=None if is_terminal else PLAIN_WIDTH, highlight=False)
        self._status = Status("", console=self._console) if is_terminal else None
        if self._status:
            self._status.start()

    def note(self, text: str) -> None:
        """Print a line."""
        self._console.print(text, markup=False, soft_wrap=True)

    def goes_on(self, earlier: Sequence[TrialResult | None]) -> None:
        """Say of a sweep that is continued what there is of it: how its runs ended, if they did."""
        num_open = sum(outcome is None for outcome in earlier)
        num_ended = len(earlier) - num_open
        ended = "1 run has ended" if num_ended == 1 else f"{num_ended} runs have ended"
        if earlier:
            more = f", {num_open} to be taken up again" if num_open else ""
            self.note(f"the sweep goes on: {ended}{more}")

    def began(self, job: Job) -> None:
        """A trial has started."""
        self._began[job.key] = time.monotonic()
        self._show()

    def epoch(self) -> None:
        """A trial has finished an epoch."""
        self._show()

    def kept(self, outcome: TrialResult) -> None:
        """A trial had ended before this command."""
        self._kept += 1
        self._counts[outcome.kind] += 1

    def ended(self, job: Job, outcome: TrialResult, log: Path | None) -> None:
        """A trial has ended."""
        seconds = time.monotonic() - self._began.pop(job.key, time.monotonic())
        self._counts[outcome.kind] += 1
        if outcome.kind != "stopped":
            self._seconds.append(seconds)
        value = f"{outcome.reason} ({log})" if outcome.reason and log else outcome.reason
        if outcome.score is not None:
            value = f"{self._metric} {outcome.score:.5g}"
        self.note(f"trial {job.name}  {outcome.kind}  {value}  {seconds:.1f} s{self._suffix()}")
        self._show()

    def standing(self, number: int, params: Mapping[str, str], score: float) -> None:
        """A point has its score: is it the best so far?"""
        if self._best is None or self._sign * score < self._sign * self._best[0]:
            self._best = (score, f"trial {number} {shown(params)}")

    def refused(self, number: int, reason: str) -> None:
        """A trial is no valid config."""
        self._counts["failed"] += 1
        self.note(f"trial {number}  failed  {reason}{self._suffix()}")
        self._show()

    def left(self, num: int) -> None:
        """Set how many runs have not begun."""
        self._left = num
        self._show()

    def _suffix(self) -> str:
        return "" if self._status else f"  | {self._line()}"

    def _show(self) -> None:
        if self._status:
            self._status.update(self._line())

    def _line(self) -> str:
        states = ("complete", "pruned", "failed")
        told = [f"{self._counts[state]} {state}" for state in states if self._counts[state]]
        told += [f"{len(self._began)} running"] if self._began else []
        told += [f"{self._left} to go"] if self._left else []
        if self._best:
            told.append(f"best {self._best[0]:.5g} ({self._best[1]})")
        if (left_s := self._seconds_left()) is not None:
            told.append(f"about {duration(left_s)} left")
        return ", ".join(told)

    def _seconds_left(self) -> float | None:
        if not self._seconds or not (self._left or self._began):
            return None
        mean = sum(self._seconds) / len(self._seconds)
        now = time.monotonic()
        running = sum(max(0.0, mean - (now - began)) for began in self._began.values())
        return (mean * self._left + running) / self._slots

    def close(self) -> None:
        """Stop showing where the sweep stands."""
        if self._status:
            self._status.stop()

    def table(self, found: Sequence[Standing], title: str) -> None:
        """Print the closing table: the best, and all that failed."""
        self.close()
        failed = [each for each in found if each.state == "failed"]
        rest = [each for each in found if each.state != "failed"]
        rows = rest[:MAX_ROWS] + failed
        names = [*dict.fromkeys(name for each in rows for name in each.params)]
        several = any(each.interval for each in rows)
        table = Table(
            title=title, title_justify="left", title_style="", box=None, pad_edge=False,
            header_style="bold", padding=(0, 2, 0, 0),
        )  # fmt: skip
        for column in ("#", self._metric, *(("± 95 %", "seeds") if several else ())):
            table.add_column(column, justify="right", no_wrap=True)
        for column in ("trial", *short_names(names), "state"):
            table.add_column(column, overflow="fold")
        for column in ("epochs", "s"):
            table.add_column(column, justify="right", no_wrap=True)
        if failed:
            table.add_column("reason", overflow="fold")
        for each in rows:
            cells = _cells(each, names)
            spread, reason = (*cells[2:4],) if several else (), (each.reason,) if failed else ()
            style = "bold green" if each.rank == 1 else None
            table.add_row(*map(Text, (*cells[:2], *spread, *cells[4:], *reason)), style=style)
        self._console.print(table)
        if len(rest) > MAX_ROWS:
            self.note(f"and {len(rest) - MAX_ROWS} more; all are in leaderboard.csv")


def _cells(standing: Standing, names: Sequence[str]) -> list[str]:
    """Return rank, mean score, half its interval, seeds, trial, what varies, state, epochs, s."""
    interval, runs = standing.interval, standing.runs
    return [
        str(standing.rank or "-"),
        "-" if standing.score is None else f"{standing.score:.5g}",
        "" if interval is None else f"±{(interval[1] - interval[0]) / 2:.2g}",
        str(len(runs)),
        str(standing.trial),
        *(short_value(standing.params.get(name, "")) for name in names),
        standing.state,
        str(sum(run.epochs for run in runs)),
        f"{sum(run.seconds for run in runs):.1f}",
    ]


def duration(seconds: float) -> str:
    """Say a duration in its two largest units."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


LOG_RATIO = 30.0  # an axis of positive numbers this far apart is drawn logarithmically


def page(standings: Sequence[Standing], metric: str, mode: str) -> str | None:
    """Return HTML with history, importance and parallel coordinates; None with nothing to show."""
    from optuna import visualization

    from tracklight.sweep.study import optuna

    study = _study(standings, mode)
    num_complete = len(study.get_trials(states=(optuna.trial.TrialState.COMPLETE,)))
    if not num_complete:
        return None
    names = list(study.best_trial.params)
    draws = [
        lambda: visualization.plot_optimization_history(study, target_name=metric),
        lambda: visualization.plot_parallel_coordinate(study, params=names, target_name=metric),
        lambda: visualization.plot_slice(study, params=names, target_name=metric),
    ]
    if num_complete > 2 and len(names) > 1:
        draws.insert(1, lambda: visualization.plot_param_importances(study, target_name=metric))
    parts = []
    for draw in draws:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                figure = draw()
            except (ValueError, RuntimeError):  # too few distinct values for this one
                continue
        parts.append(figure.to_html(full_html=False, include_plotlyjs=not parts))
    return f"<html><head><meta charset='utf-8'></head><body>{''.join(parts)}</body></html>"


def _study(standings: Sequence[Standing], mode: str):
    """Build a study in memory, axes of numbers as numbers."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution
    from optuna.trial import TrialState

    from tracklight.sweep.study import optuna

    study = optuna.create_study(direction=direction(mode))
    distributions = {}
    for name in standings[0].params if standings else ():
        texts = [each.params[name] for each in standings if name in each.params]
        numbers = [_number(text) for text in texts]
        if all(number is not None and math.isfinite(number) for number in numbers):
            low, high = min(numbers), max(numbers)  # pyright: ignore[reportArgumentType]
            log = low > 0 and high / low > LOG_RATIO
            distributions[name] = FloatDistribution(low, high, log=log)
        else:
            distributions[name] = CategoricalDistribution(tuple(dict.fromkeys(texts)))
    states = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED}
    for each in sorted(standings, key=lambda each: each.trial):
        if (
            each.state not in states
            or each.score is None
            or each.params.keys() != distributions.keys()
        ):
            continue
        params = {
            name: text if isinstance(kind, CategoricalDistribution) else float(text)
            for (name, text), kind in zip(
                ((name, each.params[name]) for name in distributions),
                distributions.values(),
                strict=True,
            )
        }
        study.add_trial(
            optuna.create_trial(
                state=states[each.state],
                value=each.score,
                params=params,
                distributions=distributions,
            )
        )
    return study


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
