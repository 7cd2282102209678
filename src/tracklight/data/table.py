"""Regression on a table: a CSV file of one's own, or the diabetes table that scikit-learn ships.

Shapes: `N` rows, `F` features, `T` targets.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor

from tracklight.data.csv_columns import TOLERATED, choose_columns, read_columns
from tracklight.data.tensor_data import Split, TensorData, hash_tensors, split_rows
from tracklight.errors import BadInput


class Table(TensorData):
    """Rows of numbers, split by seed into training, validation and test parts.

    Features are standardised by mean and standard deviation of the training part alone; targets
    stay in their own unit. Sums are exactly rounded, so the digest is the same on every machine.
    A feature that is constant in the training part cannot be standardised and is refused. Test rows
    are drawn first, so they do not depend on `num_val`. `conf/data/table.yaml` describes the arguments.
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
        decimal: str = ".",
        fold: int = 0,
        num_folds: int = 0,
    ):
        super().__init__(batch_size, seed, fold, num_folds)
        if path == "":
            raise BadInput("data.path= is empty; give a CSV file, or data.path=null for the diabetes table")
        if delimiter == "\\t":  # as one can type it
            delimiter = "\t"
        is_one = isinstance(delimiter, str) and len(delimiter) == 1 and delimiter not in '"\r\n'
        self.check_argument("delimiter", repr(delimiter), is_one, "one character", "','")
        self.check_argument("decimal", repr(decimal), decimal in (".", ","), "a point or a comma", "','")
        self.path = path
        self.target = [target] if isinstance(target, str) else target
        self.features = features
        self.num_val = num_val
        self.num_test = num_test
        self.standardise = standardise
        self.encoding = "columns standardised as in training" if standardise else ""
        self.delimiter = delimiter
        self.decimal = decimal

    def load(self) -> dict[str, Split]:
        """Read the table; split it; standardise the features on the training part."""
        self.feature_names, targets, values = self._read()
        self.source_digest = hash_tensors([(repr((self.feature_names, targets)), torch.from_numpy(values))])
        self.in_features, self.out_features = len(self.feature_names), len(targets)
        num_val, num_test = (_count(part, len(values)) for part in (self.num_val, self.num_test))
        if self.num_folds:
            num_val = math.ceil((len(values) - num_test) / self.num_folds)
        num_train = len(values) - num_val - num_test
        if num_train < 2:
            problem = f"{len(values)} rows leave {max(num_train, 0)} for training, at least 2 are needed"
            cure = f"add rows, or lower data.num_val={self.num_val} and data.num_test={self.num_test}"
            raise BadInput(f"{self._where}: {problem}; {cure}")
        order = torch.randperm(len(values), generator=torch.Generator().manual_seed(self.seed))
        rows = {
            name: np.split(values[part.numpy()], [self.in_features], axis=1)
            for name, part in split_rows(order, num_val, num_test, self.fold, self.num_folds).items()
        }
        if self.standardise:
            self._fit(rows["train"][0])
        splits = {name: Split(self.encode(x), self._tensor(y, targets)) for name, (x, y) in rows.items()}
        self._warn_of_lost_digits(values, [*splits.values()], [*self.feature_names, *targets])
        return splits

    def encode(self, rows: np.ndarray) -> Tensor:
        """Turn raw rows (N, F) float64 into model input (N, F), columns as `feature_names`.

        Raises:
            BadInput: A value is so far from the training part's that the model's precision cannot hold it.
        """
        if self.standardise:
            with np.errstate(over="ignore"):
                rows = (rows - self.mean) / self.std
        return self._tensor(rows, self.feature_names or [])

    def _tensor(self, values: np.ndarray, names: list[str]) -> Tensor:
        beyond, cure = " beyond its training part", "correct its outliers, or leave it out of data.features"
        if self.half:
            beyond, cure = "", "set trainer.precision=32-true"
        for name, column in zip(names, values.T, strict=True):
            if not (np.abs(column) <= torch.finfo(dtype := self.half or self.dtype).max).all():
                problem = f"column {name!r} reaches too far{beyond} for {_name(dtype)}"
                raise BadInput(f"{self._where}: {problem}; {cure}")
        return torch.tensor(values, dtype=self.dtype)

    def _warn_of_lost_digits(self, values: np.ndarray, splits: list[Split], names: list[str]) -> None:
        """Warn of columns of which the model's precision makes many different values one."""
        dtype = self.half or self.dtype
        held = torch.cat([torch.cat([part.features, part.targets], dim=1) for part in splits]).to(dtype)
        tables = (np.sort(each, axis=0).T for each in (values, held.double().numpy()))
        for name, *columns in zip(names, *tables, strict=True):
            distinct, left = (1 + int((v[1:] > v[:-1]).sum()) for v in columns)
            # Half precision has few numbers; of a million that differ, many share one in float32 by chance.
            enough = min(distinct, 64) / 2 if self.half else (1 - TOLERATED) * min(distinct, 10**6)
            if left < enough:
                problem = f"the {distinct} different values of column {name!r} are {left} in {_name(dtype)}"
                cure = f"set trainer.precision={32 if self.half else 64}-true, subtract what they share"
                rank_zero_warn(f"{self._where}: {problem}; {cure}, or correct outliers")

    @property
    def _where(self) -> str:
        return f"data.path={self.path or 'null'}"

    def _read(self) -> tuple[list[str], list[str], np.ndarray]:
        if self.path is not None:
            path = Path(self.path).expanduser()
            self.name, self.source = path.name, str(path.absolute())
            return read_columns(path, self.target, self.features, self.delimiter, self.decimal)
        from sklearn.datasets import load_diabetes  # comes with MLflow, and takes seconds to import

        self.name, self.source = "diabetes", "scikit-learn"
        table: Any = load_diabetes(scaled=False)
        header = [*table.feature_names, "target"]
        target = self.target or ["target"]
        features, targets = choose_columns(self._where, header, target, self.features)
        values = np.column_stack([table.data, table.target])
        return features, targets, values[:, [header.index(name) for name in features + targets]]

    def _fit(self, rows: np.ndarray) -> None:
        """Compute the moments of the raw training features (N, F)."""
        for name, column in zip(self.feature_names or [], rows.T, strict=True):
            if column.min() == column.max():
                problem = f"column {name!r} is constant ({column[0]:g} in all {len(column)} training rows)"
                cure = "and cannot be standardised; leave it out of data.features"
                raise BadInput(f"{self._where}: {problem} {cure}")
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


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
