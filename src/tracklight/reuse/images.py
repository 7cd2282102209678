"""Pictures of any make as the small grey images that a model was trained on.

Shapes: `H` rows and `W` columns.
"""

import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from tracklight.errors import BadInput
from tracklight.reuse.ink import FAINT, find_ink, resized

# Pillow's other readers start programs or decode what no one scans digits into.
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")
MAX_PIXELS = 50_000_000
DIGIT_SIDE = 28
DIGIT_BOX = 20  # MNIST fits a digit into a square of this side
CONTRAST = 16 / 255  # paper varies by less, as a part of its brightest, where nothing is written
MARGIN = 0.1  # of the shorter side, from the border inwards: more paper there than frame


class Read(NamedTuple):
    """An image (H, W) of bytes, light on dark, and what was done to it."""

    pixels: np.ndarray
    notes: list[str]


def read_image(path: Path, shape: tuple[int, int], invert: str) -> Read:
    """Read a picture of a light thing on dark ground, or the reverse, in the size asked for.

    A picture of another size than 28 x 28 is made as MNIST's were: the ink is cut out, fitted
    into a square of 20 and centred by its mass. Shadows, noise, dust and frames are no ink.

    Args:
        path: The file.
        shape: Rows and columns that the model takes.
        invert: `yes`, `no`, or `auto`: a light border means that the picture is the reverse.

    Returns:
        Pixels (H, W), uint8, from 0 to 255, full contrast.

    Raises:
        BadInput: There is no picture in the file, or one that is too large, which is then not
            decoded; or the page is blank.

    Source: http://yann.lecun.com/exdb/mnist, "a 20x20 pixel box while preserving their aspect
    ratio [...] centered in a 28x28 image by computing the center of mass".
    """
    grey, notes = _grey(path)
    low, high = float(grey.min()), float(grey.max())
    if high <= low:
        raise BadInput(f"{path}: blank, all pixels are the same")
    if high - low < CONTRAST * max(abs(low), abs(high)):
        raise BadInput(f"{path}: blank, its pixels differ by less than those of paper do")
    grey = (grey - low) / (high - low)
    if invert == "yes" or (invert == "auto" and _is_light(grey)):
        grey = 1 - grey
        notes.append("inverted")
    if grey.shape != shape:
        notes.append(f"{grey.shape[1]} x {grey.shape[0]} fitted")
        digit = shape == (DIGIT_SIDE, DIGIT_SIDE)
        grey = _centred(find_ink(grey, path)) if digit else resized(grey, shape)
    return Read(np.round(np.clip(grey, 0, 1) * 255).astype(np.uint8), notes)


def _grey(path: Path) -> tuple[np.ndarray, list[str]]:
    """Decode the first frame into brightness (H, W), float64, on an arbitrary scale."""
    if path.is_dir():
        raise BadInput(f"{path}: a directory; name its files")
    if path.exists() and not path.is_file():
        raise BadInput(f"{path}: no regular file")  # opening a named pipe may take for ever
    notes = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=FORMATS) as image:  # reads the header alone
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise BadInput(_too_large(path, f"{width} x {height} pixels"))
                if getattr(image, "n_frames", 1) > 1:
                    notes.append(f"first of {getattr(image, 'n_frames', 1)} frames")
                    image.seek(0)
                image.load()
                return _brightness(ImageOps.exif_transpose(image)), notes
    except Image.DecompressionBombError as error:
        raise BadInput(_too_large(path, str(error).partition(" exceeds")[0])) from None
    except FileNotFoundError:
        raise BadInput(f"{path}: there is no such file") from None
    except Image.UnidentifiedImageError:
        empty = "empty" if path.stat().st_size == 0 else "no image"
        raise BadInput(f"{path}: {empty}; give one of {', '.join(FORMATS)}") from None
    except BadInput:
        raise
    except Exception as error:  # Pillow's readers raise whatever damaged files lead them to
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise BadInput(f"{path}: cannot be read, {reason or type(error).__name__}") from None


def _brightness(image: Image.Image) -> np.ndarray:
    if image.mode.startswith(("I", "F")):  # 16 and 32 bits, which Pillow would cut, not scale
        values = np.asarray(image, dtype=np.float64)
        if not np.isfinite(values).all():
            raise ValueError("some of its pixels are inf or nan")
        return values
    if image.mode in ("P", "PA", "LA", "La", "RGBa", "RGBA") or "transparency" in image.info:
        colour = image.convert("RGBA")
        alpha = np.asarray(colour.getchannel("A"), dtype=np.float64) / 255
        grey = np.asarray(colour.convert("L"), dtype=np.float64)
        if alpha.min() == 1:
            return grey
        ink = grey[alpha > 0.5]
        # Dark ink is seen on white, light ink on black.
        paper = 255.0 if not len(ink) or ink.mean() < 128 else 0.0
        return grey * alpha + paper * (1 - alpha)
    return np.asarray(image.convert("L"), dtype=np.float64)


def _is_light(grey: np.ndarray) -> bool:
    """Tell whether paper is light by the margin, ring by ring: a frame fills few of them."""
    depths = range(1 + round(MARGIN * min(grey.shape)))
    rings = [grey[d : grey.shape[0] - d, d : grey.shape[1] - d] for d in depths]
    borders = [np.concatenate([ring[0], ring[-1], ring[:, 0], ring[:, -1]]) for ring in rings]
    return float(np.median([np.median(border) for border in borders])) > 0.5


def _centred(grey: np.ndarray) -> np.ndarray:
    """Fit ink (H, W) into the box of a digit's page, by its centre of mass."""
    ink = grey > FAINT
    rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
    cut = grey[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    scale = DIGIT_BOX / max(cut.shape)
    height, width = max(1, round(cut.shape[0] * scale)), max(1, round(cut.shape[1] * scale))
    small = resized(cut, (height, width))
    small /= small.max()
    mass = small.sum()
    centre_y = (small.sum(axis=1) * np.arange(height)).sum() / mass
    centre_x = (small.sum(axis=0) * np.arange(width)).sum() / mass
    top = _within(round((DIGIT_SIDE - 1) / 2 - centre_y), DIGIT_SIDE - height)
    left = _within(round((DIGIT_SIDE - 1) / 2 - centre_x), DIGIT_SIDE - width)
    page = np.zeros((DIGIT_SIDE, DIGIT_SIDE))
    page[top : top + height, left : left + width] = small
    return page


def _within(value: int, most: int) -> int:
    return min(max(value, 0), most)


def _too_large(path: Path, what: str) -> str:
    return f"{path}: {what} is more than the {MAX_PIXELS:,} that are decoded; make it smaller"
