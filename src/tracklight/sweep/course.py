"""The course of a sweep: which run is next, what its outcome means, and when it is over."""

import signal
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

from tracklight.sweep.board import NEVER_BEGAN_TAG, Board
from tracklight.sweep.leaderboard import Row
from tracklight.sweep.outcomes import joined, known
from tracklight.sweep.plan import assign
from tracklight.sweep.points import Job
from tracklight.sweep.pool import Slots
from tracklight.sweep.progress import Progress
from tracklight.sweep.sources import Source
from tracklight.sweep.study import RUNS, Asked, Trials
from tracklight.sweep.trial import (
    PARENT_TAG,
    POINT_TAG,
    TRIAL_TAG,
    Epoch,
    Outcome,
)

WAIT_S = 0.25  # how soon a signal is noticed


@dataclass
class Point:
    """A trial in progress: its runs, and the outcomes so far."""

    asked: Asked
    jobs: list[Job]
    outcomes: dict[str, Outcome] = field(default_factory=dict)


class Course:
    """Keeps the slots full until there is nothing left to run.

    Args:
        source: Where trials come from.
        trials: What Optuna remembers.
        slots: What runs them.
        board: The parent run; None untracked.
        progress: What is printed.
        asks: Whether trials ask after each epoch if they are to be pruned.
        stops: Whether the first failure ends the sweep.
        logs: Folder for what trials print.
    """

    def __init__(
        self,
        source: Source,
        trials: Trials,
        slots: Slots,
        board: Board | None,
        progress: Progress,
        asks: bool,
        stops: bool,
        logs: Path | None,
    ):
        self._source = source
        self._trials = trials
        self._slots = slots
        self._board = board
        self._progress = progress
        self._asks = asks
        self._stops = stops
        self._logs = logs
        self._children: dict[str, Any] = board.by_point() if board else {}
        self._outcomes: dict[str, Outcome] = {}
        self._queue: deque[Job] = deque()
        self._points: dict[int, Point] = {}
        self._awaited: dict[str, list[Job]] = {}  # jobs in progress by key; twins wait
        self.rows: list[Row] = []  # what this command ran
        self.failures: dict[int, str] = {}
        self.signum: int | None = None
        self.halted = False

    def run(self) -> None:
        """Run all trials; `signum` tells afterwards if a signal ended it."""
        with self._listening():
            try:
                self._retry_lost()
                while not self._is_over():
                    self._fill()
                    if not self._slots.running:
                        break
                    for job, message in self._slots.messages(WAIT_S):
                        self._take(job, message)
                    if self._board:
                        self._board.refresh()
                self._wind_down()
            finally:
                self._slots.kill()

    def _is_over(self) -> bool:
        return self.signum is not None or self.halted

    @contextmanager
    def _listening(self) -> Iterator[None]:
        before = {
            number: signal.signal(number, self._handle)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is None:
            self.signum = signum
            return
        signal.signal(signum, signal.SIG_IGN)
        self._slots.kill()  # trials die with this process in any case
        raise SystemExit(128 + signum)

    def _wind_down(self) -> None:
        """Stop what runs, so that it can be continued."""
        if not self._slots.running:
            return
        self._progress.note(f"stopping {len(self._slots.running)} running; again to leave at once")
        self._slots.stop()
        for job, outcome in self._slots.drain():
            if outcome.kind == "failed" and outcome.reason.startswith("killed by"):
                outcome = Outcome("stopped", run_id=outcome.run_id)  # before it could listen
            self._take(job, outcome)

    def _retry_lost(self) -> None:
        """Keep ended trials of a search; those that failed in passing or lost runs go again."""
        if self._board is None or not self._trials.is_search:
            return
        for trial in self._trials.ended():
            keys = trial.user_attrs.get(RUNS, [])
            found = [known(self._children.get(key)) for key in keys]
            outcomes = [outcome for outcome in found if outcome]
            if not outcomes or len(outcomes) < len(keys):
                self._trials.retry(trial.number)
            else:
                self._keep(trial.number, self._trials.params(trial), outcomes)

    def _fill(self) -> None:
        while self._slots.has_room and not self._is_over():
            job = self._next()
            if job is None:
                break
            self._begin(job)
        self._progress.left(len(self._queue) + self._source.left)

    def _next(self) -> Job | None:
        while not self._queue:
            found = self._source.next()
            if found is None:
                return None
            asked, jobs = found
            if asked.has_ended:
                found = [known(self._children.get(job.key)) for job in jobs]
                outcomes = [outcome for outcome in found if outcome]
                if len(outcomes) == len(jobs):
                    self._keep(asked.number, asked.params, outcomes)
                    continue
                asked = self._trials.retried(asked.number)
                jobs = [job.numbered(asked.number) for job in jobs]
            if not jobs:
                continue
            self._trials.note_runs(asked.number, [job.key for job in jobs])
            self._points[asked.number] = Point(asked, jobs)
            self._queue.extend(jobs[:1] if self._asks else jobs)
        return self._queue.popleft()

    def _keep(self, number: int, params: Mapping[str, str], outcomes: list[Outcome]) -> None:
        for outcome in outcomes:
            self._progress.kept(outcome)
            if outcome.kind == "failed":
                self.failures[number] = outcome.reason
        kind, score = joined(outcomes)
        if kind == "complete" and score is not None:
            self._progress.standing(number, params, score)

    def _begin(self, job: Job) -> None:
        child = self._children.get(job.key)
        outcome = self._outcomes.get(job.key) or known(child)
        if outcome is not None:
            self._progress.kept(outcome)
            self._end(job, outcome)
            return
        twins = self._awaited.setdefault(job.key, [])
        twins.append(job)
        if len(twins) > 1:
            return
        run_id = child.info.run_id if child is not None else None
        if child is not None and NEVER_BEGAN_TAG in child.data.tags:
            assert self._board
            self._board.store.client.delete_run(run_id)
            run_id = None
        asks = self._asks and job.key == self._points[job.number].jobs[0].key
        tags = self._tags(job)
        assignment = assign(job, tags=tags, run_id=run_id, asks=asks, log=self._log(job))
        if run_id is not None:
            self._progress.note(f"trial {job.name}  goes on in run {run_id}")
        self._progress.began(job)
        self._slots.start(assignment, job)

    def _log(self, job: Job) -> Path | None:
        return self._logs / f"{job.number:04d}.log" if self._logs else None

    def _tags(self, job: Job) -> Mapping[str, str]:
        if self._board is None:
            return {}
        ours = {POINT_TAG: job.key, TRIAL_TAG: str(job.number), PARENT_TAG: self._board.run.run_id}
        return {**job.params, **ours}

    def _take(self, job: Job, message: Epoch | Outcome) -> None:
        if isinstance(message, Epoch):
            asks = self._asks and job.key == self._points[job.number].jobs[0].key
            if asks:
                prune = self._trials.report(job.number, message.number, message.value)
                self._slots.answer(job, prune)
            self._progress.epoch(job, message)
            return
        if message.kind == "stopped" and not self._is_over():
            message = replace(message, kind="failed", reason="stopped by a signal")
        if message.kind == "failed":
            self._record_failure(job, message)
        self._progress.ended(job, message, self._log(job))
        self.rows.append(_row(job, message))
        if message.kind != "stopped":
            self._outcomes[job.key] = message
        for twin in self._awaited.pop(job.key, [job]):
            self._end(twin, message)

    def _record_failure(self, job: Job, outcome: Outcome) -> None:
        if self._board is None:
            return
        run_id = outcome.run_id
        if run_id is None:
            child = self._board.child(job.key)
            run_id = child.info.run_id if child is not None else None
        if run_id is None:
            experiment = job.cfg.tracking.experiment
            self._board.add_failed(job.name, self._tags(job), experiment, outcome.reason)
        else:
            self._board.mark_failed(run_id, outcome.reason)

    def _end(self, job: Job, outcome: Outcome) -> None:
        point = self._points[job.number]
        point.outcomes[job.key] = outcome
        if outcome.kind == "failed":
            self.failures[job.number] = outcome.reason
            self.halted |= self._stops
        others = [each for each in point.jobs if each.key not in point.outcomes]
        if self._asks and job is point.jobs[0] and others and outcome.kind == "complete":
            self._queue.extendleft(reversed(others))
            return
        leads = self._asks and job is point.jobs[0]  # its siblings have not begun
        if others and not leads:
            return
        kind, score = joined(list(point.outcomes.values()))
        self._trials.tell(job.number, kind, score)
        if kind == "complete" and score is not None:
            self._progress.standing(job.number, job.params, score)


def _row(job: Job, outcome: Outcome) -> Row:
    return Row(
        trial=job.number,
        params=job.params,
        seed=job.cfg.seed,
        state=outcome.kind,
        score=outcome.score,
        run_id=outcome.run_id or "",
        reason=outcome.reason,
    )
