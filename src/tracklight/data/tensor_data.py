"""The base of our data sets: each split is one tensor, resident on the training device.

Shapes: `N` examples in a split, `B` minibatch size, `...` the example's own shape.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor

from tracklight.errors import BadInput

# From raw rows (B, ...) and their indices in the training part (B,) to other raw rows.
Augmentation = Callable[[Tensor, Tensor], Tensor]

EVALUATION_ROWS = 2048  # of a batch: enough to amortise overhead, few enough for caches


@dataclass(frozen=True)
class Split:
    """The examples of one split: `features` (N, ...) and `targets` (N, ...)."""

    features: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.features)

    def to(self, device: torch.device) -> "Split":
        """Return this split on `device`; the same tensors where they already are there."""
        return Split(self.features.to(device), self.targets.to(device))


def epoch_generator(seed: int, epoch: int, purpose: str = "") -> torch.Generator:
    """Return a generator (CPU) for an epoch, from 0; each purpose has its own stream."""
    mixed = int.from_bytes(hashlib.blake2b(f"{seed}/{epoch}{purpose}".encode(), digest_size=8).digest())
    return torch.Generator().manual_seed(mixed >> 1)


def epoch_order(num_examples: int, seed: int, epoch: int) -> Tensor:
    """Return the order of an epoch (from 0), a pure function of its arguments: (N,), int64, CPU."""
    return torch.randperm(num_examples, generator=epoch_generator(seed, epoch))


def split_rows(
    order: Tensor, num_val: int, num_test: int, fold: int = 0, num_folds: int = 0
) -> dict[str, Tensor]:
    """Split an order of rows into sorted indices of "train", "val" and "test", test drawn first.

    With `num_folds`, a fold of what is not test is validation, not `num_val` rows; each row is in one fold.
    """
    test, others = order[:num_test], order[num_test:]
    position = torch.arange(len(others))
    is_val = position % num_folds == fold if num_folds else position < num_val
    parts = {"train": others[~is_val], "val": others[is_val], "test": test}
    return {name: part.sort().values for name, part in parts.items()}


def hash_tensors(named: Iterable[tuple[str, Tensor]]) -> str:
    """Return the SHA-256 (hexadecimal) over the raw bytes of tensors, in order, and their names."""
    digest = hashlib.sha256()
    for name, tensor in named:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().numpy().data)
    return digest.hexdigest()


class TensorData(LightningDataModule):
    """Splits held as tensors; subclasses define `load` and, for raw rows, `transform`.

    Args:
        batch_size: Examples in a training minibatch; None takes all at once, in their natural order.
        seed: Seed of the epochs' orders.
        fold: Which part of the training examples validates, from 0.
        num_folds: Number of these parts, split by the seed; 0: the data set's own validation part.
    """

    name: str  # pyright: ignore[reportIncompatibleVariableOverride]
    source: str
    in_features: int
    out_features: int
    feature_names: list[str] | None = None
    class_names: list[str] | None = None
    encoding = ""  # how raw numbers become model input, in words
    dtype = torch.float32  # of inputs and targets that are no whole numbers
    half: torch.dtype | None = None  # in which the model computes with them, if it is half precision
    # `hash_tensors` of the examples before the seed splits them, set by `load`: runs that differ in it are no
    # seeds of one setting. None where config and seed alone make the examples, or nothing is known.
    source_digest: str | None = None

    def __init__(self, batch_size: int | None, seed: int, fold: int = 0, num_folds: int = 0):
        super().__init__()
        is_count = type(num_folds) is int and (num_folds == 0 or num_folds >= 2)
        self.check_argument("num_folds", num_folds, is_count, "0 for none, or 2 or more", 5)
        is_fold = type(fold) is int and 0 <= fold < max(num_folds, 1)
        self.check_argument("fold", fold, is_fold, f"from 0 to below data.num_folds={num_folds}", 0)
        self.fold, self.num_folds = fold, num_folds
        self.batch_size = batch_size
        self.seed = seed
        self.steps_per_block = 1
        self.use_distributed_sampler = True  # the Trainer's argument: each process takes a part

    @staticmethod
    def check_argument(key: str, value: Any, is_valid: bool, allowed: str, example: Any) -> None:
        """Refuse an argument that is not valid, by its config key."""
        if not is_valid:
            raise BadInput(f"data.{key}={value} must be {allowed}; try data.{key}={example}")

    def load(self) -> dict[str, Split]:
        """Read the splits: "train", and "val" and "test" if the data set has them."""
        raise NotImplementedError

    def transform(self, features: Tensor) -> Tensor:
        """Turn gathered raw rows (B, ...) into model input."""
        return features

    def augmentation(self, num_examples: int, epoch: int) -> Augmentation | None:
        """Return a function that changes training rows at random, depending on seed and epoch only."""
        return None

    @cached_property
    def splits(self) -> dict[str, Split]:
        """The splits, read at first use."""
        return {name: split for name, split in self.load().items() if len(split)}

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the raw bytes of every split, in order, hexadecimal."""
        named = ((name, part) for name, s in self.splits.items() for part in (s.features, s.targets))
        return hash_tensors(named)

    def setup(self, stage: str | None = None) -> None:
        """Read the splits once."""
        _ = self.splits

    def train_dataloader(self) -> "Loader":
        """Return minibatches, or blocks of them, in the epoch's order."""
        return Loader(self, "train", self.batch_size, training=True)

    def val_dataloader(self) -> "Loader | list":
        """Return the validation part in its natural order; nothing where there is none."""
        return Loader(self, "val", EVALUATION_ROWS) if "val" in self.splits else []

    def test_dataloader(self) -> "Loader | list":
        """Return the test part in its natural order; nothing where there is none."""
        return Loader(self, "test", EVALUATION_ROWS) if "test" in self.splits else []


class Epoch:
    """Yields one batch, a loader of all: whoever gets it gathers a block of an epoch at a time."""

    def __init__(self, loader: "Loader"):
        self.loader = loader

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator["Loader"]:
        yield self.loader


class Loader:
    """Iterates over a split in minibatches, or in blocks of several, as (inputs, targets).

    In training a block is `data.steps_per_block` minibatches gathered and transformed at once: rows
    (k * B, ...). It does itself what Lightning's samplers do: with several processes, each takes every
    `world_size`-th row, and in training the order is padded from its front so that all take equally
    many steps. With `overfit_batches`, the natural order makes every epoch's batches the same.
    """

    def __init__(self, data: TensorData, split: str, batch_size: int | None, training: bool = False):
        trainer: Any = data.trainer
        sharded = trainer and data.use_distributed_sampler
        self.rank, self.world_size = (trainer.global_rank, trainer.world_size) if sharded else (0, 1)
        self.data = data
        self.split = split
        self.training = training
        self.shuffle = training and not (trainer and trainer.overfit_batches)
        num_examples = len(data.splits[split]) - (0 if training else self.rank)
        self.num_rows = math.ceil(num_examples / self.world_size)
        self.batch_size = min(batch_size or self.num_rows, self.num_rows)
        self.rows_per_item = self.batch_size * (data.steps_per_block if training else 1)

    def __len__(self) -> int:
        return math.ceil(self.num_rows / self.rows_per_item)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        data = self.data
        device = data.trainer.strategy.root_device if data.trainer else torch.device("cpu")
        split = data.splits[self.split] = data.splits[self.split].to(device)
        epoch = data.trainer.current_epoch if data.trainer else 0
        augment = data.augmentation(len(split), epoch) if self.training else None
        rows = self._rows(len(split), epoch)
        if rows is None and not augment:  # natural order: views, no gathering
            for start in range(0, self.num_rows, self.rows_per_item):
                end = start + self.rows_per_item
                yield data.transform(split.features[start:end]), split.targets[start:end]
        else:
            rows = torch.arange(len(split)) if rows is None else rows
            for chosen in rows.to(device).split(self.rows_per_item):
                inputs = split.features.index_select(0, chosen)  # 8 times as fast as indexing
                inputs = augment(inputs, chosen) if augment else inputs
                yield data.transform(inputs), split.targets.index_select(0, chosen)

    def _rows(self, num_examples: int, epoch: int) -> Tensor | None:
        if self.world_size == 1 and (self.batch_size >= num_examples or not self.shuffle):
            return None
        if not self.training:
            return torch.arange(self.rank, num_examples, self.world_size)
        order = torch.arange(num_examples)
        if self.shuffle:
            order = epoch_order(num_examples, self.data.seed, epoch)
        padding = self.num_rows * self.world_size - num_examples
        return torch.cat([order, order[:padding]])[self.rank :: self.world_size]
