"""Reads a photo or scan of one digit as the small grey image that a model was trained on.

Shapes: `H` rows and `W` columns.
"""

import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps
from scipy import ndimage

from tracklight.errors import BadInput

# Pillow's other readers start programs or decode formats in which no one stores digits.
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")
MAX_PIXELS = 50_000_000
MAX_SIDE = 2048  # a larger page is reduced: more pixels add nothing to a digit and cost seconds
DIGIT_SIDE = 28
DIGIT_BOX = 20  # MNIST fits a digit into a square of this side
MIN_CONTRAST = 16 / 255  # of the largest brightness; blank paper varies by less
BACKGROUND_SIDE = 64  # pixels of the copy in which the paper's brightness is estimated
CLEAN = 5 / 255  # half of a clean page's pixels are this near to the darkest one
BACKGROUND_PERCENTILE = 35
BACKGROUND_WINDOW = 0.5  # of the longer side: wider than any stroke
FAINT = 30 / 255  # ink below this is noise of scanning or compression
NOISE_WIDTHS = 5  # standard deviations of the paper's noise by which ink stands out
INK_THRESHOLD = 0.4  # of the brightness of full ink
MIN_INK_SIDE = 5  # pixels; no digit is legible in less
SPECK = 0.02  # a piece of ink with less than this share of the largest one's mass is dust
LARGE = 0.25  # a piece with this share of the largest one's mass may be a digit
MOST_INK = 0.27  # of an image; 1 in 400 of MNIST's has more
WIDEST = 1.25  # times as wide as high; 1 in 60 of MNIST's is wider
SOFT_EDGE = 0.05  # of the ink's longer side: pixels this near to a stroke are its faint edge


class DigitImage(NamedTuple):
    """Pixels (H, W), uint8 from 0 to 255, light on dark, and notes on how they were made."""

    pixels: np.ndarray
    notes: list[str]


def read_image(path: Path, shape: tuple[int, int], invert: str) -> DigitImage:
    """Read an image file as a light object on dark ground, in the size that a model takes.

    For a model of 28 x 28 images, an image of another size is prepared as MNIST was: the ink is
    separated from the page, fitted into a square of 20 and centred by its mass. `shape` is (H, W)
    of the model; `invert` is `yes`, `no`, or `auto`, which inverts if the border is light.

    Raises:
        BadInput: The file holds no image, or one too large to be decoded, or a blank page.

    Source: http://yann.lecun.com/exdb/mnist.
    """
    grey, notes = _decode(path)
    low, high = float(grey.min()), float(grey.max())
    if high - low <= MIN_CONTRAST * max(abs(low), abs(high)):
        raise BadInput(f"{path}: blank, its pixels differ by less than those of paper do")
    grey = (grey - low) / (high - low)
    border = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    if invert == "yes" or (invert == "auto" and np.median(border) > 0.5):
        grey = 1 - grey
        notes.append("inverted")
    if grey.shape != shape:
        notes.append(f"{grey.shape[1]} x {grey.shape[0]} fitted")
        is_digit = shape == (DIGIT_SIDE, DIGIT_SIDE)
        grey = _center(_separate_ink(grey, path)) if is_digit else _resize(grey, shape)
    return DigitImage(np.round(np.clip(grey, 0, 1) * 255).astype(np.uint8), notes)


def doubts(pixels: np.ndarray) -> list[str]:
    """Say why a digit may be misread: its pixels (H, W), as a model takes them, are unlike MNIST's."""
    grey, found = pixels / 255, list[str]()
    (box,) = ndimage.find_objects((grey > FAINT).astype(int)) or [(slice(0, 1),) * 2]
    height, width = (part.stop - part.start for part in box)
    shift = np.abs(np.array(ndimage.center_of_mass(grey)) - (DIGIT_SIDE - 1) / 2).max()
    if not DIGIT_BOX - 2 <= max(height, width) <= DIGIT_BOX + 1 or shift > 1.5:
        found.append("not centred as in training, which is done for images of any other size")
    _, boxes, masses = _find_pieces(grey, INK_THRESHOLD)
    large = (boxes[i] for i in np.flatnonzero(masses > LARGE * masses.max(initial=0)))
    columns = sorted((box[1].start, box[1].stop) for box in large)
    if width > WIDEST * height or any(a[1] <= b[0] for a, b in pairwise(columns)):
        found.append("more than one digit?")
    if grey.mean() > MOST_INK:
        found.append("much ink, perhaps of what lies around the page")
    return [f"doubtful: {', '.join(found)}"] if found else []


def _decode(path: Path) -> tuple[np.ndarray, list[str]]:
    """Decode the first frame into brightness (H, W), float64, on an arbitrary scale."""
    if not path.is_file():  # opening a named pipe may block for ever
        other = "no regular file" if path.exists() else "there is no such file"
        raise BadInput(f"{path}: {'a directory; name its files' if path.is_dir() else other}")
    notes = []
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=FORMATS) as image:
            width, height = image.size  # so far only the header was read
            if width * height > MAX_PIXELS:
                raise Image.DecompressionBombError(f"{width} x {height} pixels")
            if (num_frames := getattr(image, "n_frames", 1)) > 1:
                notes.append(f"first of {num_frames} frames")
                image.seek(0)
            image.load()
            return _brightness(ImageOps.exif_transpose(image)), notes
    except Image.DecompressionBombError as error:
        size = str(error).partition(" exceeds")[0]
        too_large = f"is more than the {MAX_PIXELS:,} that are decoded; make it smaller"
        raise BadInput(f"{path}: {size} {too_large}") from None
    except Image.UnidentifiedImageError:
        found = "empty" if path.stat().st_size == 0 else "no image"
        raise BadInput(f"{path}: {found}; give one of {', '.join(FORMATS)}") from None
    except Exception as error:  # Pillow raises errors of any kind for damaged files
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise BadInput(f"{path}: cannot be read, {reason or type(error).__name__}") from None


def _brightness(image: Image.Image) -> np.ndarray:
    if image.mode.startswith(("I", "F")):  # 16 and 32 bits, which Pillow would cut, not scale
        values = np.asarray(image, dtype=np.float64)
        if not np.isfinite(values).all():
            raise ValueError("some of its pixels are inf or nan")
        return values
    if image.has_transparency_data:
        grey, alpha = np.array(image.convert("RGBA").convert("LA"), dtype=np.float64).transpose(2, 0, 1)
        alpha /= 255
        ink = grey[alpha > 0.5]
        paper = 255.0 if not len(ink) or ink.mean() < 128 else 0.0  # dark ink is shown on white
        return grey * alpha + paper * (1 - alpha)
    return np.asarray(image.convert("L"), dtype=np.float64)


def _separate_ink(grey: np.ndarray, path: Path) -> np.ndarray:
    """Return the ink of a page, light on dark in [0, 1], with 0 everywhere else."""
    grey = _rescale(grey, min(1.0, MAX_SIDE / max(grey.shape)))
    background = _background(grey)
    ink = (grey - background) / (1 - background.clip(0, 0.9))  # ink has less contrast in a shadow
    noise = 1.4826 * float(np.median(-ink[ink <= 0])) if (ink <= 0).any() else 0.0
    faint = max(FAINT, NOISE_WIDTHS * noise)
    full = float(np.percentile(ink[ink > faint], 90)) if (ink > faint).any() else 0.0
    pieces, boxes, masses = _find_pieces(ink, max(faint, INK_THRESHOLD * full))
    sides = np.array([max(part.stop - part.start for part in box) for box in boxes])
    masses = masses * (sides >= MIN_INK_SIDE)
    if not masses.any():
        raise BadInput(f"{path}: blank, nothing on it is larger than dust")
    written = np.isin(pieces, 1 + np.flatnonzero(masses >= SPECK * masses.max()))
    edge = max(2, round(SOFT_EDGE * sides[masses.argmax()]))
    written = ndimage.binary_dilation(written, np.ones((3, 3)), edge, mask=ink > faint)
    if not background.any() and not (ink[np.logical_not(written)] > faint).any():
        return ink  # a clean page keeps its faintest strokes
    return np.where(written, ink, 0).clip(0, 1)


def _find_pieces(grey: np.ndarray, threshold: float) -> tuple[np.ndarray, list[Any], np.ndarray]:
    """Return the connected pieces of ink: their numbers (H, W), from 1, their boxes and their masses."""
    pieces, num_pieces = ndimage.label(grey > threshold, np.ones((3, 3)))  # pyright: ignore
    masses = ndimage.sum_labels(grey, pieces, np.arange(1, num_pieces + 1))
    return pieces, ndimage.find_objects(pieces), np.asarray(masses)


def _background(grey: np.ndarray) -> np.ndarray:
    """Estimate the page (H, W) without its ink: a plane, and low percentiles of wide windows."""
    small = _rescale(grey, min(1.0, BACKGROUND_SIDE / max(grey.shape)))
    window = round(BACKGROUND_WINDOW * max(small.shape))
    # A narrow cut round a 1 is mostly ink, whose percentiles are no background.
    if np.mean(grey < CLEAN) > 0.5 or min(small.shape) <= window:
        return np.zeros(grey.shape)
    terms = np.stack([*np.indices(small.shape), np.ones(small.shape)], axis=-1)
    plane = terms @ np.linalg.lstsq(terms.reshape(-1, 3), small.ravel())[0]
    low = ndimage.percentile_filter(small - plane, BACKGROUND_PERCENTILE, window, mode="nearest")
    return _resize(plane + low, grey.shape)


def _center(ink: np.ndarray) -> np.ndarray:
    """Fit ink (H, W) into MNIST's box and centre it by its mass."""
    (box,) = ndimage.find_objects((ink > FAINT).astype(int))
    small = _rescale(ink[box], DIGIT_BOX / max(ink[box].shape))
    starts = np.round((DIGIT_SIDE - 1) / 2 - np.array(ndimage.center_of_mass(small))).astype(int)
    top, left = starts.clip(0, DIGIT_SIDE - np.array(small.shape))
    page = np.zeros((DIGIT_SIDE, DIGIT_SIDE))
    page[top : top + small.shape[0], left : left + small.shape[1]] = small / small.max()
    return page


def _rescale(grey: np.ndarray, scale: float) -> np.ndarray:
    return _resize(grey, tuple(max(1, round(side * scale)) for side in grey.shape))


def _resize(grey: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    way = Image.Resampling.BOX if max(grey.shape) > max(shape) else Image.Resampling.BILINEAR
    image = Image.fromarray(grey.astype(np.float32)).resize((shape[1], shape[0]), way)
    return np.asarray(image, dtype=np.float64)
