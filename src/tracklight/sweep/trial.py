"""One trial in the process that runs it; importing this file imports nothing heavy."""

import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from multiprocessing import parent_process
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from tracklight.errors import BadInput, RunFailed
from tracklight.redact import redact, redact_messages

PACKAGE = Path(__file__).resolve().parents[1]
MAX_REASON_CHARS = 500

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
    epochs: int = 0
    seconds: float = 0.0  # of training, over all starts
    metrics: tuple[str, ...] = ()  # names of the logged metrics
    data: str | None = None  # digest of the data set, of a preflight only
    warnings: tuple[str, ...] = ()  # of tracklight's own code, of a preflight only


def run_in_worker(spec: TrialSpec, connection: Connection) -> None:
    """Run a trial in a process of its own and send its reports and its result to the sweep."""
    os.setsid()  # the sweep's process handles Ctrl-C in the terminal
    _redirect_output(spec.log)
    if spec.gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = spec.gpu
    sys.argv[1 + (sys.argv[1:2] == ["train"]) :] = spec.overrides  # after `tracklight train`
    try:
        redact_messages()
        threading.Thread(target=_die_with_parent, daemon=True).start()
        result = run_trial(spec, connection)
    except Exception as error:  # a broken installation, or no thread to be had
        print(redact(traceback.format_exc()))
        result = TrialResult("failed", reason=describe_error(error))
    connection.send(result)
    sys.stdout.flush()
    sys.stderr.flush()
    from tracklight.runs import select

    select.remove_downloads()
    os._exit(0)  # the run is closed; shutting down the interpreter would only keep the worker busy


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

    def report(epoch: int, value: float) -> bool:
        if connection is None:
            return False
        connection.send(EpochReport(epoch, value))
        return spec.awaits_decision and bool(connection.recv())

    callback = PruningCallback(metric, report, one_epoch=spec.preflight)
    with warnings.catch_warnings(record=spec.preflight) as caught:
        try:
            score = train.run(cfg, tags=spec.tags, callbacks=[callback], test=spec.test, run_id=spec.run_id)
            result = TrialResult("pruned" if callback.pruned else "complete", score)
            if score is None and not spec.preflight:
                result = TrialResult("failed", reason=f"{metric} was never logged")
        except Stopped:
            result = TrialResult("stopped")
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
