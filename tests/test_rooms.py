"""The rooms of the house, read from the imports."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SRC = ROOT / "src"
FILES = sorted(SRC.rglob("*.py"))

# Who may import whom: a room imports from those of the lines below its own.
FLOORS = (
    ("__init__",),
    ("api",),
    ("cli",),
    ("commands",),
    ("sweep",),
    ("experiment",),
    ("engine", "figures", "runs"),
    ("data", "config", "tracking"),
    ("models", "paths", "redact", "errors"),
)
ROOT_FILES = {"__init__", "api", "cli", "errors", "paths", "redact"}
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
    *(SRC / "tracklight" / f"{name}.py" for name in ("__init__", "api", "cli")),
    SRC / "tracklight" / "config" / "compose.py",
    *(SRC / "tracklight" / "commands" / f"{name}.py" for name in ("parser", "compare")),
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
    return path.relative_to(SRC / "tracklight").parts[0].removesuffix(".py")


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


IN_ROOMS = [path for path in FILES if path.is_relative_to(SRC / "tracklight")]
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}


def imported_files(path: Path) -> set[Path]:
    """Return the files of ours that a file imports, wherever in it."""
    ours = (name for name in imports(path) if within(name, "tracklight", "hydra_plugins"))
    found = {own_file(name) for name in ours}
    return {file for file in found if file is not None and file != path}


def circles(files: list[Path]) -> list[list[str]]:
    """Return the sets of files that import one another, by Kahn's elimination of the others."""
    left = {file: imported_files(file) & {*files} for file in files}
    while free := [file for file, needs in left.items() if not needs]:
        for file in free:
            del left[file]
        left = {file: needs - {*free} for file, needs in left.items()}
    while free := [f for f in left if not any(f in needs for needs in left.values())]:
        left = {file: needs for file, needs in left.items() if file not in free}
    return [sorted(str(file.relative_to(SRC)) for file in left)] if left else []


def test_no_files_import_one_another_in_a_circle():
    assert circles(FILES) == []


def test_a_circle_would_be_found(tmp_path, monkeypatch):
    folder = tmp_path / "tracklight"
    folder.mkdir()
    (folder / "a.py").write_text("import tracklight.b\n")
    (folder / "b.py").write_text("def f():\n    from tracklight.a import x\n")
    (folder / "c.py").write_text("import tracklight.a\n")
    monkeypatch.setattr("test_rooms.SRC", tmp_path)
    assert circles(sorted(folder.glob("*.py"))) == [["tracklight/a.py", "tracklight/b.py"]]


@pytest.mark.parametrize("path", named(IN_ROOMS))
def test_rooms_import_downward_only(path):
    own = room(path)
    upward = {
        str(file.relative_to(SRC))
        for file in imported_files(path)
        if room(file) != own and file.stem != "__init__" and FLOOR[room(file)] <= FLOOR[own]
    }
    assert upward == set()


def test_the_root_holds_nothing_but_the_entrance_and_what_all_rooms_share():
    assert {path.stem for path in (SRC / "tracklight").glob("*.py")} == ROOT_FILES


@pytest.mark.parametrize("path", named(IN_ROOMS))
def test_room_does_not_know_what_lies_outside_its_concern(path):
    foreign = KNOWS_NOT.get(room(path), ())
    assert {name for name in imports(path) if within(name, *foreign)} == set()


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


SHORT = 60  # lines; a shorter file needs a reason
MAY_BE_SHORT = (
    "errors",
    "paths",
    "redact",
    "tags",
    "forkserver",
    "sweeper",
    "torch_internals",
    "init",
    "completion",
)


@pytest.mark.parametrize("path", named(IN_ROOMS))
def test_a_short_file_has_its_reason(path):
    length = len(path.read_text().splitlines())
    assert length >= SHORT or path.name == "__init__.py" or path.stem in MAY_BE_SHORT


def test_each_room_says_what_belongs_there():
    for folder in {path.parent for path in IN_ROOMS}:
        assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text())), folder


@pytest.mark.parametrize("path", named([path for path in FILES if path.name == "__init__.py"]))
def test_init_files_hold_nothing_but_a_docstring(path):
    body = ast.parse(path.read_text()).body
    further = [node for node in body if not isinstance(node, ast.Expr)]
    if path == SRC / "tracklight" / "__init__.py":  # gives the Python API, and imports it when asked
        assert [getattr(node, "name", "") for node in further] == ["__getattr__"]
    elif path == SRC / "tracklight" / "runs" / "__init__.py":  # has the name of a function of the API
        assert [node.name for node in further if isinstance(node, ast.ClassDef)] == ["_Room"]
        assert not any(isinstance(node, ast.FunctionDef) for node in further)
    else:
        assert further == []


@pytest.mark.parametrize("path", named(FILES))
def test_file_is_short_enough_to_hold_one_idea(path):
    length = len(path.read_text().splitlines())
    assert length <= 500


def test_no_file_is_named_for_nothing():
    parts = {p for path in FILES for p in path.relative_to(SRC).with_suffix("").parts}
    words = {word for part in parts for word in part.split("_")}
    assert words & FORBIDDEN_WORDS == set()


def test_standard_library_is_not_shadowed_at_the_top():
    assert {path.stem for path in SRC.iterdir()} & set(sys.stdlib_module_names) == set()
