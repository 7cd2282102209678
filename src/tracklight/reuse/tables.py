"""A leaderboard as a table for people, or as CSV or JSON."""

import csv
import json
import math
from collections.abc import Sequence
from typing import IO, Any

from tracklight.reuse.ranking import Leaderboard, Place
from tracklight.sweep.leaderboard import short_names

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
