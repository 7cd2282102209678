"""A sweep from the command line to its winner."""

import difflib
import signal
import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.types import HydraContext
from omegaconf import DictConfig

from tracklight.config.hardware import num_devices
from tracklight.errors import BadInput, RunFailed
from tracklight.runs.leaderboard import Standing
from tracklight.sweep.executors import Executor, ProcessExecutor
from tracklight.sweep.parent_run import ParentRun
from tracklight.sweep.plan import Job, Plan, assign, pinned, shown
from tracklight.sweep.trial import TrialResult
from tracklight.tracking.tags import PARENT_TAG, POINT_TAG, TESTED_TAG

if TYPE_CHECKING:
    from mlflow.entities import Run
    from optuna.storages import BaseStorage

    from tracklight.sweep.loop import SweepLoop
    from tracklight.sweep.parent_run import ParentRun
    from tracklight.sweep.progress import Progress
    from tracklight.tracking.store import Store


pass


MAX_TOLD = 3  # failed trials that the last line names
MAX_REASON = 80  # characters there; the table has the whole


def sweep(arguments: list[str], master: DictConfig, context: HydraContext) -> float | None:
    """Run the sweep that the overrides of `-m` describe.

    Args:
        arguments: The overrides.
        master: The config of the whole command, Hydra's part included.
        context: Hydra's.

    Returns:
        The best score.

    Raises:
        BadInput: Something is wrong with it; nothing ran.
        RunFailed: OptunaStudy failed.
        KeyboardInterrupt: Ctrl-C.
        SystemExit: SIGTERM.
    """
    plan = Plan.of(arguments, master, context)
    if plan.settings["dry_run"]:
        print(plan.listing())
        return None
    pool = ProcessExecutor(plan.settings["workers"], plan.gpus)
    try:
        with preflight(plan, pool) as rehearsed:
            storage = _open_storage(plan)
            store = _open_store(plan)
        return _Sweep(plan, pool, store, storage, rehearsed[0].data).run()
    finally:
        pool.kill()


def _open_storage(plan: Plan) -> "BaseStorage | None":
    """Open the database that `sweep.storage` names, before there is a parent run."""
    from tracklight.sweep.study import open_storage

    url = plan.settings["storage"]
    tracked = plan.points[0][0].cfg.tracking.enabled
    return open_storage(url, None) if url or not tracked else None


def _open_store(plan: Plan) -> "Store | None":
    from tracklight.runs.select import find_run
    from tracklight.tracking.run import Run  # noqa: F401, imported now: the preflight takes as long
    from tracklight.tracking.store import connect

    tracking = plan.points[0][0].cfg.tracking
    starts = {job.cfg.init_from for jobs in plan.points for job in jobs} - {None}
    if not tracking.enabled:
        for run_id in starts:
            raise BadInput(f"init_from={run_id} needs tracking=mlflow, where that run is")
        return None
    store = connect(tracking.uri, Path(tracking.dir))
    store.recover()
    for run_id in starts:
        find_run(store, run_id)
    return store


class _Sweep:
    """One sweep, its store open.

    Args:
        plan: What to run.
        pool: Processes for it.
        store: Where it is recorded; None for nowhere.
        storage: Optuna's, opened already; None for the journal in the parent's folder.
        data: Digest of the first point's data, where it is known.
    """

    def __init__(
        self,
        plan: Plan,
        pool: ProcessExecutor,
        store: "Store | None",
        storage: "BaseStorage | None",
        data: str | None,
    ):
        self.plan = plan
        self.pool = pool
        self.store = store
        self.storage = storage
        self.data = data
        self.board: ParentRun | None = None

    def run(self) -> float | None:
        """Run what is left of it, test the winner, close the parent run as it really ended."""
        from optuna.exceptions import StorageInternalError

        from tracklight.sweep.progress import Progress
        from tracklight.tracking.mlflow_client import mlflow, reason

        plan = self.plan
        threads = plan.threads
        if self.store:
            self.board, threads = self._open_board(self.store)
        status = "FAILED"
        progress = Progress(plan.metric, plan.mode, plan.settings["workers"])
        try:
            plan.pin(threads)
            course = self._course(progress, threads)
            course.run()
            if course.signum is not None:
                status = "KILLED"
            score = self._close(course, progress)
            if course.signum is None and not course.failures:
                status = "FINISHED"
        except (KeyboardInterrupt, SystemExit):
            status = "KILLED"
            raise
        except mlflow.exceptions.MlflowException as error:
            raise RunFailed(
                f"the tracking store fails ({reason(error)}); the same command continues the sweep"
            ) from None
        except StorageInternalError as error:
            cause = error.__cause__ or error
            raise RunFailed(
                f"sweep.storage fails ({reason(cause)}); the same command continues the sweep"
            ) from None
        finally:
            progress.close()
            if self.board:
                hint = "; the same command continues it" if status == "KILLED" else ""
                run = self.board.run
                progress.note(f"sweep  {run.run_id}  {run.folder}{hint}\nlook   {run.look}")
                self.board.finish(status)
        _raise_what_happened(course)
        return score

    def _open_board(self, store: "Store") -> "tuple[ParentRun, int]":
        """Return the parent run and how many threads a trial has."""
        from tracklight.sweep.parent_run import ParentRun, open_parent

        plan = self.plan
        run, threads = open_parent(store, plan, self.data)
        names = [axis.name for axis in plan.space.axes]
        seeds = plan.settings["seeds"]
        return ParentRun(store, run, names, plan.metric, plan.mode, seeds), threads

    def _course(self, progress: "Progress", threads: int) -> "SweepLoop":
        from tracklight.sweep.executors import LauncherExecutor
        from tracklight.sweep.loop import Grid, Search, SweepLoop
        from tracklight.sweep.parent_run import journal
        from tracklight.sweep.study import OptunaStudy, open_storage

        plan, board, storage = self.plan, self.board, self.storage
        name = plan.identity[:16]
        if storage is None:
            assert board
            storage = open_storage(None, journal(board.run))
        elif board:
            name += f"-{board.run.run_id}"
        trials = OptunaStudy(storage, name, plan.mode, plan.space, plan.methods, plan.total)
        logs = board.run.folder / "logs" if board else None
        if logs:
            logs.mkdir(exist_ok=True)
        slots = self.pool
        prunes = plan.methods.prunes
        if plan.launcher:
            one_by_one = plan.is_search or plan.settings["on_failure"] == "stop"
            slots = LauncherExecutor(
                plan.context, plan.master, plan.settings["workers"] if one_by_one else None
            )
        for remark in plan.remarks:
            progress.note(remark)
        seeds = plan.settings["seeds"]
        source = (
            Search(trials, plan.composer, seeds, threads)
            if plan.is_search
            else Grid(plan.points, trials)
        )
        stops = plan.settings["on_failure"] == "stop"
        asks = prunes and not plan.launcher
        return SweepLoop(source, trials, slots, board, progress, asks, stops, logs)

    def _close(self, course: "SweepLoop", progress: "Progress") -> float | None:
        """Test the winner, if the sweep is through, and tell how it went."""
        from tracklight.runs.leaderboard import standings

        if self.board is None:
            found = standings(course.rows, self.plan.mode, self.plan.settings["seeds"])
        else:
            found = self.board.refresh(final=True) or []
        num = max(len(found), course.num_ended)
        several = f", {len(found)} of them different" if num > len(found) else ""
        trials = f"{num} trial{'s' * (num != 1)}{several}"
        progress.table(found, f"{self.plan.metric} ({self.plan.mode}), {trials}")
        if course.halted and course.num_left:
            progress.note(
                f"sweep.on_failure=stop: runs not begun: {course.num_left}; the same command goes "
                "on with them"
            )
        winner = found[0] if found and found[0].rank == 1 else None
        if self.board and winner and course.signum is None and not course.halted:
            pass

            progress.note(test(self.plan, course.slots, self.board, winner))
        return winner.score if winner else None


def _raise_what_happened(course: "SweepLoop") -> None:
    if course.signum == signal.SIGINT:
        raise KeyboardInterrupt
    if course.signum is not None:
        sys.exit(128 + course.signum)
    if course.failures:
        told = [
            f"trial {number} ({textwrap.shorten(reason, MAX_REASON, placeholder='...')})"
            for number, reason in course.failures.items()
        ][:MAX_TOLD]
        more = ", ..." if len(course.failures) > MAX_TOLD else ""
        num = len(course.failures)
        raise RunFailed(f"{num} trial{'s' * (num > 1)} failed: {', '.join(told)}{more}")


def test(plan: Plan, slots: Executor, board: ParentRun, winner: Standing) -> str:
    """Test the runs of the winning point that were not tested yet.

    Returns:
        A line that tells what came out.

    Raises:
        RunFailed: A run could not be tested.
    """
    children = {child.info.run_id: child for child in board.children()}
    wanted = [children[run.run_id] for run in winner.runs]
    todo = [child for child in wanted if TESTED_TAG not in child.data.tags]
    try:
        _run_tests(plan, slots, board, winner, todo)
    except (KeyboardInterrupt, SystemExit):
        slots.stop()  # each closes its run, and the same command goes on with it
        for _ in slots.drain():
            pass
        raise
    found = board.log_test([run.run_id for run in winner.runs])
    told = "  ".join(f"{key} {value:.5g}" for key, value in sorted(found.items()))
    score = f"{plan.metric} {winner.score:.5g}"
    return f"best  trial {winner.trial} {shown(winner.params)}  {score}  {told}".rstrip()


def _run_tests(
    plan: Plan, slots: Executor, board: ParentRun, winner: Standing, todo: "list[Run]"
) -> None:
    jobs = _jobs(plan, winner, todo)
    runs = {child.data.tags[POINT_TAG]: child.info.run_id for child in todo}
    while todo or slots.running:
        while todo and slots.has_room:
            child = todo.pop()
            job = jobs.get(child.data.tags[POINT_TAG])
            if job is None:
                raise RunFailed(
                    f"the winner, run {child.info.run_id}, was trained by another config than "
                    f"{shown(winner.params)} stands for now, and is not tested; sweep.fresh=true "
                    "starts over"
                )
            tags = {PARENT_TAG: board.run.run_id}
            log = board.run.folder / "logs" / f"{winner.trial:04d}.log"
            slots.start(assign(job, tags=tags, run_id=runs[job.key], test=True, log=log), job)
        for job, message in slots.messages(1.0):
            if isinstance(message, TrialResult):
                _tested(board, runs[job.key], message)


def _tested(board: ParentRun, run_id: str, outcome: TrialResult) -> None:
    if outcome.kind not in ("complete", "pruned"):
        why = outcome.reason or outcome.kind
        raise RunFailed(f"the winner, run {run_id}, could not be tested: {why}")
    board.store.client.set_tag(run_id, TESTED_TAG, "true")


def _jobs(plan: Plan, winner: Standing, runs: "list[Run]") -> dict[str, Job]:
    """Compose the winner again, under each of its seeds, by key."""
    jobs = {}
    for offset in range(max(plan.settings["seeds"], len(winner.runs))):
        job = plan.composer.job(winner.trial, winner.params, offset)
        job = pinned(job, int(runs[0].data.params["num_threads"])) if runs else job
        jobs[job.key] = job
    return jobs


@contextmanager
def preflight(plan: Plan, pool: ProcessExecutor) -> Iterator[list[TrialResult]]:
    """Take one batch of the first point while this process does its own imports.

    Trials of a launcher or of several devices are rehearsed on this machine's CPU, where a failure
    proves nothing of them: then only the names of the metrics count.

    Yields:
        A list that holds its outcome in the end.

    Raises:
        BadInput: The data or the model refuse, or nothing of the score's name is logged.
    """
    jobs = [jobs[0] for jobs in plan.points]
    differs = plan.launcher is not None or num_devices(jobs[0].cfg.trainer.devices) != 1
    outcomes: list[TrialResult] = []
    errors: list[Exception] = []

    def start() -> None:
        try:
            _start(pool, jobs[0], differs)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=start, daemon=True)
    thread.start()  # blocks until the forkserver has done its imports
    yield outcomes
    thread.join()
    if errors:
        raise errors[0]
    found, told = _outcome(pool), set()
    outcomes.append(found)
    for job in (*jobs[1:], None):
        refusal = _refusal(found, plan.metric, differs)
        if not refusal:
            break
        if refusal in told or job is None:  # it is not that point's alone
            raise BadInput(refusal)
        told.add(refusal)
        _start(pool, job, differs)
        found = _outcome(pool)
        outcomes[0] = replace(found, data=None)  # of another point than the first
    for text in found.warnings:
        print(f"warning: {text}", file=sys.stderr)


def _start(pool: ProcessExecutor, job: Job, differs: bool) -> None:
    assignment = assign(job, rehearse=True)
    if differs:
        assignment.cfg["trainer"]["accelerator"] = "cpu"
    pool.start(assignment, job)


def _outcome(pool: ProcessExecutor) -> TrialResult:
    while True:
        for _, message in pool.messages(1.0):
            if isinstance(message, TrialResult):
                return message


def _refusal(found: TrialResult, metric: str, differs: bool) -> str:
    """Return why a preflight refuses its point; nothing if it does not."""
    if found.kind == "failed":
        return found.reason if found.is_input and not differs else ""
    if metric in found.metrics:
        return ""
    near = difflib.get_close_matches(metric, found.metrics, n=1, cutoff=0.0)
    hint = f"; try score.metric={near[0]}" if near else ""
    logged = ", ".join(found.metrics) or "no metrics"
    return f"score.metric={metric} is never logged; logged are {logged}{hint}"
