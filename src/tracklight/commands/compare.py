"""Runs side by side: a leaderboard of many, or all that differs between two."""

import csv
import json
import math
import sys
from collections.abc import Sequence
from typing import IO, Any

from tracklight.commands.parser import RUN_HELP, Parser
from tracklight.errors import BadInput
from tracklight.runs.leaderboard import Leaderboard, Place, short_names
from tracklight.runs.reader import RunFilter, RunReader, open_reader, parts
from tracklight.tracking.tags import FOLDER, PARENT_TAG, SWEEP_TAG

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
    ledger = open_reader(asked.uri, asked.dir)
    if asked.runs:
        from tracklight.runs import diff as pair

        print(pair.told(ledger, asked), end="")
        return 0
    from tracklight.runs import leaderboard as ranking

    runs, folders = chosen(ledger, asked), asked.dir.absolute() / FOLDER
    board = ranking.rank(
        ledger, runs, asked.metric, asked.mode, asked.limit or LIMIT, asked.each, folders
    )
    write(board, asked.form or "table", sys.stdout)
    return 0


def chosen(ledger: RunReader, asked: Any) -> RunFilter:
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
    return RunFilter(asked.experiment, parent, tags)


def _sweep(ledger: RunReader, word: str, experiment: str | None) -> str:
    from tracklight.runs.select import choose_id
    from tracklight.tracking.tags import SCORE

    if word != "last":
        run_id = choose_id(ledger, word, experiment)
        if SWEEP_TAG not in ledger.entries([run_id])[0].tags:
            raise BadInput(f"--sweep {word}: run {run_id} is no sweep; name one, or `last`")
        return run_id
    trained = [run.run_id for run in ledger.scored(RunFilter(experiment), SCORE)]
    for part in parts(trained):
        for entry in ledger.entries(part):
            if PARENT_TAG in entry.tags:
                return entry.tags[PARENT_TAG]
    raise BadInput(f"there is no sweep in {ledger.shown_uri}")


BARS = "▁▂▃▄▅▆▇█"
SPARK_WIDTH = 12
MAX_COLUMNS = 6  # of parameters on a terminal; CSV and JSON have all
WIDTH = 160  # where there is no terminal to ask


def write(board: Leaderboard, form: str, out: IO[str]) -> None:
    """Write a leaderboard; `form` is table, csv or json."""
    if form == "json":
        json.dump([_plain(board, place) for place in board.places], out, indent=1)
        out.write("\n")
    elif form == "csv":
        rows = [_flat(board, place) for place in board.places]
        writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    else:
        _show(board, out)


def sparkline(values: Sequence[float]) -> str:
    """Draw a series in a few letters; one that falls by orders of magnitude by its logarithm."""
    kept = [value for value in values if math.isfinite(value)]
    if not kept:
        return ""
    size = len(kept) / min(SPARK_WIDTH, len(kept))
    cells = [kept[int(at * size)] for at in range(min(SPARK_WIDTH, len(kept)) - 1)] + [kept[-1]]
    if min(cells) > 0 and max(cells) > 20 * min(cells):
        cells = [math.log(value) for value in cells]
    low, high = min(cells), max(cells)
    if high == low:
        return BARS[0] * len(cells)
    return "".join(BARS[round((v - low) / (high - low) * (len(BARS) - 1))] for v in cells)


def _plain(board: Leaderboard, place: Place) -> dict[str, Any]:
    return {
        "rank": place.rank,
        "metric": board.metric,
        "score": place.mean,
        "half_width": place.half_width,
        "delta": place.delta,
        "seeds": [run.params.get("seed") for run in place.runs],
        "params": place.params,
        "flags": place.flags,
        "runs": [run.run_id for run in place.runs],
        "names": [run.name for run in place.runs],
        "loss": place.loss,
    }


def _flat(board: Leaderboard, place: Place) -> dict[str, Any]:
    plain = _plain(board, place)
    first = {key: plain[key] for key in ("rank", "metric", "score", "half_width", "delta")}
    last = {key: " ".join(map(str, plain[key])) for key in ("seeds", "runs")}
    return {**first, **place.params, **last, "flags": "; ".join(place.flags)}


def _show(board: Leaderboard, out: IO[str]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(
        file=out, width=None if out.isatty() else WIDTH, highlight=False, markup=False
    )
    columns, dropped = board.columns[:MAX_COLUMNS], board.columns[MAX_COLUMNS:]
    several = any(len(place.runs) > 1 for place in board.places)
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("#", justify="right")
    table.add_column(board.metric, justify="right", no_wrap=True)
    if several:
        table.add_column("± 95 %", justify="right", no_wrap=True)
        table.add_column("seeds", justify="right")
    table.add_column("delta", justify="right", no_wrap=True)
    for name in short_names(columns):
        table.add_column(name, overflow="fold")
    table.add_column("loss", no_wrap=True)
    table.add_column("run", no_wrap=True)
    if any(place.flags for place in board.places):
        table.add_column("flags", style="yellow", overflow="fold")
    for place in board.places:
        half = place.half_width
        seeds = [f"±{half:.2g}" if half is not None else "", str(len(place.runs))]
        delta = "" if place.delta is None else f"{place.delta:+.3g}"
        cells = [
            str(place.rank or "-"),
            "-" if place.mean is None else f"{place.mean:.5g}",
            *(seeds if several else []),
            delta,
            *(_value(place.params[key]) for key in columns),
            sparkline(place.loss),
            place.runs[0].run_id[:8],
            ", ".join(place.flags),
        ]
        style = "bold green" if place.rank == 1 else None
        table.add_row(*(Text(cell) for cell in cells[: len(table.columns)]), style=style)
    console.print(table)
    told = f"{board.num_runs:,} runs of {board.num_settings:,} settings, {board.mode} first"
    if len(board.places) < board.num_settings:
        told += f", {len(board.places)} shown (--limit)"
    if board.left_out:
        told += f"; {board.left_out}"
    if dropped:
        told += f"; further parameters that differ: {', '.join(dropped)} (--csv, --json)"
    console.print(told, style="dim")


def _value(text: str) -> str:
    try:
        return f"{float(text):.4g}" if "." in text or "e" in text else text
    except ValueError:
        tail = text.rpartition(".")[2]
        return tail if text.startswith(("tracklight.", "torch.")) else text[:40]
