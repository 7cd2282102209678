"""What a run looks like: learning curves and the fit of a regression, drawn from plain arrays.

Matplotlib is imported by who draws; no state of its pyplot is touched.

Shapes: `N` examples, `T` targets.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

Series = Mapping[str, tuple[Sequence[int], Sequence[float]]]  # metric to its steps and values

BLUE, ORANGE, GREEN, RED, GREY = "#2f6db3", "#d9822b", "#3a8f5c", "#c23b3b", "#8a8f98"
STAGES = {"train": BLUE, "val": ORANGE, "test": GREEN}
MAX_DRAWN = 400  # more points along one line, or twice as many in one cloud, are mere ink
MAX_PANELS = 4
LOG_FROM = 20.0  # a positive metric that spans this factor is read better on a logarithmic axis


def canvas(width_in: float, height_in: float) -> Figure:
    """Return an empty figure of this size, to be drawn on without pyplot."""
    figure = Figure(figsize=(width_in, height_in), dpi=110)
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, pil_kwargs={"compress_level": 4})


def style(axes: Axes, title: str, x: str, y: str) -> None:
    """Give axes the look all figures share."""
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(True, color="#e6e8eb", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def learning_curves(series: Series, best_step: int | None = None) -> Figure:
    """Draw each metric over optimizer steps, its stages in one panel.

    Args:
        series: Metrics named `stage/name`; others, and those without two finite points in any
            stage, are left out. `train/loss` and `train/loss_epoch` share the panel of `loss`.
        best_step: Where the best checkpoint was taken; marked.
    """
    panels = _panels(series)
    figure = canvas(5.2 * max(1, len(panels)) + 0.4, 3.7)
    grid = figure.subplots(1, max(1, len(panels)), squeeze=False)[0]
    figure.subplots_adjust(
        left=0.75 / figure.get_figwidth(), right=1 - 0.15 / figure.get_figwidth(), bottom=0.15,
        top=0.9, wspace=0.22,
    )  # fmt: skip
    for axes, (name, keys) in zip(grid, panels.items(), strict=False):
        for key in keys:
            _draw_stage(axes, key, *series[key], best_step)
        style(axes, name.replace("_", " "), "optimizer steps", "")
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        values = np.concatenate([_finite(*series[key])[1] for key in keys])
        if len(values) and values.min() > 0 and values.max() > LOG_FROM * values.min():
            axes.set_yscale("log")
            is_wide = values.max() > 1e3 * values.min()
            axes.yaxis.set_major_locator(LogLocator(subs=(1,) if is_wide else (1, 2, 5)))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        if best_step:
            axes.axvline(best_step, color=GREY, linewidth=1, linestyle=":", label="best")
        axes.legend(frameon=False, fontsize=9)
    if not panels:
        style(grid[0], "no metric was logged twice", "optimizer steps", "")
    return figure


def _panels(series: Series) -> dict[str, list[str]]:
    panels: dict[str, list[str]] = {}
    for key in sorted(series, key=lambda key: (key.endswith("_epoch"), key)):
        stage, _, name = key.partition("/")
        means, _ = series.get(f"{key}_epoch", ((), ()))
        if stage in STAGES and name and len(series[key][0]) > len(means):  # else they are the same
            panels.setdefault(name.removesuffix("_epoch"), []).append(key)
    drawable = {
        name: keys
        for name, keys in panels.items()
        if any(len(_finite(*series[key])[0]) > 1 for key in keys)
    }
    return dict(sorted(drawable.items(), key=lambda item: item[0] != "loss")[:MAX_PANELS])


def _draw_stage(
    axes: Axes, key: str, steps: Sequence[int], values: Sequence[float], best_step: int | None
) -> None:
    stage, _, name = key.partition("/")
    x, y = _finite(steps, values)
    colour = STAGES[stage]
    if not len(x):
        return
    if stage == "test":
        at = best_step or x[-1]  # the step of the weights that were tested, not of the call
        axes.plot(at, y[-1], "*", color=colour, markersize=12, label=f"test {y[-1]:.4g}", zorder=5)
    elif stage == "train" and not name.endswith("_epoch"):
        axes.plot(*_thinned(x, y), color=colour, alpha=0.45, linewidth=1, label="train, each step")
    else:
        label = f"{stage}, each epoch" if stage == "train" else stage
        marker = "o" if len(x) <= 40 else ""
        axes.plot(x, y, color=colour, marker=marker, markersize=4, linewidth=1.8, label=label)


def _finite(steps: Sequence[int], values: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(steps, dtype=float), np.asarray(values, dtype=float)
    order = np.argsort(x, kind="stable")
    x, y = x[order], y[order]
    return x[np.isfinite(y)], y[np.isfinite(y)]


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Average neighbours until at most `MAX_DRAWN` points are left."""
    size = -(-len(x) // MAX_DRAWN)
    starts = np.arange(0, len(x), size)
    counts = np.diff(np.append(starts, len(x)))
    return np.add.reduceat(x, starts) / counts, np.add.reduceat(y, starts) / counts


def fitted_line(
    points: Mapping[str, tuple[np.ndarray, np.ndarray]],
    line: tuple[np.ndarray, np.ndarray],
    x_name: str,
    equation: str,
) -> Figure:
    """Draw the data of a regression on one feature, and the line that was fitted to it.

    Args:
        points: Split to its feature (N,) and its target (N,).
        line: The fitted line, as two arrays.
        x_name: Name of the feature.
        equation: The line in words, for the title.
    """
    figure, axes = _single()
    for split, (x, y) in points.items():
        kept = _spread(len(x))
        axes.scatter(x[kept], y[kept], **_dots(split, len(x)))
    axes.plot(*line, color=RED, linewidth=1.8, label="fitted line")
    style(axes, equation, x_name, "target")
    axes.legend(frameon=False, fontsize=9)
    return figure


def predicted_against_true(points: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Figure:
    """Draw predictions over targets: on the diagonal they agree.

    Args:
        points: Split to its targets (N, T) and its predictions (N, T).
    """
    figure, axes = _single()
    for split, (true, predicted) in points.items():
        kept = _spread(len(true))
        axes.scatter(true[kept].ravel(), predicted[kept].ravel(), **_dots(split, len(true)))
    both = np.concatenate([array.ravel() for pair in points.values() for array in pair])
    ends = [both.min(), both.max()]
    axes.plot(ends, ends, color=RED, linewidth=1.4, label="prediction = target")
    style(axes, "Predicted against true", "target", "prediction")
    axes.legend(frameon=False, fontsize=9)
    return figure


def residuals(points: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Figure:
    """Draw target minus prediction over the prediction, and how these differences spread.

    Args:
        points: Split to its targets (N, T) and its predictions (N, T).
    """
    figure = canvas(7.2, 3.7)
    cloud, spread = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
    every = np.concatenate([(true - predicted).ravel() for true, predicted in points.values()])
    bins = np.linspace(every.min(), every.max() + 1e-12, min(30, max(13, every.size // 8)))
    figure.subplots_adjust(left=0.12, right=0.98, bottom=0.15, top=0.9, wspace=0.06)
    title = []
    for split, (true, predicted) in points.items():
        difference, kept = true - predicted, _spread(len(true))
        cloud.scatter(predicted[kept].ravel(), difference[kept].ravel(), **_dots(split, len(true)))
        spread.hist(
            difference.ravel(), bins=bins.tolist(), color=STAGES[split], alpha=0.6,
            orientation="horizontal", weights=np.full(difference.size, 1 / difference.size),
        )  # fmt: skip
        title.append(f"{split}: RMSE {np.sqrt(np.mean(difference**2)):.4g}")
    for axes in (cloud, spread):
        axes.axhline(0, color=RED, linewidth=1.2)
    style(cloud, "Residuals   " + ",  ".join(title), "prediction", "target - prediction")
    style(spread, "", "share", "")
    spread.set_xticks([])
    cloud.legend(frameon=False, fontsize=9)
    return figure


def _single() -> tuple[Figure, Axes]:
    figure = canvas(6.0, 4.0)
    axes = figure.subplots()
    figure.subplots_adjust(left=0.13, right=0.97, bottom=0.13, top=0.91)
    return figure, axes


def _dots(split: str, count: int) -> dict[str, Any]:
    size = 40 if count <= 20 else 16
    return {"s": size, "color": STAGES[split], "alpha": 0.8, "linewidths": 0, "label": split}


def _spread(count: int) -> np.ndarray:
    """Return at most twice `MAX_DRAWN` rows, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(count, 2 * MAX_DRAWN)).astype(int))
