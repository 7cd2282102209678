"""Measure what tracklight promises about speed: half an hour on two quiet cores."""

import argparse
import os
import tempfile
from pathlib import Path

from benchmark.machine import Setting
from benchmark.table import Section, keep
from tracklight.cli import quiet

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Measure, print, write."""
    arguments = _arguments()
    quiet()
    for name in [name for name in os.environ if name.startswith("MLFLOW_TRACKING")]:
        del os.environ[name]
    if arguments.quick:
        arguments.epochs, arguments.repeats, arguments.crowd = 1, 2, 1000
    setting = Setting.here()
    with tempfile.TemporaryDirectory(prefix="tracklight-bench-") as name:
        folder, root = Path(name), arguments.root.absolute()
        for part in arguments.only:  # they name their stores alike
            (folder / part).mkdir(exist_ok=True)
        # First, since a child's peak memory begins at its parent's, here still small.
        if "commands" in arguments.only:
            from benchmark import commands

            _report(commands.measure(root, folder / "commands", arguments, setting), arguments)
        if "peers" in arguments.only:
            from benchmark import peers

            _report(peers.measure(root, folder / "peers", arguments, setting), arguments)
        if "sweeps" in arguments.only:
            from benchmark import sweeps

            _report(sweeps.measure(root, folder / "sweeps", setting), arguments)
        if "pruning" in arguments.only:
            from benchmark import pruning

            _report(pruning.measure(setting), arguments)
        if "populations" in arguments.only:
            from benchmark import populations

            _report(populations.measure(root, folder / "populations", setting, arguments.quick), arguments)
        if {"steps", "settings", "cuda"} & {*arguments.only}:
            import torch

            from benchmark import steps

            if "steps" in arguments.only:
                _report(steps.on_cpu(root, folder, arguments.epochs, setting), arguments)
            if "settings" in arguments.only:
                _report(steps.in_other_settings(root, folder, arguments.epochs, setting), arguments)
            if "cuda" in arguments.only and torch.cuda.is_available():
                _report(steps.on_cuda(root, folder, arguments.epochs, setting), arguments)
            elif "cuda" in arguments.only:
                print("\nno CUDA device here: steps on it are not measured", flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=20, help="of the fast rivals: 20 or more")
    parser.add_argument("--repeats", type=int, default=5, help="of each whole command")
    parser.add_argument("--crowd", type=int, default=10_000, help="runs in the full store")
    parts = ("commands", "steps", "cuda", "settings", "sweeps", "pruning", "populations", "peers")
    only = (
        "parts to measure; only if named: sweeps, half an hour more; settings, pruning and populations, some"
        " minutes; peers, other frameworks, six minutes and at first a .venv-peers of 6 GB"
    )
    parser.add_argument("--only", nargs="+", default=parts[:3], choices=parts, help=only)
    root = Path(os.environ.get("MNIST_ROOT", ROOT / "data"))
    parser.add_argument("--root", type=Path, default=root, help="folder of MNIST/raw (MNIST_ROOT)")
    parser.add_argument("--out", type=Path, default=ROOT / "BENCHMARKS.md")
    parser.add_argument("--quick", action="store_true", help="only check that it runs; write nothing")
    return parser.parse_args()


def _report(section: Section, arguments: argparse.Namespace) -> None:
    print(f"\n## {section.markdown()}", flush=True)
    if arguments.quick:
        print("(--quick: this only shows that it runs; nothing is written)", flush=True)
    else:
        keep(section, arguments.out)


if __name__ == "__main__":
    main()
