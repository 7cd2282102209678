"""Predicts from files: images for a classifier of images, CSV rows for a regression."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tracklight.reuse.command import RUN_HELP, Parser

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
    from tracklight.reuse import answers, stored
    from tracklight.tracking import query

    store = stored.open_store(asked.uri, asked.dir)
    run = query.trained(store, query.choose(store, asked.run, asked.experiment))
    if run.info.status == "FAILED":
        print(
            f"warning: run {run.info.run_id} has failed; its best weights answer", file=sys.stderr
        )
    facts = stored.inputs_of(store, run)
    read = answers.reader(facts, asked.invert)
    cfg = stored.stored_config(store, run, stored.ANYWHERE)
    kept = stored.rebuild(store, run, cfg, read=False)
    found, bad = [], []
    for path in asked.files:
        try:
            found += answers.answer(kept, facts, path, read(path, kept.data))
        except BadInput as error:
            bad.append(path)
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    answers.write(found, asked.format)
    return 0 if not bad else 1 if found else 2
