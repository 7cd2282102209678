"""Executors of trials: processes forked with all imports done, or one of Hydra's launchers."""

import functools
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.types import HydraContext
from omegaconf import DictConfig

from tracklight.errors import RunFailed
from tracklight.redact import redact_messages
from tracklight.sweep.plan import Job
from tracklight.sweep.trial import (
    EpochReport,
    NotStacked,
    TrialResult,
    TrialSpec,
    describe_error,
    final_result,
    run_in_worker,
    run_trial,
)

PRELOADED = ["tracklight.sweep.forkserver"]
STOP_S = 60.0  # for a trial to reach a safe point and close its run
JOIN_S = 5.0
TERMINATED_S = 300.0  # from SIGTERM until a cluster kills a job's process, or sends it another signal

Message = tuple[Job, EpochReport | TrialResult]


@dataclass
class _Worker:
    process: Any
    jobs: dict[int, tuple[TrialSpec, Job]]  # that have not ended, by their index in its messages
    number: int


class ProcessExecutor:
    """Runs each trial in a process of its own; the workers share the GPUs, if any."""

    blocks = False  # whether `messages` returns only after all trials have ended

    def __init__(self, num_workers: int, num_gpus: int = 0):
        self._workers: dict[Connection, _Worker] = {}
        self._num_workers = num_workers
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(num_gpus)))
        self._gpus = [name.strip() for name in visible.split(",")] if num_gpus else [None]
        self.max_members: int | None = None  # of a population that are trained at once
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)

    @property
    def has_room(self) -> bool:
        """Whether another trial can be started."""
        return len(self._workers) < self._num_workers

    @property
    def running(self) -> list[Job]:
        """The jobs in progress."""
        return [job for worker in self._workers.values() for _, job in worker.jobs.values()]

    def start(self, spec: TrialSpec, job: Job) -> None:
        """Start a trial; its messages are yielded with the job."""
        self.start_group([(spec, job)])

    def start_group(self, group: Sequence[tuple[TrialSpec, Job]]) -> None:
        """Start trials that one process trains together, or one of them."""
        number = min({*range(self._num_workers)} - {each.number for each in self._workers.values()})
        ours, theirs = self._context.Pipe()
        gpu = self._gpus[number % len(self._gpus)]
        specs = [replace(spec, gpu=gpu) for spec, _ in group]
        process = self._context.Process(target=run_in_worker, args=(specs, theirs, self.max_members))
        try:
            process.start()
        except (EOFError, OSError):  # the process that forks them has died, or cannot be started
            problem = "no process could be started for a trial"
            raise RunFailed(f"{problem}; is memory short, or `ulimit -u` too low?") from None
        theirs.close()
        self._workers[ours] = _Worker(process, dict(enumerate(group)), number)

    def messages(self, timeout_s: float) -> Iterator[Message]:
        """Yield the reports and results of trials, waiting for the first."""
        for connection in wait([*self._workers], timeout_s):
            assert isinstance(connection, Connection)
            worker = self._workers[connection]
            jobs, found = dict(worker.jobs), list[tuple[int, Any]]()
            try:
                while worker.jobs and (not found or connection.poll()):
                    found += (received := connection.recv())
                    for index, message in received:
                        if not isinstance(message, EpochReport):
                            worker.jobs.pop(index, None)
            except (EOFError, OSError):
                failed = TrialResult("failed", reason=_exit_reason(worker.process))
                found += [(index, failed) for index in worker.jobs]
                worker.jobs.clear()
                _kill_group(worker.process.pid)  # the trial's own children outlive it
            if not worker.jobs:
                del self._workers[connection]
                connection.close()
                worker.process.join(JOIN_S)
            unstacked = [index for index, message in found if isinstance(message, NotStacked)]
            if unstacked:
                self.take_back([jobs[index] for index in unstacked], found[-1][1])
            yield from ((jobs[i][1], message) for i, message in found if i not in unstacked)

    def take_back(self, group: Sequence[tuple[TrialSpec, Job]], why: NotStacked) -> None:
        """Start trials otherwise that could not be trained together."""
        raise AssertionError(why)

    def answer(self, job: Job, prune: bool) -> None:
        """Answer the epoch report of a trial that awaits a decision."""
        for connection, worker in self._workers.items():
            for index, (_, each) in worker.jobs.items():
                if each is job:
                    with suppress(OSError):  # the trial has died; `messages` yields its result next
                        connection.send((index, prune))

    def stop(self) -> Iterator[Message]:
        """Stop all trials at the next safe point; yield their last messages."""
        for worker in self._workers.values():
            worker.process.terminate()
        end_s = time.monotonic() + STOP_S
        while self._workers and time.monotonic() < end_s:
            yield from self.messages(1.0)
        for job in self.running:
            yield job, TrialResult("stopped")
        self.kill()

    def kill(self) -> None:
        """End all trials at once, with the processes that they started."""
        workers = [*self._workers.values()]  # the preflight's thread may change them
        for worker in workers:
            worker.process.kill()
            _kill_group(worker.process.pid)
        for worker in workers:
            worker.process.join(JOIN_S)
        self._workers.clear()


def _kill_group(pid: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _exit_reason(process: Any) -> str:
    process.join(JOIN_S)
    code = process.exitcode
    if code is not None and code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"its process ended with exit code {code}"


class LauncherExecutor:
    """Collects trials and hands them to the launcher of the master config in batches."""

    blocks = True

    def __init__(self, context: HydraContext, master: DictConfig, batch_size: int | None):
        self._context = context
        self._master = master
        self._batch_size = batch_size  # None: no limit
        self._batch: list[tuple[Job, TrialSpec]] = []
        self._num_launched = 0

    @property
    def has_room(self) -> bool:
        """Whether the batch can grow."""
        return self._batch_size is None or len(self._batch) < self._batch_size

    @property
    def running(self) -> list[Job]:
        """The jobs in the batch."""
        return [job for job, _ in self._batch]

    def start(self, spec: TrialSpec, job: Job) -> None:
        """Add a trial to the batch."""
        self._batch.append((job, spec))

    def messages(self, timeout_s: float) -> Iterator[Message]:
        """Launch the batch; yield its results once all trials have ended.

        Raises:
            RunFailed: The launcher itself failed.
        """
        batch, self._batch = self._batch, []
        first, self._num_launched = self._num_launched, self._num_launched + len(batch)
        specs = {first + index: spec for index, (_, spec) in enumerate(batch)}
        task = functools.partial(_run_launched, specs, [*sys.path])
        make = Plugins.instance().instantiate_launcher
        launcher = make(hydra_context=self._context, task_function=task, config=self._master)
        name = type(launcher).__name__
        try:
            returned = launcher.launch([list(job.overrides) for job, _ in batch], first)
        except Exception as error:  # third-party launchers may raise anything
            cure = "the same command continues, hydra/launcher=basic without it"
            raise RunFailed(f"{name} failed ({describe_error(error)}); {cure}") from error
        if len(returned) != len(batch):
            raise RunFailed(f"{name} returned {len(returned)} results for {len(batch)} trials")
        for (job, _), job_return in zip(batch, returned, strict=True):
            try:
                yield job, job_return.return_value
            except Exception as error:
                yield job, TrialResult("failed", reason=describe_error(error))

    def answer(self, job: Job, prune: bool) -> None:
        """Do nothing: launched trials await no decision."""

    def stop(self) -> Iterator[Message]:
        """Discard the batch, which was not launched."""
        self._batch.clear()
        return iter(())

    def kill(self) -> None:
        """Do nothing: no trial runs between two calls."""


def _run_launched(specs: Mapping[int, TrialSpec], path: Sequence[str], cfg: DictConfig) -> TrialResult:
    """Run the trial whose number is that of the launcher's job; `path` is the sweep's `sys.path`.

    In a job that was requeued, the run that the trial has begun continues.
    """
    redact_messages()  # the launcher's process has not begun as ours do
    sys.path += [each for each in path if each not in sys.path]
    from tracklight.engine.signals import requeue_signal

    spec = specs[int(HydraConfig.get().job.num)]
    log = spec.log or Path(os.devnull)
    with log.open("a") as file, redirect_stdout(file), redirect_stderr(file):
        if (run := _find_run(spec)) is not None:
            if result := final_result(run):
                return result
            spec = replace(spec, run_id=run.info.run_id)
        result = run_trial(spec)
    if result.kind == "stopped" and (number := requeue_signal()):
        if result.signum == signal.SIGTERM:  # the cluster requeues the job if it is not over by itself
            time.sleep(TERMINATED_S)
        signal.raise_signal(number)  # submitit's handler requeues the job and exits
    return result


def _find_run(spec: TrialSpec) -> Any | None:
    """Return the newest run of a trial of a tracked sweep; none for a test of the winner."""
    from tracklight.experiment.stored import open_store
    from tracklight.tracking.tags import PARENT_TAG, POINT_TAG

    if POINT_TAG not in spec.tags:
        return None
    tracking = spec.cfg["tracking"]
    store = open_store(tracking["uri"], Path(tracking["dir"]), create=True)
    wanted = (f"tags.`{name}` = '{spec.tags[name]}'" for name in (PARENT_TAG, POINT_TAG))
    return next(iter(store.search(" and ".join(wanted))), None)


Executor = ProcessExecutor | LauncherExecutor
