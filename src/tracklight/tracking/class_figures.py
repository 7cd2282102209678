"""What a classifier has learned: which classes it mixes up, where it is wrong, what it looks for.

Shapes: `K` classes, `N` examples, `U` units, `H` rows and `W` columns of an image.
"""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from tracklight.tracking.figures import GREY, canvas

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
