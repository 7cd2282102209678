"""Reads numbers from named columns of a CSV file, strictly: nothing is guessed.

Shapes: `N` rows, `C` chosen columns.
"""

import codecs
import contextlib
import csv
import difflib
import itertools
import math
import re
from array import array
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path

import numpy as np
import torch
from pytorch_lightning.utilities import rank_zero_warn

from tracklight.errors import BadInput

Columns = tuple[list[str], list[str]]  # names of the features and of the targets

UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
UTF32_MARKS = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)  # the first opens with a UTF-16 mark
TOLERATED = 0.01  # of a column's different values: so many fall together by chance
EXACT = 2.0**53  # from here on float64 leaves out whole numbers
NUMBER = r"[\s\"]*[-+]?[.,]?\d"  # how one begins
COMMA, POINT = (rf"\s*[-+]?\d+{mark}\d+\s*" for mark in (",", r"\."))  # numbers, by their decimal point
MAX_LINE_CHARS = 2**26  # a file may be one endless line, of which this much is a row too long
MAX_COMMENTS = 10_000  # lines above a header
FLOAT32_MAX = torch.finfo(torch.float32).max


def choose_columns(
    where: str, header: list[str], targets: list[str] | None, features: list[str] | None
) -> Columns:
    """Choose the feature and the target columns of a table; features of None are all others.

    A column that does not exist, is named twice, or serves as both, is refused.
    """
    if not targets:
        raise BadInput(f"{where}: data.target is missing; name one of {_format(header)}")
    if features is None:
        features = [name for name in header if name not in targets]
    if not features:
        have = f"have {_format(header)}, data.target={_format(targets)}"
        raise BadInput(f"{where}: no feature column; {have}")
    keys = [("target", name) for name in targets] + [("features", name) for name in features]
    for key, name in keys:
        if name not in header:
            near = difflib.get_close_matches(str(name), header, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"have {_format(header)}"
            problem = f"data.{key} names {name!r}, which is no column; {hint}"
        elif name == "":
            problem = f"column {header.index('') + 1} has no name; list data.features"
        elif header.count(name) > 1:
            problem = f"{header.count(name)} columns are named {name!r}; rename them"
        elif keys.count((key, name)) > 1:
            problem = f"data.{key} names {name!r} twice; name it once"
        elif key == "features" and name in targets:
            problem = f"data.features holds the target {name!r}; leave it out"
        else:
            continue
        raise BadInput(f"{where}: {problem}")
    return features, targets


def read_columns(
    path: Path, targets: list[str] | None, features: list[str] | None, delimiter: str, decimal: str = "."
) -> tuple[list[str], list[str], np.ndarray]:
    """Read the chosen columns of a CSV file whose first row is the header.

    UTF-8, with or without a byte-order mark, and UTF-16 or UTF-32 with one. Blank lines are skipped; columns
    that are not chosen may hold anything. A blank as delimiter stands for any white space; a first line
    `sep=;`, as spreadsheets write it, wins over the delimiter.

    Returns:
        Names of the features and of the targets, and their values, (N, C) float64, all finite in float32.

    Raises:
        BadInput: The file is not such a table; the message names line and column.
    """
    where = f"data.path={path}"
    return _read(where, path, lambda h: choose_columns(where, h, targets, features), delimiter, decimal)


def read_features(path: Path, names: list[str], delimiter: str, decimal: str = ".") -> np.ndarray:
    """Read the named columns of a CSV file as (N, C) float64.

    A delimiter that separates nothing is replaced by a usual one.
    """

    def choose(header: list[str]) -> Columns:
        for name in names:
            if header.count(name) != 1:
                count = "no column is" if name not in header else "several columns are"
                problem = f"{count} named {name!r} in its first line"
                raise BadInput(f"{path}: {problem}; the model takes {_format(names)}")
        return names, []

    return _read(str(path), path, choose, delimiter, decimal, guess=True)[2]


def _read(
    where: str,
    path: Path,
    choose: Callable[[list[str]], Columns],
    delimiter: str,
    decimal: str,
    guess: bool = False,
) -> tuple[list[str], list[str], np.ndarray]:
    try:
        if path.exists() and not path.is_file():
            raise BadInput(f"{where}: not a regular file; give a CSV file")
        header, *_ = _first_rows(path, delimiter)
        if not header:
            raise BadInput(f"{where}: empty; expected a header and rows of numbers")
        header = [name.strip() for name in header]
        others = [mark for mark in ";\t|, " if mark != delimiter and _num_cells(path, mark) > 1]
        others.sort(key=lambda mark: -_num_cells(path, mark))
        if len(header) == 1 and others:
            if guess:
                return _read(where, path, choose, others[0], decimal)
            hint = "'data.delimiter=\"{}\"'".format(others[0].replace("\t", "\\t"))
            cells = [cell for cell in _first_rows(path, others[0])[-1] if re.fullmatch(COMMA, cell)]
            hint += " 'data.decimal=\",\"'" if cells else ""
            raise BadInput(f"{where}: one column {header[0][:80]!r}; try {hint}")
        features, targets = choose(header)
        columns = [(name, header.index(name)) for name in features + targets]
        values, digits = array("d"), array("q")  # the hash of each number with all its digits
        for line, row in itertools.islice(_rows(path, delimiter), 1, None):
            if len(row) != len(header):
                cells = f"line {line} has {len(row)} cells, expected {len(header)}"
                raise BadInput(f"{where}: {cells} as in the header; correct that row")
            for name, column in columns:
                cell, place = row[column], f"{where}: line {line}, column {name!r}"
                values.append(number := _number(cell, decimal, place))
                digits.append(hash(Decimal(cell.replace(decimal, "."))) if number else 0)
    except UnicodeError:
        problem = "not UTF-8 text (nor UTF-16 with a mark); save it as UTF-8"
        raise BadInput(f"{where}: {problem}") from None
    except csv.Error as error:
        raise BadInput(f"{where}: not a CSV file ({error}); correct its quotes") from None
    except OSError as error:
        raise BadInput(f"{where}: cannot be read ({error.strerror or error})") from None
    if not values:
        raise BadInput(f"{where}: a header only; expected rows of numbers below it")
    table, written = (np.array(each).reshape(-1, len(columns)) for each in (values, digits))
    for (name, _), *cells in zip(columns, table.T, written.T, strict=True):
        left, distinct = (len(np.unique(each)) for each in cells)
        problem = f"{where}: the {distinct} different values of column {name!r} are {left} in float64"
        if left < distinct and np.abs(cells[0]).max() >= EXACT:
            cure = "name another data.target" if name in targets else "leave the column out of data.features"
            raise BadInput(f"{problem}; identifiers are no measurements: {cure}")
        if left < (1 - TOLERATED) * distinct:
            rank_zero_warn(f"{problem}; subtract what they share before the file is written")
    return features, targets, table


def _rows(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield line number (from 1) and cells of every row that is not blank."""
    with path.open("rb") as file:
        start = file.read(4)
    wide = "utf-32" if start in UTF32_MARKS else "utf-16"
    encoding = wide if start.startswith(UTF16_MARKS + UTF32_MARKS) else "utf-8-sig"
    with path.open(encoding=encoding, newline="") as file:
        lines = iter(lambda: file.readline(MAX_LINE_CHARS), "")
        first = next(lines, "")
        declared = re.fullmatch(r"\"?sep=(.)\"?\s*", first)
        delimiter = declared[1] if declared else delimiter
        lines = itertools.chain(["\n" if declared else first], lines)
        if delimiter == " ":
            lines = (" ".join(line.split()) for line in lines)
        lines = _blank_comments(lines, delimiter)
        reader = csv.reader(lines, delimiter=delimiter, strict=True, skipinitialspace=True)
        yield from ((reader.line_num, row) for row in reader if row)


def _blank_comments(lines: Iterator[str], delimiter: str) -> Iterator[str]:
    """Make the lines with a # above the header blank; `#id,y` with numbers below it is a header itself."""
    top = list[str]()
    for line in lines:
        top.append(line)
        if (line.strip() and line[0] != "#") or len(top) > MAX_COMMENTS:
            break
    cells = [line.split(delimiter) for line in top if line.strip()][-2:] or [[]]
    is_header = 1 < len(cells[0]) == len(cells[-1]) and any(re.match(NUMBER, cell) for cell in cells[-1])
    num = max((i + (not is_header) for i, line in enumerate(top) if line[:1] == "#"), default=0)
    return itertools.chain(["\n"] * num, top[num:], lines)


def _first_rows(path: Path, delimiter: str) -> list[list[str]]:
    """Return the first two rows, or those that can be read; an empty cell for such a header."""
    rows: list[list[str]] = []
    with contextlib.suppress(csv.Error):  # "a";"b" read with a comma
        rows.extend(row for _, row in itertools.islice(_rows(path, delimiter), 2))
        return rows or [[]]
    return rows or [[""]]


def _num_cells(path: Path, delimiter: str) -> int:
    """Return how many cells a delimiter makes of each of the first two rows; 0 if they differ."""
    lengths = {len(row) for row in _first_rows(path, delimiter)}
    return lengths.pop() if len(lengths) == 1 else 0


def _number(cell: str, decimal: str, where: str) -> float:
    text = cell.replace(".", "_").replace(decimal, ".") if decimal != "." else cell
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not abs(value) <= FLOAT32_MAX or "_" in text:  # float() reads "1_000"
        got = f"{cell[:40]!r}" if cell.strip() else "an empty cell"
        fix = "correct it, or leave the row or the column out"
        if re.fullmatch(COMMA if decimal == "." else POINT, cell):
            fix = f"try 'data.decimal=\"{',' if decimal == '.' else '.'}\"'"
        raise BadInput(f"{where}: got {got}, expected a finite number; {fix}")
    return value


def _format(names: list[str]) -> str:
    return f"{names[:20]}" + (f" and {len(names) - 20} more" if len(names) > 20 else "")
