"""Ctrl-C and SIGTERM while a sweep's trials run."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from tracklight.sweep.pool import Slots
from tracklight.sweep.progress import Progress


class Interrupts:
    """Notes the first signal, so that trials can be stopped in peace; a second leaves at once.

    Args:
        slots: What runs the trials.
        progress: What is printed.
    """

    def __init__(self, slots: Slots, progress: Progress):
        self._slots = slots
        self._progress = progress
        self.signum: int | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the place of the handlers there are."""
        before = {
            number: signal.signal(number, self._handle)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is None:
            self.signum = signum
            if self._slots.blocks:  # a launcher, which tells nothing before all of its trials ended
                raise KeyboardInterrupt if signum == signal.SIGINT else SystemExit(128 + signum)
            return
        self._progress.close()
        self._slots.kill()
        os._exit(128 + signum)  # the next start says of the parent run that it was killed
