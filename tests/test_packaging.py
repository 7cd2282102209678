"""What is declared, what is pinned and what is imported are the same packages."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions, requires, version
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
LINES = (ROOT / "constraints.txt").read_text().splitlines()
PINS = {
    canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in LINES if not line.startswith("#")
}


def declared(*groups: list[str]) -> list[Requirement]:
    return [Requirement(line) for group in groups for line in group]


OPTIONAL = {"sphinx": "docs", "submitit": "slurm", "ray": "ray"}
EVERYTHING = declared(PROJECT["dependencies"], *EXTRAS.values())


@pytest.mark.parametrize("requirement", EVERYTHING, ids=str)
def test_pin_lies_in_the_declared_range(requirement):
    assert PINS[canonicalize_name(requirement.name)] in requirement.specifier


def test_constraints_are_names_and_versions_alone():
    pin = re.compile(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+")
    pins = [line for line in LINES if not line.startswith("#")]
    assert [line for line in pins if not pin.fullmatch(line)] == []
    assert [line for line in LINES if "//" in line or "@" in line] == []


def test_everything_that_is_pulled_in_is_pinned():
    absent = [r for name, extra in OPTIONAL.items() if not find_spec(name) for r in declared(EXTRAS[extra])]
    there = [r for r in EVERYTHING if r not in absent]  # `make docs`, say, installs them
    others = [r.name for r in there if version(r.name) != PINS[canonicalize_name(r.name)]]
    if others:  # of `make floors`, say
        pytest.skip(f"needs the pinned versions; others are installed of {', '.join(others)}")
    seen: set[tuple[str, str]] = set()
    todo = there
    unpinned = set()
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        if name not in PINS:
            unpinned.add(name)
            continue
        for extra in {"", *requirement.extras}:
            if (name, extra) not in seen:
                seen.add((name, extra))
                below = map(Requirement, requires(name) or [])
                todo += [r for r in below if not r.marker or r.marker.evaluate({"extra": extra})]
    assert unpinned == set()


def test_known_bad_versions_are_out_of_range():
    ranges = {canonicalize_name(r.name): r.specifier for r in EVERYTHING}
    bad = {
        "torch": ["2.9.1"],  # CVE-2026-24747
        "pytorch-lightning": ["2.6.2", "2.6.3", "2.6.5"],  # malware; CVE-2026-58659
        "hydra-core": ["1.3.7"],
        "mlflow": ["3.16.0"],
    }
    for name, versions in bad.items():
        assert [v for v in versions if v in ranges[name]] == []


PEERS = ROOT / "scripts" / "benchmark" / "peers"  # scripts for an environment of their own


def imported(*folders: Path) -> set[str]:
    names = set()
    for path in (path for folder in folders for path in folder.rglob("*.py")):
        if path.is_relative_to(PEERS):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module.split(".")[0])
    ours = {path.stem for folder in folders for path in folder.iterdir()}
    return names - set(sys.stdlib_module_names) - ours


def test_every_package_imported_is_declared():
    distributions = packages_distributions()
    names = {canonicalize_name(requirement.name) for requirement in EVERYTHING}
    undeclared = {
        module
        for module in imported(ROOT / "src", ROOT / "scripts")
        if not names & {canonicalize_name(name) for name in distributions.get(module, [module])}
    }
    assert undeclared == set()


def test_the_teams_server_is_the_pinned_mlflow_and_takes_every_secret_from_its_user():
    text = (ROOT / "scripts" / "server" / "compose.yaml").read_text()
    assert re.findall(r"mlflow\[auth\]==([\d.]+)", text) == [PINS["mlflow"]]
    secrets = re.findall(r"^ +\w*(?:PASSWORD|SECRET\w*): (.+)$", text, re.M)
    assert len(secrets) == 6 and all(re.fullmatch(r"\$\{\w+(:\?.+)?\}", each) for each in secrets), secrets
    assert "/scripts/server/.env" in (ROOT / ".gitignore").read_text().splitlines()
