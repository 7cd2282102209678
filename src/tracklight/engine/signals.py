"""Signals that stop a run: the first at the next safe point, a second one at once."""

import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import psutil
from pytorch_lightning import Callback
from pytorch_lightning.utilities.exceptions import SIGTERMException
from typing_extensions import override

STUCK_S = 20.0  # that a run with other processes may take from a signal to a safe point
AGAIN_S = 1.0  # that a second signal may take

# A forked process shares the pipe, but its signals are not for this one.
os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))


def stop_signals() -> list[signal.Signals]:
    """Return the signals that stop a run; SIGHUP and SIGUSR1 only if not ignored, as under nohup."""
    others = (signal.SIGHUP, signal.SIGUSR1)
    others = [each for each in others if signal.getsignal(each) is not signal.SIG_IGN]
    if (number := requeue_signal()) not in (None, *others):
        others.append(number)
    return [signal.SIGINT, signal.SIGTERM, *others]


def requeue_signal() -> signal.Signals | None:
    """Return the signal at which submitit requeues the job of this process; None in any other process."""
    name = os.environ.get("SUBMITIT_PREEMPT_SIGNAL", "USR2")
    number = getattr(signal, f"SIG{name}", None) if "SUBMITIT_EXECUTOR" in os.environ else None
    return number if number and callable(signal.getsignal(number)) else None


class Stopped(BaseException):
    """The user or the system asked the process to stop; exit code 128 + `signum`."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class SafeStop(Callback):
    """Raises `Stopped` before the next batch, or step of a block: no file is half written, no hook half done.

    Outside the training loop there is nothing to wait for: there the signal raises at once.
    """

    supports_blocks = True

    def __init__(self) -> None:
        self.received: int | None = None
        self.in_loop = False
        # Whether the run has other processes, for which this one waits in PyTorch, where no handler runs.
        self.has_company = False
        # Whether a second signal is no request to hurry: a cluster may send several.
        self.is_requeued = requeue_signal() is not None

    @contextmanager
    def listening(self) -> Iterator["SafeStop"]:
        """Handle the signals that stop a run within the context; only a main thread can."""
        previous = {number: signal.signal(number, self._handle) for number in stop_signals()}
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(reader, {*previous}), daemon=True).start()
        try:
            yield self
        finally:
            signal.set_wakeup_fd(wakeup)
            os.close(writer)
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _watch(self, reader: int, numbers: set[int]) -> None:
        """Leave for a signal whose handler does not come to run, and for a second one in any case."""
        signum, patience_s = 0, None
        while True:
            if select.select([reader], [], [], patience_s)[0]:
                if not (byte := os.read(reader, 1)):  # the run is over
                    return os.close(reader)
                if byte[0] in numbers:
                    is_again = signum and not self.is_requeued
                    signum, patience_s = byte[0], AGAIN_S if is_again else STUCK_S
            elif patience_s == AGAIN_S or (self.has_company and (self.received is None or self.in_loop)):
                print(
                    "error: no safe point was reached; the next start marks the run KILLED", file=sys.stderr
                )
                for child in psutil.Process().children(recursive=True):
                    child.kill()
                os._exit(128 + signum)
            else:
                patience_s = None

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
        is_again = self.received is not None
        if is_again and not self.is_requeued:
            os._exit(128 + signum)
        self.received = signum
        if not (self.in_loop or is_again):
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
