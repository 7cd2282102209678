"""The loop of a sweep: which run starts next, what its result means, and when the sweep ends."""

import os
import signal
import statistics
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

from tracklight.config.compose import json_digest
from tracklight.engine.signals import stop_signals
from tracklight.errors import BadInput, RunFailed
from tracklight.runs.leaderboard import TrialRun
from tracklight.sweep import executors, parent_run
from tracklight.sweep.machines import Machines
from tracklight.sweep.plan import Job, Plan, format_params, make_trial_spec, with_num_threads
from tracklight.sweep.progress import Progress
from tracklight.sweep.storage import OUTAGE_S
from tracklight.sweep.study import INVALID_ATTR, RUN_KEYS_ATTR, OptunaStudy, TrialRequest
from tracklight.sweep.trial import EpochReport, TrialResult, final_result
from tracklight.tracking import tags

WAIT_S = 0.25  # the delay until a signal is noticed
MACHINES_S = 1.0  # from one look at what other machines do to the next


@dataclass
class SweepLoop:
    """Keeps the executor busy until there is nothing left to run.

    With a pruner, the first seed of a trial runs alone: it decides whether the trial is pruned, and
    the other seeds start once it is complete.
    """

    plan: Plan
    study: OptunaStudy
    executor: executors.Executor
    parent: parent_run.ParentRun | None  # None if the sweep is not tracked
    progress: Progress
    machines: Machines | None = None  # this one among those that run the sweep, if there may be others
    signum: int | None = None  # of the signal that ended the sweep
    halted: bool = False  # whether a failure ended the sweep
    failures: dict[int, str] = field(default_factory=dict)  # reason by trial number
    trial_runs: list[TrialRun] = field(default_factory=list)  # of this command
    _children: dict[str, Any] = field(default_factory=dict)  # earlier runs by job key
    _results: dict[str, TrialResult] = field(default_factory=dict)  # of this command, by job key
    _queue: deque[Job] = field(default_factory=deque)
    _trials: dict[int, list[Job]] = field(default_factory=dict)  # by number
    _ended: dict[int, dict[str, TrialResult]] = field(default_factory=dict)  # by number and job key
    _in_progress: dict[str, list[Job]] = field(default_factory=dict)  # jobs that share a run
    _started: dict[str, int] = field(default_factory=dict)  # trial number by job key
    _elsewhere: list[list[Job]] = field(default_factory=list)  # configs of a grid that other machines run
    _counted: set[int] = field(default_factory=set)  # numbers of finished trials that the progress has
    _reviewed_as_leader: bool | None = None  # whether this machine led when nothing was left, and it looked

    def __post_init__(self) -> None:
        self._storage = self.plan.settings["storage"] if self.executor.blocks else None
        self._prunes = self.plan.prunes and (not self.executor.blocks or self._storage is not None)
        self._stops_on_failure = self.plan.settings["on_failure"] == "stop"
        self._grid = deque(() if self.plan.is_search else self.plan.configs)

    def run(self) -> None:
        """Run all trials; the first signal stops them so that the sweep can be continued."""
        handlers = {signum: signal.signal(signum, self._handle_signal) for signum in stop_signals()}
        try:
            self._read_children()
            earlier = [final_result(child) for child in self._children.values()]
            self.progress.resumed([*filter(None, earlier)] if self.machines else earlier)
            self._review_finished_trials()
            while not self._is_over:
                is_exhausted = self._start_runs()
                if self.parent:
                    self.parent.refresh(logs=self._leads)  # slow, so only once no worker is idle
                if self.executor.running:
                    for job, message in self.executor.messages(WAIT_S):
                        self._handle(job, message)
                elif is_exhausted:
                    if not self._waits_for_machines():
                        break
                else:  # only an unreachable store leaves all workers idle
                    self._wait_for_store()
            if self.machines and self.signum is None:
                self.machines.read_failure()  # of the last trial elsewhere
            if self.machines and self.machines.failure:
                self.halted = True
                self._note_failure(*self.machines.failure)
            self._stop_runs()
        finally:
            self.executor.kill()
            for signum, handler in handlers.items():
                signal.signal(signum, handler)

    @property
    def num_remaining(self) -> int:
        """How many runs have not started."""
        num_trials = self.study.num_remaining if self.plan.is_search else len(self._grid)
        return len(self._queue) + num_trials * self.plan.num_runs

    @property
    def _is_over(self) -> bool:
        machines = self.machines
        is_told = machines is not None and (machines.is_lost or machines.failure is not None)
        return self.signum is not None or self.halted or is_told

    def _handle_signal(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None:  # the second signal
            self.progress.close()
            self.executor.kill()
            os._exit(128 + signum)  # the next start marks the parent run as killed
        self.signum = signum
        is_waiting = self.study.is_waiting or (self.machines is not None and self.machines.is_waiting)
        if self.executor.blocks or is_waiting:  # nothing would notice `signum` for long
            raise KeyboardInterrupt if signum == signal.SIGINT else SystemExit(128 + signum)

    def _waits_for_machines(self) -> bool:
        """Return whether another machine runs trials or has yet to end the sweep, after a moment."""
        if self.machines is None:
            return False
        self._grid.extend(self._elsewhere)
        self._elsewhere.clear()
        leads = self.machines.leads
        if self._grid or self.study.runs_elsewhere:
            self._reviewed_as_leader = None
        elif self._reviewed_as_leader != leads:  # slow
            self._reviewed_as_leader = leads
            self._read_children()
            self._review_finished_trials()
        is_left = bool(self._grid) or self.study.runs_elsewhere
        if self.machines.is_over:  # perhaps only for a machine whose sweep is smaller
            has_more = is_left or len(self.study.finished_trials()) > self.machines.num_ranked
            self.machines.is_over = not has_more
        is_waiting = is_left or not (leads or self.machines.is_over)  # a leader that is killed ends nothing
        if is_waiting:
            time.sleep(MACHINES_S)
        return is_waiting

    def _read_children(self) -> None:
        if self.parent:
            self._children = self.parent.children_by_key()

    @property
    def _leads(self) -> bool:
        return self.machines is None or self.machines.leads

    def _wait_for_store(self) -> None:
        if self.parent and self.parent.outage_s > OUTAGE_S:
            problem = f"the tracking store has not answered for {OUTAGE_S:.0f} s"
            raise RunFailed(f"{problem}; the same command continues the sweep")
        time.sleep(WAIT_S)

    def _stop_runs(self) -> None:
        if not self.executor.running:
            return
        hint = "; again to leave at once" if self.signum is not None else ""
        self.progress.note(f"stopping {len(self.executor.running)} running{hint}")
        for job, message in self.executor.stop():
            if isinstance(message, TrialResult) and message.reason.startswith("killed by"):
                message = TrialResult("stopped", run_id=message.run_id)  # before it set its handler
            self._handle(job, message)

    def _review_finished_trials(self) -> None:
        """Count the finished trials of a search of earlier commands, or of other machines.

        Those that have runs to repeat are enqueued again.
        """
        if self.parent is None or not self.plan.is_search:
            return
        for trial in self.study.finished_trials():
            number = self.study.trial_number(trial)
            if number in self._trials or number in self._counted:
                continue
            error = trial.user_attrs.get(INVALID_ATTR)
            invalid = [TrialResult("failed", reason=error)] if error else []
            if results := invalid or self._final_results(trial.user_attrs.get(RUN_KEYS_ATTR, [])):
                self._counted.add(number)
                self._count_finished(number, self.study.trial_params(trial), results)
            elif self._leads:
                self.study.enqueue_retry(number)

    def _final_results(self, keys: Sequence[str]) -> list[TrialResult]:
        """Return the results of a trial's earlier runs; none if a run is left to do."""
        found = [final_result(self._children.get(key)) for key in keys]
        results = [result for result in found if result]
        if self._prunes and found and found[0] and found[0].kind != "complete":
            return results  # the other seeds never start
        return results if len(results) == len(keys) else []

    def _start_runs(self) -> bool:
        """Start runs while the executor has room; return whether none are left to start."""
        is_exhausted = False
        while self.executor.has_room and not (is_exhausted or self._is_over):
            if self.parent and self.parent.outage_s:  # a new run would fail
                break
            job = self._next_job()
            is_exhausted = job is None
            if job is not None:
                self._start(job)
        self.progress.update(self.num_remaining)
        return is_exhausted

    def _next_job(self) -> Job | None:
        while not self._queue:
            following = None if self._is_over else self._request_trial()
            if following is None:
                return None
            request, jobs = following
            if not jobs:
                continue
            keys = [job.key for job in jobs]
            if self.machines and (request.has_ended or request.is_retry) and not self._final_results(keys):
                self._read_children()
            if request.has_ended:
                if results := self._final_results(keys):
                    self._count_finished(request.number, request.params, results)
                    continue
                retry = self.study.ask_retry(request.number) if self._leads else None
                if retry is None:
                    self._elsewhere.append(jobs)
                    continue
                request = retry
            if self.plan.is_search:
                self.study.set_run_keys(request.number, keys)
            self._trials[request.number], self._ended[request.number] = jobs, {}
            self._queue.extend(jobs[:1] if self._prunes else jobs)
        return self._queue.popleft()

    def _request_trial(self) -> tuple[TrialRequest, list[Job]] | None:
        """Return the next trial and its jobs; none if its config is invalid, which is recorded."""
        while self._grid:
            jobs = [with_num_threads(job, self.plan.num_threads) for job in self._grid.popleft()]
            if request := self.study.ask_config(jobs[0].params):
                return request, [replace(job, number=request.number) for job in jobs]
            self._elsewhere.append(jobs)
        request = self.study.ask() if self.plan.is_search else None
        if request is None:
            return None
        try:
            return request, self.plan.compose_jobs(request.number, request.params, self.plan.num_runs)
        except BadInput as error:
            self._fail_invalid(request.number, request.params, str(error))
            return request, []

    def _fail_invalid(self, number: int, params: dict[str, str], reason: str) -> None:
        """Record a trial whose config is invalid as failed."""
        self._note_failure(number, reason)
        if self.parent:
            run_tags = self._tags(number, params, json_digest(params))
            self.parent.record_failure(None, f"{number} {format_params(params)}", run_tags, reason)
        self.study.fail_invalid(number, reason)
        self.progress.update(self.num_remaining)
        self.progress.invalid(number, reason)
        self.trial_runs.append(TrialRun(number, params, 0, "failed", None, reason=reason))

    def _note_failure(self, number: int, reason: str) -> None:
        self.failures[number] = reason
        if self._stops_on_failure and not self.halted:
            self.halted = True
            if self.machines:
                self.machines.halt(number, reason)

    def _count_finished(self, number: int, params: Mapping[str, str], results: list[TrialResult]) -> None:
        for result in results:
            self.progress.finished_earlier(result)
            if result.kind == "failed":
                self.failures[number] = result.reason
        self.progress.combined(number, params, *combine(results))

    def _start(self, job: Job) -> None:
        """Start a job's run, unless an equal run has ended or is in progress."""
        if job.key in self._started:
            self.progress.note(f"trial {job.name}  same as trial {self._started[job.key]}")
        child = self._children.get(job.key)
        result = self._results.get(job.key) or final_result(child)
        if result is not None:
            self.progress.finished_earlier(result)
            self._end(job, result)
            return
        sharing = self._in_progress.setdefault(job.key, [])
        sharing.append(job)
        if len(sharing) > 1:
            return
        if self.parent and child is not None:
            is_elsewhere = self.machines and not self.parent.store.folder(child.info.run_id).is_dir()
            if is_elsewhere or tags.NEVER_BEGAN_TAG in child.data.tags:  # a dead machine has its checkpoints
                self.parent.delete_child(child.info.run_id)
                child = None
        run_id = None if child is None else child.info.run_id
        facts = {"tags": self._tags(job.number, job.params, job.key), "log": self._log(job)}
        if (decides := self._decides(job)) and self._storage:
            facts["shared"] = self.study.share(job.number, self._storage)
        awaits = decides and not self._storage
        spec = make_trial_spec(job, run_id=run_id, awaits_decision=awaits, **facts)
        if run_id is not None:
            self.progress.note(f"trial {job.name}  goes on in run {run_id}")
        if self.machines:
            self.machines.is_over = False
        self.progress.started(job)
        self._started[job.key] = job.number
        self.executor.start(spec, job)

    def _decides(self, job: Job) -> bool:
        """Return whether this run decides if its trial is pruned."""
        return self._prunes and job.key == self._trials[job.number][0].key

    def _log(self, job: Job) -> Path | None:
        return self.parent.folder / "logs" / f"{job.number:04d}.log" if self.parent else None

    def _tags(self, number: int, params: Mapping[str, str], key: str) -> dict[str, str]:
        if self.parent is None:
            return {}
        own = {tags.POINT_TAG: key, tags.TRIAL_TAG: str(number), tags.PARENT_TAG: self.parent.run_id}
        return {**params, **own}

    def _handle(self, job: Job, message: EpochReport | TrialResult) -> None:
        if isinstance(message, EpochReport):
            if self._decides(job):
                self.executor.answer(job, self.study.report(job.number, message.epoch, message.value))
            self.progress.epoch_ended(job, message.epoch)
            return
        if message.kind == "stopped" and not self._is_over:
            message = replace(message, kind="failed", reason="stopped by a signal")
        if message.kind == "failed" and self.parent:
            run_tags = self._tags(job.number, job.params, job.key)
            self.parent.record_failure(message.run_id, job.name, run_tags, message.reason)
        ended = (job.cfg["seed"], message.kind, message.score, message.epochs, message.seconds)
        self.trial_runs.append(TrialRun(job.number, job.params, *ended, reason=message.reason))
        if message.kind != "stopped":
            self._results[job.key] = message
        for sharing in self._in_progress.pop(job.key, [job]):
            self._end(sharing, message)
        self.progress.update(self.num_remaining)
        self.progress.ended(job, message, self._log(job))

    def _end(self, job: Job, result: TrialResult) -> None:
        """Add a result to its trial; end the trial once all of its runs have ended."""
        results = self._ended[job.number]
        results[job.key] = result
        if result.kind == "failed":
            self._note_failure(job.number, result.reason)
        others = [each for each in self._trials[job.number] if each.key not in results]
        decides = self._decides(job)  # then the others have not started
        if others and decides and result.kind == "complete":
            self._queue.extendleft(reversed(others))
        elif decides or not others:
            kind, score = combine(list(results.values()))
            self.study.tell(job.number, kind, score)
            self.progress.combined(job.number, job.params, kind, score)


def combine(results: Sequence[TrialResult]) -> tuple[str, float | None]:
    """Return the kind and the mean score of a trial, given the results of its runs."""
    kinds = {result.kind for result in results}
    kind = next((k for k in ("stopped", "failed", "pruned") if k in kinds), "complete")
    scores = [result.score for result in results if result.score is not None]
    return kind, statistics.fmean(scores) if scores else None
