"""One trial, as the process sees it that runs it: nothing heavy is imported with this file."""

import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from multiprocessing import parent_process
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

PACKAGE = Path(__file__).resolve().parents[1]

REHEARSAL = {  # one batch of an epoch; the length of a schedule stays
    "tracking": {"enabled": False},
    "init_from": None,  # no store, no weights; the sweep itself looks that run up
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
    """What a trial's process is told.

    Args:
        cfg: The resolved config as plain values.
        words: The command line of this one run; further processes of a distributed trial use it.
        tags: Of its run.
        run_id: Run to continue; None for a new one.
        asks: Whether the parent decides after each epoch if the trial goes on.
        test: Whether to evaluate on the test part.
        rehearse: Take one batch, untracked, to see which metrics are logged.
        log: File for what the trial prints; None for nowhere.
        slot: Which of the sweep's slots it fills, hence which GPU.
        gpus: How many GPUs the slots share.
    """

    cfg: dict[str, Any]
    words: tuple[str, ...] = ()
    tags: Mapping[str, str] = field(default_factory=dict)
    run_id: str | None = None
    asks: bool = False
    test: bool = False
    rehearse: bool = False
    log: Path | None = None
    slot: int = 0
    gpus: int = 0


@dataclass(frozen=True)
class EpochReport:
    """Told by a trial after each epoch: its number, counted from 1, and `score.metric`."""

    number: int
    value: float


@dataclass(frozen=True)
class TrialResult:
    """How a trial ended.

    Args:
        kind: `stopped` may be continued; the others are for good.
        score: Best value of `score.metric`.
        reason: Why it failed, one line.
        run_id: Its run, if it came to have one.
        is_input: Whether it failed by what the user asked for.
        epochs: How many it has behind it.
        seconds: How long it trained, all its starts together.
        metrics: What a preflight found to be logged.
        data: Digest of the data set that a preflight read, if it has one.
        warnings: Ours, of a preflight: what trials print goes to their logs.
    """

    kind: Literal["complete", "pruned", "failed", "stopped"]
    score: float | None = None
    reason: str = ""
    run_id: str | None = None
    is_input: bool = False
    epochs: int = 0
    seconds: float = 0.0
    metrics: tuple[str, ...] = ()
    data: str | None = None
    warnings: tuple[str, ...] = ()


def work(assignment: TrialSpec, line: Connection) -> None:
    """Run a trial in a process of its own, and tell the parent of it over the line."""
    os.setsid()  # Ctrl-C in the terminal is the parent's to handle
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _redirect(assignment.log)
    if assignment.gpus:
        _take_gpu(assignment.slot, assignment.gpus)
    sys.argv[1:] = assignment.words
    outcome = run(assignment, line)
    line.send(outcome)
    sys.stdout.flush()
    sys.stderr.flush()
    if query := sys.modules.get("tracklight.runs.select"):
        query.discard()
    os._exit(0)  # the run is closed; tearing the interpreter down would keep the slot for longer


def run(assignment: TrialSpec, line: Connection | None = None) -> TrialResult:
    """Run a trial in this process.

    Args:
        assignment: What to run.
        line: To the parent; None where no parent listens.
    """
    from omegaconf import OmegaConf

    from tracklight.engine.signals import Stopped
    from tracklight.errors import BadInput, RunFailed
    from tracklight.experiment import train as experiment
    from tracklight.sweep.pruning import PruningCallback

    cfg = OmegaConf.create(assignment.cfg)
    if assignment.rehearse:
        cfg.merge_with(REHEARSAL)
    OmegaConf.set_struct(cfg, True)
    reporter = PruningCallback(
        cfg.score.metric, _teller(line), assignment.asks, assignment.rehearse
    )
    warned: list[str] = []
    try:
        with _overheard(warned) if assignment.rehearse else nullcontext():
            score = experiment.run(
                cfg,
                tags=assignment.tags,
                callbacks=[reporter],
                test=assignment.test,
                into=assignment.run_id,
            )
    except Stopped:
        outcome = TrialResult("stopped")
    except (BadInput, RunFailed) as error:
        outcome = TrialResult("failed", reason=_line(error), is_input=isinstance(error, BadInput))
    except Exception as error:
        traceback.print_exc()
        outcome = TrialResult("failed", reason=f"{type(error).__name__}: {_line(error)}")
    else:
        kind = "pruned" if reporter.pruned else "complete"
        outcome = TrialResult(kind, score, metrics=tuple(sorted(reporter.metrics)))
        if score is None and not assignment.rehearse:
            outcome = TrialResult("failed", reason=f"{cfg.score.metric} was never logged")
        elif score is not None and score != score:
            outcome = TrialResult("failed", reason=f"{cfg.score.metric} is nan")
    if outcome.reason:
        print(f"failed: {outcome.reason}", flush=True)
    return replace(
        outcome,
        run_id=reporter.run_id or assignment.run_id,
        epochs=reporter.epochs,
        seconds=reporter.seconds,
        data=reporter.data,
        warnings=tuple(dict.fromkeys(warned)),
    )


@contextmanager
def _overheard(found: list[str]) -> Iterator[None]:
    """Append what our own code warns of."""
    with warnings.catch_warnings(record=True) as caught:
        try:
            yield
        finally:
            ours = [each for each in caught if Path(each.filename).is_relative_to(PACKAGE)]
            found += [str(each.message) for each in ours]


def _teller(line: Connection | None) -> Callable[[EpochReport, bool], bool]:
    """Return what tells the parent of an epoch and, if asked to, brings its answer: to stop?"""

    def tell(epoch: EpochReport, asks: bool) -> bool:
        if line is None:
            return False
        line.send(epoch)
        return bool(line.recv()) if asks else False

    return tell


def _die_with_parent() -> None:
    """End this process and those it started once the parent is gone, however that came to be."""
    parent = parent_process()
    assert parent is not None
    parent.join()  # returns when the kernel closes the parent's end of a pipe
    os.killpg(0, signal.SIGKILL)


def _redirect(log: Path | None) -> None:
    descriptor = os.open(log or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def _take_gpu(slot: int, gpus: int) -> None:
    """Let the trial see one of the GPUs that the sweep may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(index) for index in range(gpus)]
    os.environ["CUDA_VISIBLE_DEVICES"] = names[slot % len(names)].strip()


def _line(error: BaseException) -> str:
    from tracklight.redact import redact

    return redact(" ".join(str(error).split()))[:500]
