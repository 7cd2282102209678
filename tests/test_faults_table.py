"""docs/faults.md promises nothing that no test holds."""

import re

import pytest

from tracklight.paths import ROOT

ROWS = [
    line
    for line in (ROOT / "docs" / "faults.md").read_text().splitlines()
    if line.startswith("| ") and not line.startswith(("| # |", "| input |", "| ---"))
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[2:50])
def test_each_row_names_tests_that_exist(row):
    named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", row.split(" | ")[-1])
    assert named
    for path, test in named:
        assert f"\ndef {test}(" in (ROOT / path).read_text(), f"{path} has no {test}"


def test_each_test_named_anywhere_exists():
    for path, test in re.findall(
        r"`(tests/[\w/]+\.py)::(test_\w+)`", (ROOT / "docs" / "faults.md").read_text()
    ):
        assert f"\ndef {test}(" in (ROOT / path).read_text(), f"{path} has no {test}"


def test_every_fault_of_the_matrix_has_a_row():
    numbers = {int(row.split("|")[1]) for row in ROWS if row.split("|")[1].strip().isdigit()}
    assert numbers == set(range(1, 28))


def test_each_test_named_in_what_is_said_of_security_exists():
    named = re.findall(r"`(tests/[\w/]+\.py)`", (ROOT / "docs" / "security.md").read_text())
    assert named
    assert [path for path in named if not (ROOT / path).is_file()] == []
