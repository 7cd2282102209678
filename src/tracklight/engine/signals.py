"""Ctrl-C and SIGTERM: the first stops at the next safe point, a second one leaves at once."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from pytorch_lightning import Callback, Trainer
from pytorch_lightning.utilities.exceptions import SIGTERMException
from typing_extensions import override


class Stopped(BaseException):
    """The user or the system asked the process to stop; exit code 128 + `signum`."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class SafeStop(Callback):
    """Raises `Stopped` before the next batch, where no file is half written and no hook half done.

    Outside the training loop there is nothing to wait for: there the signal raises at once.
    """

    listens_by_block = True

    def __init__(self) -> None:
        self.received: int | None = None
        self.in_loop = False

    @contextmanager
    def listening(self) -> Iterator["SafeStop"]:
        """Handle SIGINT and SIGTERM until the block ends; only a main thread may."""
        previous = {
            number: signal.signal(number, self._handle)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    @contextmanager
    def prevailing(self) -> Iterator[None]:
        """Raise `Stopped` for whatever else the signal makes others raise meanwhile.

        A data loader's worker may hear of it first and die; Lightning makes of SIGTERM a SystemExit
        without a code, on every process.
        """
        try:
            yield
        except SIGTERMException as error:
            raise Stopped(signal.SIGTERM) from error
        except Exception as error:
            if self.received is None:
                raise
            raise Stopped(self.received) from error

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.received is not None:
            os._exit(128 + signum)
        self.received = signum
        if not self.in_loop:
            raise Stopped(signum)

    def check(self) -> None:
        """Raise `Stopped` if a signal has come."""
        if self.received is not None:
            self.in_loop = False
            raise Stopped(self.received)

    @override
    def setup(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        self.in_loop = True
        self.check()

    @override
    def on_train_start(self, *_: Any) -> None:
        # Lightning's own handler broadcasts in the midst of whatever else the processes exchange,
        # and so hangs where one of several gets the signal. Its teardown brings ours back, too.
        signal.signal(signal.SIGTERM, self._handle)

    @override
    def on_test_start(self, *_: Any) -> None:
        signal.signal(signal.SIGTERM, self._handle)

    @override
    def teardown(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        self.in_loop = False

    @override
    def on_exception(self, *_: Any) -> None:
        self.in_loop = False

    @override
    def on_train_epoch_start(self, *_: Any) -> None:
        self.check()

    @override
    def on_train_batch_start(self, *_: Any) -> None:
        self.check()

    @override
    def on_validation_batch_start(self, *_: Any) -> None:
        self.check()

    @override
    def on_test_batch_start(self, *_: Any) -> None:
        self.check()
