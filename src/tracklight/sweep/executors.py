"""Executor for trials, each in a process that a forkserver starts with the heavy imports done."""

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import connection
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.types import HydraContext
from omegaconf import DictConfig

from tracklight.errors import RunFailed
from tracklight.sweep.trial import EpochReport, TrialResult, TrialSpec, run, work

PRELOADED = [
    "tracklight.sweep.forkserver",
    "tracklight.experiment.train",
    "tracklight.sweep.pruning",
    "tracklight.figures.plots",
    "mlflow.store.tracking.sqlalchemy_store",
    "sqlalchemy.dialects.sqlite",
    "alembic.command",
    "fsspec.implementations.local",
    "hydra.utils",
    "PIL.PngImagePlugin",
]
STOP_S = 60.0  # what a trial may take to reach a safe point and close its run
JOIN_S = 5.0


class Executor(Protocol):
    """What runs trials: a pool of processes, or one of Hydra's launchers."""

    blocks: bool  # whether messages come only when all of the trials have ended

    @property
    def has_room(self) -> bool: ...  # noqa: D102

    @property
    def running(self) -> list[Any]: ...  # noqa: D102

    def start(self, assignment: TrialSpec, tag: Any) -> None: ...  # noqa: D102

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


class ProcessExecutor:
    """Keeps up to `size` trials running, each in a process of its own.

    Args:
        size: OptunaStudy at once.
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

    def start(self, assignment: TrialSpec, tag: Any) -> None:
        """Start a trial in a free slot; its messages come with the tag."""
        number = next(number for number in range(self._size) if number not in self._slots)
        ours, theirs = self._context.Pipe()
        assignment = replace(assignment, slot=number, gpus=self._gpus)
        process = self._context.Process(target=work, args=(assignment, theirs))
        process.start()
        theirs.close()
        self._slots[number] = _Slot(process, ours, tag)

    def messages(self, timeout_s: float) -> Iterator[tuple[Any, EpochReport | TrialResult]]:
        """Yield what trials have to tell, waiting for the first; an outcome frees its slot."""
        by_line = {slot.line: number for number, slot in self._slots.items()}
        for line in connection.wait(list(by_line), timeout_s):
            number = by_line[line]  # pyright: ignore[reportArgumentType]
            slot = self._slots[number]
            try:
                message = slot.line.recv()
            except (EOFError, OSError):
                message = TrialResult("failed", reason=_cause_of_death(slot.process))
                _kill_group(slot.process.pid)  # what it started outlives it
            if isinstance(message, TrialResult):
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

    def drain(self) -> Iterator[tuple[Any, EpochReport | TrialResult]]:
        """Yield the messages of trials asked to stop; those that take too long are killed."""
        end_s = time.monotonic() + STOP_S
        while self._slots and time.monotonic() < end_s:
            yield from self.messages(1.0)
        for slot in self._slots.values():
            yield slot.tag, TrialResult("stopped")
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


class BatchTask:
    """What a launcher runs in each of its jobs; the job's number tells which trial that is."""

    def __init__(self) -> None:
        self.assignments: dict[int, TrialSpec] = {}

    def __call__(self, cfg: DictConfig) -> TrialResult:
        """Run a trial; whatever becomes of it, the answer is an outcome."""
        assignment = self.assignments[int(HydraConfig.get().job.num)]
        log = assignment.log or Path("/dev/null")
        with (
            log.open("a") as file,
            contextlib.redirect_stdout(file),
            contextlib.redirect_stderr(file),
        ):
            return run(assignment)


class LauncherExecutor:
    """Takes trials like a pool, and launches all it has taken when asked for messages.

    Args:
        context: Hydra's.
        master: The config of the whole command, which names the launcher.
        size: OptunaStudy in a batch; None for all there are.
    """

    blocks = True

    def __init__(self, context: HydraContext, master: DictConfig, size: int | None):
        self._task = BatchTask()
        self._launcher = Plugins.instance().instantiate_launcher(
            hydra_context=context, task_function=self._task, config=master
        )
        self._size = size
        self._taken: list[tuple[Any, TrialSpec]] = []
        self._num_launched = 0

    @property
    def has_room(self) -> bool:
        """Whether the batch may grow."""
        return self._size is None or len(self._taken) < self._size

    @property
    def running(self) -> list[Any]:
        """The tags of the trials in the batch."""
        return [tag for tag, _ in self._taken]

    def start(self, assignment: TrialSpec, tag: Any) -> None:
        """Take a trial into the batch."""
        self._taken.append((tag, assignment))

    def messages(self, timeout_s: float) -> Iterator[tuple[Any, TrialResult]]:
        """Launch the batch and yield its outcomes; launchers tell nothing before all have ended."""
        taken, self._taken = self._taken, []
        first = self._num_launched
        self._num_launched += len(taken)
        self._task.assignments = {
            first + index: assignment for index, (_, assignment) in enumerate(taken)
        }
        words = [list(tag.words) for tag, _ in taken]
        for (tag, _), result in zip(taken, self._launch(words, first), strict=True):
            try:
                yield tag, result.return_value
            except Exception as error:
                reason = " ".join(str(error).split())
                yield tag, TrialResult("failed", reason=f"{type(error).__name__}: {reason}")

    def _launch(self, words: list[list[str]], first: int) -> Sequence[JobReturn]:
        name = type(self._launcher).__name__
        try:
            results = self._launcher.launch(words, initial_job_idx=first)
        except Exception as error:  # whatever a launcher of others raises
            reason = " ".join(str(error).split())
            raise RunFailed(
                f"{name} failed ({type(error).__name__}: {reason}); the same command continues, "
                "hydra/launcher=basic without it"
            ) from error
        if len(results) != len(words):
            raise RunFailed(f"{name} returned {len(results)} results for {len(words)} trials")
        return results

    def answer(self, tag: Any, stop: bool) -> None:
        """Nobody asks."""

    def stop(self) -> None:
        """Forget what was not launched."""
        self._taken.clear()

    def drain(self) -> Iterator[tuple[Any, TrialResult]]:
        """Yield nothing: no batch is in progress between two calls."""
        return iter(())

    def kill(self) -> None:
        """Nothing is in progress."""
