"""Pictures of any make as the small grey images that a model was trained on.

Shapes: `H` rows and `W` columns.
"""

import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps
from scipy import ndimage

from tracklight.errors import BadInput

pass

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
