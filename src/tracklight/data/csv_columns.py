"""Numbers from named columns of a CSV file, strictly: what is not a number is never guessed.

Shapes: `N` rows, `C` chosen columns.
"""

import codecs
import csv
import difflib
import math
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from tracklight.errors import BadInput

# Longest first: the UTF-16 mark opens the UTF-32 one.
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF8: "utf-8-sig",
}
LARGEST = torch.finfo(torch.float32).max


def choose_columns(
    where: str, header: list[str], targets: list[str] | None, features: list[str] | None
) -> tuple[list[str], list[str]]:
    """Pick the feature and the target columns of a table.

    Args:
        where: Opening of the error messages: the key and value that named the table.
        header: Names of all columns.
        targets: Columns to predict.
        features: Columns to predict from; None takes all others.

    Returns:
        Names of the feature columns and of the target columns.

    Raises:
        BadInput: A column does not exist, is named twice, or serves as both.
    """
    if not targets:
        raise BadInput(f"{where}: data.target is missing; name one of {_shown(header)}")
    if features is None:
        features = [name for name in header if name not in targets]
    if not features:
        raise BadInput(
            f"{where}: no feature column; have {_shown(header)}, data.target={_shown(targets)}"
        )
    for key, names in (("target", targets), ("features", features)):
        for name in names:
            if name not in header:
                near = difflib.get_close_matches(str(name), header, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"have {_shown(header)}"
                raise BadInput(f"{where}: data.{key} names {name!r}, which is no column; {hint}")
            if name == "":
                raise BadInput(
                    f"{where}: column {header.index('') + 1} has no name; list data.features"
                )
            if header.count(name) > 1:
                raise BadInput(
                    f"{where}: {header.count(name)} columns are named {name!r}; rename them"
                )
            if names.count(name) > 1:
                raise BadInput(f"{where}: data.{key} names {name!r} twice; name it once")
            if key == "features" and name in targets:
                raise BadInput(f"{where}: data.features holds the target {name!r}; leave it out")
    return features, targets


def read_columns(
    path: Path, targets: list[str] | None, features: list[str] | None, delimiter: str
) -> tuple[list[str], list[str], np.ndarray]:
    """Read the chosen columns of a CSV file whose first row is the header.

    UTF-8, with or without a byte-order mark, and UTF-16 or UTF-32 with one. Blank lines are
    skipped; columns that are not chosen may hold anything.

    Args:
        path: The file.
        targets: Columns to predict.
        features: Columns to predict from; None takes all others.
        delimiter: The one character between cells.

    Returns:
        Names of the features, names of the targets, and their values in this order: (N, C) float64,
        all finite in float32.

    Raises:
        BadInput: The file is not such a table; the message names line and column.
    """

    def choose(where: str, header: list[str]) -> tuple[list[str], list[str]]:
        return choose_columns(where, header, targets, features)

    return _read(f"data.path={path}", path, choose, delimiter)


def read_features(path: Path, names: list[str], delimiter: str) -> np.ndarray:
    """Read the named columns of a CSV file, to predict from.

    Args:
        path: The file; columns that are not named may hold anything.
        names: Of the columns.
        delimiter: The one character between cells; where it parts nothing, a usual one is tried.

    Returns:
        (N, C) float64.

    Raises:
        BadInput: The file is not such a table; the message names line and column.
    """

    def choose(where: str, header: list[str]) -> tuple[list[str], list[str]]:
        for name in names:
            if header.count(name) != 1:
                count = "no column is" if name not in header else "several columns are"
                raise BadInput(
                    f"{where}: {count} named {name!r} in its first line; the model takes "
                    f"{_shown(names)}"
                )
        return names, []

    return _read(str(path), path, choose, delimiter, guess=True)[2]


def _read(
    where: str,
    path: Path,
    choose: Callable[[str, list[str]], tuple[list[str], list[str]]],
    delimiter: str,
    guess: bool = False,
) -> tuple[list[str], list[str], np.ndarray]:
    try:
        if path.exists() and not path.is_file():
            raise BadInput(f"{where}: not a regular file; give a CSV file")
        rows = _rows(path, delimiter)
        _, header = next(rows, (0, []))
        if not header:
            raise BadInput(f"{where}: empty; expected a header and rows of numbers")
        header = [name.strip() for name in header]
        if len(header) == 1 and (
            found := [d for d in ";\t|," if d in header[0] and d != delimiter]
        ):
            if guess:
                return _read(where, path, choose, found[0])
            shown = found[0].replace("\t", "\\t")
            raise BadInput(
                f"{where}: one column {header[0][:80]!r}; try 'data.delimiter=\"{shown}\"'"
            )
        features, targets = choose(where, header)
        columns = [(name, header.index(name)) for name in features + targets]
        values = array("d")
        for line, row in rows:
            if len(row) != len(header):
                raise BadInput(
                    f"{where}: line {line} has {len(row)} cells, expected {len(header)} as in "
                    "the header; correct that row"
                )
            for name, column in columns:
                values.append(_number(row[column], f"{where}: line {line}, column {name!r}"))
    except UnicodeError:
        raise BadInput(
            f"{where}: not UTF-8 text (nor UTF-16 with a mark); save it as UTF-8"
        ) from None
    except csv.Error as error:
        raise BadInput(f"{where}: not a CSV file ({error}); correct its quotes") from None
    except OSError as error:
        raise BadInput(f"{where}: cannot be read ({error.strerror or error})") from None
    if not values:
        raise BadInput(f"{where}: a header only; expected rows of numbers below it")
    return features, targets, np.array(values).reshape(-1, len(columns))


def _rows(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number from 1, cells) of every row that is not blank."""
    with path.open("rb") as file:
        opening = file.read(4)
    encoding = next(
        (e for mark, e in BYTE_ORDER_MARKS.items() if opening.startswith(mark)), "utf-8"
    )
    with path.open(encoding=encoding, newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True, skipinitialspace=True)
        for row in reader:
            if row:
                yield reader.line_num, row


def _number(cell: str, where: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not abs(value) <= LARGEST or "_" in cell:  # float() reads "1_000"
        got = f"{cell[:40]!r}" if cell.strip() else "an empty cell"
        raise BadInput(
            f"{where}: got {got}, expected a finite number; correct it, or leave the row or the "
            "column out"
        )
    return value


def _shown(names: list[str]) -> str:
    return f"{names[:20]}" + (f" and {len(names) - 20} more" if len(names) > 20 else "")
