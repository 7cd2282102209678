"""What all these scripts share: MNIST in memory, and the line that each of them prints after an epoch.

Shapes: `N` images, `P` pixels.
"""

import sys
import time
from pathlib import Path

import numpy as np

NUM_TRAIN = 55_000  # of 60,000: train.py keeps the rest for validation
EPOCHS = int(sys.argv[2])


def load() -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Return standardised float32 images (N, P) and int64 labels (N,), of training and of test."""
    raw = Path(sys.argv[1]) / "MNIST" / "raw"

    def part(name: str, number: int | None) -> tuple[np.ndarray, np.ndarray]:
        pixels = np.fromfile(raw / f"{name}-images-idx3-ubyte", np.uint8, offset=16).reshape(-1, 784)
        labels = np.fromfile(raw / f"{name}-labels-idx1-ubyte", np.uint8, offset=8).astype(np.int64)
        images = (pixels[:number].astype(np.float32) / 255 - 0.1307) / 0.3081
        return images, labels[:number]

    return part("train", NUM_TRAIN), part("t10k", None)


class Lines:
    """Prints an epoch's loss and the seconds since the line before, the first one's since the start."""

    def __init__(self) -> None:
        self.epoch = 0
        self.looked_at_s = time.perf_counter()

    def end_epoch(self, loss: float) -> None:
        """Print the line."""
        now_s = time.perf_counter()
        self.epoch += 1
        seconds = now_s - self.looked_at_s
        print(f"epoch {self.epoch}/{EPOCHS}  loss {loss:.5f}  {seconds:.3f} s", flush=True)
        self.looked_at_s = now_s

    def end(self, accuracy: float) -> None:
        """Print the accuracy on the test images."""
        print(f"test/accuracy {accuracy:.4f}", flush=True)
