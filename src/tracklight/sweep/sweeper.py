"""A sweep from the command line to its winner."""

import signal
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.types import HydraContext
from omegaconf import DictConfig

from tracklight.errors import BadInput, RunFailed
from tracklight.sweep.plan import Plan
from tracklight.sweep.pool import Pool
from tracklight.sweep.rehearsal import rehearsal

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

    from tracklight.sweep.board import Board
    from tracklight.sweep.course import Course
    from tracklight.sweep.progress import Progress
    from tracklight.tracking.store import Store

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
        RunFailed: Trials failed.
        KeyboardInterrupt: Ctrl-C.
        SystemExit: SIGTERM.
    """
    plan = Plan.of(arguments, master, context)
    if plan.settings["dry_run"]:
        print(plan.listing())
        return None
    pool = Pool(plan.settings["workers"], plan.gpus)
    try:
        with rehearsal(plan, pool) as rehearsed:
            storage = _open_storage(plan)
            store = _open_store(plan)
        return _Sweep(plan, pool, store, storage, rehearsed[0].data).run()
    finally:
        pool.kill()


def _open_storage(plan: Plan) -> "BaseStorage | None":
    """Open the database that `sweep.storage` names, before there is a parent run."""
    from tracklight.sweep.storage import open_storage

    url = plan.settings["storage"]
    tracked = plan.points[0][0].cfg.tracking.enabled
    return open_storage(url, None) if url or not tracked else None


def _open_store(plan: Plan) -> "Store | None":
    from tracklight.tracking.query import find_run
    from tracklight.tracking.run import Run  # noqa: F401, imported now: the rehearsal takes as long
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
        pool: Pool,
        store: "Store | None",
        storage: "BaseStorage | None",
        data: str | None,
    ):
        self.plan = plan
        self.pool = pool
        self.store = store
        self.storage = storage
        self.data = data
        self.board: Board | None = None

    def run(self) -> float | None:
        """Run what is left of it, test the winner, close the parent run as it really ended."""
        from optuna.exceptions import StorageInternalError

        from tracklight.sweep.progress import Progress
        from tracklight.tracking.patience import reason
        from tracklight.tracking.quiet import mlflow

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

    def _open_board(self, store: "Store") -> "tuple[Board, int]":
        """Return the parent run and how many threads a trial has."""
        from tracklight.sweep.board import Board
        from tracklight.sweep.parent import open_parent

        plan = self.plan
        run, threads = open_parent(store, plan, self.data)
        names = [axis.name for axis in plan.space.axes]
        seeds = plan.settings["seeds"]
        return Board(store, run, names, plan.metric, plan.mode, seeds), threads

    def _course(self, progress: "Progress", threads: int) -> "Course":
        from tracklight.sweep.batches import Batches
        from tracklight.sweep.course import Course
        from tracklight.sweep.parent import journal
        from tracklight.sweep.sources import Grid, Search
        from tracklight.sweep.storage import open_storage
        from tracklight.sweep.study import Trials

        plan, board, storage = self.plan, self.board, self.storage
        name = plan.identity[:16]
        if storage is None:
            assert board
            storage = open_storage(None, journal(board.run))
        elif board:
            name += f"-{board.run.run_id}"
        trials = Trials(storage, name, plan.mode, plan.space, plan.methods, plan.total)
        logs = board.run.folder / "logs" if board else None
        if logs:
            logs.mkdir(exist_ok=True)
        slots = self.pool
        prunes = plan.methods.prunes
        if plan.launcher:
            one_by_one = plan.is_search or plan.settings["on_failure"] == "stop"
            slots = Batches(
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
        return Course(source, trials, slots, board, progress, asks, stops, logs)

    def _close(self, course: "Course", progress: "Progress") -> float | None:
        """Test the winner, if the sweep is through, and tell how it went."""
        from tracklight.sweep.leaderboard import standings

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
            from tracklight.sweep.winner import test

            progress.note(test(self.plan, course.slots, self.board, winner))
        return winner.score if winner else None


def _raise_what_happened(course: "Course") -> None:
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
