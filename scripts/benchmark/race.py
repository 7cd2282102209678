"""Rivals that train in turns, on one thread, a slice of steps at a time.

All meet the machine in the same state: what else runs on it, its clock and its caches disturb each
of them alike. A rival is ordinary training code; its greenlet stands still while others run.
"""

import gc
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from greenlet import getcurrent, greenlet

from benchmark.interval import Interval, of_ratio

SLICE = 64  # optimizer steps at most
Item = TypeVar("Item")


class Relay:
    """What a rival's training loop calls so that others have their turn."""

    def __init__(self) -> None:
        self.steps = 0  # taken in the slice under way
        self.result: Any = None  # what the training made

    def epoch(self, batches: Callable[[], Iterable[Item]]) -> Iterator[Item]:
        """Walk an epoch's batches, one step each, and hand over after every slice.

        What precedes the first epoch is set-up and not timed; making the batches is.
        """
        self.hand_over()
        for batch in batches():
            if self.steps == SLICE:
                self.hand_over()
            self.steps += 1
            yield batch

    def hand_over(self) -> None:
        """End the slice; return when it is this rival's turn again."""
        parent = getcurrent().parent
        assert parent is not None
        steps, self.steps = self.steps, 0
        parent.switch(steps)


class Rival:
    """One way to train.

    Args:
        name: As shown.
        train: Trains, handing over to the relay it is given, the last time when all is done.
        every: Takes a slice only in each such round; for slow ones.
    """

    def __init__(self, name: str, train: Callable[[Relay], object], every: int = 1):
        self.name = name
        self.every = every
        self.steps: list[int] = []
        self.seconds: list[float] = []
        self.relay = Relay()
        self._greenlet = greenlet(lambda: train(self.relay))

    def get_ready(self) -> None:
        """Run up to the first epoch."""
        self._greenlet.switch()

    def take_slice(self, settle: Callable[[], None]) -> None:
        """Train for one slice, timed until the device has settled."""
        started = time.perf_counter()
        steps = self._greenlet.switch()
        settle()
        self.seconds.append(time.perf_counter() - started)
        self.steps.append(steps)

    def leave(self) -> None:
        """Break off where it stands; nothing that is measured comes after its last hand-over."""
        self._greenlet.throw()

    def seconds_per(self, steps: int) -> float:
        """Return the mean time of so many steps."""
        return sum(self.seconds) / sum(self.steps) * steps


def race(
    rivals: Sequence[Rival],
    rounds: int,
    tell: Callable[[int], None],
    settle: Callable[[], None] = lambda: None,
) -> None:
    """Let all train; in each round each has one slice, in an order drawn anew.

    Args:
        rivals: Who trains.
        rounds: Slices of a rival with `every=1`.
        tell: Told the number of rounds done.
        settle: Waits until the device has done what was asked of it.
    """
    for rival in rivals:
        rival.get_ready()
    gc.collect()
    gc.freeze()  # what was imported for some must not slow the collections of all
    draw = random.Random(0)
    for turn in range(rounds):
        due = [rival for rival in rivals if turn % rival.every == 0]
        for rival in draw.sample(due, len(due)):
            rival.take_slice(settle)
        tell(turn + 1)
    gc.unfreeze()
    for rival in reversed(rivals):  # signal handlers go back in the order opposite to their coming
        rival.leave()


def ratio(above: Rival, below: Rival, rounds_per_epoch: int) -> Interval:
    """Return the ratio of two rivals' times a step, over what lies close in time.

    A pair of measurements is an epoch of both, or one slice of the slower with all that the other
    did until the next one.
    """
    every = max(above.every, below.every)
    size = every if every > 1 else rounds_per_epoch
    tops, bottoms = (_sums(rival, size) for rival in (above, below))
    steps = sum(below.steps) / sum(above.steps)
    return of_ratio(tops, bottoms).scaled(steps)


def per_epoch(rival: Rival, rounds_per_epoch: int, steps_per_epoch: int) -> Interval:
    """Return a rival's seconds an epoch."""
    size = rounds_per_epoch if rival.every == 1 else rival.every
    times, counts = _sums(rival, size), _sums(rival, size, rival.steps)
    return of_ratio(times, counts).scaled(steps_per_epoch)


def _sums(rival: Rival, rounds: int, values: Sequence[float] | None = None) -> list[float]:
    """Sum a rival's slices over stretches of so many rounds."""
    values, size = rival.seconds if values is None else values, rounds // rival.every
    return [sum(values[at : at + size]) for at in range(0, len(values), size)]
