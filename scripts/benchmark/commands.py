"""Whole commands: processes started in turns, their seconds and their peak memory."""

import os
import random
import re
import shutil
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from benchmark.crowd import crowd
from benchmark.interval import of_mean, of_ratio
from benchmark.machine import Setting
from benchmark.table import Claim, Section

ROOT = Path(__file__).resolve().parents[2]
HAND_SCRIPT = Path(__file__).with_name("hand_script.py")
IMPORTS = "import torch, pytorch_lightning, mlflow"
MISSPELT = ["model=mlp", "optimzer.lr=0.1"]
ACCURACY = 0.98
BYTES = 1 if sys.platform == "darwin" else 1024  # ru_maxrss counts in these

HAND = "script by hand, five epochs"
ALONE = "imports alone"
OURS = "train.py model=mlp trainer.max_epochs=5"
CROWDED = "the same in a full store"
TYPO = "train.py with a misspelt override"
FAST = "train.py experiment=mnist_fast"


@dataclass(frozen=True)
class Ended:
    """What a process took."""

    seconds: float
    peak_mb: float
    output: str


class Commands:
    """The commands, each in a state made anew.

    Args:
        root: Folder of MNIST/raw.
        folder: For stores and outputs; the working directory.
    """

    def __init__(self, root: Path, folder: Path):
        self.root = root
        self.folder = folder
        self.environment = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith("MLFLOW_") and key != "MNIST_ROOT"
        }
        self.full = folder / "full"
        self.empty = folder / "empty"
        self.number = 0

    def prepare(self, crowd_size: int) -> None:
        """Make an empty store and a full one; whatever is slow the first time, is so here."""
        self.make_empty()
        shutil.copytree(self.empty, self.full)
        self.train(self.full, "model=mlp", "trainer.max_epochs=5")
        crowd(self.full, crowd_size)
        self.run([str(HAND_SCRIPT), str(self.root)])

    def make_empty(self) -> None:
        """Make the empty store, of which each new one is a copy."""
        made = "from tracklight.tracking.store import connect; from pathlib import Path;"
        self.run(["-c", f"{made} connect(None, Path({str(self.empty)!r}))"])

    def ours(self) -> Ended:
        """Run the main command in a store just made."""
        return self.train(self.new_store(), "model=mlp", "trainer.max_epochs=5")

    def crowded(self) -> Ended:
        """Run it in the full store."""
        return self.train(self.full, "model=mlp", "trainer.max_epochs=5")

    def fast(self) -> Ended:
        """Run the fast preset, each time with another seed."""
        self.number += 1
        return self.train(self.new_store(), "experiment=mnist_fast", f"seed={self.number}")

    def by_hand(self) -> Ended:
        """Run the script that uses no framework."""
        return self.run([str(HAND_SCRIPT), str(self.root)])

    def alone(self) -> Ended:
        """Import what the script by hand imports."""
        return self.run(["-c", IMPORTS])

    def misspelt(self) -> Ended:
        """Mistype a key."""
        return self.run([str(ROOT / "train.py"), *MISSPELT], exit_code=2)

    def train(self, store: Path, *words: str) -> Ended:
        """Run train.py on the CPU, tracked in `store`."""
        return self.run(self.training(store, *words))

    def training(self, store: Path, *words: str) -> list[str]:
        """Return what Python runs to train on the CPU, tracked in `store`."""
        words = (*words, f"data.root={self.root}", "data.fallback=false", f"tracking.dir={store}")
        return [str(ROOT / "train.py"), *words, "trainer.accelerator=cpu"]

    def run(self, arguments: Sequence[str], exit_code: int = 0) -> Ended:
        """Run Python; its peak memory is right as long as this process has less of it."""
        assert "torch" not in sys.modules
        output = self.folder / "output"
        with output.open("w") as file:
            started = time.perf_counter()
            process = subprocess.Popen(
                [sys.executable, *arguments], cwd=self.folder, env=self.environment,
                stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            )  # fmt: skip
            _, status, usage = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        text = output.read_text()
        if process.returncode != exit_code:
            raise SystemExit(f"exit code {process.returncode}: python {arguments}\n{text[-2000:]}")
        return Ended(seconds, usage.ru_maxrss * BYTES / 1e6, text)

    def new_store(self) -> Path:
        """Return a store as at the first command after it was made."""
        store = self.folder / "store"
        shutil.rmtree(store, ignore_errors=True)
        shutil.copytree(self.empty, store)
        return store


def measure(root: Path, folder: Path, arguments: Namespace, setting: Setting) -> Section:
    """Run all commands `arguments.repeats` times, in an order drawn anew each time."""
    commands = Commands(root, folder)
    print(f"making a store of {arguments.crowd} runs", flush=True)
    commands.prepare(arguments.crowd)
    makers: dict[str, Callable[[], Ended]] = {
        HAND: commands.by_hand,
        ALONE: commands.alone,
        OURS: commands.ours,
        CROWDED: commands.crowded,
        TYPO: commands.misspelt,
        FAST: commands.fast,
    }
    ended: dict[str, list[Ended]] = {name: [] for name in makers}
    draw = random.Random(0)
    for turn in range(arguments.repeats):
        for name in draw.sample(list(makers), len(makers)):
            one = makers[name]()
            ended[name].append(one)
            shown = f"{one.seconds:.2f} s, {one.peak_mb:.0f} MB"
            print(f"{turn + 1}/{arguments.repeats}  {name}: {shown}", flush=True)
    return _section(ended, arguments, setting)


def _section(ended: dict[str, list[Ended]], arguments: Namespace, setting: Setting) -> Section:
    seconds = {name: [one.seconds for one in each] for name, each in ended.items()}
    pairs = zip(ended[OURS], ended[ALONE], strict=True)
    more_mb = [ours.peak_mb - alone.peak_mb for ours, alone in pairs]
    training = [_found(r"(\d+\.\d+) s of training", one.output) for one in ended[FAST]]
    accuracy = [_found(r"test/accuracy (\d\.\d+)", one.output) for one in ended[FAST]]
    mean_accuracy, worst = fmean(accuracy), min(accuracy)
    claims = [
        Claim(f"{OURS} / {HAND}", of_ratio(seconds[OURS], seconds[HAND]), 1.3, "1.30"),
        Claim(f"{TYPO}: s", of_mean(seconds[TYPO]), 1.0, "1 s"),
        Claim(f"{CROWDED} / {OURS}", of_ratio(seconds[CROWDED], seconds[OURS]), 1.1, "1.10"),
        Claim(
            f"{FAST}: s of training (test accuracy {mean_accuracy:.2%} on average, {worst:.2%} or"
            f" more, {ACCURACY:.0%} with {sum(a >= ACCURACY for a in accuracy)} of"
            f" {len(accuracy)} seeds)",
            of_mean(training), 3.0, f"3 s, {ACCURACY:.0%}", mean_accuracy >= ACCURACY,
        ),
        Claim(f"peak memory: {OURS} - {ALONE}: MB", of_mean(more_mb), 250.0, "+250 MB"),
    ]  # fmt: skip
    notes = [
        *setting.lines(),
        f"{arguments.repeats} runs of each command, in random order, after one"
        f" that is not counted. The full store has {arguments.crowd:,} runs, each with its params"
        " and tags and every 100th of its metric points, the others none.",
        "`train.py` trains on 55,000 images, tracks every step, validates and checkpoints each"
        " epoch, tests, draws and logs the model; the script by hand only trains, on as many images.",
    ]
    times = [(name, of_mean(each)) for name, each in seconds.items()]
    return Section("Whole commands", notes, claims, times, "s")


def _found(pattern: str, output: str) -> float:
    match = re.search(pattern, output)
    if match is None:
        raise SystemExit(f"no {pattern!r} in the output:\n{output[-2000:]}")
    return float(match[1])
