"""The course of a sweep: which run is next, what its outcome means, and when it is over."""

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tracklight.errors import RunFailed
from tracklight.sweep.board import NEVER_BEGAN_TAG, Board
from tracklight.sweep.interrupts import Interrupts
from tracklight.sweep.leaderboard import Row
from tracklight.sweep.outcomes import as_row, joined, known
from tracklight.sweep.plan import assign
from tracklight.sweep.points import Job, params_key, shown
from tracklight.sweep.pool import Slots
from tracklight.sweep.progress import Progress
from tracklight.sweep.sources import Source
from tracklight.sweep.study import REFUSED, RUNS, Asked, Trials
from tracklight.sweep.trial import POINT_TAG, TRIAL_TAG, Epoch, Outcome
from tracklight.tracking.layout import PARENT_TAG

WAIT_S = 0.25  # how soon a signal is noticed
OUTAGE_S = 300.0  # how long a store that is away is waited for


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
        self.slots = slots
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
        self._began: dict[str, int] = {}  # trial by key
        self.rows: list[Row] = []  # what this command ran
        self.failures: dict[int, str] = {}
        self._interrupts = Interrupts(slots, progress)
        self.halted = False

    def run(self) -> None:
        """Run all trials; `signum` tells afterwards if a signal ended it."""
        with self._interrupts.listening():
            try:
                self._progress.goes_on([known(child) for child in self._children.values()])
                self._retry_lost()
                while not self._is_over():
                    is_through = self._fill()
                    if self._board:
                        self._board.refresh()  # takes its time: no slot is to wait for it
                    if self.slots.running:
                        for job, message in self.slots.messages(WAIT_S):
                            self._take(job, message)
                    elif is_through:
                        break
                    else:  # the store was away: only that leaves the slots empty
                        self._await_store()
                self._wind_down()
            finally:
                self.slots.kill()

    @property
    def signum(self) -> int | None:
        """The signal that ended it, if one did."""
        return self._interrupts.signum

    @property
    def num_ended(self) -> int:
        """How many trials have ended, those of earlier commands and repeated ones among them."""
        return len(self._trials.ended())

    @property
    def num_left(self) -> int:
        """How many runs have not begun."""
        return len(self._queue) + self._source.left

    def _is_over(self) -> bool:
        return self.signum is not None or self.halted

    @property
    def _away_s(self) -> float:
        """For how long the store has not answered: a trial begun now would fail for that alone."""
        return self._board.away_s if self._board else 0.0

    def _await_store(self) -> None:
        if self._away_s > OUTAGE_S:
            raise RunFailed(
                f"the tracking store has not answered for {OUTAGE_S:.0f} s; "
                "the same command continues the sweep"
            )
        time.sleep(WAIT_S)

    def _wind_down(self) -> None:
        """Stop what runs, so that it can be continued."""
        if not self.slots.running:
            return
        hint = "; again to leave at once" if self.signum is not None else ""
        self._progress.note(f"stopping {len(self.slots.running)} running{hint}")
        self.slots.stop()
        for job, message in self.slots.drain():
            if isinstance(message, Outcome) and message.reason.startswith("killed by"):
                message = Outcome("stopped", run_id=message.run_id)  # before it could listen
            self._take(job, message)

    def _retry_lost(self) -> None:
        """Keep ended trials of a search; those that failed in passing or lost runs go again."""
        if self._board is None or not self._trials.is_search:
            return
        for trial in self._trials.ended():
            reason = trial.user_attrs.get(REFUSED)
            refused = [Outcome("failed", reason=reason)] if reason else []
            if outcomes := refused or self._known(trial.user_attrs.get(RUNS, [])):
                self._keep(self._trials.number(trial), self._trials.params(trial), outcomes)
            else:
                self._trials.retry(self._trials.number(trial))

    def _known(self, keys: Sequence[str]) -> list[Outcome]:
        """Return the outcomes of a trial's runs; none if there is something to run."""
        found = [known(self._children.get(key)) for key in keys]
        outcomes = [outcome for outcome in found if outcome]
        lead = found[0] if self._asks and found else None
        if lead is not None and lead.kind != "complete":
            return outcomes  # its siblings never begin
        return outcomes if len(outcomes) == len(keys) else []

    def _fill(self) -> bool:
        """Begin what there is room for; return whether there is nothing left to begin."""
        is_through = False
        while self.slots.has_room and not (is_through or self._is_over() or self._away_s):
            job = self._next()
            is_through = job is None
            if job is not None:
                self._begin(job)
        self._progress.left(self.num_left)
        return is_through

    def _next(self) -> Job | None:
        while not self._queue:
            found = None if self._is_over() else self._source.next()
            if found is None:
                return None
            asked, jobs = found
            if asked.refused:
                self._refuse(asked)
                continue
            if asked.has_ended:
                if outcomes := self._known([job.key for job in jobs]):
                    self._keep(asked.number, asked.params, outcomes)
                    continue
                asked = self._trials.retried(asked.number)
            self._trials.note_runs(asked.number, [job.key for job in jobs])
            self._points[asked.number] = Point(asked, jobs)
            self._queue.extend(jobs[:1] if self._asks else jobs)
        return self._queue.popleft()

    def _refuse(self, asked: Asked) -> None:
        """Take a point that is no valid config for a failure like any other."""
        number, params, reason = asked.number, asked.params, asked.refused
        self.failures[number] = reason
        self.halted |= self._stops
        if self._board:
            tags = self._tags(number, params, params_key(params))
            self._board.record_failure(None, f"{number} {shown(params)}", tags, reason)
        self._trials.refuse(number, reason)
        self._progress.left(self.num_left)
        self._progress.refused(number, reason)
        self.rows.append(Row(number, params, 0, "failed", None, reason=reason))

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
        if job.key in self._began:
            self._progress.note(f"trial {job.name}  same as trial {self._began[job.key]}")
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
            self._board.discard(child.info.run_id)
            run_id = None
        asks = self._asks_for(job)
        tags = self._tags(job.number, job.params, job.key)
        assignment = assign(job, tags=tags, run_id=run_id, asks=asks, log=self._log(job))
        if run_id is not None:
            self._progress.note(f"trial {job.name}  goes on in run {run_id}")
        self._progress.began(job)
        self._began[job.key] = job.number
        self.slots.start(assignment, job)

    def _asks_for(self, job: Job) -> bool:
        """Say whether a run is the one by which its trial is pruned."""
        return self._asks and job.key == self._points[job.number].jobs[0].key

    def _log(self, job: Job) -> Path | None:
        return self._logs / f"{job.number:04d}.log" if self._logs else None

    def _tags(self, number: int, params: Mapping[str, str], key: str) -> dict[str, str]:
        if self._board is None:
            return {}
        ours = {POINT_TAG: key, TRIAL_TAG: str(number), PARENT_TAG: self._board.run.run_id}
        return {**params, **ours}

    def _take(self, job: Job, message: Epoch | Outcome) -> None:
        if isinstance(message, Epoch):
            if self._asks_for(job):
                prune = self._trials.report(job.number, message.number, message.value)
                self.slots.answer(job, prune)
            self._progress.epoch()
            return
        if message.kind == "stopped" and not self._is_over():
            message = replace(message, kind="failed", reason="stopped by a signal")
        if message.kind == "failed" and self._board:
            tags = self._tags(job.number, job.params, job.key)
            self._board.record_failure(message.run_id, job.name, tags, message.reason)
        self.rows.append(as_row(job, message))
        if message.kind != "stopped":
            self._outcomes[job.key] = message
        for twin in self._awaited.pop(job.key, [job]):
            self._end(twin, message)
        self._progress.left(self.num_left)
        self._progress.ended(job, message, self._log(job))

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
