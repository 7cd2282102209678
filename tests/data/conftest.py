import gzip
import os
from pathlib import Path

import numpy as np
import pytest
from idx_encoding import NAMES, idx_bytes, numbered_images


@pytest.fixture
def write_mnist(tmp_path):
    """Write a small MNIST: the label of image i is i % 10."""

    def write(num_train=300, num_test=50, folder="MNIST/raw", zipped=False, **replaced) -> Path:
        contents = {
            "train_images": idx_bytes(numbered_images(num_train)),
            "train_labels": idx_bytes(np.arange(num_train) % 10),
            "test_images": idx_bytes(numbered_images(num_test, first=num_train)),
            "test_labels": idx_bytes(np.arange(num_train, num_train + num_test) % 10),
        } | replaced
        raw = tmp_path / "root" / folder
        raw.mkdir(parents=True, exist_ok=True)
        for key, content in contents.items():
            if content is None:
                continue
            if zipped:
                (raw / f"{NAMES[key]}.gz").write_bytes(gzip.compress(content))
            else:
                (raw / NAMES[key]).write_bytes(content)
        return tmp_path / "root"

    return write


@pytest.fixture(scope="session")
def full_mnist() -> Path:
    default = Path(__file__).parents[3] / "shared" / "mnist"
    root = Path(os.environ.get("MNIST_ROOT") or default)
    if not (root / "MNIST" / "raw" / NAMES["train_images"]).exists():
        pytest.skip("needs the 70,000 images of MNIST: set MNIST_ROOT to the folder of MNIST/raw")
    return root
