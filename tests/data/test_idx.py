import gzip
import os
import struct
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from idx_encoding import idx_bytes
from torchvision.datasets.mnist import read_image_file, read_label_file

from tracklight.data.mnist import check_labels, read_idx
from tracklight.errors import BadInput

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
GOOD = idx_bytes(IMAGES)
PACKED = gzip.compress(GOOD, mtime=0)  # the time would make the names of tests differ


def decoded(content: bytes, shape: tuple[int, ...]) -> np.ndarray | None:
    """The examples that `content` encodes by the letter of the format, None where it does not."""
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except Exception:
            return None
    start = 8 + 4 * len(shape)
    if len(content) <= start or content[:4] != bytes([0, 0, 8, 1 + len(shape)]):
        return None
    dimensions = struct.unpack(f">{1 + len(shape)}I", content[4:start])
    if dimensions[1:] != shape or dimensions[0] * int(np.prod(shape)) != len(content) - start:
        return None
    return np.array(list(content[start:]), dtype=np.uint8).reshape(dimensions)


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_reads_what_torchvision_reads(tmp_path, pack):
    labels = np.arange(10)
    (tmp_path / "i").write_bytes(GOOD)
    (tmp_path / "l").write_bytes(idx_bytes(labels))
    (tmp_path / "images").write_bytes(pack(GOOD))
    (tmp_path / "labels").write_bytes(pack(idx_bytes(labels)))
    images = read_idx(tmp_path / "images", (28, 28))
    assert images.dtype == torch.uint8
    assert torch.equal(images, read_image_file(str(tmp_path / "i")))
    assert torch.equal(read_idx(tmp_path / "labels", ()).long(), read_label_file(str(tmp_path / "l")))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes, expected at least a header of 16"),
        (GOOD[:10], "10 bytes, expected at least a header of 16"),
        (GOOD[:-1], "truncated: 3935 bytes, expected 3936"),
        (GOOD + b"x", "trailing bytes: 3937 bytes, expected 3936"),
        (b"\x00\x00\x0d\x03" + GOOD[4:], "magic number 0x00000d03, expected 0x00000803"),
        (idx_bytes(np.zeros(9)), "magic number 0x00000801, expected 0x00000803"),
        (b"hello, world", "magic number 0x68656c6c"),
        (idx_bytes(np.zeros((2, 32, 32))), "examples of 32x32, expected 28x28"),
        (idx_bytes(np.zeros((0, 28, 28))), "0 examples"),
        (PACKED[:-20], "ends early"),
        (PACKED[:5], "ends early"),
        (gzip.compress(GOOD[:-1], mtime=0), "truncated: 3935 bytes"),
        (gzip.compress(GOOD + b"x", mtime=0), "trailing bytes: 3937 bytes"),
        (PACKED + b"garbage", "damaged gzip"),
        (PACKED[:-8] + b"\0" * 8, "damaged gzip"),
    ],
)
def test_a_faulty_file_is_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(content)
    with pytest.raises(BadInput) as error:
        read_idx(path, (28, 28))
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_lying_header_claims_no_memory(tmp_path, pack):
    path = tmp_path / "images"
    path.write_bytes(pack(struct.pack(">BBBBIII", 0, 0, 8, 3, 2**32 - 1, 28, 28) + bytes(100_000)))
    tracemalloc.start()
    with pytest.raises(BadInput, match="truncated"):
        read_idx(path, (28, 28))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8_000_000


@pytest.mark.parametrize("pack", [bytes, lambda content: gzip.compress(content, 1)])
def test_reading_needs_little_more_memory_than_the_images(tmp_path, pack):
    images = np.random.default_rng(0).integers(0, 256, (20_000, 28, 28), dtype=np.uint8)
    path = tmp_path / "images"
    path.write_bytes(pack(idx_bytes(images)))
    tracemalloc.start()
    read = read_idx(path, (28, 28))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.array_equal(read, images)
    assert peak < 1.5 * images.nbytes


def test_a_path_that_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for a writer for ever
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "absent", tmp_path / ("long" * 100)):
        with pytest.raises(BadInput) as error:
            read_idx(path, ())
        assert str(error.value).startswith(f"{path}: ")


def test_the_first_label_out_of_range_is_named():
    labels = torch.tensor([0, 9, 200, 10], dtype=torch.uint8)
    check_labels("labels", labels[:2], 10)
    with pytest.raises(BadInput, match="labels: label 200 at position 2; expected 0 to 9"):
        check_labels("labels", labels, 10)


@given(
    count=st.integers(1, 3),
    shape=st.sampled_from([(), (2,), (28, 28)]),
    edits=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 255)), max_size=3),
    cut=st.integers(0, 40),
    tail=st.binary(max_size=5),
    zipped=st.booleans(),
)
@example(count=2, shape=(28, 28), edits=[], cut=0, tail=b"", zipped=False)
@example(count=2, shape=(28, 28), edits=[], cut=0, tail=b"", zipped=True)
@example(count=2, shape=(), edits=[], cut=1, tail=b"x", zipped=False)
def test_a_damaged_file_is_read_right_or_refused(tmp_path_factory, count, shape, edits, cut, tail, zipped):
    content = idx_bytes(np.arange(count * int(np.prod(shape))).reshape(count, *shape) % 256)
    content = bytearray(gzip.compress(content, mtime=0) if zipped else content)
    for position, value in edits:
        if position < len(content):
            content[position] = value
    content = bytes(content[: len(content) - cut]) + tail
    assert_right_or_refused(tmp_path_factory.getbasetemp() / "damaged", content, shape)


@given(content=st.binary(max_size=60), opening=st.sampled_from([b"", b"\0\0\x08\x01", b"\x1f\x8b\x08"]))
def test_arbitrary_bytes_are_read_right_or_refused(tmp_path_factory, content, opening):
    assert_right_or_refused(tmp_path_factory.getbasetemp() / "arbitrary", opening + content, ())


def assert_right_or_refused(path, content, shape):
    path.write_bytes(content)
    expected = decoded(content, shape)
    if expected is None:
        with pytest.raises(BadInput) as error:
            read_idx(path, shape)
        assert "\n" not in str(error.value)
    else:
        assert np.array_equal(read_idx(path, shape), expected)
