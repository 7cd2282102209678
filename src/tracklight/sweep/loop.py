"""The course of a sweep: which run is next, what its outcome means, and when it is over."""

import os
import signal
import statistics
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol

from tracklight.errors import BadInput, RunFailed
from tracklight.runs.leaderboard import Row
from tracklight.sweep.executors import Executor
from tracklight.sweep.parent_run import ParentRun
from tracklight.sweep.plan import Composer, Job, assign, params_key, pinned, shown
from tracklight.sweep.progress import Progress
from tracklight.sweep.study import REFUSED, RUNS, OptunaStudy, TrialRequest
from tracklight.sweep.trial import EpochReport, TrialResult
from tracklight.tracking.tags import (
    NEVER_BEGAN_TAG,
    PARENT_TAG,
    POINT_TAG,
    REASON_TAG,
    SCORE,
    TRIAL_TAG,
    is_pruned,
)

if TYPE_CHECKING:
    from tracklight.sweep.study import OptunaStudy, TrialRequest


pass
pass
pass


WAIT_S = 0.25  # how soon a signal is noticed
OUTAGE_S = 300.0  # how long a store that is away is waited for


class Source(Protocol):
    """Where trials come from, each as one job a seed."""

    def next(self) -> "tuple[TrialRequest, list[Job]] | None": ...  # noqa: D102

    @property
    def left(self) -> int: ...  # noqa: D102


class Grid:
    """The points of a grid, composed and checked before any of them runs.

    Args:
        points: The runs of each point, one a seed.
        trials: What Optuna remembers.
    """

    def __init__(self, points: Sequence[list[Job]], trials: "OptunaStudy"):
        self._points = points
        self._trials = trials
        self._next = 0

    def next(self) -> "tuple[TrialRequest, list[Job]] | None":
        """Return the next point's trial and runs."""
        if self._next == len(self._points):
            return None
        jobs = self._points[self._next]
        self._next += 1
        asked = self._trials.take(jobs[0].params)
        return asked, [job.numbered(asked.number) for job in jobs]

    @property
    def left(self) -> int:
        """Runs not handed out yet."""
        return sum(len(jobs) for jobs in self._points[self._next :])


class Search:
    """Points as Optuna draws them.

    Args:
        trials: What Optuna remembers.
        composer: Makes configs of them.
        seeds: Runs of a point.
        threads: Of each run.
    """

    def __init__(self, trials: "OptunaStudy", composer: Composer, seeds: int, threads: int):
        self._trials = trials
        self._composer = composer
        self._seeds = seeds
        self._threads = threads

    def next(self) -> "tuple[TrialRequest, list[Job]] | None":
        """Return the next trial and its runs; refused and without any if no valid config."""
        asked = self._trials.ask()
        if asked is None:
            return None
        try:
            jobs = [
                pinned(self._composer.job(asked.number, asked.params, seed), self._threads)
                for seed in range(self._seeds)
            ]
        except BadInput as error:
            return replace(asked, refused=str(error)), []
        return asked, jobs

    @property
    def left(self) -> int:
        """Runs not handed out yet."""
        return self._trials.waiting * self._seeds


class Interrupts:
    """Notes the first signal, so that trials can be stopped in peace; a second leaves at once.

    Args:
        slots: What runs the trials.
        progress: What is printed.
    """

    def __init__(self, slots: Executor, progress: Progress):
        self._slots = slots
        self._progress = progress
        self.signum: int | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the place of the handlers there are."""
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
            if self._slots.blocks:  # a launcher, which tells nothing before all of its trials ended
                raise KeyboardInterrupt if signum == signal.SIGINT else SystemExit(128 + signum)
            return
        self._progress.close()
        self._slots.kill()
        os._exit(128 + signum)  # the next start says of the parent run that it was killed


@dataclass
class Point:
    """A trial in progress: its runs, and the outcomes so far."""

    asked: TrialRequest
    jobs: list[Job]
    outcomes: dict[str, TrialResult] = field(default_factory=dict)


class SweepLoop:
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
        trials: OptunaStudy,
        slots: Executor,
        board: ParentRun | None,
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
        self._outcomes: dict[str, TrialResult] = {}
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
            if isinstance(message, TrialResult) and message.reason.startswith("killed by"):
                message = TrialResult("stopped", run_id=message.run_id)  # before it could listen
            self._take(job, message)

    def _retry_lost(self) -> None:
        """Keep ended trials of a search; those that failed in passing or lost runs go again."""
        if self._board is None or not self._trials.is_search:
            return
        for trial in self._trials.ended():
            reason = trial.user_attrs.get(REFUSED)
            refused = [TrialResult("failed", reason=reason)] if reason else []
            if outcomes := refused or self._known(trial.user_attrs.get(RUNS, [])):
                self._keep(self._trials.number(trial), self._trials.params(trial), outcomes)
            else:
                self._trials.retry(self._trials.number(trial))

    def _known(self, keys: Sequence[str]) -> list[TrialResult]:
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

    def _refuse(self, asked: TrialRequest) -> None:
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

    def _keep(self, number: int, params: Mapping[str, str], outcomes: list[TrialResult]) -> None:
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

    def _take(self, job: Job, message: EpochReport | TrialResult) -> None:
        if isinstance(message, EpochReport):
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

    def _end(self, job: Job, outcome: TrialResult) -> None:
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


def known(child: Any | None) -> TrialResult | None:
    """Return how a run ended for good; None if there is something to run."""
    from tracklight.experiment.stored import is_unfinished
    from tracklight.tracking.tags import NON_FINITE_TAG

    if child is None or is_unfinished(child, 0):
        return None
    tags, run_id = child.data.tags, child.info.run_id
    if child.info.status == "FAILED":
        reason = tags.get(REASON_TAG, f"not finite at step {tags[NON_FINITE_TAG]}")
        return TrialResult("failed", reason=reason, run_id=run_id)
    kind = "pruned" if is_pruned(tags) else "complete"
    return TrialResult(kind, child.data.metrics.get(SCORE), run_id=run_id)


def as_row(job: Job, outcome: TrialResult) -> Row:
    """Return a run as the leaderboard lists it where nothing is tracked."""
    ended = {"state": outcome.kind, "score": outcome.score, "reason": outcome.reason}
    spent = {"epochs": outcome.epochs, "seconds": outcome.seconds}
    return Row(job.number, job.params, job.cfg.seed, run_id=outcome.run_id or "", **ended, **spent)


def joined(outcomes: Sequence[TrialResult]) -> tuple[str, float | None]:
    """Return the outcome of a point and its mean score."""
    kinds = {outcome.kind for outcome in outcomes}
    kind = next((k for k in ("stopped", "failed", "pruned") if k in kinds), "complete")
    scores = [outcome.score for outcome in outcomes if outcome.score is not None]
    return kind, statistics.fmean(scores) if len(scores) > 1 else next(iter(scores), None)
