"""Runs side by side: a leaderboard of many, or all that differs between two."""

import sys
from collections.abc import Sequence
from typing import Any

from tracklight.errors import BadInput
from tracklight.reuse.command import RUN_HELP, Parser
from tracklight.tracking.layout import FOLDER, PARENT_TAG, SWEEP_TAG
from tracklight.tracking.ledger import Chosen, Ledger, open_ledger, parts

LIMIT = 50
EPILOG = """\
Without RUNs, a leaderboard: settings that differ in their seed alone share a place, ranked by the
mean of their scores with its 95 % interval. Runs scored by another metric than the newest are left
out; --metric ranks all that have it. Reproductions are no new evidence, and left out; pruned trials
are shown without a rank, and no part of a mean. "other git", "other code" and "other data": than
that of the first place.
With two RUNs, all that differs between them, and whether their scores differ by more than chance,
where there are several seeds of each.

  compare.py --sweep last               the trials of the newest sweep
  compare.py --metric test/accuracy --tag tracklight.code=1f3a... --limit 10
  compare.py best last                  what is different in the newest run
Exit codes: 0 done, 2 bad input."""


def main(argv: Sequence[str]) -> int:
    """Compare as the command line says; return the exit code."""
    parser = Parser("Compare runs.", EPILOG)
    parser.add_argument("runs", nargs="*", metavar="RUN", help=f"none or two: {RUN_HELP}")
    parser.add_argument("--sweep", metavar="RUN", help="only trials of this sweep, or of `last`")
    parser.add_argument("--metric", help="rank by its last value (default: each run's own score)")
    parser.add_argument("--mode", choices=("min", "max"), help="default: as the metric's name says")
    parser.add_argument("--tag", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--limit", type=int, help=f"places to show (default: {LIMIT})")
    parser.add_argument("--each", action="store_true", help="a place for each run, not setting")
    parser.add_argument("--diff", action="store_true", help="of two runs: show the code's patch")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--csv", action="store_const", const="csv", dest="form")
    form.add_argument("--json", action="store_const", const="json", dest="form")
    asked = parser.parse_intermixed_args(argv)
    if len(asked.runs) not in (0, 2):
        raise BadInput(f"{len(asked.runs)} RUN given; give none for a leaderboard, or two")
    if asked.runs and asked.form == "csv":
        raise BadInput("--csv is of a leaderboard; of two runs, --json tells all")
    if asked.limit is not None and asked.limit < 1:
        raise BadInput(f"--limit {asked.limit} must be 1 or more")
    others = ("sweep", "metric", "mode", "tag", "limit", "each") if asked.runs else ("diff",)
    for name in others:
        if getattr(asked, name):
            what = "a leaderboard" if asked.runs else "two runs"
            raise BadInput(f"--{name} is of {what}; leave it out")
    ledger = open_ledger(asked.uri, asked.dir)
    if asked.runs:
        from tracklight.reuse import pair

        print(pair.told(ledger, asked), end="")
        return 0
    from tracklight.reuse import ranking, tables

    runs, folders = chosen(ledger, asked), asked.dir.absolute() / FOLDER
    board = ranking.rank(
        ledger, runs, asked.metric, asked.mode, asked.limit or LIMIT, asked.each, folders
    )
    tables.write(board, asked.form or "table", sys.stdout)
    return 0


def chosen(ledger: Ledger, asked: Any) -> Chosen:
    """Return which runs the command line's filters leave in.

    Raises:
        BadInput: A filter does not read, or there is no such sweep.
    """
    tags = {}
    for word in asked.tag:
        key, separator, value = word.partition("=")
        if not separator or not key:
            raise BadInput(f"--tag {word} must be KEY=VALUE")
        tags[key] = value
    parent = None if asked.sweep is None else _sweep(ledger, asked.sweep, asked.experiment)
    return Chosen(asked.experiment, parent, tags)


def _sweep(ledger: Ledger, word: str, experiment: str | None) -> str:
    from tracklight.tracking.choice import SCORE, choose_id

    if word != "last":
        run_id = choose_id(ledger, word, experiment)
        if SWEEP_TAG not in ledger.entries([run_id])[0].tags:
            raise BadInput(f"--sweep {word}: run {run_id} is no sweep; name one, or `last`")
        return run_id
    trained = [run.run_id for run in ledger.scored(Chosen(experiment), SCORE)]
    for part in parts(trained):
        for entry in ledger.entries(part):
            if PARENT_TAG in entry.tags:
                return entry.tags[PARENT_TAG]
    raise BadInput(f"there is no sweep in {ledger.shown_uri}")
