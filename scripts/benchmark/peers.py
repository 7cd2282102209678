"""Other frameworks: the same training as scripts of their users, whole processes in turns with ours."""

import os
import random
import re
import shutil
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmark.commands import ROOT, Commands
from benchmark.interval import Interval, of_mean, of_ratio
from benchmark.machine import Setting
from benchmark.table import Claim, Section

SCRIPTS = Path(__file__).with_suffix("")
ENVIRONMENT = ROOT / ".venv-peers"
PINS = (SCRIPTS / "requirements.txt", ROOT / "constraints.txt")
PACKAGES = ("jax", "keras", "transformers", "skorch", "scikit-learn", "torch")
EPOCHS, QUICK_EPOCHS = 5, 2
ACCURACY_GAP = 0.01

OURS = "ours"
UNTRACKED = "ours, untracked"
JAX = "JAX, a scan an epoch"
KERAS = "Keras on JAX"
TRAINER = "Hugging Face Trainer"
SKORCH = "skorch"
SCIKIT = "scikit-learn's MLPClassifier"
LIGHTNING = "Lightning with a DataLoader"
PEERS = {
    JAX: "jax_scan.py",
    KERAS: "keras_on_jax.py",
    SCIKIT: "scikit_learn.py",
    SKORCH: "skorch_net.py",
    LIGHTNING: "lightning_loader.py",
    TRAINER: "hugging_face.py",
}
SLOW = (SCIKIT, SKORCH, LIGHTNING, TRAINER)  # so much that fewer repeats tell


@dataclass(frozen=True)
class Training:
    """What one process took.

    Args:
        seconds: From its start to its end.
        ends_s: When each epoch's line came.
        accuracy: On the test images.
    """

    seconds: float
    ends_s: Sequence[float]
    accuracy: float

    @property
    def epoch_s(self) -> float:
        """Return the seconds of an epoch after the first, which compiles or traces."""
        return (self.ends_s[-1] - self.ends_s[0]) / (len(self.ends_s) - 1)


def finish(command: Sequence[str], folder: Path, environment: dict[str, str], epochs: int) -> Training:
    """Run a command that prints a line that begins with `epoch` after each, and its test accuracy."""
    lines, ends_s = [], []
    start_s = time.perf_counter()
    with subprocess.Popen(
        command, cwd=folder, env=environment, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("epoch "):
                ends_s.append(time.perf_counter())
            lines.append(line)
    seconds, output = time.perf_counter() - start_s, "".join(lines)
    accuracy = re.search(r"test/accuracy (\d\.\d+)", output)
    if process.returncode or accuracy is None or len(ends_s) != epochs:
        problem = f"exit code {process.returncode}, {len(ends_s)} of {epochs} epochs"
        raise SystemExit(f"{problem}: {' '.join(command)}\n{output[-2000:]}")
    return Training(seconds, ends_s, float(accuracy[1]))


def is_set_up() -> bool:
    """Tell whether the environment of the others is there, as pinned today."""
    stamp = ENVIRONMENT / ".installed"
    return stamp.exists() and stamp.read_text() == _pins()


def set_up() -> None:
    """Make their environment as the Makefile makes ours: by uv where there is one, else by pip."""
    print(f"Setting up {ENVIRONMENT.name}; this takes some minutes and 6 GB.", flush=True)
    uv = os.environ.get("UV", shutil.which("uv"))
    python, (requirements, constraints) = str(ENVIRONMENT / "bin" / "python"), PINS
    make = [sys.executable, "-m", "venv", "--clear", str(ENVIRONMENT)]
    install = [python, "-m", "pip", "install", "--disable-pip-version-check"]
    if uv:
        make = [uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(ENVIRONMENT)]
        install = [uv, "pip", "install", "--compile-bytecode", "--python", python]
    install += ["--quiet", "--requirement", str(requirements), "--constraint", str(constraints)]
    subprocess.run(make, check=True)
    subprocess.run(install, check=True)
    (ENVIRONMENT / ".installed").write_text(_pins())


def _pins() -> str:
    return "".join(path.read_text() for path in PINS)


def measure(root: Path, folder: Path, arguments: Namespace, setting: Setting) -> Section:
    """Run all, in an order drawn anew each time.

    Args:
        root: Folder of MNIST/raw.
        folder: For stores; the working directory.
        arguments: `repeats` of each, every other one of the slow; `quick`: whether only to show that it runs.
        setting: Where this is.
    """
    if not is_set_up():
        set_up()
    commands = Commands(root, folder)
    commands.make_empty()
    epochs = QUICK_EPOCHS if arguments.quick else EPOCHS

    def train(name: str, epochs: int) -> Training:
        if name in PEERS:
            python = sys.executable if name == LIGHTNING else str(ENVIRONMENT / "bin" / "python")
            command = [python, str(SCRIPTS / PEERS[name]), str(root), str(epochs)]
        else:
            words = ["model=mlp", f"trainer.max_epochs={epochs}"]
            words += ["tracking=none"] if name == UNTRACKED else []
            command = [sys.executable, *commands.training(commands.new_store(), *words)]
        return finish(command, folder, commands.environment, epochs)

    names = [OURS, UNTRACKED, *PEERS]
    if not arguments.quick:
        for name in names:  # whatever is slow the first time, is so here
            print(f"once, not counted: {name}", flush=True)
            train(name, 1)
    done: dict[str, dict[int, Training]] = {name: {} for name in names}
    draw = random.Random(0)
    for turn in range(arguments.repeats):
        for name in draw.sample(names, len(names)):
            if name in SLOW and turn % 2:
                continue
            one = done[name][turn] = train(name, epochs)
            shown = f"{one.seconds:.2f} s, {one.epoch_s:.3f} s an epoch, test accuracy {one.accuracy:.4f}"
            print(f"{turn + 1}/{arguments.repeats}  {name}: {shown}", flush=True)
    return section(done, epochs, [*setting.lines(), _versions()])


def section(done: dict[str, dict[int, Training]], epochs: int, notes: Sequence[str]) -> Section:
    """Compare ours with each of the others, turn by turn.

    Args:
        done: By name and turn.
        epochs: Of each process.
        notes: What the result is valid for.
    """

    def compare(above: str, below: str) -> list[Claim]:
        pairs = [(done[above][turn], one) for turn, one in done[below].items()]
        named = f"{above} / {below}"
        per_epoch = of_ratio(*zip(*[(a.epoch_s, b.epoch_s) for a, b in pairs], strict=True))
        whole = of_ratio(*zip(*[(a.seconds, b.seconds) for a, b in pairs], strict=True))
        targets = ((1.3, "1.30"), (1.2, "1.20")) if (above, below) == (OURS, JAX) else ((None, ""),) * 2
        return [
            Claim(f"an epoch: {named}", per_epoch, *targets[0]),
            Claim(f"a process of {epochs} epochs: {named}", whole, *targets[1]),
        ]

    claims = [claim for name in PEERS for claim in compare(OURS, name)]
    claims += compare(UNTRACKED, JAX)
    accuracies = {
        name: sum(one.accuracy for one in turns.values()) / len(turns) for name, turns in done.items()
    }
    name, accuracy = max(accuracies.items(), key=lambda each: abs(each[1] - accuracies[OURS]))
    gap = abs(accuracy - accuracies[OURS])
    what = f"largest difference of test accuracy from ours ({accuracies[OURS]:.2%}): {name} ({accuracy:.2%})"
    claims.append(Claim(what, Interval(gap, gap, gap), ACCURACY_GAP, f"{ACCURACY_GAP:.2f}"))
    times = [(f"an epoch: {n}", of_mean([one.epoch_s for one in each.values()])) for n, each in done.items()]
    times += [
        (f"a process of {epochs} epochs: {n}", of_mean([one.seconds for one in each.values()]))
        for n, each in done.items()
    ]
    numbers = [len(turns) for turns in done.values()]
    notes = [
        *notes,
        f"{max(numbers)} processes of each, {min(numbers)} of the slow ones, in a new random order each turn,"
        " after one that is not counted; each has all cores.",
        "MNIST's first 55,000 training images (ours: all but 5,000), 784-128-10, batch 64, SGD, learning rate"
        " 0.01, float32, then the test images; by the scripts in `scripts/benchmark/peers`.",
        "A process includes imports, reading the data, compilation and the test. The first epoch of each,"
        " which compiles, does not count as an epoch.",
        "Ours is `train.py model=mlp`, which also tracks every step, validates and checkpoints each epoch,"
        " draws and logs the model; untracked, with `tracking=none`, it validates. The others only train.",
    ]
    return Section("Other frameworks", notes, claims, times, "s")


def _versions() -> str:
    code = f"from importlib.metadata import version; print(*map(version, {PACKAGES!r}))"
    command = [str(ENVIRONMENT / "bin" / "python"), "-c", code]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    pairs = zip(PACKAGES, found, strict=True)
    return f"The others: {', '.join(f'{name} {version}' for name, version in pairs)}."
