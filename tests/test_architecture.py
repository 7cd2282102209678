"""CONTRIBUTING and docs/architecture.md name files, classes and functions that exist."""

import ast
import re

import pytest

from tracklight.paths import PACKAGE, ROOT

CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()
FILE = r"(?:src/[\w/]+|\w+(?:/\w+)?)\.py"


def names_in(path) -> set[str]:
    """Every name that a file defines or assigns, methods and attributes included."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def test_the_tree_has_a_line_for_each_file_and_none_for_what_is_gone():
    tree = CONTRIBUTING.split("```\n")[3]
    listed, room = set(), ""
    for line in tree.splitlines():
        if re.match(r"\w+/ ", line):
            room = line.split()[0]
        elif found := re.match(r"( *)(\w+\.py) +\S", line):
            listed.add((room if found[1] else "") + found[2])
    there = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")}
    assert listed == {name for name in there if not name.endswith("__init__.py")}


@pytest.mark.parametrize("text", [CONTRIBUTING, ARCHITECTURE], ids=["CONTRIBUTING", "architecture"])
def test_each_file_named_exists(text):
    named = {name for name in re.findall(rf"`({FILE})`", text) if not name.startswith("tests/")}
    assert named
    assert {name for name in named if not any((f / name).is_file() for f in (ROOT, PACKAGE))} == set()


def test_each_name_in_the_architecture_is_defined_in_a_file_of_its_sentence():
    checked = 0
    for line in re.split(r"\n(?=\d\. |\n)", ARCHITECTURE):
        files = re.findall(r"`(src/[\w/]+\.py)`", line)
        defined = set().union(*(names_in(ROOT / file) for file in files)) if files else set()
        for name in re.findall(r"`([A-Za-z_]\w+)`", line) if files else ():
            assert name in defined or name in GENERAL, f"{name} is in none of {files}"
            checked += 1
    assert checked > 40


GENERAL = {"_target_", "log_batch", "compare"}


def test_each_place_of_the_table_is_where_it_says():
    rows = re.findall(r"^\| where .* \| (.*) \|$", CONTRIBUTING, re.M)
    assert len(rows) > 7
    for row in rows:
        files = [PACKAGE / name for name in re.findall(rf"`({FILE})`", row)]
        defined = set().union(*(names_in(file) for file in files))
        assert {name for name in re.findall(r"`(\w+)`", row)} <= defined, row
