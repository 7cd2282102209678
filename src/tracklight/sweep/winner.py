"""The test set's only part in a sweep: the winner is evaluated on it, once."""

from typing import TYPE_CHECKING

from tracklight.errors import RunFailed
from tracklight.sweep.board import Board
from tracklight.sweep.leaderboard import Standing
from tracklight.sweep.plan import Plan, assign
from tracklight.sweep.points import Job, pinned, shown
from tracklight.sweep.pool import Slots
from tracklight.sweep.trial import POINT_TAG, TESTED_TAG, Outcome
from tracklight.tracking.layout import PARENT_TAG

if TYPE_CHECKING:
    from mlflow.entities import Run


def test(plan: Plan, slots: Slots, board: Board, winner: Standing) -> str:
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


def _run_tests(plan: Plan, slots: Slots, board: Board, winner: Standing, todo: "list[Run]") -> None:
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
            if isinstance(message, Outcome):
                _tested(board, runs[job.key], message)


def _tested(board: Board, run_id: str, outcome: Outcome) -> None:
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
