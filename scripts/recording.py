"""Record a terminal session for the README: type commands, run them, write an animated SVG.

    python scripts/recording.py docs/recording.svg

The commands run in a pseudo-terminal, beside a copy of the project with a store of its own. Nothing of what
they print is made up; only time is cut short. Needs the extra docs, and MNIST where `MNIST_ROOT` says.
"""

import fcntl
import os
import pty
import select
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator, Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

import pyte  # pyright: ignore[reportMissingImports] -- of the extra docs

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = (
    "python train.py model=mlp",
    "python train.py -m model=mlp optimizer.lr=0.1,0.01 seed=1,2 trainer.max_epochs=2",
    "python scripts/compare.py",
)
PARTS = ("train.py", "conf", "scripts", "src", "pyproject.toml")  # of the project, to be run beside
HOME = "/home/you/tracklight"  # shown in place of the copy's folder
ROWS, COLUMNS = 24, 118
PROMPT = "\x1b[32m$\x1b[0m "
KEY_S, READ_S, PLAY_S, STEP_S = 0.03, 3.0, 7.0, 0.15  # a key; to read an answer; an answer at most; a frame
WAIT_S = 1.0  # the longest wait, before an answer is sped up
POSTER_S = 1.0  # of the finished screen, before the first key
CELL_X, CELL_Y, SIZE, MARGIN = 7.8, 17, 13, 16  # pixels
COLOURS = {
    **{"default": "#d6deeb", "black": "#575656", "red": "#ef5350", "green": "#22da6e", "brown": "#e0c07a"},
    **{"blue": "#82aaff", "magenta": "#c792ea", "cyan": "#4fd6be", "white": "#ffffff"},
}


def record(command: str, folder: Path) -> Iterator[tuple[float, bytes]]:
    """Run a command in a pseudo-terminal; yield what it prints with the seconds since it printed before."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    env = os.environ | {"PYTHONPATH": str(folder / "src"), "TERM": "xterm-256color"}
    env |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    streams: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), theirs)
    process = subprocess.Popen(
        ["bash", "-c", command], cwd=folder, env=env, start_new_session=True, **streams
    )
    os.close(theirs)
    before_s = time.monotonic()
    while process.poll() is None or select.select([ours], [], [], 0)[0]:
        if not select.select([ours], [], [], 0.05)[0]:
            continue
        try:
            printed = os.read(ours, 1 << 16)
        except OSError:  # closed by its last writer
            break
        now_s = time.monotonic()
        yield now_s - before_s, printed.replace(str(folder).encode(), HOME.encode())
        before_s = now_s
    os.close(ours)
    if process.wait():
        raise SystemExit(f"{command}: exit code {process.returncode}")


def session(commands: Sequence[str], folder: Path) -> Iterator[tuple[float, bytes]]:
    """Yield all that the terminal shows, with the seconds to wait before it."""
    for command in commands:
        yield 0.0, PROMPT.encode()
        for key in command:
            yield KEY_S, key.encode()
        yield 0.5, b"\r\n"
        answer = [(min(waited_s, WAIT_S), printed) for waited_s, printed in record(command, folder)]
        faster = max(1.0, sum(waited_s for waited_s, _ in answer) / PLAY_S)
        yield from ((waited_s / faster, printed) for waited_s, printed in answer)
        yield READ_S, b""


def frames(events: Iterator[tuple[float, bytes]]) -> Iterator[tuple[float, list[str]]]:
    """Yield the rows of the screen as SVG, each time it has changed, with the second at which it does."""
    screen = pyte.Screen(COLUMNS, ROWS)
    stream = pyte.ByteStream(screen)
    now_s, due_s = 0.0, 0.0
    for waited_s, printed in events:
        at_s = max(now_s, due_s)
        now_s += waited_s
        if at_s < now_s:  # else the next event changes the screen before it is due
            yield at_s, [draw_row(screen.buffer[row]) for row in range(ROWS)]
            due_s = at_s + STEP_S
        stream.feed(printed)


def draw_row(row: Any) -> str:
    """Draw one row of the screen: a text for each stretch of one colour."""
    parts = []
    for (colour, bold), cells in groupby(range(COLUMNS), lambda x: (row[x].fg, row[x].bold)):
        columns = list(cells)
        text = "".join(row[x].data for x in columns)
        start = columns[0] + len(text) - len(text.lstrip())
        if text := text.strip():
            fill = COLOURS.get(colour) or (f"#{colour}" if len(colour) == 6 else COLOURS["default"])
            place = f'x="{start * CELL_X:.1f}" textLength="{len(text) * CELL_X:.1f}"'
            weight = ' font-weight="bold"' if bold else ""
            parts.append(f'<text {place} fill="{fill}"{weight}>{escape(text)}</text>')
    return "".join(parts)


def film(shots: Sequence[tuple[float, list[str]]]) -> str:
    """Lay the frames below one another, and move them past a window by a CSS animation without scripts.

    The last frame is the first one as well: where nothing moves, the finished screen is seen.
    """
    shots = [(0.0, shots[-1][1]), *((at_s + POSTER_S, rows) for at_s, rows in shots)]
    total_s = shots[-1][0] + READ_S
    width, height = COLUMNS * CELL_X + 2 * MARGIN, ROWS * CELL_Y + 2 * MARGIN
    numbers: dict[str, int] = {}
    strip, steps = [], []
    for index, (at_s, rows) in enumerate(shots):
        for y, row in enumerate(rows):
            if row:
                number = numbers.setdefault(row, len(numbers))
                strip.append(f'<use href="#r{number}" y="{index * height + (y + 1) * CELL_Y:g}"/>')
        steps.append(f"{100 * at_s / total_s:.2f}%{{transform:translateY({-index * height:g}px)}}")
    defined = "".join(f'<g id="r{number}">{row}</g>' for row, number in numbers.items())
    style = (
        f"text{{font:{SIZE}px ui-monospace,Menlo,Consolas,'DejaVu Sans Mono',monospace;white-space:pre}}"
        f"#film{{animation:film {total_s:.1f}s steps(1,end) infinite}}@keyframes film{{{''.join(steps)}}}"
        f"@media (prefers-reduced-motion:reduce){{#film{{animation:none}}}}"
    )
    frame = f'<rect width="{width}" height="{height}" rx="8" fill="#0d1b2a"/>'
    window = f'<svg x="{MARGIN}" y="{MARGIN}" width="{width - 2 * MARGIN}" height="{height - 2 * MARGIN}">'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xml:space="preserve" viewBox="0 0 {width} {height}">'
        f"<style>{style}</style><defs>{defined}</defs>{frame}"
        f'{window}<g id="film">{"".join(strip)}</g></svg></svg>\n'
    )


def main(path: Path) -> None:
    """Record and write."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "tracklight"
        folder.mkdir()
        for part in PARTS:
            if (ROOT / part).is_dir():
                shutil.copytree(ROOT / part, folder / part, symlinks=True)
            else:
                shutil.copy2(ROOT / part, folder / part)
        shots = list(frames(session(COMMANDS, folder)))
    path.write_text(film(shots))
    print(f"{path}: {len(shots)} frames, {shots[-1][0]:.0f} s, {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
