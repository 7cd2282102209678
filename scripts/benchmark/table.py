"""Benchmark results as Markdown: printed, and kept in BENCHMARKS.md."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmark.interval import Interval

HEAD = """# Benchmarks

These are the last measurements of `make bench`. Brackets hold 95 % intervals. A target is reached if the
estimate keeps it, and "unclear" if only a part of the interval does. "Ours" is tracklight, "by hand" a
hand-written loop, and A / B the ratio of their times.
"""


@dataclass(frozen=True)
class Claim:
    """Something measured, and how much it may be at most."""

    what: str
    measured: Interval
    target: float | None
    shown_target: str
    holds: bool = True  # what else the target asks for

    @property
    def verdict(self) -> str:
        """Say whether the target is reached."""
        if self.target is None:
            return ""
        if not math.isfinite(self.measured.low):
            return "unknown"
        if not self.holds or self.measured.low > self.target:
            return "no"
        return "yes" if self.measured.estimate <= self.target else "unclear"


@dataclass(frozen=True)
class Section:
    """What was measured in one go: claims, and the times they rest on."""

    title: str
    notes: Sequence[str]
    claims: Sequence[Claim]
    times: Sequence[tuple[str, Interval]]
    time_unit: str = "s an epoch"

    def markdown(self) -> str:
        """Lay the section out, its title without the mark of a heading."""
        rows = [
            [claim.what, *_cells(claim.measured), claim.shown_target, claim.verdict] for claim in self.claims
        ]
        claims = _table(["what", "measured", "95 % interval", "at most", "reached"], rows)
        rows = [[name, *_cells(interval)] for name, interval in self.times]
        times = ["", _table(["", self.time_unit, "95 % interval"], rows)] if rows else []
        return "\n".join([self.title, "", *self.notes, "", claims, *times, ""])


def keep(section: Section, path: Path) -> None:
    """Write a section into the file, in place of what it said under the same title before."""
    text = path.read_text() if path.exists() else ""
    parts = text.split("\n## ")[1:]
    kept = {part.splitlines()[0]: part.rstrip("\n") + "\n" for part in parts}
    kept[section.title] = section.markdown()
    path.write_text("\n## ".join([HEAD, *kept.values()]))


def _cells(interval: Interval) -> list[str]:
    if not math.isfinite(interval.low):
        return [_number(interval.estimate), ""]
    return [_number(interval.estimate), f"[{_number(interval.low)}, {_number(interval.high)}]"]


def _number(value: float) -> str:
    """Show three significant digits, or whole numbers."""
    if value == 0 or abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
