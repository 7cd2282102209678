"""The command lines of all commands but train.

All of them are parsed here, without the imports that the commands themselves need, so that help
and bad arguments are answered at once.
"""

import argparse
import importlib
import json
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import NoReturn

from tracklight.config.hardware import choose_temporary_folder
from tracklight.errors import BadInput
from tracklight.paths import HOME, IN_CLONE, UI_PORT

LIMIT = 50
RUN_HELP = "id of a run, a unique prefix of one, `last`, or `best` (of those like the newest)"
DONE = "Exit codes: 0 done, 2 bad input."
COMPARE = """\
Without RUNs, a leaderboard: configs that differ only in their seed share a row, ranked by the mean
of their scores with its 95 % interval. Runs scored by another metric than the newest are left out;
--metric ranks all that have it. Each data set has a ranking of its own. Reproductions add no
evidence and are left out; pruned trials are listed without a rank and do not count in a mean.
"other git", "other code" and "other data" are relative to the first row of the ranking.
With two RUNs, all that differs between them, and whether their scores differ by more than chance,
if there are several seeds of each.

  compare.py --sweep last               the trials of the newest sweep
  compare.py --metric test/accuracy --tag tracklight.code=1f3a... --limit 10
  compare.py best last                  what is different in the newest run
Exit codes: 0 done, 2 bad input."""
EVALUATE = """\
KEY=VALUE says where the data are now, or names other data of the same kind:
  evaluate.py best data.root=/other/mnist       the test part of other IDX files
  evaluate.py RUN --table new.csv               every row of a CSV file with the same columns,
                                                standardised as in training
Of a sweep, the best trial is evaluated. The metrics are logged to a child of the run; with
--into-run to the run itself, as evaluate/SPLIT_NAME, once per split.
Exit codes: 0 done, 1 failed, 2 bad input."""
PREDICT = """\
Images may have any size, depth and colour (PNG, JPEG, GIF, BMP, TIFF, WebP, PPM); of an animation
the first frame is used. A table is a CSV file whose header names the columns the model was trained
on; further columns are ignored. Of a sweep, the best trial predicts. A picture that is unlike MNIST's
digits (off-centre, several digits, things around the page) is marked as doubtful beside the answer.

A file that cannot be read is named on stderr and the others are still predicted. Exit codes: 0 all
files were predicted, 1 some were not, 2 none was, or the run is not available."""
REPRODUCE = """\
Nothing is checked out and nothing is installed: differences in code, packages, machine and data are
listed, and the run is trained again as a new run beside the old one. KEY=VALUE may change what does
not affect the result, such as data.root or trainer.enable_progress_bar, and trainer.accelerator or
trainer.devices if this machine lacks those of the run. Of a sweep, the best trial is reproduced; a
pruned trial ends after the same number of epochs.
Exit codes: 0 identical to the bit, 1 not, 2 bad input."""
UI = """\
It listens on this machine only, until Ctrl-C, and keeps a log in ui.log beside the runs.
Exit codes: 0 done, 1 failed, 2 bad input."""

COMPLETION = """\
In ~/.bashrc, in the environment's activate script, or typed:  eval "$(tracklight completion)"
"""
PUSH = """\
TARGET is a server (http://HOST:PORT), a database (sqlite:////PATH/mlflow.db) or a folder of runs. Params,
metrics, tags, data sets, artifacts and models are copied; with a sweep its trials, with a run its
evaluations; each once: what is there already is left, and the same command goes on after an end in the
middle. A run that went on is copied again, unless its copy went on, too; one in progress, with all below
it, is left out. A copy has an id of its own; its tag tracklight.pushed_from names the first.

  tracklight push /mnt/team/mlruns                      all runs
  tracklight push http://tracking:5000 best
Exit codes: 0 done, 1 a store does not answer, 2 bad input."""
GC = """\
Without --delete it only says how much each kind holds. What is deleted is gone for good, from MLflow too.
A sweep's trials are superseded by those of the same sweep alone; a reproduction never is.

  tracklight gc --delete deleted superseded
Exit codes: 0 done, 2 bad input."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are `BadInput`."""

    def error(self, message: str) -> NoReturn:
        """Refuse the command line."""
        raise BadInput(f"{message}; `{self.prog} --help` shows what can be given")


def main(command: str, argv: Sequence[str]) -> int:
    """Parse a command's arguments, then import and run it; return the exit code.

    The command is a module of this package that has `run(args) -> int`.
    """
    description, epilog, add_arguments = COMMANDS[command]
    script = f"python {sys.argv[0]}"
    prog = script if script.endswith(f"{command}.py") else f"tracklight {command}"
    parser = Parser(
        prog=prog,
        description=description,
        epilog=epilog.replace(f"{command}.py", prog),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if command not in STORELESS:
        _add_store(parser)
    if command not in OWN_JSON:
        parser.add_argument(
            "--json", action="store_true", help="print the result as JSON, all else on stderr"
        )
    add_arguments(parser)
    args = parser.parse_intermixed_args(argv)
    if command == "compare":
        _check_compare(args)
    if command not in STORELESS:
        choose_temporary_folder(args.dir)
    try:
        module = importlib.import_module(f"tracklight.commands.{command}")
    except ModuleNotFoundError as error:
        activate = "`source .venv/bin/activate` or `make train`" if IN_CLONE else f"pip install {error.name}"
        raise BadInput(f"no {error.name} here: {activate}") from error
    stdout, as_json = sys.stdout, command not in OWN_JSON and args.json
    args.emit = lambda found: print(json.dumps(found, indent=1), file=stdout, flush=True) if as_json else None
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        return module.run(args)


def _add_store(parser: Parser) -> None:
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    parser.add_argument("--uri", default=uri, help="of MLflow (default: mlflow.db in --dir)")
    folder = f"where the runs' folders are (default: {HOME})"
    parser.add_argument("--dir", type=Path, default=HOME, metavar="FOLDER", help=folder)
    parser.add_argument("--experiment", metavar="NAME", help="only runs of this one (default: all)")


def _add_compare(parser: Parser) -> None:
    parser.add_argument("runs", nargs="*", default=[], metavar="RUN", help=f"none or two: {RUN_HELP}")
    parser.add_argument("--sweep", metavar="RUN", help="only trials of this sweep, or of `last`")
    parser.add_argument("--metric", help="rank by its last value (default: each run's own score)")
    parser.add_argument("--mode", choices=("min", "max"), help="default: by the metric's name")
    parser.add_argument("--tag", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--since", metavar="TIME", help="started then or later: 2026-11-30, or 7d, 12h ago")
    parser.add_argument("--data", metavar="NAME", help="only on this data set")
    parser.add_argument("--columns", metavar="KEY,KEY", help="parameters to show, whether they differ or not")
    parser.add_argument("--limit", type=int, help=f"rows to show (default: {LIMIT})")
    parser.add_argument("--each", action="store_true", help="a row for each run, not each config")
    parser.add_argument("--diff", action="store_true", help="of two runs: show the code's patch")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--csv", action="store_const", const="csv", dest="form")
    form.add_argument("--json", action="store_const", const="json", dest="form")


def _check_compare(args: argparse.Namespace) -> None:
    if len(args.runs) not in (0, 2):
        raise BadInput(f"{len(args.runs)} RUN given; give none for a leaderboard, or two")
    if args.runs and args.form == "csv":
        raise BadInput("--csv is of a leaderboard; of two runs, --json tells all")
    if args.limit is not None and args.limit < 1:
        raise BadInput(f"--limit {args.limit} must be 1 or more")
    of_many = ("sweep", "metric", "mode", "tag", "since", "data", "columns", "limit", "each")
    for name in of_many if args.runs else ("diff",):
        if getattr(args, name):
            subject = "a leaderboard" if args.runs else "two runs"
            raise BadInput(f"--{name} is of {subject}; leave it out")


def _add_evaluate(parser: Parser) -> None:
    parser.add_argument("run", metavar="RUN", help=RUN_HELP)
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help="of its data config")
    splits = ("train", "val", "test")
    parser.add_argument("--split", choices=splits, help="default: test, if there is one")
    parser.add_argument("--table", type=Path, metavar="FILE", help="test on all rows of this CSV")
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--into-run", action="store_true", help="log to the run, not to a child")
    target.add_argument("--no-log", action="store_true", help="log nothing")


def _add_predict(parser: Parser) -> None:
    parser.add_argument("run", metavar="RUN", help=RUN_HELP)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--format", choices=("table", "csv", "json"), default="table")
    form.add_argument("--json", action="store_const", const="json", dest="format")
    invert = "whether images are dark on light (auto: by their border)"
    parser.add_argument("--invert", choices=("auto", "yes", "no"), default="auto", help=invert)


def _add_reproduce(parser: Parser) -> None:
    parser.add_argument("run", metavar="RUN", help=RUN_HELP)
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help="of its config")


def _add_ui(parser: Parser) -> None:
    parser.add_argument("--port", type=int, default=UI_PORT, help=f"default: {UI_PORT}")


def _add_push(parser: Parser) -> None:
    parser.add_argument("target", metavar="TARGET")
    parser.add_argument("runs", nargs="*", default=[], metavar="RUN", help=f"default: all; {RUN_HELP}")


def _add_gc(parser: Parser) -> None:
    kinds = ("deleted", "failed", "superseded")
    parser.add_argument(
        "--delete", nargs="+", choices=kinds, default=[], metavar="KIND", help=", ".join(kinds)
    )


def _add_init(parser: Parser) -> None:
    parser.add_argument("folder", type=Path, metavar="NAME", help="of the folder, and of the package in it")


OWN_JSON = ("compare", "predict")  # commands that print a result of many rows in several forms
STORELESS = ("completion", "init")  # commands that have nothing to do with runs
COMMANDS = {
    "compare": ("Compare runs.", COMPARE, _add_compare),
    "evaluate": ("Test the best weights of a run again.", EVALUATE, _add_evaluate),
    "predict": ("Predict from files with the best weights of a run.", PREDICT, _add_predict),
    "reproduce": ("Train a run again and compare metrics and weights.", REPRODUCE, _add_reproduce),
    "ui": ("Show the runs in MLflow's UI.", UI, _add_ui),
    "completion": ("Print the script that completes command lines in bash.", COMPLETION, lambda parser: None),
    "push": ("Copy runs to another store.", PUSH, _add_push),
    "gc": ("Free the disk of runs that nobody needs.", GC, _add_gc),
    "init": ("Make a project of your own: a model, data, config, a test.", DONE, _add_init),
}
