"""The rooms of the house, read from the imports."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SRC = ROOT / "src"
FILES = sorted(SRC.rglob("*.py"))

ROOMS = ("reuse", "sweep", "tracking", "engine", "models", "data")
# What a room may import of ours beside itself and `tracklight.errors`.
MAY_IMPORT = {
    "reuse": ("tracklight",),  # like the experiment, it joins all rooms, for finished runs
    "sweep": (
        *("tracklight.config", "tracklight.machine", "tracklight.report", "tracklight.resume"),
        *("tracklight.overrides", "tracklight.rules", "tracklight.statistic"),
        *("tracklight.tracking", "tracklight.experiment"),
    ),
    "tracking": (),
    "engine": ("tracklight.models.supervised", "tracklight.data.tensor_data"),
    "models": (),
    "data": (),
}
KNOWS_NOT = {
    "models": ("hydra", "omegaconf", "mlflow"),
    "data": ("hydra", "omegaconf", "mlflow"),
    "tracking": ("hydra", "omegaconf"),
}
# What takes more than a fraction of a second to import.
HEAVY = {
    *("torch", "torchvision", "torchmetrics", "pytorch_lightning", "lightning_fabric"),
    *("lightning_utilities", "mlflow", "optuna", "plotly", "matplotlib", "pandas", "scipy"),
    *("sklearn", "mlxtend", "sqlalchemy", "numpy"),
}
SCRIPTS = ("compare", "evaluate", "predict", "reproduce", "ui")
LIGHT = [
    ROOT / "train.py",
    SRC / "tracklight" / "cli.py",
    SRC / "tracklight" / "config.py",
    *(SRC / "tracklight" / "reuse" / f"{name}.py" for name in SCRIPTS),
    *(ROOT / "scripts" / f"{name}.py" for name in SCRIPTS),
    *sorted((SRC / "hydra_plugins").rglob("*.py")),
]
FORBIDDEN_WORDS = {"utils", "util", "helpers", "helper", "common", "manager"}


def imports(path: Path, *, only_at_import: bool = False) -> Iterator[str]:
    """Yield the dotted names a file imports; `from a import b` gives a.b.

    Args:
        path: The file.
        only_at_import: Leave out what runs only when called or checked by a type checker.
    """

    def walk(node: ast.AST) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path} imports relatively"
                yield from (f"{child.module}.{alias.name}" for alias in child.names)
            elif not (only_at_import and is_skipped_at_import(child)):
                yield from walk(child)

    yield from walk(ast.parse(path.read_text(encoding="utf-8")))


def is_skipped_at_import(node: ast.AST) -> bool:
    if isinstance(node, ast.If):
        return "TYPE_CHECKING" in ast.unparse(node.test)
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


def within(name: str, *modules: str) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def room(path: Path) -> str:
    return path.relative_to(SRC / "tracklight").parts[0]


def own_file(name: str) -> Path | None:
    """Return the file of ours that importing a dotted name executes."""
    parts = name.split(".")
    for end in (len(parts), len(parts) - 1):
        stem = SRC.joinpath(*parts[:end])
        for path in (stem.with_suffix(".py"), stem / "__init__.py"):
            if path.is_file():
                return path
    return None


def named(paths: list[Path]) -> list:
    return [pytest.param(path, id=str(path.relative_to(ROOT))) for path in paths]


IN_ROOMS = [
    path for path in FILES if path.is_relative_to(SRC / "tracklight") and room(path) in ROOMS
]


@pytest.mark.parametrize("path", named(IN_ROOMS))
def test_room_imports_of_ours_only_what_it_may(path):
    own = room(path)
    allowed = ("tracklight.errors", f"tracklight.{own}", *MAY_IMPORT[own])
    ours = {name for name in imports(path) if within(name, "tracklight", "hydra_plugins")}
    assert {name for name in ours if not within(name, *allowed)} == set()


@pytest.mark.parametrize("path", named(IN_ROOMS))
def test_room_does_not_know_what_lies_outside_its_concern(path):
    foreign = KNOWS_NOT.get(room(path), ())
    assert {name for name in imports(path) if within(name, *foreign)} == set()


@pytest.mark.parametrize(
    "path", named([p for p in FILES if p.is_relative_to(SRC / "tracklight" / "sweep")])
)
def test_sweep_imports_the_experiment_only_inside_functions(path):
    assert not any(within(n, "tracklight.experiment") for n in imports(path, only_at_import=True))


def test_errors_import_nothing():
    assert list(imports(SRC / "tracklight" / "errors.py")) == []


@pytest.mark.parametrize("path", named([path for path in LIGHT if path.exists()]))
def test_what_runs_before_the_config_is_checked_imports_nothing_heavy(path):
    seen, todo, heavy = set(), [path], set()
    while todo:
        file = todo.pop()
        seen.add(file)
        for name in imports(file, only_at_import=True):
            if name.split(".")[0] in HEAVY:
                heavy.add(f"{file.relative_to(ROOT)}: {name}")
            further = own_file(name) if within(name, "tracklight", "hydra_plugins") else None
            if further is not None and further not in seen:
                todo.append(further)
    assert heavy == set()


def test_import_of_plugins_reaches_the_sweep_only_inside_methods():
    plugins = sorted((SRC / "hydra_plugins").rglob("*.py"))
    reached = {n for path in plugins for n in imports(path, only_at_import=True)}
    assert {name for name in reached if within(name, "tracklight.sweep")} == set()


def test_plugins_are_a_namespace():
    assert not (SRC / "hydra_plugins" / "__init__.py").exists()


@pytest.mark.parametrize("path", named([path for path in FILES if path.name == "__init__.py"]))
def test_init_files_hold_nothing_but_a_docstring(path):
    body = ast.parse(path.read_text()).body
    assert [node for node in body if not isinstance(node, ast.Expr)] == []


@pytest.mark.parametrize("path", named(FILES))
def test_file_is_short_enough_to_hold_one_idea(path):
    length = len(path.read_text().splitlines())
    assert length <= 300


def test_no_file_is_named_for_nothing():
    parts = {p for path in FILES for p in path.relative_to(SRC).with_suffix("").parts}
    words = {word for part in parts for word in part.split("_")}
    assert words & FORBIDDEN_WORDS == set()


def test_standard_library_is_not_shadowed_at_the_top():
    assert {path.stem for path in SRC.iterdir()} & set(sys.stdlib_module_names) == set()
