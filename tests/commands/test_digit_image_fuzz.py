"""Files of any bytes at all, and what else is no picture, before the reader of images."""

import functools
import io
import os
import resource
import struct
import threading
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tracklight.commands import digit_image
from tracklight.errors import BadInput

SHAPE = (28, 28)
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")
MAX_PIXELS = 100_000  # instead of what is allowed: memory must follow from it, not from the file
MAX_KIB = 64 * 1024  # of memory that an example may add to what the process ever had
MOST_S = 5.0
MARKS = (b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"GIF89a", b"BM", b"II*\0", b"MM\0*")
MARKS += (b"RIFF\x20\0\0\0WEBPVP8 ", b"P5 ", b"P6 3 3 255\n", b"Pf 2 2 -1\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digit_image, "MAX_PIXELS", MAX_PIXELS)
        yield tmp_path_factory.mktemp("fuzz")


def check(folder, content, invert="auto"):
    """Read it: an image, or a refusal in one line that names the file."""
    path = folder / "given"
    path.write_bytes(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        found = digit_image.read_image(path, SHAPE, invert)
    except BadInput as error:
        assert str(error).startswith(str(path))
        assert "\n" not in str(error)
    else:
        assert found.pixels.shape == SHAPE
        assert found.pixels.dtype == np.uint8
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MAX_KIB


@functools.cache
def picture(kind, mode):
    """A small picture of noise as the bytes of a file."""
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    image = Image.fromarray(noise).convert("RGB").convert(mode)
    file = io.BytesIO()
    frames = [image.rotate(180)] if kind in ("GIF", "TIFF", "WEBP") else []
    image.save(file, kind, **({"save_all": True, "append_images": frames} if frames else {}))
    return file.getvalue()


def pictures():
    kinds = [(kind, mode) for kind in FORMATS for mode in ("L", "RGB")]
    kinds += [("PNG", "P"), ("PNG", "LA"), ("PNG", "1"), ("TIFF", "F"), ("TIFF", "I"), ("PPM", "F")]
    return st.sampled_from(kinds).map(lambda each: picture(*each))


def mutated(content, changes):
    """The content with some bytes, told by their place as a part of the whole, replaced."""
    found = bytearray(content)
    for place, new in changes:
        at = int(place * (len(found) - 1))
        found[at : at + len(new)] = new
    return bytes(found)


def rechecked(content):
    """A PNG whose checksums hold again, so that a reader looks beyond them."""
    found, at = bytearray(content[:8]), 8
    while at + 12 <= len(content):
        (length,) = struct.unpack_from(">I", content, at)
        body = content[at + 4 : at + 8 + length]
        found += content[at : at + 4] + body + struct.pack(">I", zlib.crc32(body))
        at += 12 + length
    return bytes(found)


FRACTIONS = st.floats(0, 1) | st.floats(0, 0.05)  # headers come first
CHANGES = st.lists(st.tuples(FRACTIONS, st.binary(min_size=1, max_size=8)), max_size=6)
INVERT = st.sampled_from(["auto", "yes", "no"])
thorough = settings(max_examples=400, deadline=MOST_S * 1000, derandomize=True)


@thorough
@given(mark=st.sampled_from(MARKS), rest=st.binary(max_size=600), invert=INVERT)
def test_any_bytes_are_read_or_refused_in_bounded_time_and_memory(folder, mark, rest, invert):
    check(folder, mark + rest, invert)


@thorough
@given(content=pictures(), part=st.floats(0, 1), invert=INVERT)
def test_any_part_of_a_picture_is_read_or_refused(folder, content, part, invert):
    check(folder, content[: round(part * len(content))], invert)


@thorough
@given(content=pictures(), changes=CHANGES, invert=INVERT)
def test_any_change_of_a_picture_is_read_or_refused(folder, content, changes, invert):
    check(folder, mutated(content, changes), invert)


@thorough
@given(mode=st.sampled_from(["L", "RGB", "P", "LA", "1"]), changes=CHANGES)
def test_any_change_beneath_the_checksums_of_a_png_is_read_or_refused(folder, mode, changes):
    check(folder, rechecked(mutated(picture("PNG", mode), changes)))


def half(tmp_path, name):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (99, 99), np.uint8)).save(tmp_path / name)
    return (tmp_path / name).read_bytes()[:-2000]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (lambda _: b"", "empty"),
        (lambda _: b"hello\n", "no image"),
        (lambda _: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image"),
        (lambda folder: half(folder, "a.png"), "cannot be read"),
        (lambda folder: half(folder, "a.jpg"), "cannot be read"),
        (lambda folder: half(folder, "a.bmp"), "cannot be read"),
    ],
)
def test_file_that_is_no_whole_picture_is_named_with_the_reason(tmp_path, content, told):
    path = tmp_path / "given"
    path.write_bytes(content(tmp_path))
    with pytest.raises(BadInput, match=told) as caught:
        digit_image.read_image(path, SHAPE, "auto")
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("side", [28, 99])
def test_pixel_that_is_no_finite_number_is_refused(tmp_path, side, value):
    values = np.zeros((side, side), np.float32)
    values[4:24, 12:15], values[9, 7] = 1, value
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(BadInput, match=r"a\.tif: cannot be read, .* inf or nan"):
        digit_image.read_image(tmp_path / "a.tif", SHAPE, "auto")


def test_named_pipe_is_refused_without_waiting_for_its_writer(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    writer = os.open(tmp_path / "a.png", os.O_RDWR)
    end = threading.Timer(MOST_S, os.close, [writer])  # a reader that waits fails, not hangs
    end.start()
    with pytest.raises(BadInput, match=r"a\.png: no regular file$"):
        digit_image.read_image(tmp_path / "a.png", SHAPE, "auto")
    end.cancel()
    os.close(writer)


def test_a_very_large_page_is_looked_at_in_a_smaller_copy(tmp_path, monkeypatch):
    seen, background = [], digit_image._background
    monkeypatch.setattr(digit_image, "_background", lambda grey: seen.append(grey.shape) or background(grey))
    monkeypatch.setattr(digit_image, "MAX_SIDE", 150)
    page = np.full((120, 300), 255, np.uint8)
    page[30:90, 140:146] = 0
    Image.fromarray(page).save(tmp_path / "page.png")
    found = digit_image.read_image(tmp_path / "page.png", (28, 28), "auto").pixels
    assert seen == [(60, 150)]
    rows, columns = np.nonzero(found > 128)
    assert (np.ptp(rows) + 1, np.ptp(columns) + 1) == (20, 2)  # a tenth as wide as it is high
