"""Trials through one of Hydra's launchers, a batch at a time."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.types import HydraContext
from omegaconf import DictConfig

from tracklight.errors import RunFailed
from tracklight.sweep.trial import Assignment, Outcome, run


class BatchTask:
    """What a launcher runs in each of its jobs; the job's number tells which trial that is."""

    def __init__(self) -> None:
        self.assignments: dict[int, Assignment] = {}

    def __call__(self, cfg: DictConfig) -> Outcome:
        """Run a trial; whatever becomes of it, the answer is an outcome."""
        assignment = self.assignments[int(HydraConfig.get().job.num)]
        log = assignment.log or Path("/dev/null")
        with (
            log.open("a") as file,
            contextlib.redirect_stdout(file),
            contextlib.redirect_stderr(file),
        ):
            return run(assignment)


class Batches:
    """Takes trials like a pool, and launches all it has taken when asked for messages.

    Args:
        context: Hydra's.
        master: The config of the whole command, which names the launcher.
        size: Trials in a batch; None for all there are.
    """

    blocks = True

    def __init__(self, context: HydraContext, master: DictConfig, size: int | None):
        self._task = BatchTask()
        self._launcher = Plugins.instance().instantiate_launcher(
            hydra_context=context, task_function=self._task, config=master
        )
        self._size = size
        self._taken: list[tuple[Any, Assignment]] = []
        self._num_launched = 0

    @property
    def has_room(self) -> bool:
        """Whether the batch may grow."""
        return self._size is None or len(self._taken) < self._size

    @property
    def running(self) -> list[Any]:
        """The tags of the trials in the batch."""
        return [tag for tag, _ in self._taken]

    def start(self, assignment: Assignment, tag: Any) -> None:
        """Take a trial into the batch."""
        self._taken.append((tag, assignment))

    def messages(self, timeout_s: float) -> Iterator[tuple[Any, Outcome]]:
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
                yield tag, Outcome("failed", reason=f"{type(error).__name__}: {reason}")

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

    def drain(self) -> Iterator[tuple[Any, Outcome]]:
        """Yield nothing: no batch is in progress between two calls."""
        return iter(())

    def kill(self) -> None:
        """Nothing is in progress."""
