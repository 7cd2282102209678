"""The race over optimizer steps: who takes part, and what their times are held against."""

import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmark import by_hand, ours, plain_lightning
from benchmark.interval import Interval
from benchmark.machine import Setting, device_name
from benchmark.race import SLICE, Relay, Rival, per_epoch, race, ratio
from benchmark.table import Claim, Section
from tracklight.data.mnist import MNIST
from tracklight.data.tensor_data import epoch_order
from tracklight.engine.blocks import steps_per_block
from tracklight.tracking.sqlite_file import ensure_database

HAND_UINT8 = "by hand, resident uint8"
HAND_FLOAT = "by hand, resident float32"
HAND_LOADER = "by hand, torchvision + DataLoader"
LIGHTNING = "Lightning, resident tensors, no logger"
STOCK = "Lightning, resident tensors, its MLFlowLogger each step"
STOCK_LOADER = "Lightning, torchvision + DataLoader, its MLFlowLogger each step"
OURS = "ours, untracked"
TRACKED = "ours, every step's loss in MLflow"
DURABLE = "ours, the same and a durable resume checkpoint each epoch"
BEST = "ours, the same and the best weights kept each epoch"
GRADIENTS = "ours, every step's loss and tracking.gradients=true"

RATE = by_hand.LEARNING_RATE
OPTIMIZERS: dict[str, Any] = {
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=RATE, momentum=0.9),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=RATE),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=RATE),
}
# What ours is told, what the loop by hand is, and the ratio aimed at.
SETTINGS: dict[str, tuple[list[str], dict[str, Any], float]] = {
    "batch 16": (["data.batch_size=16"], {"batch_size": 16}, 0.6),
    "batch 256": (["data.batch_size=256"], {"batch_size": 256}, 0.75),
    "batch 512": (["data.batch_size=512"], {"batch_size": 512}, 0.85),
    "hidden 800": (["model.hidden=[800]"], {"hidden": [800]}, 0.85),
    "hidden 3 x 1024": (["model.hidden=[1024,1024,1024]"], {"hidden": [1024] * 3}, 0.97),
    "momentum": (["optimizer.momentum=0.9"], {"optimize": OPTIMIZERS["momentum"]}, 0.6),
    "Adam": (["optimizer=adam", f"optimizer.lr={RATE}"], {"optimize": OPTIMIZERS["Adam"]}, 0.5),
    "AdamW": (["optimizer=adamw", f"optimizer.lr={RATE}"], {"optimize": OPTIMIZERS["AdamW"]}, 0.5),
}


def on_cpu(root: Path, folder: Path, epochs: int, setting: Setting) -> Section:
    """Race on the CPU.

    Args:
        root: Folder of MNIST/raw.
        folder: For the stores.
        epochs: Of the fast rivals.
        setting: What the result is valid for.
    """
    images, labels, order = _load(root)
    floats = by_hand.standardised(images)
    ensure_database(folder / "stock.db", (folder / "stock").as_uri())
    hand = partial(by_hand.resident, labels=labels, order=order, epochs=epochs)
    light = partial(plain_lightning.resident, images=floats, labels=labels, epochs=epochs)
    logger = partial(plain_lightning.mlflow_logger, folder / "stock.db")
    own = partial(ours.train, root=root, epochs=epochs)
    rivals = {
        HAND_UINT8: lambda relay: hand(relay, images),
        HAND_FLOAT: lambda relay: hand(relay, floats),
        LIGHTNING: lambda relay: light(relay, logger=None),
        OURS: own,
        TRACKED: lambda relay: own(relay, tracking=folder / "a"),
        DURABLE: lambda relay: own(relay, tracking=folder / "b", checkpoints=[ours.LAST]),
        BEST: lambda relay: own(relay, tracking=folder / "c", checkpoints=[ours.LAST, ours.BEST]),
        GRADIENTS: lambda relay: own(relay, tracking=folder / "d", gradients=True),
        HAND_LOADER: lambda relay: by_hand.torchvision_loop(relay, root, epochs),
        STOCK: lambda relay: light(relay, logger=logger("resident")),
        STOCK_LOADER: lambda relay: plain_lightning.torchvision_loader(relay, root, epochs, logger("loader")),
    }
    done = _run(rivals, len(images), epochs)
    _assert_same_bits(done, [HAND_UINT8, HAND_FLOAT, OURS, TRACKED, DURABLE, BEST, GRADIENTS])
    best_hand = min(done[HAND_UINT8], done[HAND_FLOAT], key=lambda rival: rival.seconds_per(1))
    per = _rounds(len(images))
    claims = [
        Claim(f"{above} / {below}", ratio(done[above], done[below], per), target, shown)
        for above, below, target, shown in (
            (OURS, best_hand.name, 1.0, "1.00"),
            (TRACKED, best_hand.name, 1.15, "1.15"),
            (TRACKED, STOCK, 1 / 7, "1/7"),
            (TRACKED, HAND_LOADER, 1 / 8, "1/8"),
            (DURABLE, TRACKED, 1.05, "1.05"),
            (GRADIENTS, TRACKED, 1.1, "1.10"),
            (BEST, TRACKED, None, ""),
            (TRACKED, STOCK_LOADER, None, ""),
            (TRACKED, LIGHTNING, None, ""),
        )
    ]
    title = "Steps on the CPU"
    notes = [
        *_notes(epochs, setting),
        "Final weights of ours and of the loops by hand on resident tensors are bit-identical (asserted).",
    ]
    return Section(title, notes, claims, _times(done, len(images)))


def in_other_settings(root: Path, folder: Path, epochs: int, setting: Setting) -> Section:
    """Race ours, untracked, against the loop by hand in settings other than those of the notes."""
    images, labels, order = _load(root)
    floats = by_hand.standardised(images)
    claims, times = list[Claim](), list[tuple[str, Interval]]()
    for name, (words, by, target) in SETTINGS.items():
        size = by.get("batch_size", by_hand.BATCH_SIZE)
        rivals: dict[str, Callable[[Relay], object]] = {
            f"by hand, {name}": partial(
                by_hand.resident, images=floats, labels=labels, order=order, epochs=epochs, **by
            ),
            f"ours, {name}": partial(ours.train, root=root, epochs=epochs, words=words),
        }
        done = _run(rivals, len(images), epochs, batch_size=size)
        _assert_same_bits(done, [*rivals])
        hand, own = done.values()
        per = _rounds(len(images), size)
        claims.append(Claim(f"{own.name} / {hand.name}", ratio(own, hand, per), target, f"{target:.2f}"))
        times += _times(done, len(images), size)
    notes = [
        *_notes(epochs, setting)[:-1],
        "Each pair differs from that in what its name says. Final weights are bit-identical (asserted).",
    ]
    return Section("Steps in other settings", notes, claims, times)


def on_cuda(root: Path, folder: Path, epochs: int, setting: Setting) -> Section:
    """Race on the GPU."""
    images, labels, order = _load(root)
    images, labels = images.cuda(), labels.cuda()
    floats = by_hand.standardised(images)
    hand = partial(by_hand.resident, labels=labels, order=order, epochs=epochs)
    own = partial(ours.train, root=root, epochs=epochs, accelerator="gpu")
    rivals = {
        HAND_UINT8: lambda relay: hand(relay, images),
        HAND_FLOAT: lambda relay: hand(relay, floats),
        OURS: own,
        TRACKED: lambda relay: own(relay, tracking=folder / "gpu"),
    }
    done = _run(rivals, len(images), epochs, torch.cuda.synchronize)
    best_hand = min(done[HAND_UINT8], done[HAND_FLOAT], key=lambda rival: rival.seconds_per(1))
    per = _rounds(len(images))
    claims = [
        Claim(f"{OURS} / {best_hand.name}", ratio(done[OURS], best_hand, per), 0.2, "1/5"),
        Claim(f"{TRACKED} / {best_hand.name}", ratio(done[TRACKED], best_hand, per), None, ""),
        Claim(
            f"{OURS}: milliseconds an epoch (target: on an H200)",
            per_epoch(done[OURS], per).scaled(1000),
            30.0 if "H200" in device_name() else None,
            "30 ms",
        ),
    ]
    notes = _notes(epochs, setting)
    return Section(f"Steps on CUDA ({device_name()})", notes, claims, _times(done, len(images)))


def _load(root: Path) -> tuple[Tensor, Tensor, Callable[[int], Tensor]]:
    """Return the official training images (N, 28, 28), their labels (N,), and epochs' orders."""
    data = MNIST(
        batch_size=by_hand.BATCH_SIZE, seed=0, root=str(root), num_val=0, fallback=False,
        mean=by_hand.MEAN, std=by_hand.STD,
    )  # fmt: skip
    split = data.splits["train"]
    return split.features, split.targets, partial(epoch_order, len(split), 0)


def _steps(num_images: int, batch_size: int = by_hand.BATCH_SIZE) -> int:
    return math.ceil(num_images / batch_size)


def _slice(batch_size: int) -> int:
    """Return the steps of a slice: one block of ours at least."""
    return max(SLICE, steps_per_block(batch_size))


def _rounds(num_images: int, batch_size: int = by_hand.BATCH_SIZE) -> int:
    return math.ceil(_steps(num_images, batch_size) / _slice(batch_size))


def _run(
    trains: dict[str, Callable[[Relay], object]],
    num_images: int,
    epochs: int,
    settle: Callable[[], None] = lambda: None,
    batch_size: int = by_hand.BATCH_SIZE,
) -> dict[str, Rival]:
    rivals = {name: Rival(name, train, _slice(batch_size)) for name, train in trains.items()}
    per, steps = _rounds(num_images, batch_size), _steps(num_images, batch_size)

    def tell(done: int) -> None:
        if done % per == 0 or done == 1:
            shown = "  ".join(f"{r.seconds_per(steps):.3f}" for r in rivals.values())
            print(f"epoch {done / per:.0f}/{epochs}, s an epoch so far: {shown}", flush=True)

    print("rivals: " + "; ".join(rivals), flush=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice to its users
        race(list(rivals.values()), per * epochs, tell, settle)
    return rivals


def _assert_same_bits(done: dict[str, Rival], names: Sequence[str]) -> None:
    reference = done[names[0]].relay.result
    for name in names[1:]:
        pairs = zip(reference, done[name].relay.result, strict=True)
        if not all(torch.equal(a, b) for a, b in pairs):
            raise AssertionError(f"final weights differ: {names[0]} and {name}")
    print(f"final weights are bit-identical: {'; '.join(names)}", flush=True)


def _notes(epochs: int, setting: Setting) -> list[str]:
    return [
        *setting.lines(),
        f"{epochs} epochs of MNIST's 60,000 training images, 784-128-10, batch"
        f" {by_hand.BATCH_SIZE}, SGD, {torch.get_num_threads()} threads; slices of {SLICE} steps,"
        " or of one block of ours where that is more, in one process, in a new random order each round.",
        "No progress bars are shown.",
        "A tracked epoch of ours ends when MLflow has all its values.",
    ]


def _times(
    done: dict[str, Rival], num_images: int, batch_size: int = by_hand.BATCH_SIZE
) -> list[tuple[str, Interval]]:
    per = _rounds(num_images, batch_size)
    return [(name, per_epoch(rival, per)) for name, rival in done.items()]
