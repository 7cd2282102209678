"""A strict reader of IDX files, the format MNIST is published in, plain or gzipped.

Layout (big endian): two zero bytes, element type, number of dimensions, each dimension as uint32,
then the elements. Source: the MNIST page of LeCun, Cortes and Burges, "File formats".

Shapes: `N` examples.
"""

import gzip
import io
import math
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tracklight.errors import BadInput

UNSIGNED_BYTE = 0x08
GZIP_MAGIC = b"\x1f\x8b"
CHUNK = 1 << 20  # bytes unpacked at a time: gzip copies what it hands out


def read_idx(path: str | os.PathLike[str], shape: tuple[int, ...]) -> Tensor:
    """Read an IDX file of unsigned bytes straight into one buffer.

    The header is believed only as far as the file's size bears it out, so memory stays in
    proportion to what the file holds.

    Args:
        path: File, plain or gzipped (told by content, not by suffix).
        shape: Shape each example must have: `(28, 28)` for images, `()` for labels.

    Returns:
        uint8, (N, *shape), N >= 1; writable and owned by the caller.

    Raises:
        BadInput: The file cannot be read or is anything but exactly such an IDX file.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise BadInput(f"{path}: not a regular file, expected an IDX file")
        with path.open("rb") as file:
            if file.peek(2)[:2] != GZIP_MAGIC:
                return _parse(path, file, shape, os.fstat(file.fileno()).st_size)
            with gzip.GzipFile(fileobj=file) as unpacked:
                size = sum(map(len, iter(lambda: unpacked.read(CHUNK), b"")))  # checks the CRC, too
                unpacked.seek(0)
                return _parse(path, unpacked, shape, size)
    except EOFError:
        raise BadInput(f"{path}: the gzip stream ends early; fetch the file again") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise BadInput(f"{path}: damaged gzip stream ({error}); fetch the file again") from None
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror or error})") from None


def check_labels(path: str | os.PathLike[str], labels: Tensor, num_classes: int) -> None:
    """Refuse labels outside 0..num_classes-1, naming the first.

    Raises:
        BadInput: A label is too large.
    """
    if int(labels.max()) >= num_classes:
        position = int((labels >= num_classes).nonzero()[0])
        raise BadInput(
            f"{path}: label {int(labels[position])} at position {position}; "
            f"expected 0 to {num_classes - 1}"
        )


def _parse(path: Path, file: io.BufferedIOBase, shape: tuple[int, ...], size: int) -> Tensor:
    """Parse `file`, which holds `size` bytes."""
    num_dimensions = 1 + len(shape)
    start = 4 + 4 * num_dimensions
    header = file.read(start)
    magic = bytes([0, 0, UNSIGNED_BYTE, num_dimensions])
    if len(header) >= 4 and header[:4] != magic:
        raise BadInput(f"{path}: magic number 0x{header[:4].hex()}, expected 0x{magic.hex()}")
    if len(header) < start:
        raise BadInput(f"{path}: {size} bytes, expected at least a header of {start}")
    num_examples, *example = struct.unpack(f">{num_dimensions}I", header[4:])
    if tuple(example) != shape:
        raise BadInput(f"{path}: examples of {_times(example)}, expected {_times(shape)}")
    if num_examples == 0:
        raise BadInput(f"{path}: 0 examples, expected at least 1")
    expected = start + num_examples * math.prod(shape)
    if size != expected:
        fault = "truncated" if size < expected else "trailing bytes"
        raise BadInput(
            f"{path}: {fault}: {size} bytes, expected {expected} for the {num_examples} examples "
            "of its header; fetch the file again"
        )
    data = np.empty((num_examples, *shape), dtype=np.uint8)
    buffer = data.data.cast("B")
    while len(buffer) and (count := file.readinto(buffer[:CHUNK])):
        buffer = buffer[count:]
    if len(buffer):
        raise BadInput(f"{path}: shrank while it was read; fetch the file again")
    return torch.from_numpy(data)


def _times(shape: list[int] | tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "one byte"
