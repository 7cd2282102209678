"""What pruning saves, and what it costs: ten small regressions, searched with and without a pruner.

Each trial is a loop by hand in NumPy; which trials there are and which of them end early is decided by
the sampler and the pruner of sweeps, with the default settings of conf/sweep.

Shapes: `N` rows, `F` features, `H` hidden units (0: linear).
"""

import math
import statistics
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from sklearn.datasets import load_diabetes, make_friedman1, make_friedman2, make_friedman3, make_regression

from benchmark.interval import of_mean
from benchmark.machine import Setting
from benchmark.table import Claim, Section
from tracklight.config.compose import compose
from tracklight.sweep.space import read_space
from tracklight.sweep.study import OptunaSettings, OptunaStudy, optuna

SEEDS = range(10)
EPOCHS, TRIALS, ROWS = 20, 20, 400
SPACE = read_space(
    ["lr=tag(log,interval(1e-4,1))", "momentum=interval(0.0,0.95)", "size=8,16,32,64"], {}, None
)


class Regression(NamedTuple):
    """Standardised rows: features (N, F) and targets (N,) of a training and a validation part."""

    name: str
    hidden: int
    train: tuple[np.ndarray, np.ndarray]
    val: tuple[np.ndarray, np.ndarray]


def regressions() -> Iterator[Regression]:
    """Yield ten: well and ill conditioned, noisy, curved; linear models and small networks."""
    diabetes = load_diabetes(return_X_y=True)
    sources = {
        "plane": make_regression(ROWS, 10, noise=10.0, random_state=0),
        "much noise": make_regression(ROWS, 10, noise=200.0, random_state=1),
        "few of many features": make_regression(ROWS, 100, n_informative=5, noise=10.0, random_state=2),
        "ill conditioned": make_regression(ROWS, 20, effective_rank=5, noise=1.0, random_state=3),
        "friedman 1": make_friedman1(ROWS, noise=1.0, random_state=4),
        "friedman 2": make_friedman2(ROWS, noise=50.0, random_state=5),
        "friedman 3": make_friedman3(ROWS, noise=0.1, random_state=6),
    }
    sources["diabetes"] = diabetes
    order = np.random.default_rng(7)
    x = order.uniform(-3, 3, (ROWS, 2))
    sources["waves"] = (x, np.sin(2 * x[:, 0]) * np.cos(x[:, 1]) + 0.1 * order.standard_normal(ROWS))
    x = order.standard_normal((ROWS, 4))
    sources["a step"] = (x, np.where(x[:, 0] > 0.5, 3.0, 0.0) + x[:, 1])
    for name, (x, y) in sources.items():
        x, y = (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()
        rows = np.random.default_rng(0).permutation(len(x))
        train, val = rows[: len(x) * 3 // 4], rows[len(x) * 3 // 4 :]
        hidden = 0 if name in list(sources)[:4] or name == "diabetes" else 16
        yield Regression(name, hidden, (x[train], y[train]), (x[val], y[val]))


def losses(task: Regression, params: dict[str, str], seed: int) -> Iterator[float]:
    """Train by SGD and yield the validation loss after each epoch."""
    lr, momentum, size = float(params["lr"]), float(params["momentum"]), int(params["size"])
    (x, y), random = task.train, np.random.default_rng(seed)
    width = task.hidden or x.shape[1]
    weights = (
        [random.standard_normal((x.shape[1], task.hidden)) / math.sqrt(x.shape[1])] if task.hidden else []
    )
    weights += [random.standard_normal(width) / math.sqrt(width) if task.hidden else np.zeros(width)]
    speeds = [np.zeros_like(each) for each in weights]

    def forward(inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        features = np.tanh(inputs @ weights[0]) if task.hidden else inputs
        return features, features @ weights[-1]

    with np.errstate(over="ignore", invalid="ignore"):
        for _ in range(EPOCHS):
            for rows in np.array_split(random.permutation(len(x)), math.ceil(len(x) / size)):
                features, outputs = forward(x[rows])
                error = 2 * (outputs - y[rows]) / len(rows)
                slopes = [features.T @ error]
                if task.hidden:
                    slopes.insert(0, x[rows].T @ (np.outer(error, weights[-1]) * (1 - features**2)))
                for weight, speed, slope in zip(weights, speeds, slopes, strict=True):
                    speed *= momentum
                    speed += slope
                    weight -= lr * speed
            yield float(np.mean((forward(task.val[0])[1] - task.val[1]) ** 2))


def search(task: Regression, settings: OptunaSettings) -> tuple[float, int]:
    """Search as a sweep does; return the best score, of a best epoch, and the epochs trained."""
    storage = optuna.storages.InMemoryStorage()
    study = OptunaStudy(storage, task.name, "min", SPACE, settings, TRIALS)
    best, epochs = math.inf, 0
    while request := study.ask():
        kind, score = "complete", math.inf
        for epoch, loss in enumerate(losses(task, request.params, settings.seed), 1):
            epochs += 1
            if not math.isfinite(loss):
                kind = "failed"
                break
            score = min(score, loss)
            if study.report(request.number, epoch, loss):
                kind = "pruned"
                break
        study.tell(request.number, kind, score if kind == "complete" else None)
        best = min(best, score) if kind == "complete" else best
    return best, epochs


def default_settings(pruner: str, seed: int) -> OptunaSettings:
    """Return the settings of a sweep that says no more than which pruner."""
    sweep = compose().sweep
    return OptunaSettings(
        **{key: sweep[key] or {} for key in ("sampler", "sampler_options", "pruner_options")},
        **{key: sweep[key] for key in ("warmup_trials", "warmup_epochs")},
        pruner=pruner,
        seed=seed,
        max_epochs=EPOCHS,
    )


def measure(setting: Setting) -> Section:
    """Compare median pruning by default, and with other warm-ups, with no pruning."""
    warmups = {"": {}, ", no warm-up": {"warmup_epochs": 0}, ", half the epochs": {"warmup_epochs": 0.5}}
    tasks = [(task, seed) for task in regressions() for seed in SEEDS]
    plain = [search(task, default_settings("none", seed)) for task, seed in tasks]
    claims = []
    for name, changes in warmups.items():
        settings = [replace(default_settings("median", seed), **changes) for _, seed in tasks]
        found = [search(task, each) for (task, _), each in zip(tasks, settings, strict=True)]
        pairs = list(zip(found, plain, strict=True))
        regrets = [best / least - 1 for (best, _), (least, _) in pairs]
        shares = [epochs / all_epochs for (_, epochs), (_, all_epochs) in pairs]
        limits = ((0.02, "0.02"), (0.75, "0.75")) if not name else ((None, ""), (None, ""))
        worst = f"median {statistics.median(regrets):.4f}, worst {max(regrets):.3f}"
        claims += [
            Claim(f"median pruner{name}: regret, mean ({worst})", of_mean(regrets), *limits[0]),
            Claim(f"median pruner{name}: epochs trained / without pruning", of_mean(shares), *limits[1]),
        ]
        print(claims[-2], claims[-1], flush=True)
    notes = [
        *setting.lines(),
        f"Ten regressions, {len(SEEDS)} seeds each; {TRIALS} trials of {EPOCHS} epochs by TPE over learning"
        " rate, momentum and batch size; the settings of conf/sweep, but for what a row says.",
        "Regret: how much worse the best validation loss is than that of the same search without a pruner,"
        " relative to it.",
    ]
    return Section("Pruning", notes, claims, [])
