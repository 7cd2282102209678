"""Predicts from files: images for a classifier of images, CSV rows for a regression."""

import csv
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tracklight.commands.digit_image import read_image
from tracklight.commands.parser import RUN_HELP, Parser
from tracklight.data.csv_columns import read_features
from tracklight.errors import BadInput
from tracklight.experiment.stored import Stored
from tracklight.figures.choose import outputs_of

EPILOG = """\
Images may have any size, depth and colour (PNG, JPEG, GIF, BMP, TIFF, WebP, PPM); of an animation
the first frame counts. A table is a CSV file whose header names the columns the model was trained
on; further columns are ignored. A sweep stands for its best trial.

A file that cannot be read is named on stderr and the rest are answered. Exit codes: 0 all were
answered, 1 some were not, 2 none was, or the run is not to be had."""


def main(argv: Sequence[str]) -> int:
    """Predict as the command line says; return the exit code."""
    parser = Parser("Answer files with the best weights of a run.", EPILOG)
    parser.add_argument("run", metavar="RUN", help=RUN_HELP)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--format", choices=("table", "csv", "json"), default="table")
    parser.add_argument(
        "--invert",
        choices=("auto", "yes", "no"),
        default="auto",
        help="whether images are dark on light (auto: by their border)",
    )
    return predict(parser.parse_intermixed_args(argv))


def predict(asked: Any) -> int:
    """Print an answer for each file or row; return the exit code.

    Raises:
        BadInput: The run or its files are not there, or the model takes no files.
    """
    from tracklight.errors import BadInput
    from tracklight.experiment import stored
    from tracklight.runs import select as query

    store = stored.open_store(asked.uri, asked.dir)
    run = query.trained(store, query.choose(store, asked.run, asked.experiment))
    if run.info.status == "FAILED":
        print(
            f"warning: run {run.info.run_id} has failed; its best weights answer", file=sys.stderr
        )
    facts = stored.inputs_of(store, run)
    read = reader(facts, asked.invert)
    cfg = stored.stored_config(store, run, stored.ANYWHERE)
    kept = stored.rebuild(store, run, cfg, read=False)
    found, bad = [], []
    for path in asked.files:
        try:
            found += answer(kept, facts, path, read(path, kept.data))
        except BadInput as error:
            bad.append(path)
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    write(found, asked.format)
    return 0 if not bad else 1 if found else 2


Answer = dict[str, Any]


class Rows(NamedTuple):
    """What a file holds: raw rows (N, ...) as the data set keeps them, and what to say of each."""

    features: Tensor
    labels: list[Answer]


def reader(facts: dict[str, Any], invert: str) -> Callable[[Path, Any], Rows]:
    """Return what reads a file for the model.

    Args:
        facts: What the run wrote down about its inputs.
        invert: Whether images are dark on light.

    Raises:
        BadInput: The model takes neither images nor named columns.
    """
    shape = facts.get("shape") or []
    if facts.get("class_names") and len(shape) == 2:
        return lambda path, _: _read_picture(path, (shape[0], shape[1]), invert)
    if facts.get("feature_names") and len(shape) == 1:
        return lambda path, data: _read_table(path, facts, data)
    raise BadInput(f"the model of this run takes {shape or 'what'} of {facts['name']}, not files")


def _read_picture(path: Path, shape: tuple[int, int], invert: str) -> Rows:
    pixels, notes = read_image(path, shape, invert)
    label = {"file": str(path)} | ({"note": ", ".join(notes)} if notes else {})
    return Rows(torch.from_numpy(pixels)[None], [label])


def _read_table(path: Path, facts: dict[str, Any], data: Any) -> Rows:
    values = read_features(path, facts["feature_names"], getattr(data, "delimiter", ","))
    encode = getattr(data, "encode", None)
    try:
        features = encode(values) if encode else torch.tensor(values, dtype=torch.float32)
    except BadInput as error:
        raise BadInput(f"{path}: {str(error).partition(': ')[2]}") from None
    return Rows(features, [{"file": str(path), "row": i + 1} for i in range(len(values))])


def answer(kept: Stored, facts: dict[str, Any], path: Path, rows: Rows) -> list[Answer]:
    """Return the model's answers to a file, one a row, as plain values.

    Raises:
        BadInput: They are no finite numbers.
    """
    assert kept.data is not None
    outputs = outputs_of(kept.model, kept.data, rows.features)  # type: ignore[arg-type]
    if not outputs.isfinite().all():
        raise BadInput(f"{path}: the model's answer is no finite number")
    names = facts.get("class_names")
    if names:
        return [
            {**label, **_classified(names, row)}
            for label, row in zip(rows.labels, outputs.double().softmax(1).tolist(), strict=True)
        ]
    targets = facts["target_names"]
    return [
        {**label, **dict(zip(targets, row, strict=True))}
        for label, row in zip(rows.labels, outputs.tolist(), strict=True)
    ]


def _classified(names: Sequence[str], probabilities: Sequence[float]) -> Answer:
    best = max(range(len(names)), key=probabilities.__getitem__)
    shares = dict(zip(names, probabilities, strict=True))
    return {
        "prediction": names[best],
        "probability": probabilities[best],
        "probabilities": shares,
    }


def write(found: list[Answer], form: str) -> None:
    """Print answers as a table for people, or as CSV or JSON."""
    if form == "json":
        json.dump(found, sys.stdout, indent=1, ensure_ascii=False)
        print()
        return
    if form == "csv":
        flat = [_flat(each) for each in found]
        keys = dict.fromkeys(key for each in flat for key in each if key != "note")
        columns = [*keys, "note"] if keys else ["file"]
        writer = csv.DictWriter(sys.stdout, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(flat)
        return
    if found:
        _show(found)


def _flat(each: Answer) -> Answer:
    shares = each.get("probabilities", {})
    rest = {key: value for key, value in each.items() if key != "probabilities"}
    return rest | {f"p({name})": value for name, value in shares.items()}


def _show(found: list[Answer]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    rows = []
    for each in found:
        row = {key: value for key, value in each.items() if key not in ("probabilities", "note")}
        if "probabilities" in each:
            ranked = sorted(each["probabilities"].items(), key=lambda item: -item[1])
            row["next"] = ", ".join(f"{name} {share:.1%}" for name, share in ranked[1:3])
            row["probability"] = f"{each['probability']:.1%}"
        row["note"] = each.get("note", "")
        rows.append(row)
    if not any(row["note"] for row in rows):
        for row in rows:
            del row["note"]
    for key in rows[0]:
        numeric = isinstance(rows[0][key], int | float) or key == "probability"
        table.add_column(key, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(f"{v:.6g}" if isinstance(v, float) else str(v) for v in row.values()))
    Console(width=None if sys.stdout.isatty() else 200, highlight=False, markup=False).print(table)
