"""What sweeps promise: speed, epochs saved by pruning, full slots, kills survived."""

import random
import signal
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmark.commands import ROOT, Commands
from benchmark.interval import Interval, of_mean
from benchmark.machine import Setting
from benchmark.table import Claim, Section

PARENT = "mlflow.parentRunId"
QUIET = ("trainer.enable_progress_bar=false", "trainer.accelerator=cpu")
SMALL = ("model=mlp", "data.download=false", "data.root=nowhere", "num_threads=1", *QUIET)
NUM_TRIALS = 20
NUM_COMMANDS = 10  # half of them before the sweep, half after
NUM_KILLS = 5
SEEDS = range(5)
LENGTHS = (5, 120, 10, 80, 6, 60, 40, 7, 20, 100, 12, 30)  # epochs, each a trial of two slots
SLOTS = 2
KILLED = (
    *("-m", *SMALL, "optimizer.lr=tag(log,interval(1e-4,1e0))", "model.hidden=[32],[64]"),
    *("sweep.trials=12", "trainer.max_epochs=4", "sweep.pruner=median", "seed=3"),
)


def measure(root: Path, folder: Path, setting: Setting) -> Section:
    """Measure all of it: half an hour on two quiet cores.

    Args:
        root: Folder of MNIST/raw.
        folder: For stores.
        setting: Where this is.
    """
    sweeps = Sweeps(root, folder)
    # The last one imports torch, whose memory the commands' process must not have.
    claims = [sweeps.pruning(), sweeps.slots(), sweeps.kills(), sweeps.speed()]
    notes = [
        *setting.lines(),
        f"Speed: {NUM_TRIALS} learning rates, 3 epochs of MNIST each, 2 workers, against"
        f" {NUM_COMMANDS} separate commands. The others train on 5,000 images.",
        "Pruning: 40 random trials of 10 epochs by SGD, learning rates from 1e-6 to 1, of which the"
        f" lower half learn nothing; in brackets the lowest and highest of {len(SEEDS)} seeds.",
        f"Executor: {len(LENGTHS)} trials of {min(LENGTHS)} to {max(LENGTHS)} epochs, three times.",
    ]
    return Section("Sweeps", notes, claims[::-1], sweeps.times, "s")


class Sweeps:
    """The sweeps, each in a store of its own."""

    def __init__(self, root: Path, folder: Path):
        self.root = root
        self.folder = folder
        self.commands = Commands(root, folder)
        self.times: list[tuple[str, Interval]] = []

    def train(self, store: Path, *words: str) -> float:
        """Run train.py, tracked in `store`; return its seconds."""
        seconds = self.commands.run([str(ROOT / "train.py"), *words, f"tracking.dir={store}"]).seconds
        print(f"{store.name}: {seconds:.1f} s", flush=True)
        return seconds

    def speed(self) -> Claim:
        """20 MLP trials of 3 epochs on full MNIST against separate commands."""
        draw = random.Random(0)
        rates = [f"{10 ** draw.uniform(-2.5, 0):.6f}" for _ in range(NUM_TRIALS)]
        shared = ("model=mlp", f"data.root={self.root}", "trainer.max_epochs=3", *QUIET)

        def alone(each: Sequence[str]) -> list[float]:
            store = self.folder / "alone"
            return [self.train(store, *shared, f"optimizer.lr={rate}") for rate in each]

        seconds = alone(rates[: NUM_COMMANDS // 2])
        place = self.folder / "sweep"
        lists = (f"optimizer.lr={','.join(rates)}", f"sweep.workers={SLOTS}")
        sweep_s = self.train(place, "-m", *shared, *lists)
        seconds += alone(rates[NUM_COMMANDS // 2 : NUM_COMMANDS])
        best = max(children(place), key=lambda run: run.data.metrics["score"])
        threads, rate = best.data.params["num_threads"], best.data.tags["optimizer.lr"]
        again = self.folder / "same"
        self.train(again, *shared, f"optimizer.lr={rate}", f"num_threads={threads}")
        (same,) = runs(again)
        is_same = _weights(place, best) == _weights(again, same)
        one = of_mean(seconds)
        self.times = [
            (f"a sweep of {NUM_TRIALS} trials", of_mean([sweep_s])),
            ("a separate command", one),
        ]
        return Claim(
            f"a sweep of {NUM_TRIALS} trials / {NUM_TRIALS} separate commands"
            f" (the best has {'the same' if is_same else 'other'} bits run alone)",
            Interval(*(sweep_s / NUM_TRIALS / each for each in (one.estimate, one.high, one.low))),
            *(1 / 4, "1/4", is_same),
        )

    def pruning(self) -> Claim:
        """40 random trials of 10 epochs, half the learning rates useless."""
        shares, same = [], []
        for seed in SEEDS:
            words = (
                *("-m", *SMALL, "optimizer.lr=tag(log,interval(1e-6,1))", "sweep.trials=40"),
                *("sweep.sampler=random", "trainer.max_epochs=10", f"seed={seed}"),
            )
            epochs, winner = {}, {}
            for pruner in ("median", "none"):
                place = self.folder / f"seed-{seed}-{pruner}"
                self.train(place, *words, f"sweep.pruner={pruner}", f"sweep.workers={SLOTS}")
                trials = children(place)
                assert len(trials) == 40, len(trials)
                epochs[pruner] = sum(int(run.data.tags["tracklight.epochs_run"]) for run in trials)
                best = max(
                    (run for run in trials if run.data.tags["tracklight.outcome"] == "complete"),
                    key=lambda run: run.data.metrics["score"],
                )
                winner[pruner] = best.data.tags["optimizer.lr"]
            shares.append(epochs["median"] / epochs["none"])
            same.append(winner["median"] == winner["none"])
        return Claim(
            f"epochs with the median pruner / without (the same best point with {sum(same)} of"
            f" {len(same)} seeds)",
            Interval(statistics.median(shares), min(shares), max(shares)),
            *(0.6, "0.60", all(same)),
        )

    def slots(self) -> Claim:
        """12 trials of very different length on 2 workers: how idle is a slot while one waits?"""
        shares = []
        for turn in range(3):
            log = self.folder / f"slots-{turn}.txt"
            words = (
                *("-m", *SMALL, f"trainer.max_epochs={','.join(map(str, LENGTHS))}"),
                *(f"sweep.workers={SLOTS}", "optimizer.lr=0.01"),
                f"tracking.dir={self.folder / f'slots-{turn}'}",
            )
            self.commands.run(["-c", _RECORDER.format(log=str(log), root=str(ROOT)), *words])
            shares.append(idle(log.read_text().splitlines(), SLOTS, len(LENGTHS)))
            print(f"slots idle: {shares[-1]:.1%}", flush=True)
        return Claim("a slot is idle while a trial waits", of_mean(shares), 0.1, "0.10")

    def kills(self) -> Claim:
        """SIGKILL a serial search at random moments, start it again; is all as undisturbed?"""
        whole, killed = self.folder / "whole", self.folder / "killed"
        whole_s = self.train(whole, *KILLED)
        draw = random.Random(1)
        command = [sys.executable, str(ROOT / "train.py"), *KILLED, f"tracking.dir={killed}"]
        struck = 0
        while struck < NUM_KILLS:
            process = subprocess.Popen(
                command,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=self.commands.environment,
                cwd=self.folder,
            )
            try:
                process.wait(draw.uniform(0.25, 0.6) * whole_s)
                break  # all of it was done before this kill
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                struck += 1
        self.train(killed, *KILLED)
        points = Counter(run.data.tags["tracklight.point"] for run in children(killed))
        differing = {*_told(children(whole))} ^ {*_told(children(killed))}
        parents = sum("tracklight.sweep" in run.data.tags for run in runs(killed))
        wrong = len(differing) + sum(points.values()) - len(points) + parents - 1
        return Claim(
            f"trials lost, doubled or of another outcome after {struck} SIGKILLs of the sweep",
            Interval(wrong, wrong, wrong),
            *(0, "0"),
        )


def runs(store: Path) -> list[Any]:
    """Return all runs of a store, oldest first."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{store / 'mlflow.db'}")
    experiments = [each.experiment_id for each in client.search_experiments()]
    order = ["attributes.start_time ASC"]
    return list(client.search_runs(experiments, order_by=order, max_results=5000))


def children(store: Path) -> list[Any]:
    """Return the trials of a store."""
    return [run for run in runs(store) if PARENT in run.data.tags]


def idle(lines: Sequence[str], num_slots: int, total: int) -> float:
    """Return the share of slot time that was idle while a trial still waited.

    Args:
        lines: `start` or `end` of a trial and when, in s.
        num_slots: How many trials may run at once.
        total: How many there are.
    """
    events = [(float(at), kind) for kind, at in (line.split() for line in lines)]
    assert sum(kind == "start" for _, kind in events) == total, "not the trials asked for"
    events = events[next(i for i, (_, kind) in enumerate(events) if kind == "start") :]
    busy = started = 0
    idle_s = waiting_s = 0.0
    for (at, kind), (until, _) in zip(events, events[1:], strict=False):
        busy += 1 if kind == "start" else -1
        started += kind == "start"
        if started < total:
            idle_s += (num_slots - busy) * (until - at)
            waiting_s += num_slots * (until - at)
    return idle_s / waiting_s


# train.py, but noting when trials start and end.
_RECORDER = """
import sys, time
sys.argv[0] = {root!r} + "/train.py"
sys.path.insert(0, {root!r})
from tracklight.sweep.executors import ProcessExecutor
from tracklight.sweep.trial import TrialResult
log, jobs = open({log!r}, "a", buffering=1), []
start, messages = ProcessExecutor.start, ProcessExecutor.messages
def record_start(self, spec, job):
    start(self, spec, job)
    if not spec.preflight and not spec.test:
        jobs.append(job)
        print("start", time.time(), file=log)
def record_end(self, timeout_s):
    for job, message in messages(self, timeout_s):
        if isinstance(message, TrialResult) and job in jobs:
            jobs.remove(job)
            print("end", time.time(), file=log)
        yield job, message
ProcessExecutor.start, ProcessExecutor.messages = record_start, record_end
from tracklight.cli import main
main(lambda cfg: None)
"""


def _weights(store: Path, run: Any) -> list[bytes]:
    import torch

    path = store / "artifacts" / run.info.run_id / "artifacts" / "checkpoints" / "best.ckpt"
    state = torch.load(path, weights_only=True)["state_dict"]
    return [value.numpy().tobytes() for value in state.values()]


def _told(trials: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Return what a trial is known by: number, point, outcome, score."""
    return [
        (
            run.data.tags["tracklight.trial"],
            run.data.tags["tracklight.point"],
            run.data.tags["tracklight.outcome"],
            run.data.metrics["score"],
        )
        for run in trials
    ]
