"""Where a sweep's trials come from: the points of a grid in turn, or Optuna."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from tracklight.errors import BadInput
from tracklight.sweep.points import Composer, Job, pinned

if TYPE_CHECKING:
    from tracklight.sweep.study import Asked, Trials


class Source(Protocol):
    """Where trials come from, each as one job a seed."""

    def next(self) -> "tuple[Asked, list[Job]] | None": ...  # noqa: D102

    @property
    def left(self) -> int: ...  # noqa: D102


class Grid:
    """The points of a grid, composed and checked before any of them runs.

    Args:
        points: The runs of each point, one a seed.
        trials: What Optuna remembers.
    """

    def __init__(self, points: Sequence[list[Job]], trials: "Trials"):
        self._points = points
        self._trials = trials
        self._next = 0

    def next(self) -> "tuple[Asked, list[Job]] | None":
        """Return the next point's trial and runs."""
        if self._next == len(self._points):
            return None
        jobs = self._points[self._next]
        self._next += 1
        asked = self._trials.take(jobs[0].params)
        return asked, [job.numbered(asked.number) for job in jobs]

    @property
    def left(self) -> int:
        """Runs not handed out yet."""
        return sum(len(jobs) for jobs in self._points[self._next :])


class Search:
    """Points as Optuna draws them.

    Args:
        trials: What Optuna remembers.
        composer: Makes configs of them.
        seeds: Runs of a point.
        threads: Of each run.
    """

    def __init__(self, trials: "Trials", composer: Composer, seeds: int, threads: int):
        self._trials = trials
        self._composer = composer
        self._seeds = seeds
        self._threads = threads

    def next(self) -> "tuple[Asked, list[Job]] | None":
        """Return the next trial and its runs; refused and without any if no valid config."""
        asked = self._trials.ask()
        if asked is None:
            return None
        try:
            jobs = [
                pinned(self._composer.job(asked.number, asked.params, seed), self._threads)
                for seed in range(self._seeds)
            ]
        except BadInput as error:
            return replace(asked, refused=str(error)), []
        return asked, jobs

    @property
    def left(self) -> int:
        """Runs not handed out yet."""
        return self._trials.waiting * self._seeds
