"""Regression on a table: a CSV file of one's own, or the diabetes table that scikit-learn ships.

Shapes: `N` rows, `F` features, `T` targets.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tracklight.data.csv_columns import choose_columns, read_columns
from tracklight.data.tensor_data import Split, TensorData
from tracklight.errors import BadInput


class Table(TensorData):
    """Rows of numbers, split by seed into training, validation and test parts.

    Features are standardised by mean and standard deviation of the training part alone; targets
    stay in their own unit. Sums are exactly rounded, so the digest is the same on every machine.
    A feature that is constant in the training part cannot be standardised and is refused.

    Args:
        batch_size: Rows in a minibatch; None takes the whole training part.
        seed: Seed of the split and of the epochs' orders.
        path: CSV file with a header; None takes the diabetes table.
        target: Column, or list of columns, to predict; None only with the diabetes table.
        features: Columns to predict from; None takes all others.
        num_val: Validation rows: a count, or a fraction of all rows below 1. 0 for no such part.
        num_test: Test rows, likewise; drawn first, so they do not depend on `num_val`.
        standardise: Whether features are standardised.
        delimiter: The one character between the cells of the file.

    Raises:
        BadInput: A value is out of its range.
    """

    def __init__(
        self,
        batch_size: int | None,
        seed: int,
        path: str | None,
        target: str | list[str] | None,
        features: list[str] | None,
        num_val: float,
        num_test: float,
        standardise: bool,
        delimiter: str,
    ):
        super().__init__(batch_size, seed)
        if path == "":
            raise BadInput(
                "data.path= is empty; give a CSV file, or data.path=null for the diabetes table"
            )
        if delimiter == "\\t":  # as one can type it
            delimiter = "\t"
        if not isinstance(delimiter, str) or len(delimiter) != 1 or delimiter in '"\r\n ':
            raise BadInput(
                f"data.delimiter={delimiter!r} must be one character; try data.delimiter=','"
            )
        for key, value in (("num_val", num_val), ("num_test", num_test)):
            if type(value) not in (int, float) or not (
                0 <= value < 1 or type(value) is int and value >= 1
            ):
                raise BadInput(
                    f"data.{key}={value} must be a count of rows or a fraction below 1; "
                    f"try data.{key}=0.15"
                )
        self.path = path
        self.target = [target] if isinstance(target, str) else target
        self.features = features
        self.num_val = num_val
        self.num_test = num_test
        self.standardise = standardise
        self.delimiter = delimiter

    def load(self) -> dict[str, Split]:
        """Read the table; split it; standardise the features on the training part."""
        features, targets, values = self._read()
        self.feature_names = self._columns = features
        self.in_features, self.out_features = len(features), len(targets)
        sizes = {
            "test": _count(self.num_test, len(values)),
            "val": _count(self.num_val, len(values)),
        }
        num_train = len(values) - sum(sizes.values())
        if num_train < 2:
            raise BadInput(
                f"{self._where}: {len(values)} rows leave {max(num_train, 0)} for training, at "
                f"least 2 are needed; add rows, or lower data.num_val={self.num_val} and "
                f"data.num_test={self.num_test}"
            )
        order = torch.randperm(len(values), generator=torch.Generator().manual_seed(self.seed))
        parts = dict(
            zip(("test", "val", "train"), order.split([*sizes.values(), num_train]), strict=True)
        )
        rows = {
            name: values[parts[name].sort().values.numpy()] for name in ("train", "val", "test")
        }
        self._fit(rows["train"][:, : len(features)])
        return {
            name: Split(self.encode(part[:, : len(features)]), _float32(part[:, len(features) :]))
            for name, part in rows.items()
            if len(part)
        }

    def encode(self, rows: np.ndarray) -> Tensor:
        """Turn raw feature rows into model input, by the moments of the training part.

        Args:
            rows: (N, F), float64, columns in the order of `feature_names`.

        Returns:
            (N, F), float32.

        Raises:
            BadInput: A value lies so far out that float32 cannot hold it.
        """
        if self.standardise:
            with np.errstate(over="ignore"):
                rows = (rows - self.mean) / self.std
        if far := np.flatnonzero(
            ~(np.abs(rows) <= torch.finfo(torch.float32).max).all(axis=0)
        ).tolist():
            raise BadInput(
                f"{self._where}: column {self._columns[far[0]]!r} reaches too far beyond its "
                "training part for float32; correct its outliers, or leave it out of data.features"
            )
        return _float32(rows)

    def recall(self, columns: list[str], mean: np.ndarray | None, std: np.ndarray | None) -> None:
        """Take the moments of an earlier training part, so that `encode` works without reading it.

        Args:
            columns: Names of the features.
            mean: (F,), None where nothing is standardised.
            std: (F,), likewise.
        """
        self.feature_names = self._columns = columns
        if mean is not None and std is not None:
            self.mean, self.std = mean, std

    @property
    def _where(self) -> str:
        return f"data.path={self.path or 'null'}"

    def _read(self) -> tuple[list[str], list[str], np.ndarray]:
        if self.path is not None:
            path = Path(self.path).expanduser()
            self.name, self.source = path.name, str(path.absolute())
            return read_columns(path, self.target, self.features, self.delimiter)
        try:
            from sklearn.datasets import load_diabetes  # optional, and seconds to import
        except ImportError:
            raise BadInput(
                "data.path=null takes the diabetes table from scikit-learn, which is not "
                "installed: pip install 'tracklight[table]', or give a CSV file with data.path"
            ) from None
        self.name, self.source = "diabetes", "scikit-learn"
        table: Any = load_diabetes(scaled=False)
        header = [*table.feature_names, "target"]
        features, targets = choose_columns(
            self._where, header, self.target or ["target"], self.features
        )
        values = np.column_stack([table.data, table.target])
        return features, targets, values[:, [header.index(name) for name in features + targets]]

    def _fit(self, rows: np.ndarray) -> None:
        """Keep the moments of the raw training features `rows` (N, F)."""
        if not self.standardise:
            return
        for name, column in zip(self._columns, rows.T, strict=True):
            if column.min() == column.max():
                raise BadInput(
                    f"{self._where}: column {name!r} is constant ({column[0]:g} in all "
                    f"{len(column)} training rows) and cannot be standardised; leave it out of "
                    "data.features"
                )
        self.mean = np.array([math.fsum(column) / len(rows) for column in rows.T])
        deviations = rows - self.mean
        scale = np.abs(deviations).max(axis=0)  # keeps the squares from underflowing
        squares = (deviations / scale) ** 2
        self.std = scale * np.sqrt([math.fsum(column) / len(rows) for column in squares.T])


def _count(wanted: float, num_rows: int) -> int:
    """Return a count as it is, a fraction rounded to rows: one at least, unless it is 0."""
    if type(wanted) is int or wanted == 0:
        return int(wanted)
    return max(1, round(wanted * num_rows))


def _float32(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.astype(np.float32))
