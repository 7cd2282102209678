"""The command lines of all commands but train.

Help and bad arguments are answered at once, without the imports that the commands themselves need.
"""

import argparse
import importlib
import json
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Any, NoReturn

from tracklight.config.hardware import choose_temporary_folder
from tracklight.errors import BadInput
from tracklight.paths import HOME, IN_CLONE, UI_PORT

LIMIT = 50
RUN_HELP = "id of a run, a unique prefix of one, `last`, or `best` (of those like the newest)"
HELP = Path(__file__).with_name("help")  # texts: of each command what it does and what follows its arguments


class Parser(argparse.ArgumentParser):
    """A parser whose errors are `BadInput`."""

    def error(self, message: str) -> NoReturn:
        """Refuse the command line."""
        raise BadInput(f"{message}; `{self.prog} --help` shows what can be given")


def main(command: str, argv: Sequence[str]) -> int:
    """Parse a command's arguments, then import and run it; return the exit code.

    The command is a module of this package that has `run(args) -> int`.
    """
    script = f"python {sys.argv[0]}"
    prog = script if script.endswith(f"{command}.py") else f"tracklight {command}"
    look = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    description, _, epilog = help_of(command).replace(f"{command}.py", prog).partition("\n\n")
    parser = Parser(prog=prog, description=description, epilog=epilog, **look)
    has_store, own_json = command not in STORELESS, command in OWN_JSON
    for each in [*(STORE if has_store else ()), *(() if own_json else (JSON,)), *COMMANDS[command]]:
        alternatives = parser.add_mutually_exclusive_group() if isinstance(each, list) else parser
        for names, options in each if isinstance(each, list) else [each]:
            alternatives.add_argument(*names, **options)
    args = parser.parse_intermixed_args(argv)
    if command == "compare":
        _check_compare(args)
    if has_store:
        args.uri = os.environ.get("MLFLOW_TRACKING_URI") if args.uri is None else args.uri
        choose_temporary_folder(args.dir)
    try:
        module = importlib.import_module(f"tracklight.commands.{command}")
    except ModuleNotFoundError as error:
        activate = "`source .venv/bin/activate` or `make train`" if IN_CLONE else f"pip install {error.name}"
        raise BadInput(f"no {error.name} here: {activate}") from error
    stdout, as_json = sys.stdout, not own_json and args.json
    args.emit = lambda found: print(json.dumps(found, indent=1), file=stdout, flush=True) if as_json else None
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        return module.run(args)


def help_of(command: str) -> str:
    """Return what a command does, in its first line, and what follows its arguments."""
    return (HELP / f"{command}.txt").read_text(encoding="utf-8")


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


def _add(*names: str, **options: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Return what `add_argument` is to be called with."""
    return names, options


RUN = _add("run", metavar="RUN", help=RUN_HELP)
JSON = _add("--json", action="store_true", help="print the result as JSON, all else on stderr")
STORE = (
    _add("--uri", help="of MLflow (default: mlflow.db in --dir)"),
    _add("--dir", type=Path, default=HOME, metavar="FOLDER", help=f"of the runs' folders (default: {HOME})"),
    _add("--experiment", metavar="NAME", help="only runs of this one (default: all)"),
)
COMPARE = (
    _add("runs", nargs="*", default=[], metavar="RUN", help=f"none or two: {RUN_HELP}"),
    _add("--sweep", metavar="RUN", help="only trials of this sweep, or of `last`"),
    _add("--metric", help="rank by its last value (default: each run's own score)"),
    _add("--mode", choices=("min", "max"), help="default: by the metric's name"),
    _add("--tag", action="append", default=[], metavar="KEY=VALUE"),
    _add("--since", metavar="TIME", help="started then or later: 2026-11-30, or 7d, 12h ago"),
    _add("--data", metavar="NAME", help="only on this data set"),
    _add("--columns", metavar="KEY,KEY", help="parameters to show, whether they differ or not"),
    _add("--limit", type=int, help=f"rows to show (default: {LIMIT})"),
    _add("--each", action="store_true", help="a row for each run, not each config"),
    _add("--diff", action="store_true", help="of two runs: show the code's patch"),
    [_add(f"--{form}", action="store_const", const=form, dest="form") for form in ("csv", "json")],
)
EVALUATE = (
    RUN,
    _add("overrides", nargs="*", default=[], metavar="KEY=VALUE", help="of its data config"),
    _add("--split", choices=("train", "val", "test"), help="default: test, if there is one"),
    _add("--table", type=Path, metavar="FILE", help="test on all rows of this CSV"),
    [
        _add("--into-run", action="store_true", help="log to the run, not to a child"),
        _add("--no-log", action="store_true", help="log nothing"),
    ],
)
PREDICT = (
    RUN,
    _add("files", nargs="+", type=Path, metavar="FILE"),
    [
        _add("--format", choices=("table", "csv", "json"), default="table"),
        _add("--json", action="store_const", const="json", dest="format"),
    ],
    _add(
        "--invert", choices=("auto", "yes", "no"), default="auto", help="dark on light? auto: by the border"
    ),
)
KINDS = ("deleted", "failed", "superseded")
OWN_JSON = ("compare", "predict")  # commands that print a result of many rows in several forms
STORELESS = ("completion", "init")  # commands that have nothing to do with runs
COMMANDS: dict[str, Sequence[Any]] = {  # the arguments of each; of those in a list at most one is given
    "compare": COMPARE,
    "evaluate": EVALUATE,
    "predict": PREDICT,
    "reproduce": [RUN, _add("overrides", nargs="*", default=[], metavar="KEY=VALUE", help="of its config")],
    "ui": [_add("--port", type=int, default=UI_PORT, help=f"default: {UI_PORT}")],
    "completion": [],
    "push": [
        _add("target", metavar="TARGET"),
        _add("runs", nargs="*", default=[], metavar="RUN", help=f"default: all; {RUN_HELP}"),
    ],
    "gc": [_add("--delete", nargs="+", choices=KINDS, default=[], metavar="KIND", help=", ".join(KINDS))],
    "init": [_add("folder", type=Path, metavar="NAME", help="of the folder, and of the package in it")],
}
