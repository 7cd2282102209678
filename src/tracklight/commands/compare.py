"""Compares runs: a leaderboard of many, or all that differs between two.

Neither torch nor MLflow is imported here: they take longer than ranking ten thousand runs.
"""

import csv
import json
import math
import re
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.table import Table

from tracklight.commands.parser import LIMIT
from tracklight.errors import BadInput, count
from tracklight.runs import diff, leaderboard, select
from tracklight.runs.leaderboard import RIGHT, Leaderboard, LeaderboardRow, short_names
from tracklight.runs.reader import RunFilter, RunReader, batches, open_reader
from tracklight.tracking.tags import DATA_NAME_TAG, PARENT_TAG, RUNS_FOLDER, SCORE, SWEEP_TAG

BARS = "▁▂▃▄▅▆▇█"
SPARKLINE_WIDTH = 12
MAX_COLUMNS = 6  # of parameters in the table; CSV and JSON have all
WIDTH = 160  # of the table if the output is no terminal


def run(args: Namespace) -> int:
    """Print the leaderboard, or the report on two runs; return the exit code."""
    reader = open_reader(args.uri, args.dir)
    if args.runs:
        print(diff.diff_runs(reader, args), end="")
        return 0
    folders = args.dir.absolute() / RUNS_FOLDER
    run_filter, limit = _parse_filter(reader, args), args.limit or LIMIT
    chosen = args.columns.split(",") if args.columns else []
    board = leaderboard.rank_runs(
        reader, run_filter, args.metric, args.mode, limit, args.each, folders, chosen
    )
    if args.form == "json":
        print(json.dumps([_to_dict(board, row) for row in board.rows], indent=1))
    elif args.form == "csv":
        rows = [_to_csv_row(board, row) for row in board.rows]
        writer = csv.DictWriter(sys.stdout, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    else:
        _print_table(board, len(board.columns) if chosen else MAX_COLUMNS)
    return 0


def _parse_filter(reader: RunReader, args: Namespace) -> RunFilter:
    for word in args.tag:
        if word.find("=") < 1:
            raise BadInput(f"--tag {word} must be KEY=VALUE")
    tags = dict(word.split("=", 1) for word in args.tag)
    if args.sweep is not None:
        tags[PARENT_TAG] = _find_sweep(reader, args.sweep, args.experiment)
    if args.data is not None:
        tags[DATA_NAME_TAG] = args.data
    return RunFilter(args.experiment, tags, since_ms=_parse_time(args.since) if args.since else 0)


def _parse_time(text: str) -> int:
    """Return a date or an age in milliseconds since 1970."""
    try:
        if match := re.fullmatch(r"(\d{1,6})([dhm])", text):
            return round((time.time() - int(match[1]) * {"d": 86400, "h": 3600, "m": 60}[match[2]]) * 1000)
        return round(datetime.fromisoformat(text).timestamp() * 1000)
    except (ValueError, OverflowError):
        raise BadInput(f"--since {text} must be a date, 2026-11-30, or an age, 7d, 12h or 30m") from None


def _find_sweep(reader: RunReader, word: str, experiment: str | None) -> str:
    if word != "last":
        run_id = select.select_id(reader, word, experiment)
        if SWEEP_TAG not in reader.get_runs([run_id])[0].tags:
            raise BadInput(f"--sweep {word}: run {run_id} is no sweep; name one, or `last`")
        return run_id
    scores = reader.search_scores(RunFilter(experiment), SCORE)
    for batch in batches([run.run_id for run in scores]):
        for run in reader.get_runs(batch):
            if PARENT_TAG in run.tags:
                return run.tags[PARENT_TAG]
    raise BadInput(f"there is no sweep in {reader.display_uri}")


def sparkline(values: Sequence[float]) -> str:
    """Draw a series in a few letters, on a logarithmic scale if it spans orders of magnitude."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    width = min(SPARKLINE_WIDTH, len(finite))
    cells = [finite[int(i * len(finite) / width)] for i in range(width - 1)] + [finite[-1]]
    if min(cells) > 0 and max(cells) > 20 * min(cells):
        cells = [math.log(value) for value in cells]
    low, span = min(cells), (max(cells) - min(cells)) or 1.0
    return "".join(BARS[round((value - low) / span * (len(BARS) - 1))] for value in cells)


def _to_dict(board: Leaderboard, row: LeaderboardRow) -> dict[str, Any]:
    own = {key: getattr(row, key) for key in ("score", "half_width", "delta", "params", "flags")}
    seeds, names = [run.params.get("seed") for run in row.runs], [run.name for run in row.runs]
    own |= {"seeds": seeds, "runs": row.run_ids, "names": names, "loss": row.losses}
    return {"rank": row.rank, "metric": board.metric, **own}


def _to_csv_row(board: Leaderboard, row: LeaderboardRow) -> dict[str, Any]:
    values = _to_dict(board, row)
    first = {key: values[key] for key in ("rank", "metric", "score", "half_width", "delta")}
    last = {key: " ".join(map(str, values[key])) for key in ("seeds", "runs")}
    return {**first, **row.params, **last, "flags": "; ".join(row.flags)}


def _print_table(board: Leaderboard, num_columns: int) -> None:
    """Print a leaderboard as a table, as wide as the screen, and below it what the table leaves out."""
    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False, markup=False)
    columns, unbounded = board.columns[:num_columns], console.options.update(max_width=10_000)
    table = _make_table(board, columns)
    while columns and console.measure(table, options=unbounded).minimum > console.width:
        columns = columns[:-1]
        table = _make_table(board, columns)
    note = f"{count(board.num_runs, 'run')} of {count(board.num_settings, 'setting')}, {board.mode} first"
    if len(board.rows) < board.num_settings:
        note += f", {len(board.rows)} shown (--limit)"
    if board.left_out:
        note += f"; {board.left_out}"
    if dropped := board.columns[len(columns) :]:
        note += f"; further parameters that differ: {', '.join(dropped)} (--columns, --csv, --json)"
    console.print(table)
    console.print(note, style="dim")


def _make_table(board: Leaderboard, params: Sequence[str]) -> Table:
    columns = leaderboard.score_columns(board.metric, any(len(row.runs) > 1 for row in board.rows))
    columns.append(("delta", RIGHT, lambda row: "" if row.delta is None else f"{row.delta:+.3g}"))
    for key, name in zip(params, short_names(params), strict=True):
        fold = {"overflow": "fold", "min_width": len(name)}
        columns.append((name, fold, lambda row, key=key: _format_param(row.params[key])))
    columns.append(("loss", {"no_wrap": True}, lambda row: sparkline(row.losses)))
    columns.append(("run", {"no_wrap": True}, lambda row: row.run_ids[0][:8]))
    if any(row.flags for row in board.rows):
        columns.append(("flags", {"style": "yellow", "overflow": "fold"}, lambda row: ", ".join(row.flags)))
    return leaderboard.to_table(board.rows, columns)


def _format_param(text: str) -> str:
    try:
        return f"{float(text):.4g}" if "." in text or "e" in text else text
    except ValueError:
        is_class = text.startswith(("tracklight.", "torch."))
        return text.rpartition(".")[2] if is_class else text[:40]
