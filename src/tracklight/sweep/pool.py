"""Slots for trials, each in a process that a forkserver starts with the heavy imports done."""

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import connection
from multiprocessing.connection import Connection
from typing import Any, Protocol

from tracklight.sweep.trial import Assignment, Epoch, Outcome, work

PRELOADED = [
    "tracklight.sweep.forkserver",
    "tracklight.experiment",
    "tracklight.sweep.reporting",
    "tracklight.tracking.class_figures",
    "mlflow.store.tracking.sqlalchemy_store",
    "sqlalchemy.dialects.sqlite",
    "alembic.command",
    "fsspec.implementations.local",
    "hydra.utils",
    "PIL.PngImagePlugin",
]
STOP_S = 60.0  # what a trial may take to reach a safe point and close its run
JOIN_S = 5.0


class Slots(Protocol):
    """What runs trials: a pool of processes, or one of Hydra's launchers."""

    blocks: bool  # whether messages come only when all of the trials have ended

    @property
    def has_room(self) -> bool: ...  # noqa: D102

    @property
    def running(self) -> list[Any]: ...  # noqa: D102

    def start(self, assignment: Assignment, tag: Any) -> None: ...  # noqa: D102

    def messages(self, timeout_s: float) -> Iterator[tuple[Any, Any]]: ...  # noqa: D102

    def answer(self, tag: Any, stop: bool) -> None: ...  # noqa: D102

    def stop(self) -> None: ...  # noqa: D102

    def drain(self) -> Iterator[tuple[Any, Any]]: ...  # noqa: D102

    def kill(self) -> None: ...  # noqa: D102


@dataclass
class _Slot:
    process: Any
    line: Connection
    tag: Any


class Pool:
    """Keeps up to `size` trials running, each in a process of its own.

    Args:
        size: Trials at once.
        gpus: How many GPUs the slots share; 0 on the CPU.
    """

    blocks = False

    def __init__(self, size: int, gpus: int = 0):
        self._slots: dict[int, _Slot] = {}
        self._size = size
        self._gpus = gpus
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)

    @property
    def has_room(self) -> bool:
        """Whether a slot is free."""
        return len(self._slots) < self._size

    @property
    def running(self) -> list[Any]:
        """The tags of the trials in progress."""
        return [slot.tag for slot in self._slots.values()]

    def start(self, assignment: Assignment, tag: Any) -> None:
        """Start a trial in a free slot; its messages come with the tag."""
        number = next(number for number in range(self._size) if number not in self._slots)
        ours, theirs = self._context.Pipe()
        assignment = replace(assignment, slot=number, gpus=self._gpus)
        process = self._context.Process(target=work, args=(assignment, theirs))
        process.start()
        theirs.close()
        self._slots[number] = _Slot(process, ours, tag)

    def messages(self, timeout_s: float) -> Iterator[tuple[Any, Epoch | Outcome]]:
        """Yield what trials have to tell, waiting for the first; an outcome frees its slot."""
        by_line = {slot.line: number for number, slot in self._slots.items()}
        for line in connection.wait(list(by_line), timeout_s):
            number = by_line[line]  # pyright: ignore[reportArgumentType]
            slot = self._slots[number]
            try:
                message = slot.line.recv()
            except (EOFError, OSError):
                message = Outcome("failed", reason=_cause_of_death(slot.process))
                _kill_group(slot.process.pid)  # what it started outlives it
            if isinstance(message, Outcome):
                del self._slots[number]
                slot.line.close()
                slot.process.join(JOIN_S)
            yield slot.tag, message

    def answer(self, tag: Any, stop: bool) -> None:
        """Answer a trial that asked whether to go on."""
        for slot in self._slots.values():
            if slot.tag is tag:
                with suppress(OSError):  # it died since; its end is the next message
                    slot.line.send(stop)

    def stop(self) -> None:
        """Ask all trials to stop at the next safe point."""
        for slot in self._slots.values():
            slot.process.terminate()

    def kill(self) -> None:
        """End all trials at once, with what they started."""
        for slot in self._slots.values():
            slot.process.kill()
            _kill_group(slot.process.pid)
        for slot in self._slots.values():
            slot.process.join(JOIN_S)
        self._slots.clear()

    def drain(self) -> Iterator[tuple[Any, Epoch | Outcome]]:
        """Yield the messages of trials asked to stop; those that take too long are killed."""
        end_s = time.monotonic() + STOP_S
        while self._slots and time.monotonic() < end_s:
            yield from self.messages(1.0)
        for slot in self._slots.values():
            yield slot.tag, Outcome("stopped")
        self.kill()


def _kill_group(pid: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _cause_of_death(process: Any) -> str:
    process.join(JOIN_S)
    code = process.exitcode
    if code is not None and code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"its process ended with exit code {code}"
