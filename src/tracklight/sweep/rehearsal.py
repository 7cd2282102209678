"""The rehearsal of a sweep: one batch of one point, untracked, before anything is recorded."""

import difflib
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from tracklight.errors import BadInput
from tracklight.machine import num_devices
from tracklight.sweep.plan import Plan, assign
from tracklight.sweep.points import Job
from tracklight.sweep.pool import Pool
from tracklight.sweep.trial import Outcome


@contextmanager
def rehearsal(plan: Plan, pool: Pool) -> Iterator[list[Outcome]]:
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
    outcomes: list[Outcome] = []
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


def _start(pool: Pool, job: Job, differs: bool) -> None:
    assignment = assign(job, rehearse=True)
    if differs:
        assignment.cfg["trainer"]["accelerator"] = "cpu"
    pool.start(assignment, job)


def _outcome(pool: Pool) -> Outcome:
    while True:
        for _, message in pool.messages(1.0):
            if isinstance(message, Outcome):
                return message


def _refusal(found: Outcome, metric: str, differs: bool) -> str:
    """Return why a rehearsal refuses its point; nothing if it does not."""
    if found.kind == "failed":
        return found.reason if found.is_input and not differs else ""
    if metric in found.metrics:
        return ""
    near = difflib.get_close_matches(metric, found.metrics, n=1, cutoff=0.0)
    hint = f"; try score.metric={near[0]}" if near else ""
    logged = ", ".join(found.metrics) or "no metrics"
    return f"score.metric={metric} is never logged; logged are {logged}{hint}"
