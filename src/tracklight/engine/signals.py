"""Ctrl-C, SIGTERM and SIGHUP: the first stops at the next safe point, a second one exits at once."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from pytorch_lightning import Callback
from pytorch_lightning.utilities.exceptions import SIGTERMException
from typing_extensions import override


def stop_signals() -> list[signal.Signals]:
    """Return the signals that stop a run; SIGHUP only if it is not ignored, as under nohup."""
    hang_up = [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN else []
    return [signal.SIGINT, signal.SIGTERM, *hang_up]


class Stopped(BaseException):
    """The user or the system asked the process to stop; exit code 128 + `signum`."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class SafeStop(Callback):
    """Raises `Stopped` before the next batch, where no file is half written and no hook half done.

    Outside the training loop there is nothing to wait for: there the signal raises at once.
    """

    supports_blocks = True

    def __init__(self) -> None:
        self.received: int | None = None
        self.in_loop = False

    @contextmanager
    def listening(self) -> Iterator["SafeStop"]:
        """Handle the signals that stop a run within the context; only a main thread can."""
        previous = {number: signal.signal(number, self._handle) for number in stop_signals()}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    @contextmanager
    def converting_errors(self) -> Iterator[None]:
        """Raise `Stopped` in place of errors that follow from a signal.

        A data loader's worker may get the signal first and die; for SIGTERM, Lightning raises a
        SystemExit without a code, in every process.
        """
        try:
            yield
        except (Exception, SIGTERMException) as error:
            signum = signal.SIGTERM if isinstance(error, SIGTERMException) else self.received
            if signum is None:
                raise
            raise Stopped(signum) from error

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.received is not None:
            os._exit(128 + signum)
        self.received = signum
        if not self.in_loop:
            raise Stopped(signum)

    def check(self, *_: Any, **__: Any) -> None:
        """Raise `Stopped` if a signal was received."""
        if self.received is not None:
            self.in_loop = False
            raise Stopped(self.received)

    @override
    def setup(self, *_: Any, **__: Any) -> None:
        self.in_loop = True
        self.check()

    on_train_epoch_start = on_train_batch_start = check
    on_validation_batch_start = on_test_batch_start = check

    @override
    def on_train_start(self, *_: Any, **__: Any) -> None:
        # Lightning's own handler broadcasts amid whatever else the processes exchange, and hangs if
        # only one of them gets the signal. Its teardown restores ours.
        signal.signal(signal.SIGTERM, self._handle)

    on_test_start = on_train_start

    @override
    def teardown(self, *_: Any, **__: Any) -> None:
        self.in_loop = False

    on_exception = teardown
