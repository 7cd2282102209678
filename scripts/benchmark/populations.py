"""What populations promise: many small models for little more than the time of one, each a tracked run.

Shapes: `M` members, `N` examples, `B` in a minibatch.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmark.commands import ROOT, Commands
from benchmark.interval import Interval, of_ratio
from benchmark.machine import Setting
from benchmark.sweeps import QUIET, children
from benchmark.table import Claim, Section

LINE_STEPS, NUM_BY_HAND = 1000, 20
NUM_IMAGES, B = 55_000, 64
MLP_STEPS, ROUNDS = 20, 5
NUM_ALONE = 22  # linear regressions as processes of their own: each further one takes as long as these
TRACKED_EPOCHS = 5
GRID = ("-m", "model=linear", "num_threads=1", *QUIET)
TOGETHER = "hydra/launcher=population"


def measure(root: Path, folder: Path, setting: Setting, is_quick: bool) -> Section:
    """Measure all of it: some minutes on two quiet cores.

    Args:
        root: Folder of MNIST/raw.
        folder: For stores.
        setting: Where this is.
        is_quick: Whether to show on a few members that it runs.
    """
    num_lines, tracked, sizes = (24, 4, (4,)) if is_quick else (1000, 64, (16, 64))
    claims, times = _commands(root, folder, num_lines, tracked)  # first: the others import torch
    claims += [_lines(num_lines), *(claim for size in sizes for claim in _images(size))]
    notes = [
        *setting.lines(),
        f"Lines: {num_lines} linear regressions, {LINE_STEPS} full-batch steps each, tracing included;"
        f" {NUM_BY_HAND} by hand, times {num_lines // NUM_BY_HAND}. MLPs: {MLP_STEPS} steps"
        f" of {B} images for each, {ROUNDS} times in turn, 784-128-10 under SGD on {NUM_IMAGES:,} images.",
        f"Grid: the whole command; in processes of its own, 2 trials and {num_lines - 2} times what each"
        f" further one of {NUM_ALONE} takes.",
    ]
    return Section("Populations", notes, claims, times, "s")


def _commands(
    root: Path, folder: Path, num_lines: int, tracked: int
) -> tuple[list[Claim], list[tuple[str, Interval]]]:
    commands = Commands(root, folder)

    def train(store: str, *words: str) -> tuple[float, list[Any]]:
        place = folder / store
        seconds = commands.run([str(ROOT / "train.py"), *words, f"tracking.dir={place}"]).seconds
        print(f"{store}: {seconds:.1f} s", flush=True)
        return seconds, children(place)

    few = f"seed=range(0,{NUM_ALONE})"
    alone_s, alone = train("alone", *GRID, few)
    two_alone_s, _ = train("two alone", *GRID, "seed=0,1")  # what a command takes whatever its size
    two_s, _ = train("two", *GRID, "seed=0,1", TOGETHER)
    many_s, many = train("together", *GRID, f"seed=range(0,{num_lines})", TOGETHER)
    scores = {run.data.params["seed"]: run.data.metrics["score"] for run in many}
    equal = all(abs(scores[r.data.params["seed"]] / r.data.metrics["score"] - 1) < 1e-4 for r in alone)
    further_s = (alone_s - two_alone_s) / (NUM_ALONE - 2)
    ratio = many_s / (two_alone_s + further_s * (num_lines - 2))
    words = (
        "-m",
        "model=mlp",
        f"data.root={root}",
        f"trainer.max_epochs={TRACKED_EPOCHS}",
        "num_threads=2",
        *QUIET,
    )
    mlp_s, mlps = train("tracked", *words, f"seed=range(0,{tracked})", TOGETHER)
    trained_s = sum(float(run.data.tags["tracklight.seconds"]) for run in mlps)
    claims = [
        Claim(
            f"grid of {num_lines} tracked linear regressions / the same in processes of our own"
            f" (scores {'equal' if equal else 'DIFFER'})",
            *(Interval(ratio, ratio, ratio), 1 / 50, "1/50", equal and len(many) == num_lines),
        ),
        Claim(
            f"command of {tracked} tracked MLPs, {TRACKED_EPOCHS} epochs / its training",
            *(Interval(*[mlp_s / trained_s] * 3), None, ""),
        ),
        Claim(
            "the same, less the start of a command / its training",
            *(Interval(*[(mlp_s - two_s) / trained_s] * 3), 1.2, "1.20"),
        ),
    ]
    a_member = (many_s - two_s) / (num_lines - 2)
    named = {
        f"grid of {NUM_ALONE} alone": alone_s,
        f"of {num_lines} together": many_s,
        "of 2 alone": two_alone_s,
        "of 2 together": two_s,
        "a further run alone": further_s,
    }
    named |= {
        "a further member, tracked": a_member,
        f"{tracked} MLPs together": mlp_s,
        "their training": trained_s,
    }
    return claims, [(name, Interval(*[seconds] * 3)) for name, seconds in named.items()]


def _seconds(call: Callable[[], Any]) -> float:
    start_s = time.perf_counter()
    call()
    return time.perf_counter() - start_s


def _by_hand(model: Any, optimizer: Any, x: Any, y: Any, size: int) -> None:
    for inputs, targets in zip(x.split(size), y.split(size), strict=True):
        optimizer.zero_grad()
        loss = model.loss(model(inputs), targets)
        loss.backward()
        optimizer.step()


def _lines(num_lines: int) -> Claim:
    import torch

    from tracklight.engine.population import Population
    from tracklight.models.linear_regression import LinearRegression

    x = torch.arange(1.0, 5.0)[:, None]
    y, together, alone = 2 * x, [], []
    xs, ys = (each.repeat(LINE_STEPS, 1)[None] for each in (x, y))
    for _ in range(3):
        models = [LinearRegression() for _ in range(num_lines + NUM_BY_HAND)]
        optimizers = [torch.optim.SGD(model.parameters(), lr=0.01) for model in models]
        make = partial(Population, models[:num_lines], optimizers[:num_lines], torch.device("cpu"))
        together.append(_seconds(lambda: make().train_block(xs, ys, len(x), 0, [])))  # noqa: B023
        pairs = zip(models[num_lines:], optimizers[num_lines:], strict=True)
        by_hand_s = _seconds(lambda: [_by_hand(*each, xs[0], ys[0], len(x)) for each in pairs])  # noqa: B023
        alone.append(by_hand_s * num_lines / NUM_BY_HAND)
    return Claim(
        f"{num_lines} linear regressions / loops by hand", of_ratio(together, alone), 1 / 500, "1/500"
    )


def _images(size: int) -> list[Claim]:
    import torch

    from tracklight.engine.population import Population
    from tracklight.engine.steps import make_step
    from tracklight.models.mlp import MLP

    images, labels = torch.randn(NUM_IMAGES, 784), torch.randint(10, (NUM_IMAGES,))
    kinds = [[MLP() for _ in range(size)] for _ in range(3)]
    optimizers = [[torch.optim.SGD(model.parameters(), lr=0.01) for model in models] for models in kinds]
    steps = [make_step(*each) for each in zip(kinds[2], optimizers[2], strict=True)]
    population = Population(kinds[0], optimizers[0], torch.device("cpu"))
    seconds: list[list[float]] = [[], [], []]
    for turn in range(ROUNDS + 2):  # the first two warm up: traces are made, and the faster way is taken
        rows = torch.randint(NUM_IMAGES, (size, MLP_STEPS * B))

        def ours() -> None:
            for step, own in zip(steps, rows, strict=True):  # noqa: B023
                for each in own.split(B):
                    step(images[each], labels[each])

        def by_hand() -> None:
            for model, optimizer, own in zip(kinds[1], optimizers[1], rows, strict=True):  # noqa: B023
                _by_hand(model, optimizer, images[own], labels[own], B)

        ways = (lambda: population.train_block(images[rows], labels[rows], B, 0, []), by_hand, ours)  # noqa: B023
        for measured, way in zip(seconds, ways, strict=True):
            taken = _seconds(way)
            if turn > 1:
                measured.append(taken)
    together, alone, engine = seconds
    return [
        Claim(f"{size} MLPs / loops by hand", of_ratio(together, alone), 0.66, "0.66"),
        Claim(
            f"{size} MLPs / our own engine, one after the other",
            of_ratio(together, engine),
            1.0,
            "1.00",
        ),
    ]
