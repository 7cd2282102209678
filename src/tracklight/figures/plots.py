"""What a run looks like: learning curves and the fit of a regression, drawn from plain arrays.

Matplotlib is imported by who draws; no state of its pyplot is touched.

Shapes: `N` examples, `T` targets.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

Series = Mapping[str, tuple[Sequence[int], Sequence[float]]]  # metric to its steps and values

BLUE, ORANGE, GREEN, RED, GREY = "#2f6db3", "#d9822b", "#3a8f5c", "#c23b3b", "#8a8f98"
PURPLE = "#7a5aa6"  # of what has no stage
STAGES = {"train": BLUE, "val": ORANGE, "test": GREEN}
STAGED = re.compile("(train|val|valid|validation|test)[/_](.+)")
BESIDE = ("system/", "gradient/", "evaluate/", "best/", "sweep/", "ols/", "DeviceStatsMonitor.")
NO_CURVES = ("score", "epoch")  # nor what begins as one of `BESIDE`: not of the training itself
MAX_DRAWN = 400  # more points along one line, or twice as many in one cloud, are mere ink
MAX_PANELS = 4
MAX_NAME = 48  # more characters of a metric would run into the next panel
LOG_FROM = 5.0  # a positive metric that spans this factor is mostly flat on a linear axis


def canvas(width_in: float, height_in: float) -> Figure:
    """Return an empty figure of this size, to be drawn on without pyplot."""
    figure = Figure(figsize=(width_in, height_in), dpi=110)
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, pil_kwargs={"compress_level": 4})


def style(axes: Axes, title: str, x: str, y: str, title_pad: float = 6.0) -> None:
    """Give axes the look all figures share; the title stands `title_pad` points above them."""
    axes.set_title(title, fontsize=11, loc="left", pad=title_pad)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(True, color="#e6e8eb", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


class _Curve(NamedTuple):
    stage: str  # of STAGES, or empty
    name: str  # of the metric, without stage and kind
    kind: str  # step or epoch where both may be logged; else empty
    x: np.ndarray
    y: np.ndarray


def learning_curves(series: Series, best_step: int | None = None) -> Figure:
    """Draw each metric over optimizer steps, its stages in one panel.

    Args:
        series: Metrics named `stage/name` or `stage_name`, such as `train/loss` and `val_loss`;
            others have a panel of their own, after these. `loss`, `loss_step` and `loss_epoch` of
            one stage share a panel. Left out are metrics with fewer than two finite points in
            all their stages together, and what is logged beside training.
        best_step: Where the best checkpoint was taken; marked.
    """
    panels = _panels(series)
    figure = canvas(5.2 * max(1, len(panels)) + 0.5, 3.9)
    grid = figure.subplots(1, max(1, len(panels)), squeeze=False, sharex=True)[0]
    figure.subplots_adjust(
        left=0.85 / figure.get_figwidth(), right=1 - 0.15 / figure.get_figwidth(), bottom=0.14,
        top=0.84, wspace=0.22,
    )  # fmt: skip
    for axes, curves in zip(grid, panels, strict=False):
        for curve in curves:
            _draw(axes, curve, best_step)
        name = curves[0].name.replace("_", " ")
        name = name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 1]}…"
        style(axes, name, "optimizer steps", "", title_pad=24)
        axes.tick_params(labelsize=9)
        axes.margins(y=0.08)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        _scale(axes, curves)
        if best_step:
            axes.axvline(best_step, color=GREY, linewidth=1, linestyle=":", label="best")
        axes.legend(  # between title and curves, which it cannot cover there
            frameon=False, fontsize=8.5, ncols=5, loc="lower left", bbox_to_anchor=(-0.02, 0.98),
            handlelength=1.3, handletextpad=0.5, columnspacing=1, borderpad=0.3,
        )  # fmt: skip
    if not panels:
        style(grid[0], "no metric was logged twice", "optimizer steps", "")
    return figure


def _panels(series: Series) -> list[list[_Curve]]:
    panels: dict[tuple[bool, str], list[_Curve]] = {}
    for key in sorted(series):
        curve = None if key.startswith(BESIDE) or key in NO_CURVES else _curve(key, series)
        if curve is not None and len(curve.x):
            panels.setdefault((not curve.stage, curve.name), []).append(curve)
    stages = ["", *STAGES]
    drawable = {
        panel: sorted(curves, key=lambda curve: (stages.index(curve.stage), curve.kind != "step"))
        for panel, curves in panels.items()
        if sum(len(curve.x) for curve in curves) > 1
    }
    first = sorted(drawable, key=lambda at: (at[0], at[1].startswith("lr"), at[1] != "loss", at[1]))
    return [drawable[panel] for panel in first[:MAX_PANELS]]


def _curve(key: str, series: Series) -> _Curve | None:
    """Tell what a metric's name says; None where its means over epochs are drawn instead."""
    staged = STAGED.fullmatch(key)
    stage, name = staged.groups() if staged else ("", key)
    stage = "val" if stage.startswith("val") else stage
    kind = "epoch" if name.endswith("_epoch") else ""
    for each_step in (key, key.removesuffix("_step")):
        if f"{each_step}_epoch" in series:
            means, _ = series[f"{each_step}_epoch"]
            if stage in ("val", "test") or len(series[key][0]) <= len(means):
                return None
            kind = "step"
    panel = name.removesuffix(f"_{kind}") if kind else name
    return _Curve(stage, panel, kind, *_finite(*series[key]))


def _draw(axes: Axes, curve: _Curve, best_step: int | None) -> None:
    stage, _, kind, x, y = curve
    colour, label = STAGES.get(stage, PURPLE), f"{stage} {kind}".strip() or "no stage"
    if stage == "test":
        at = best_step or x[-1]  # the step of the weights that were tested, not of the call
        axes.plot(at, y[-1], "*", color=colour, markersize=15, label=f"test {y[-1]:.4g}", zorder=4)
    elif kind == "step":
        axes.plot(*_thinned(x, y), color=colour, alpha=0.45, linewidth=1, label=label)
    elif len(x) <= 40:
        size = 4 if stage == "val" else 6.5  # the smaller in front: each is seen where all meet
        axes.plot(x, y, "o-", color=colour, markersize=size, linewidth=1.8, label=label, zorder=5)
    else:
        points = (x, y) if stage == "val" or kind else _thinned(x, y)
        axes.plot(*points, color=colour, linewidth=1.4, label=label)


def _scale(axes: Axes, curves: Sequence[_Curve]) -> None:
    """Choose a logarithmic axis where a linear one would show a flat line, and label it."""
    values = np.concatenate([curve.y for curve in curves])
    low, high = values.min(), values.max()
    longest = max((curve.y for curve in curves), key=len)
    half = -(-len(longest) // 2)
    is_share = high <= 1 and longest[:half].mean() <= longest[-half:].mean()  # as an accuracy
    if low > 0 and high > LOG_FROM * low and not is_share:
        axes.set_yscale("log")
        subs = (1, 2, 3, 5, 7) if high < 30 * low else (1, 2, 5) if high < 1e3 * low else (1,)
        axes.yaxis.set_major_locator(LogLocator(subs=subs))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:.7g}"))


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


pass

MAX_NAMED = 20  # more classes than this are drawn without numbers in the cells
MISTAKES = 24
MISTAKES_ACROSS = 8
MAX_UNITS = 144


def confusion(counts: np.ndarray, class_names: Sequence[str], split: str) -> Figure:
    """Draw how often each class was taken for each; colours are shares of the row's class.

    Args:
        counts: (K, K) whole numbers: rows are true classes, columns predicted ones.
        class_names: K names.
        split: The data that was asked.
    """
    num_classes, total = len(counts), int(counts.sum())
    right = int(np.trace(counts))
    # Empty rows stay white; mistakes are what one looks for, so they get the colour scale.
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    mistakes = shares * (1 - np.eye(num_classes))
    side = min(9.0, 2.4 + 0.42 * num_classes)
    figure = canvas(side, side)
    axes = figure.subplots()
    margin = 1.0 / side
    figure.subplots_adjust(left=margin, right=0.98, bottom=margin, top=0.92)
    top = max(mistakes.max(), 1e-9)
    axes.imshow(mistakes, cmap="OrRd", vmin=0, vmax=top * 1.1, aspect="auto")
    if num_classes <= MAX_NAMED:
        for i, j in np.argwhere(counts > 0):
            dark = mistakes[i, j] > 0.6 * top
            axes.text(
                j, i, f"{counts[i, j]}", ha="center", va="center", fontsize=9,
                color="white" if dark else "#1f2328", fontweight="bold" if i == j else "normal",
            )  # fmt: skip
        ticks = range(num_classes)
        wide = max(map(len, class_names)) > 4
        axes.set_xticks(ticks, class_names, rotation=90 if wide else 0)
        axes.set_yticks(ticks, class_names)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.set_title(
        f"{split}: {right:,} of {total:,} right ({right / max(total, 1):.2%})",
        fontsize=11, loc="left",
    )  # fmt: skip
    axes.tick_params(length=0)
    return figure


def worst_mistakes(
    probabilities: np.ndarray, targets: np.ndarray, count: int = MISTAKES
) -> np.ndarray:
    """Return the rows that were wrong with most confidence, the worst first.

    Args:
        probabilities: (N, K).
        targets: (N,) true classes.
        count: At most this many.
    """
    predicted = probabilities.argmax(axis=1)
    wrong = np.flatnonzero(predicted != targets)
    confidence = probabilities[wrong, predicted[wrong]]
    return wrong[np.argsort(-confidence, kind="stable")][:count]


def mistakes(
    images: np.ndarray, probabilities: np.ndarray, targets: np.ndarray,
    class_names: Sequence[str], split: str,
) -> Figure:  # fmt: skip
    """Draw the most confident mistakes, each with what it is and what it was taken for.

    Args:
        images: (N, H, W), any range.
        probabilities: (N, K).
        targets: (N,) true classes.
        class_names: K names.
        split: The data that was asked.
    """
    rows = worst_mistakes(probabilities, targets)
    num_down = max(1, math.ceil(len(rows) / MISTAKES_ACROSS))
    height = 1.35 * num_down + 0.5
    figure = canvas(9.0, height)
    axes = figure.add_axes((0.01, 0.01, 0.98, 1 - 0.55 / height))
    axes.set_axis_off()
    wrong = int((probabilities.argmax(axis=1) != targets).sum())
    title = f"{split}: the most confident of {wrong:,} mistakes   (true → predicted, probability)"
    figure.text(0.012, 1 - 0.32 / height, title if wrong else f"{split}: no mistake", fontsize=11)
    if not len(rows):
        return figure
    side_y, side_x = images.shape[1:]
    cell_y, cell_x = round(side_y * 1.35), round(side_x * 1.12)
    mosaic = np.full((num_down * cell_y, MISTAKES_ACROSS * cell_x), np.nan)
    for at, row in enumerate(rows):
        down, across = divmod(at, MISTAKES_ACROSS)
        y, x = down * cell_y + cell_y - side_y, across * cell_x + (cell_x - side_x) // 2
        mosaic[y : y + side_y, x : x + side_x] = _stretched(images[row])
        guess = int(probabilities[row].argmax())
        axes.text(
            x + side_x / 2, y - 0.06 * side_y,
            f"{class_names[int(targets[row])]} → {class_names[guess]}  "
            f"{probabilities[row, guess]:.2f}",
            ha="center", va="bottom", fontsize=9,
        )  # fmt: skip
    axes.imshow(mosaic, cmap="gray_r", vmin=0, vmax=1, interpolation="nearest", aspect="equal")
    return figure


def first_layer(weights: np.ndarray) -> Figure:
    """Draw what each unit of the first layer looks for: red speaks for it, blue against.

    Args:
        weights: (U, H, W); the units with the largest weights are drawn where there are many.
    """
    units, side_y, side_x = weights.shape
    size = np.sqrt((weights**2).sum(axis=(1, 2)))
    shown = np.sort(np.argsort(-size, kind="stable")[:MAX_UNITS])
    across = math.ceil(math.sqrt(len(shown) * 1.6))
    down = math.ceil(len(shown) / across)
    mosaic = np.full((down * (side_y + 2), across * (side_x + 2)), np.nan)
    for at, unit in enumerate(shown):
        y, x = (at // across) * (side_y + 2) + 1, (at % across) * (side_x + 2) + 1
        mosaic[y : y + side_y, x : x + side_x] = weights[unit]
    width = 9.0
    height = width * mosaic.shape[0] / mosaic.shape[1] + 0.45
    figure = canvas(width, height)
    axes = figure.add_axes((0.01, 0.01, 0.98, 1 - 0.5 / height))
    axes.set_axis_off()
    limit = float(np.quantile(np.abs(weights), 0.995)) or 1.0
    axes.imshow(mosaic, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
    which = f"{units} units" if len(shown) == units else f"the {len(shown)} strongest of {units}"
    figure.text(0.012, 1 - 0.3 / height, f"First-layer weights of {which}", fontsize=11)
    figure.text(
        0.988, 1 - 0.3 / height, f"red +{limit:.2g}, blue -{limit:.2g}",
        fontsize=9, ha="right", color=GREY,
    )  # fmt: skip
    return figure


def _stretched(image: np.ndarray) -> np.ndarray:
    low, high = float(image.min()), float(image.max())
    return (image - low) / (high - low) if high > low else np.zeros_like(image, dtype=float)
