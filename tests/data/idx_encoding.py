import struct

import numpy as np
from torch import Tensor

NAMES = {
    "train_images": "train-images-idx3-ubyte",
    "train_labels": "train-labels-idx1-ubyte",
    "test_images": "t10k-images-idx3-ubyte",
    "test_labels": "t10k-labels-idx1-ubyte",
}


def idx_bytes(values: np.ndarray) -> bytes:
    """The IDX encoding, written from the format's description."""
    return (
        bytes([0, 0, 8, values.ndim])
        + b"".join(struct.pack(">I", n) for n in values.shape)
        + values.astype(np.uint8).tobytes()
    )


def numbered_images(count: int, first: int = 0) -> np.ndarray:
    """Images that carry their own number in their first two pixels."""
    images = np.random.default_rng(first).integers(0, 256, (count, 28, 28), dtype=np.uint8)
    numbers = np.arange(first, first + count)
    images[:, 0, 0], images[:, 0, 1] = numbers // 256, numbers % 256
    return images


def image_numbers(images: Tensor) -> list[int]:
    return (images[:, 0, 0].int() * 256 + images[:, 0, 1].int()).tolist()
