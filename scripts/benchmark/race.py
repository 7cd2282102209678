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

from benchmark.interval import Interval, of_mean, of_ratio

SLICE = 64
Item = TypeVar("Item")


class Relay:
    """What a rival's training loop calls so that others have their turn."""

    def __init__(self, slice_: int = SLICE) -> None:
        self.slice = slice_  # optimizer steps at most
        self.steps = 0  # taken in the slice under way
        self.result: Any = None  # what the training made

    def epoch(self, batches: Callable[[], Iterable[Item]]) -> Iterator[Item]:
        """Walk an epoch's batches, one step each, and hand over after every slice.

        What precedes the first epoch is set-up and not timed; making the batches is.
        """
        self.hand_over()
        for batch in batches():
            if self.steps == self.slice:
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
        slice_: Optimizer steps of a slice at most.
    """

    def __init__(self, name: str, train: Callable[[Relay], object], slice_: int = SLICE):
        self.name = name
        self.steps: list[int] = []
        self.seconds: list[float] = []
        self.relay = Relay(slice_)
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
        rounds: Slices of each.
        tell: Told the number of rounds done.
        settle: Waits until the device has done what was asked of it.
    """
    for rival in rivals:
        rival.get_ready()
    gc.collect()
    gc.freeze()  # what was imported for some must not slow the collections of all
    draw = random.Random(0)
    for turn in range(rounds):
        for rival in draw.sample(rivals, len(rivals)):
            rival.take_slice(settle)
        tell(turn + 1)
    gc.unfreeze()
    for rival in reversed(rivals):  # signal handlers go back in the order opposite to their coming
        rival.leave()


def ratio(above: Rival, below: Rival, rounds_per_epoch: int) -> Interval:
    """Return the ratio of two rivals' times, an epoch of both making a pair."""
    return of_ratio(_sums(above.seconds, rounds_per_epoch), _sums(below.seconds, rounds_per_epoch))


def per_epoch(rival: Rival, rounds_per_epoch: int) -> Interval:
    """Return a rival's seconds an epoch."""
    return of_mean(_sums(rival.seconds, rounds_per_epoch))


def _sums(values: Sequence[float], size: int) -> list[float]:
    return [sum(values[at : at + size]) for at in range(0, len(values), size)]
