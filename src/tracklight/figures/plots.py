"""Draws learning curves, the fit of a regression and the errors of a classifier, without pyplot.

Shapes: `N` examples, `T` targets, `K` classes, `U` units, `H` and `W` an image's height and width.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter
from PIL import Image

Series = Mapping[str, tuple[Sequence[int], Sequence[float]]]  # metric to its steps and values
Pairs = Mapping[str, tuple[np.ndarray, np.ndarray]]  # split to x and y, of one shape

RED, GREY, PURPLE = "#c23b3b", "#8a8f98", "#7a5aa6"  # purple: metrics without a stage
STAGES = {"train": "#2f6db3", "val": "#d9822b", "test": "#3a8f5c"}
STAGED = re.compile("(train|val|valid|validation|test)[/_](.+)")
OMITTED = re.compile(r"(system|gradient|evaluate|best|sweep|ols)/.*|DeviceStats.*|score|epoch")
MAX_DRAWN = 400  # points of a line, and half of those in a scatter plot
MAX_PANELS = 4
MAX_NAME = 48  # more characters of a metric would run into the next panel
LOG_FROM = 5.0  # a positive metric that spans this factor is mostly flat on a linear axis
MAX_NAMED = 20  # more classes than this are drawn without numbers in the cells
MISTAKES, MISTAKES_ACROSS = 24, 8  # images, and those in a row
MAX_UNITS = 144


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG of 256 colours, which takes a third of the bytes; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    drawn = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    drawn.quantize(method=Image.Quantize.MAXCOVERAGE).save(path)


def learning_curves(series: Series, best_step: int | None = None) -> Figure:
    """Draw each metric over optimizer steps, its stages in one panel, and mark the best checkpoint.

    Metrics are named `stage/name` or `stage_name`; others have a panel of their own, after these.
    `loss`, `loss_step` and `loss_epoch` of one stage share a panel. Metrics with fewer than two
    finite points in all their stages, and those logged beside training, are left out.
    """
    panels = _panels(series)
    num = max(1, len(panels))
    columns = {"ncols": num, "sharex": True, "gridspec_kw": {"wspace": 0.22}}
    figure, *grid = _subplots(5.2 * num + 0.5, 3.9, (0.85, 0.15, 0.55, 0.62), **columns)
    for axes, curves in zip(grid, panels, strict=False):
        for curve in curves:
            _draw_curve(axes, curve, best_step)
        name = curves[0].name.replace("_", " ")
        name = name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 1]}…"
        _style(axes, name, "optimizer steps", "", title_pad=24)
        axes.tick_params(labelsize=9)
        axes.margins(y=0.08)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        _scale_y(axes, curves)
        if best_step:
            axes.axvline(best_step, color=GREY, linewidth=1, linestyle=":", label="best")
        spacing = {"handlelength": 1.3, "handletextpad": 0.5, "columnspacing": 1, "borderpad": 0.3}
        place = {"loc": "lower left", "bbox_to_anchor": (-0.02, 0.98)}  # covers no curve there
        axes.legend(frameon=False, fontsize=8.5, ncols=5, **place, **spacing)
    if not panels:
        _style(grid[0], "no metric was logged twice", "optimizer steps", "")
    return figure


def fitted_line(points: Pairs, line: tuple[np.ndarray, np.ndarray], x_name: str, title: str) -> Figure:
    """Draw targets (N,) over the one feature (N,) of a regression, and the fitted line."""
    figure, axes = _subplots(6.0, 4.0)
    _scatter(axes, points)
    axes.plot(*line, color=RED, linewidth=1.8, label="fitted line")
    _style(axes, title, x_name, "target")
    axes.legend(frameon=False, fontsize=9)
    return figure


def predicted_against_true(points: Pairs) -> Figure:
    """Draw predictions (N, T) over targets (N, T): on the diagonal they agree."""
    figure, axes = _subplots(6.0, 4.0)
    _scatter(axes, points)
    values = np.concatenate([array.ravel() for pair in points.values() for array in pair])
    ends = (values.min(), values.max())
    axes.plot(ends, ends, color=RED, linewidth=1.4, label="prediction = target")
    _style(axes, "Predicted against true", "target", "prediction")
    axes.legend(frameon=False, fontsize=9)
    return figure


def residuals(points: Pairs) -> Figure:
    """Draw targets (N, T) minus predictions (N, T) over predictions, and their histogram."""
    grid = {"width_ratios": (3, 1), "wspace": 0.06}
    figure, cloud, histogram = _subplots(7.2, 3.7, ncols=2, sharey=True, gridspec_kw=grid)
    pairs = {split: (predicted, true - predicted) for split, (true, predicted) in points.items()}
    _scatter(cloud, pairs)
    every = np.concatenate([difference.ravel() for _, difference in pairs.values()])
    bins = np.linspace(every.min(), every.max() + 1e-12, min(30, max(13, every.size // 8)))
    rmse = []
    for split, (_, difference) in pairs.items():
        weights = np.full(difference.size, 1 / difference.size)
        look = {"color": STAGES[split], "alpha": 0.6, "orientation": "horizontal"}
        histogram.hist(difference.ravel(), bins=bins.tolist(), weights=weights, **look)
        rmse.append(f"{split}: RMSE {np.sqrt(np.mean(difference**2)):.4g}")
    for axes in (cloud, histogram):
        axes.axhline(0, color=RED, linewidth=1.2)
    _style(cloud, "Residuals   " + ",  ".join(rmse), "prediction", "target - prediction")
    _style(histogram, "", "share", "")
    histogram.set_xticks([])
    cloud.legend(frameon=False, fontsize=9)
    return figure


def confusion(counts: np.ndarray, class_names: Sequence[str], split: str) -> Figure:
    """Draw the confusion matrix of counts (K, K), whose rows are true classes."""
    num_classes, total, right = len(counts), int(counts.sum()), int(np.trace(counts))
    # Empty rows stay white; mistakes are what one looks for, so they get the colour scale.
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    mistakes = shares * (1 - np.eye(num_classes))
    side = min(9.0, 2.4 + 0.42 * num_classes)
    figure, axes = _subplots(side, side, (1.0, 0.15, 1.0, 0.5))
    top = max(mistakes.max(), 1e-9)
    axes.imshow(mistakes, cmap="OrRd", vmin=0, vmax=top * 1.1, aspect="auto")
    if num_classes <= MAX_NAMED:
        for i, j in np.argwhere(counts > 0):
            colour = "white" if mistakes[i, j] > 0.6 * top else "#1f2328"
            look = {"color": colour, "fontweight": "bold" if i == j else "normal", "fontsize": 9}
            axes.text(j, i, f"{counts[i, j]}", ha="center", va="center", **look)
        wide = max(map(len, class_names)) > 4
        axes.set_xticks(range(num_classes), class_names, rotation=90 if wide else 0)
        axes.set_yticks(range(num_classes), class_names)
    axes.set(xlabel="predicted class", ylabel="true class")
    share = f"({right / max(total, 1):.2%})"
    axes.set_title(f"{split}: {right:,} of {total:,} right {share}", fontsize=11, loc="left")
    axes.tick_params(length=0)
    return figure


def worst_mistakes(probabilities: np.ndarray, targets: np.ndarray, count: int = MISTAKES) -> np.ndarray:
    """Return up to `count` wrong rows of probabilities (N, K), the most confident first."""
    wrong = np.flatnonzero(probabilities.argmax(axis=1) != targets)
    return wrong[np.argsort(-probabilities[wrong].max(axis=1), kind="stable")][:count]


def mistakes(
    images: np.ndarray, probabilities: np.ndarray, targets: np.ndarray, class_names: Sequence[str], split: str
) -> Figure:
    """Draw the images (N, H, W) of the most confident mistakes in probabilities (N, K)."""
    rows = worst_mistakes(probabilities, targets)
    predicted = probabilities.argmax(axis=1)
    num_wrong = int((predicted != targets).sum())
    title = f"the most confident of {num_wrong:,} mistakes   (true → predicted, probability)"
    shown = images[rows].astype(float)
    low, high = (edge(shown, axis=(1, 2), keepdims=True) for edge in (np.min, np.max))
    shown = (shown - low) / np.where(high > low, high - low, 1)
    height, width = images.shape[1:]
    gaps, look = (round(height * 0.35), round(width * 0.12)), {"cmap": "gray_r", "vmin": 0, "vmax": 1}
    title = f"{split}: {title if num_wrong else 'no mistake'}"
    figure, axes, corners = _draw_mosaic(shown, MISTAKES_ACROSS, gaps, title, **look)
    for row, (y, x) in zip(rows, corners, strict=True):
        names = f"{class_names[int(targets[row])]} → {class_names[predicted[row]]}"
        label, at = f"{names}  {probabilities[row, predicted[row]]:.2f}", x + width / 2
        axes.text(at, y - 0.06 * height, label, ha="center", va="bottom", fontsize=9)
    return figure


def first_layer(weights: np.ndarray) -> Figure:
    """Draw weights (U, H, W) as images; of many units, those with the largest weights."""
    size = np.sqrt((weights**2).sum(axis=(1, 2)))
    shown = weights[np.sort(np.argsort(-size, kind="stable")[:MAX_UNITS])]
    across = int(np.ceil(np.sqrt(len(shown) * 1.6)))
    limit = float(np.quantile(np.abs(weights), 0.995)) or 1.0
    units = len(weights)
    which = f"{units} units" if len(shown) == units else f"the {len(shown)} strongest of {units}"
    title = f"First-layer weights of {which} (red +{limit:.2g}, blue -{limit:.2g})"
    look = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit}
    return _draw_mosaic(shown, across, (2, 2), title, **look)[0]


def _subplots(
    width: float, height: float, margins: Sequence[float] = (0.85, 0.15, 0.55, 0.4), **options: Any
) -> Any:
    """Return a figure and each of its axes; sizes, and margins (left to top), are in inches."""
    figure = Figure(figsize=(width, height), dpi=110)
    (grid,) = figure.subplots(squeeze=False, **options)
    left, right, bottom, top = margins
    figure.subplots_adjust(left / width, bottom / height, 1 - right / width, 1 - top / height)
    return figure, *grid


def _style(axes: Axes, title: str, x: str, y: str, title_pad: float = 6.0) -> None:
    """Give axes the look all figures share; the title stands `title_pad` points above them."""
    # Without a height, all tick labels would be measured for it.
    axes.set_title(title, fontsize=11, loc="left", pad=title_pad, y=1.0)
    axes.set(xlabel=x, ylabel=y)
    axes.grid(True, color="#e6e8eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


class _Curve(NamedTuple):
    stage: str  # of STAGES, or empty
    name: str  # of the metric, without stage and kind
    kind: str  # step or epoch where both may be logged; else empty
    x: np.ndarray
    y: np.ndarray


def _panels(series: Series) -> list[list[_Curve]]:
    panels: dict[tuple[bool, str], list[_Curve]] = {}
    for key in sorted(series):
        curve = None if OMITTED.fullmatch(key) else _curve(key, series)
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
    """Parse a metric's name; None where its means over epochs are drawn instead."""
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
    points = np.asarray(series[key], dtype=float)
    points = points[:, np.argsort(points[0], kind="stable")]
    return _Curve(stage, panel, kind, *points[:, np.isfinite(points[1])])


def _draw_curve(axes: Axes, curve: _Curve, best_step: int | None) -> None:
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


def _scale_y(axes: Axes, curves: Sequence[_Curve]) -> None:
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


def _thinned(x: np.ndarray, y: np.ndarray) -> list[np.ndarray]:
    """Average neighbours so that at most `MAX_DRAWN` points are left."""
    num = min(len(x), MAX_DRAWN)
    return [np.array([part.mean() for part in np.array_split(each, num)]) for each in (x, y)]


def _scatter(axes: Axes, points: Pairs) -> None:
    """Draw at most twice `MAX_DRAWN` rows of each split, evenly spread."""
    for split, (x, y) in points.items():
        rows = np.unique(np.linspace(0, len(x) - 1, min(len(x), 2 * MAX_DRAWN)).astype(int))
        look = {"s": 40 if len(x) <= 20 else 16, "color": STAGES[split], "alpha": 0.8}
        axes.scatter(x[rows].ravel(), y[rows].ravel(), linewidths=0, label=split, **look)


def _draw_mosaic(
    images: np.ndarray, across: int, gaps: tuple[int, int], title: str, **options: Any
) -> tuple[Figure, Axes, list[tuple[int, int]]]:
    """Draw images (N, H, W) in rows, gaps above and beside them; return their corners too."""
    num, height, width = images.shape
    cell_y, cell_x = height + gaps[0], width + gaps[1]
    corners = [(i // across * cell_y + gaps[0], i % across * cell_x + gaps[1] // 2) for i in range(num)]
    mosaic = np.full((max(1, -(-num // across)) * cell_y, across * cell_x), np.nan)
    for image, (y, x) in zip(images, corners, strict=True):
        mosaic[y : y + height, x : x + width] = image
    figure, axes = _subplots(9.0, 8.8 * mosaic.shape[0] / mosaic.shape[1] + 0.5, (0.1, 0.1, 0.1, 0.4))
    axes.set_axis_off()
    axes.set_title(title, fontsize=11, loc="left")
    axes.imshow(mosaic, interpolation="nearest", **options)
    return figure, axes, corners
