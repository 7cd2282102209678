"""One trial in the process that runs it; importing this file imports nothing heavy."""

import math
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing import parent_process
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from tracklight.errors import BadInput, RunFailed
from tracklight.redact import redact, redact_messages

PACKAGE = Path(__file__).resolve().parents[1]
MAX_REASON_CHARS = 500
REPORT_S = 1.0  # from one report of a population that awaits no decision to the next

PREFLIGHT = {  # one batch of one epoch; the length of a schedule stays
    "tracking": {"enabled": False},
    "init_from": None,  # without a store there are no weights; the sweep checks that the run exists
    "trainer": {
        "devices": 1,
        "num_nodes": 1,
        "strategy": "auto",
        "limit_train_batches": 1,
        "limit_val_batches": 1,
        "check_val_every_n_epoch": 1,
        "val_check_interval": None,
        "min_epochs": None,
    },
}


@dataclass(frozen=True)
class TrialSpec:
    """What a process needs to run one trial under one seed."""

    cfg: dict[str, Any]  # resolved, plain values
    overrides: tuple[str, ...] = ()  # the ranks of a distributed trial are started with them
    tags: Mapping[str, str] = field(default_factory=dict)
    run_id: str | None = None  # of a run to continue
    awaits_decision: bool = False  # after each epoch: whether the trial is pruned
    shared: Any = None  # a `SharedTrial` that tells it the same where no process of the sweep does
    test: bool = False
    preflight: bool = False
    log: Path | None = None  # file for the trial's output
    gpu: str | None = None  # its index, or its UUID; None on the CPU


@dataclass(frozen=True)
class EpochReport:
    """The value of `score.metric` after an epoch, counted from 1."""

    epoch: int
    value: float


@dataclass(frozen=True)
class TrialResult:
    """How a trial ended; a `stopped` one can be continued."""

    kind: Literal["complete", "pruned", "failed", "stopped"]
    score: float | None = None
    reason: str = ""  # why it failed, in one line
    run_id: str | None = None  # None if the trial created no run
    is_input: bool = False  # whether it failed because of bad input
    signum: int | None = None  # of the signal that stopped it
    epochs: int = 0
    seconds: float = 0.0  # of training, over all starts
    metrics: tuple[str, ...] = ()  # names of the logged metrics
    data: str | None = None  # digest of the data set, of a preflight only
    warnings: tuple[str, ...] = ()  # of tracklight's own code, of a preflight only


@dataclass(frozen=True)
class NotStacked:
    """A trial that was to be trained together with others cannot be, for a reason in words."""

    reason: str


def run_in_worker(specs: Sequence[TrialSpec], connection: Connection, max_members: int | None) -> None:
    """Run a trial, or several together, in a process of its own that sends their reports and results."""
    os.setsid()  # the sweep's process handles Ctrl-C in the terminal
    _redirect_output(specs[0].log)
    if specs[0].gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = specs[0].gpu
    sys.argv[1 + (sys.argv[1:2] == ["train"]) :] = specs[0].overrides  # after `tracklight train`
    try:
        redact_messages()
        threading.Thread(target=_die_with_parent, daemon=True).start()
        if len(specs) == 1:
            connection.send([(0, run_trial(specs[0], connection))])
        else:
            run_population(specs, connection, max_members)
    except Exception as error:  # a broken installation, or no thread to be had
        print(redact(traceback.format_exc()))
        failed = TrialResult("failed", reason=describe_error(error))
        connection.send([(index, failed) for index in range(len(specs))])  # of those that have not ended
    sys.stdout.flush()
    sys.stderr.flush()
    from tracklight.runs import select

    select.remove_downloads()
    os._exit(0)  # the run is closed; shutting down the interpreter would only keep the worker busy


def run_population(specs: Sequence[TrialSpec], connection: Connection, max_members: int | None) -> None:
    """Train trials together, and send what each of them comes to."""
    os.environ.pop("PYTHONSAFEPATH", None)
    from tracklight.config.compose import to_configs
    from tracklight.engine.signals import Stopped
    from tracklight.experiment import population

    reported_s, going = -math.inf, {*range(len(specs))}

    def end(index: int, **result: Any) -> None:
        going.discard(index)
        connection.send([(index, TrialResult(**result))])

    def report(scores: Mapping[int, float], epoch: int) -> set[int]:
        nonlocal reported_s
        asked = [index for index in scores if specs[index].awaits_decision]
        is_due = epoch == specs[0].cfg["trainer"]["max_epochs"] or time.monotonic() - reported_s >= REPORT_S
        if not asked and not is_due:
            return set()
        reported_s = time.monotonic()
        connection.send([(index, EpochReport(epoch, value)) for index, value in scores.items()])
        return {index for index, prune in (connection.recv() for _ in asked) if prune}

    rest: TrialResult | NotStacked = TrialResult("stopped")
    try:
        of_each = [spec.tags for spec in specs], [spec.run_id for spec in specs]
        population.run(to_configs([spec.cfg for spec in specs]), *of_each, max_members, report, end)
    except population.NotStackable as error:
        rest = NotStacked(str(error))
    except Stopped:
        pass
    connection.send([(index, rest) for index in going])


def run_trial(spec: TrialSpec, connection: Connection | None = None) -> TrialResult:
    """Run a trial in this process; `connection` is to the sweep's, None where a launcher runs it."""
    os.environ.pop("PYTHONSAFEPATH", None)  # further ranks find again what lies beside train.py
    from omegaconf import OmegaConf

    from tracklight.engine.monitors import PruningCallback
    from tracklight.engine.signals import Stopped
    from tracklight.experiment import train

    cfg = OmegaConf.create(spec.cfg)
    if spec.preflight:
        cfg.merge_with(PREFLIGHT)
    OmegaConf.set_struct(cfg, True)
    metric = cfg.score.metric

    reporter = spec.shared.reporter() if spec.shared else None

    def report(epoch: int, value: float) -> bool:
        if connection is None:
            return reporter is not None and reporter(epoch, value)
        connection.send([(0, EpochReport(epoch, value))])
        return spec.awaits_decision and bool(connection.recv()[1])

    callback = PruningCallback(metric, report, one_epoch=spec.preflight)
    with warnings.catch_warnings(record=spec.preflight) as caught:
        try:
            score = train.run(cfg, tags=spec.tags, callbacks=[callback], test=spec.test, run_id=spec.run_id)
            result = TrialResult("pruned" if callback.pruned else "complete", score)
            if score is None and not spec.preflight:
                result = TrialResult("failed", reason=f"{metric} was never logged")
        except Stopped as stop:
            result = TrialResult("stopped", signum=stop.signum)
        except Exception as error:
            if not isinstance(error, BadInput | RunFailed):
                print(redact(traceback.format_exc()))
            is_input = isinstance(error, BadInput)
            result = TrialResult("failed", reason=describe_error(error), is_input=is_input)
    if result.reason:
        print(f"failed: {result.reason}", flush=True)
    ours = [each for each in caught or () if Path(each.filename).is_relative_to(PACKAGE)]
    return replace(
        result,
        run_id=callback.run_id or spec.run_id,
        epochs=callback.epochs,
        seconds=callback.seconds,
        metrics=tuple(sorted(callback.metrics)),
        data=callback.data,
        warnings=tuple(dict.fromkeys(str(each.message) for each in ours)),
    )


def final_result(child: Any | None) -> TrialResult | None:
    """Return how a run ended; None if there is no run or it is to be continued."""
    from tracklight.experiment.stored import is_unfinished
    from tracklight.runs.leaderboard import read_trial_run

    if child is None or is_unfinished(child):
        return None
    run: Any = read_trial_run(child)
    return TrialResult(run.state, run.score, run.reason, run.run_id)


def describe_error(error: BaseException) -> str:
    """Return an error's message in one line without passwords, after its type if not our own."""
    text = redact(" ".join(str(error).split()))[:MAX_REASON_CHARS]
    return text if isinstance(error, BadInput | RunFailed) else f"{type(error).__name__}: {text}"


def _die_with_parent() -> None:
    """Kill this process and its children once the sweep's process has ended, however it ended."""
    parent = parent_process()
    assert parent is not None
    parent.join()  # returns when the kernel closes the parent's end of a pipe
    os.killpg(0, signal.SIGKILL)


def _redirect_output(log: Path | None) -> None:
    descriptor = os.open(log or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
