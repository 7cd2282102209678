"""Measure what sweeps promise: speed, saving by pruning, full slots, kills survived."""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tracklight.cli import quiet

ROOT = Path(__file__).resolve().parents[1]
QUIET = ("trainer.enable_progress_bar=false", "trainer.accelerator=cpu")
PARENT = "mlflow.parentRunId"
SEEDS = range(5)
SMALL = ("model=mlp", "data.download=false", "data.root=nowhere", "num_threads=1", *QUIET)
KILLED = (
    *SMALL,
    *("optimizer.lr=tag(log,interval(1e-4,1e0))", "model.hidden=[32],[64]", "sweep.trials=12"),
    *("trainer.max_epochs=4", "sweep.pruner=median", "seed=3"),
)


def main() -> None:
    """Measure the parts asked for; print one JSON line each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="+", choices=sorted(PARTS))
    parser.add_argument("--root", default=os.environ.get("MNIST_ROOT", str(ROOT / "data")))
    parser.add_argument("--commands", type=int, default=20, help="separate commands to time")
    parser.add_argument("--kills", type=int, default=8)
    arguments = parser.parse_args()
    quiet()
    for part in arguments.parts:
        with tempfile.TemporaryDirectory(prefix="tracklight-sweep-") as name:
            print(json.dumps({part: PARTS[part](Path(name), arguments)}), flush=True)


def train(folder: Path, *words: str) -> float:
    """Run a command; return its seconds."""
    began = time.perf_counter()
    command = [sys.executable, str(ROOT / "train.py"), *words, f"tracking.dir={folder}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def runs(folder: Path) -> list[Any]:
    """Return all runs, oldest first."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    experiments = [each.experiment_id for each in client.search_experiments()]
    order = ["attributes.start_time ASC"]
    return list(client.search_runs(experiments, order_by=order, max_results=5000))


def children(folder: Path) -> list[Any]:
    """Return the trials."""
    return [run for run in runs(folder) if PARENT in run.data.tags]


def speed(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """20 MLP trials of 3 epochs on full MNIST against separate commands; is the best the same?"""
    random.seed(0)
    rates = [f"{10 ** random.uniform(-2.5, 0):.6f}" for _ in range(20)]
    shared = ("model=mlp", f"data.root={arguments.root}", "trainer.max_epochs=3", *QUIET)
    half = arguments.commands // 2
    alone = [train(folder / "alone", *shared, f"optimizer.lr={rate}") for rate in rates[:half]]
    sweep_s = train(
        folder / "sweep", "-m", *shared, f"optimizer.lr={','.join(rates)}", "sweep.workers=2"
    )
    rest = rates[half : arguments.commands]
    alone += [train(folder / "alone", *shared, f"optimizer.lr={rate}") for rate in rest]
    best = max(children(folder / "sweep"), key=lambda run: run.data.metrics["score"])
    threads, rate = best.data.params["num_threads"], best.data.tags["optimizer.lr"]
    train(folder / "same", *shared, f"optimizer.lr={rate}", f"num_threads={threads}")
    (same,) = runs(folder / "same")
    return {
        "sweep_s": sweep_s,
        "command_s": statistics.fmean(alone),
        "commands_of_20": len(alone),
        "ratio": sweep_s / (20 * statistics.fmean(alone)),
        "same_bits": _weights(folder / "sweep", best) == _weights(folder / "same", same),
        "same_test": best.data.metrics["test/accuracy"] == same.data.metrics["test/accuracy"],
    }


def _weights(folder: Path, run: Any) -> list[bytes]:
    import torch

    path = folder / "artifacts" / run.info.run_id / "artifacts" / "checkpoints" / "best.ckpt"
    state = torch.load(path, weights_only=True)["state_dict"]
    return [value.numpy().tobytes() for value in state.values()]


def pruning(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """40 random trials of 10 epochs, half the learning rates useless: epochs saved, same best?"""
    found = []
    for seed in SEEDS:
        search = (
            *("-m", *SMALL, "optimizer.lr=tag(log,interval(1e-6,1))", "sweep.trials=40"),
            *("sweep.sampler=random", "trainer.max_epochs=10", f"seed={seed}", "sweep.workers=2"),
        )
        best = {}
        for pruner in ("median", "none"):
            place = folder / f"{seed}-{pruner}"
            train(place, *search, f"sweep.pruner={pruner}")
            trials = children(place)
            epochs = sum(int(run.data.tags["tracklight.epochs_run"]) for run in trials)
            complete = [r for r in trials if r.data.tags["tracklight.outcome"] == "complete"]
            winner = max(complete, key=lambda run: run.data.metrics["score"])
            best[pruner] = (winner.data.tags["optimizer.lr"], epochs, len(trials))
        saved = 1 - best["median"][1] / best["none"][1]
        found.append({"seed": seed, "saved": saved, "same": best["median"][0] == best["none"][0]})
        print(found[-1], best, file=sys.stderr, flush=True)
    return {
        "median_saved": statistics.median(each["saved"] for each in found),
        "same_best": [each["same"] for each in found],
        "each": found,
    }


def slots(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """12 trials of very different length on 2 workers: how idle is a slot while one waits?"""
    epochs = [5, 120, 10, 80, 5, 60, 40, 5, 20, 100, 10, 30]
    log = folder / "slots.txt"
    script = _RECORDER.format(log=str(log))
    words = (
        *("-m", *SMALL, f"trainer.max_epochs={','.join(map(str, epochs))}", "sweep.workers=2"),
        *("optimizer.lr=0.01", f"tracking.dir={folder}"),
    )
    # a point's length varies, its identity otherwise not: seeds would do as well
    subprocess.run(
        [sys.executable, "-c", script, *words], check=True, stdout=subprocess.DEVNULL, cwd=ROOT
    )
    return idle(log.read_text().splitlines(), 2, 12)


_RECORDER = """
import sys, time
sys.argv[0] = "train.py"
from tracklight.sweep import pool
from tracklight.sweep.trial import Outcome
log = open({log!r}, "a", buffering=1)
start, messages = pool.Pool.start, pool.Pool.messages
def started(self, assignment, tag):
    start(self, assignment, tag)
    if not assignment.rehearse and not assignment.test:
        print("start", time.time(), file=log)
def told(self, timeout_s):
    for tag, message in messages(self, timeout_s):
        if isinstance(message, Outcome) and hasattr(tag, "params"):
            print("end", time.time(), file=log)
        yield tag, message
pool.Pool.start, pool.Pool.messages = started, told
from tracklight.cli import main
main(lambda cfg: None)
"""


def idle(lines: Sequence[str], num_slots: int, total: int) -> dict[str, Any]:
    """Return the share of slot time that was idle while a trial still waited."""
    events = [(float(at), kind) for kind, at in (line.split() for line in lines)]
    events = events[next(i for i, (_, kind) in enumerate(events) if kind == "start") :]
    busy = started = 0
    idle_s = waiting_s = 0.0
    for (at, kind), (until, _) in zip(events, events[1:], strict=False):
        busy += 1 if kind == "start" else -1
        started += kind == "start"
        if started < total:
            idle_s += (num_slots - busy) * (until - at)
            waiting_s += num_slots * (until - at)
    return {"idle": idle_s / waiting_s, "waiting_s": waiting_s / num_slots}


def kills(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """SIGKILL a serial search at random moments, start it again; is all as undisturbed?"""
    whole_s = train(folder / "whole", "-m", *KILLED)
    generator = random.Random(1)
    command = [sys.executable, str(ROOT / "train.py"), "-m", *KILLED]
    command.append(f"tracking.dir={folder / 'killed'}")
    struck = 0
    while True:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
        try:
            patience_s = (
                generator.uniform(0.25, 0.6) * whole_s if struck < arguments.kills else None
            )
            code = process.wait(patience_s)
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            struck += 1
    first, second = children(folder / "whole"), children(folder / "killed")
    return {
        "kills": struck,
        "exit": code,
        "trials": len(second),
        "runs_of_a_point": max(_counts(run.data.tags["tracklight.point"] for run in second)),
        "statuses": sorted({run.info.status for run in runs(folder / "killed")}),
        "same_trials": _told(first) == _told(second),
        "parents": sum("tracklight.sweep" in run.data.tags for run in runs(folder / "killed")),
    }


def _counts(values: Any) -> list[int]:
    found = list(values)
    return [found.count(value) for value in found]


def _told(trials: Sequence[Any]) -> list[Any]:
    return sorted(
        (
            int(run.data.tags["tracklight.trial"]),
            run.data.tags["optimizer.lr"],
            run.data.tags["tracklight.outcome"],
            run.data.metrics["score"],
        )
        for run in trials
    )


PARTS: dict[str, Callable[[Path, argparse.Namespace], dict[str, Any]]] = {
    part.__name__: part for part in (speed, pruning, slots, kills)
}

if __name__ == "__main__":
    main()
