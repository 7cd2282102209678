"""What is written on a photographed or scanned page: shadows, noise, dust and frames are no ink.

Shapes: `H` rows and `W` columns of a page.
"""

from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

from tracklight.errors import BadInput

MAX_SIDE = 2048  # more pixels tell no more of a digit, and cost seconds
FAINT = 30 / 255  # ink below this is noise of scanning or compression
CLEAN = 5 / 255  # as near to one extreme of brightness is the ground of a page without shadows
NOISE_WIDTHS = 5  # standard deviations of the paper's noise that ink stands out by
INK_PART = 0.8  # of Otsu's threshold: the faint parts of a stroke are ink, too
MIN_INK_SIDE = 5  # pixels; no digit is legible in less
DUST = 0.02  # a piece of less than this part of the largest one's mass is dust
MAX_PIECES = 50  # that are looked at, the largest, where a texture falls into thousands
SOFT_PART = 0.05  # of the ink's longer side: as far from a stroke its faint edge is ink, too
SOFT_EDGE = 2  # pixels round ink that are partly ink
FRAMED = 0.25  # what stands in a frame or on a page has at least this part of its height
THUMBNAIL_SIDE = 128  # the ground is smooth, and a small copy shows it
SHADOW = 0.35  # of the longer side: strokes are narrower, what is wider is a shadow
NUM_FITS = 30  # of the ground; few change anything
INK_WEIGHT = 0.02  # of what lies above a fit to the ground, where ink is, against what lies below

Box = tuple[slice, slice]


def find_ink(grey: np.ndarray, path: Path) -> np.ndarray:
    """Return what is written on a page, light on dark, with 0 everywhere else.

    Args:
        grey: (H, W), from 0 to 1; a very large page is looked at in a smaller copy.
        path: Its file, for the message.

    Returns:
        (H, W), of the copy.

    Raises:
        BadInput: Nothing is written.
    """
    grey = _limited(grey)
    ground = _ground(grey)
    flat = (grey - ground) / (1 - ground.clip(0, 0.9))  # in a shadow, ink differs less from paper
    faint = max(FAINT, NOISE_WIDTHS * _noise(flat))
    pieces, _ = ndimage.label(flat > max(faint, INK_PART * _otsu(flat)), np.ones((3, 3)))  # pyright: ignore
    written = np.isin(pieces, _written(flat, pieces))
    if not written.any():
        raise BadInput(f"{path}: blank, nothing on it is larger than dust")
    reach = round(SOFT_PART * max(_sides(ndimage.find_objects(written.astype(int))[0])))
    if reach:  # none would mean: as far as it goes
        written = ndimage.binary_dilation(written, np.ones((3, 3)), reach, flat > faint)
    soft = ndimage.binary_dilation(written, np.ones((3, 3)), SOFT_EDGE)
    if np.abs(ground).max() < CLEAN and not (grey[np.logical_not(soft)] > FAINT).any():
        return grey  # a clean page has nothing to be rid of
    return np.where(soft, flat, 0).clip(0, 1)


def _ground(grey: np.ndarray) -> np.ndarray:
    """Estimate a page (H, W), light on dark, without its ink.

    It is a quadratic surface under uneven light, and what remains above it that is wider than
    strokes are: a shadow with an edge.
    """
    scale = min(1.0, THUMBNAIL_SIDE / max(grey.shape))
    height, width = (max(1, round(side * scale)) for side in grey.shape)
    small = resized(grey, (height, width))
    span = max(1, round(SHADOW * max(small.shape)))
    if min(small.shape) <= span:  # a close cut round a 1, mostly ink: a surface would fit the ink
        return np.zeros(grey.shape)
    smooth = _lower_surface(small)
    # Outside is below everything, so that no stroke seems wide by being cut off at the border.
    wide = ndimage.grey_opening(small - smooth, (span, span), mode="constant", cval=-1)
    return resized(smooth + wide.clip(0), grey.shape)


def _lower_surface(values: np.ndarray) -> np.ndarray:
    """Fit a quadratic surface to the dark parts of values (H, W).

    Source: P. Eilers, H. Boelens, "Baseline correction with asymmetric least squares smoothing",
    2005; here with a polynomial, and at last with paper alone, at equal weights.
    """
    rows, columns = np.indices(values.shape) / max(values.shape)
    terms = np.stack([rows**i * columns**j for i in range(3) for j in range(3 - i)], axis=-1)
    terms, known = terms.reshape(values.size, -1), values.ravel()
    weights = np.ones_like(known)
    fit = known
    for step in range(NUM_FITS):
        scaled = terms * weights[:, None]
        fit = terms @ np.linalg.lstsq(terms.T @ scaled, scaled.T @ known)[0]
        above = known - fit
        if step < NUM_FITS // 2:
            weights = np.where(above > 0, INK_WEIGHT, 1)
        else:
            weights = (above <= max(0.02, 3 * _noise(above))).astype(float)
    return fit.reshape(values.shape)


def _noise(above: np.ndarray) -> float:
    """Return the standard deviation of what is below the ground: ink is above, noise is both."""
    below = above[above < 0]
    return float(np.sqrt(np.mean(below**2))) if below.size else 0.0


def _otsu(values: np.ndarray) -> float:
    """Return the threshold that parts values in [0, 1] into the two most distinct classes.

    Source: N. Otsu, "A threshold selection method from gray-level histograms", 1979.
    """
    counts, edges = np.histogram(values.clip(0, 1), 256, (0, 1))
    share = counts.cumsum() / values.size
    mean = (counts * edges[1:]).cumsum() / values.size
    parts = share * (1 - share)
    between = (mean[-1] * share - mean) ** 2 / np.where(parts > 0, parts, np.inf)
    # Between two levels without any other all thresholds do as well: the middle is the safest.
    return float(edges[1:][between >= between.max() * (1 - 1e-9)].mean())


def _written(flat: np.ndarray, pieces: np.ndarray) -> list[int]:
    """Return the numbers of those pieces of ink that are neither dust nor a frame nor an edge."""
    boxes = ndimage.find_objects(pieces)
    masses = ndimage.sum_labels(flat, pieces, np.arange(1, len(boxes) + 1))
    large = [i for i, box in enumerate(boxes) if max(_sides(box)) >= MIN_INK_SIDE]
    large = sorted(large, key=lambda i: -masses[i])[:MAX_PIECES]
    large = [i for i in large if not any(_frames(pieces, boxes, i, other) for other in large)]
    inner = [i for i in large if not _touches(boxes[i], flat.shape)]
    if any(_sides(boxes[i])[0] >= FRAMED * flat.shape[0] for i in inner):
        large = inner  # the rest is the edge of a sheet or a shadow
    return [i + 1 for i in large if masses[i] >= DUST * masses[large].max()]


def _sides(box: Box) -> tuple[int, int]:
    return box[0].stop - box[0].start, box[1].stop - box[1].start


def _touches(box: Box, shape: tuple[int, ...]) -> bool:
    return any(part.start == 0 or part.stop == side for part, side in zip(box, shape, strict=True))


def _frames(pieces: np.ndarray, boxes: list[Box], one: int, other: int) -> bool:
    """Tell whether a piece stands round another one and leaves the whole box of that free."""
    around, box = boxes[one], boxes[other]
    ends = zip(around, box, strict=True)
    inside = all(outer.start < part.start and part.stop < outer.stop for outer, part in ends)
    tall = _sides(box)[0] >= FRAMED * _sides(around)[0]
    return inside and tall and not (pieces[box] == one + 1).any()


def _limited(grey: np.ndarray) -> np.ndarray:
    scale = min(1.0, MAX_SIDE / max(grey.shape))
    height, width = (max(1, round(side * scale)) for side in grey.shape)
    return grey if scale == 1 else resized(grey, (height, width))


def resized(grey: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Resize brightness (H, W) to another shape."""
    image = Image.fromarray(grey.astype(np.float32))
    shrinks = max(grey.shape) > max(shape)  # a box then averages the pixels that fall together
    way = Image.Resampling.BOX if shrinks else Image.Resampling.BILINEAR
    return np.asarray(image.resize((shape[1], shape[0]), way), dtype=np.float64)
