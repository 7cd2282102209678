"""The provenance of a run: code, environment, machine and command, with or without git."""

import ast
import contextlib
import functools
import getpass
import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, NamedTuple

from tracklight.paths import PACKAGE, PROJECT
from tracklight.redact import redact
from tracklight.tracking.tags import CODE_TAG, COMMAND_TAG, COMMIT_TAG, DIRTY_TAG, MAX_TAG_CHARS, shorten

OWN_CODE = (PACKAGE, PACKAGE.parent / "hydra_plugins" / "tracklight")
if PROJECT.sources:
    OWN_CODE += (PROJECT.sources / PROJECT.package,)

CODE_FILES = "provenance/code.txt"
_MAX_DIFF_BYTES = 1_000_000
_MAX_UNTRACKED = 200
_GIT_TIMEOUT_S = 5.0
GIT_ERRORS = (OSError, subprocess.SubprocessError)  # not installed, no repository, no answer


class Git(NamedTuple):
    """The state of the work tree, None where there is none; untracked files are not dirty."""

    commit: str | None = None
    branch: str | None = None
    dirty: bool | None = None
    diff: str = ""
    untracked: tuple[str, ...] = ()


class Provenance(NamedTuple):
    """Where a run came from: as tags, and what is too long for a tag as artifact path and content."""

    tags: dict[str, str]
    texts: dict[str, str]


def collect(root: Path, command: str, modules: Sequence[str], machine: Mapping[str, Any]) -> Provenance:
    """Gather the provenance of a run of `modules` in project `root`; `command` holds no secrets."""
    git, files = git_state(root), code_files(modules)
    tags = source_tags(command.split(" ")[0]) | {
        COMMAND_TAG: command,
        CODE_TAG: _digest(files),
        "tracklight.python": str(machine["python"]),
        COMMIT_TAG: git.commit,
        "mlflow.source.git.branch": git.branch,
        DIRTY_TAG: None if git.dirty is None else str(git.dirty).lower(),
    }
    texts = {
        CODE_FILES: "".join(f"{digest[:12]}  {name}\n" for name, digest in sorted(files.items())),
        "provenance/packages.txt": "".join(f"{k}=={v}\n" for k, v in sorted(installed_packages().items())),
        "provenance/machine.json": json.dumps(machine, indent=2) + "\n",
        "provenance/diff.patch": git.diff,
        "provenance/untracked.txt": "".join(f"{path}\n" for path in git.untracked),
    }
    tags = {key: shorten(value, MAX_TAG_CHARS) for key, value in tags.items() if value}
    return Provenance(tags, {path: text for path, text in texts.items() if text})


def source_tags(name: str) -> dict[str, str]:
    """Return MLflow's own tags for the user and the script of this name."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container may know no name for its user
        user = "unknown"
    return {"mlflow.user": user, "mlflow.source.name": name, "mlflow.source.type": "LOCAL"}


def code_digest(modules: Iterable[str] = ()) -> str:
    """Digest our code and that of `modules`, as `code_files` finds it."""
    return _digest(code_files(modules))


def _digest(files: Mapping[str, str]) -> str:
    lines = [f"{name}\0{content}\n" for name, content in sorted(files.items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def code_files(modules: Iterable[str] = ()) -> dict[str, str]:
    """Digest our files, those of `modules` (dotted names, as of `_target_`), and all that they import.

    Installed modules do not count: versions of packages are recorded instead.
    """
    contents, pending = dict(own_code()), list(modules)
    while pending:
        for module, path in _source_files(pending.pop()):
            if module not in contents:
                contents[module] = _sha256(path)
                pending += _imports(module, path)
    return contents


@functools.cache
def own_code() -> dict[str, str]:
    """Digest each of our files, as they are at the first call in this process."""
    return {
        f"{folder.name}/{path.relative_to(folder).as_posix()}": _sha256(path)
        for folder in OWN_CODE
        for path in folder.rglob("*.py")
    }


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _source_files(name: str) -> Iterator[tuple[str, Path]]:
    """Yield what importing a dotted name runs, packages first: modules and files; none of ours or installed.

    Only the file system is asked, since asking Python for a submodule imports its package.
    """
    top, *parts = name.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError, AttributeError):  # ValueError: `__main__`, an empty name
        return
    while spec is not None:
        origin, folders = Path(spec.origin or ""), [*(spec.submodule_search_locations or ())]
        if any(_is_installed_or_ours(Path(each).resolve()) for each in (*folders, origin)):
            return
        if origin.suffix == ".py":
            yield spec.name, origin
        below = f"{spec.name}.{parts.pop(0)}" if parts and folders else ""
        spec = PathFinder.find_spec(below, folders) if below else None


def _is_installed_or_ours(path: Path) -> bool:
    keys = ("stdlib", "platstdlib", "purelib", "platlib")
    folders = [*(Path(sysconfig.get_path(key)).resolve() for key in keys), *OWN_CODE]
    return any(map(path.is_relative_to, folders)) or bool({"site-packages", "dist-packages"} & {*path.parts})


def _imports(module: str, path: Path) -> Iterator[str]:
    """Yield the dotted names that a file imports, wherever in it."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # whoever imports it is told
        return
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            yield from (".".join([*above, *filter(None, [node.module]), alias.name]) for alias in node.names)


def git_state(root: Path) -> Git:
    """Return git's state of `root` alone, whatever else its repository holds; warn of what is not known."""
    try:
        lines = ask_git(root, "status", "--porcelain=v2", "--branch", "-z", "--", ".").split("\0")
        headers = dict(line[2:].split(" ", 1) for line in lines if line.startswith("# "))
        known = {key: value for key, value in headers.items() if value not in ("(initial)", "(detached)")}
        commit, branch = known.get("branch.oid"), known.get("branch.head")
        dirty = any(line[:2] in ("1 ", "2 ", "u ") for line in lines)
        command = ("diff", "HEAD", "--no-ext-diff", "--no-color", "--", ".")
        diff = ask_git(root, *command) if dirty and commit else ""
        untracked = tuple(line[2:] for line in lines if line.startswith("? "))
        return Git(commit, branch, dirty, redact(diff), untracked[:_MAX_UNTRACKED])
    except GIT_ERRORS as error:
        if not any((folder / ".git").exists() for folder in (root, *root.parents)):
            return Git()
        said = (getattr(error, "stderr", None) or b"").decode(errors="replace").partition("\n")[0]
        why = "not installed" if isinstance(error, OSError) else f"no answer in {_GIT_TIMEOUT_S:.0f} s"
    commit = None
    with contextlib.suppress(*GIT_ERRORS):  # without a look at the files, which may be what takes so long
        commit = ask_git(root, "rev-parse", "HEAD").strip()
    lost = "how the code differs from its commit" if commit else "the code's commit"
    warnings.warn(f"{lost} is not recorded (git: {said.removeprefix('fatal: ') or why})", stacklevel=2)
    return Git(commit)


def ask_git(root: Path, *arguments: str) -> str:
    """Return git's output, cut at a bound, or raise one of `GIT_ERRORS`."""
    hidden = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")  # set inside hooks, for another tree
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    # A repository of another user may name programs for git to run; his code in it runs here already.
    command = ["git", "-c", f"safe.directory={root}", "-C", str(root), *arguments]
    environment |= {"LC_ALL": "C", "GIT_OPTIONAL_LOCKS": "0"}
    options: Any = {"stdin": subprocess.DEVNULL, "capture_output": True, "timeout": _GIT_TIMEOUT_S}
    output = subprocess.run(command, env=environment, check=True, **options).stdout
    cut = "" if len(output) <= _MAX_DIFF_BYTES else f"\n[cut: {len(output)} bytes in all]\n"
    return output[:_MAX_DIFF_BYTES].decode(errors="replace") + cut


def installed_packages() -> dict[str, str]:
    """Return name and version of every installed package."""
    packages: dict[str, str] = {}
    # The names of metadata folders say both; opening the files takes 50 times longer.
    for folder in sys.path:
        with contextlib.suppress(OSError):
            for name in os.listdir(folder or "."):  # noqa: PTH208, names alone are wanted, and fast
                if found := re.fullmatch(r"([^-]+)-([^-]+).*\.(dist|egg)-info", name):
                    package = re.sub(r"[-_.]+", "-", found[1]).lower()
                    packages.setdefault(package, found[2])
    return packages
