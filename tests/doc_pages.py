"""Reads the pages of the documentation: their blocks, their commands, their links.

A fenced block names its language. `text` right after a block of `bash` or `python` is what that one prints,
with `...` for any text. A comment before a block, or within a row of a table, says what else is to be known:

    <!-- file: PATH -->        the block is the content of this file
    <!-- part of: PATH -->     this file has it as it stands here
    <!-- not run: REASON -->   it cannot be run, or not here
    <!-- exits: CODE -->       it ends so: it shows an error
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from tracklight.paths import ROOT

HEADS = [path for path in sorted((ROOT / "conf").glob("*/*.yaml")) if "\n# python " in path.read_text()]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = ("python", "tracklight", "make", "pip", "torchrun", "srun", "sbatch", "mlflow")
COMMENT = re.compile(r"<!-- (file|part of|not run|exits): (.*?) -->")


@dataclass
class Block:
    """A fenced block, or a command that is the whole of a cell of a table."""

    page: str
    line: int
    language: str
    text: str
    file: str = ""
    part_of: str = ""
    not_run: str = ""
    exits: str = "0"
    output: str | None = None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """Return the blocks of a page in their order."""
    found: list[Block] = []
    fence, marks, inside = "", {}, False
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if opened := re.match(r"(`{3,}|:{3,})(.*)$", line):
            if not inside:
                inside, fence = True, opened[1]
                found.append(Block(page.name, number, opened[2], "", **marks))
            elif opened[1] == fence and not opened[2]:
                inside, marks = False, {}
                _join_output(found)
        elif inside:
            found[-1].text += line + "\n"
        elif line.startswith("|"):
            for text in re.findall(r"\| `([^`]+)`(?= *(?:<!--.*?-->)? *\|)", line):
                if text.split()[0] in PROGRAMS:
                    found.append(Block(page.name, number, "bash", f"{text}\n", **_marked(line)))
        elif line.strip():
            marks = _marked(line)
    return found


def _marked(line: str) -> dict[str, str]:
    return {name.replace(" ", "_"): value for name, value in COMMENT.findall(line)}


def _join_output(found: list[Block]) -> None:
    if (
        found[-1].language == "text"
        and not found[-1].file
        and len(found) > 1
        and found[-2].language in ("bash", "python")
    ):
        output = found.pop()
        found[-1].output = output.text


def commands(text: str) -> list[list[str]]:
    """Return the words of each command of a bash block, its comments and settings of variables left out."""
    found, begun = [], ""
    for line in text.splitlines(keepends=True):
        begun += line
        try:
            words = shlex.split(begun, comments=True)
        except ValueError:  # a quotation goes on in the next line
            continue
        begun = ""
        while words and re.match(r"\w+=", words[0]):
            words.pop(0)
        while "&&" in words:
            found.append(words[: words.index("&&")])
            words = words[words.index("&&") + 1 :]
        found += [words] if words else []
    return found


def links(page: Path) -> list[str]:
    """Return the targets of a page's links, blocks and code left out."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    text = re.sub(r"`[^`\n]*`(?!\])", "", text)
    return re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href|srcset)="([^"]+)"', text)


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
