"""The provenance of a run: code, environment, machine and command, with or without git."""

import ast
import contextlib
import functools
import getpass
import hashlib
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tracklight.redact import redact
from tracklight.tracking.tags import CODE_TAG, COMMAND_TAG, COMMIT_TAG, DIRTY_TAG

_PACKAGE = Path(__file__).resolve().parents[1]
OWN_CODE = (_PACKAGE, _PACKAGE.parent / "hydra_plugins" / "tracklight")

_MAX_DIFF_BYTES = 1_000_000
_MAX_UNTRACKED = 200
_MAX_TAG_CHARS = 5000  # MLflow takes 8000; nobody reads a longer command line
_GIT_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Git:
    """The state of the work tree, None where there is none; untracked files are not dirty."""

    commit: str | None = None
    branch: str | None = None
    dirty: bool | None = None
    diff: str = ""
    untracked: tuple[str, ...] = ()


@dataclass(frozen=True)
class Provenance:
    """Where a run came from, also as MLflow's tags and artifacts."""

    git: Git
    packages: dict[str, str]
    machine: dict[str, str | int | list[str]]
    command: str
    code: str

    def tags(self) -> dict[str, str]:
        """Return short facts as run tags, under MLflow's own names where it has one."""
        tags = source_tags(self.command.split(" ")[0]) | {
            COMMAND_TAG: self.command,
            CODE_TAG: self.code,
            "tracklight.python": str(self.machine["python"]),
            COMMIT_TAG: self.git.commit,
            "mlflow.source.git.branch": self.git.branch,
            DIRTY_TAG: None if self.git.dirty is None else str(self.git.dirty).lower(),
        }
        return {key: value[:_MAX_TAG_CHARS] for key, value in tags.items() if value}

    def texts(self) -> dict[str, str]:
        """Return what is too long for a tag, as artifact path and content."""
        packages = (f"{name}=={version}\n" for name, version in sorted(self.packages.items()))
        texts = {
            "provenance/packages.txt": "".join(packages),
            "provenance/machine.json": json.dumps(self.machine, indent=2) + "\n",
            "provenance/diff.patch": self.git.diff,
            "provenance/untracked.txt": "".join(f"{path}\n" for path in self.git.untracked),
        }
        return {path: text for path, text in texts.items() if text}


def collect(root: Path, command: str, code: str) -> Provenance:
    """Gather the provenance of a run in project `root`; `command` holds no secrets."""
    return Provenance(git_state(root), installed_packages(), machine(), command, code)


def source_tags(name: str) -> dict[str, str]:
    """Return MLflow's own tags for the user and the script of this name."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container may know no name for its user
        user = "unknown"
    return {"mlflow.user": user, "mlflow.source.name": name, "mlflow.source.type": "LOCAL"}


def code_digest(modules: Iterable[str] = ()) -> str:
    """Digest our code, that of `modules` (dotted names, such as `_target_` values), and all that they import.

    Installed modules do not count: versions of packages are recorded instead.
    """
    contents, pending = dict(own_code()), list(modules)
    while pending:
        for module, path in _source_files(pending.pop()):
            if module not in contents:
                contents[module] = _sha256(path)
                pending += _imports(module, path)
    lines = [f"{name}\0{contents[name]}\n" for name in sorted(contents)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


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
    module, *parts = name.split(".")
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError, AttributeError):  # ValueError: `__main__`, an empty name
        return
    folders = [Path(each).resolve() for each in (spec and spec.submodule_search_locations) or ()]
    origin = Path((spec and spec.origin) or "")
    if any(_is_installed_or_ours(each) for each in (*folders, origin.resolve())):
        return
    if origin.suffix == ".py":
        yield module, origin
    for part in parts:
        module = f"{module}.{part}"
        packages = [folder / part for folder in folders if (folder / part).is_dir()]
        paths = [package / "__init__.py" for package in packages]
        paths += [folder / f"{part}.py" for folder in folders]
        if (path := next((each for each in paths if each.is_file()), None)) is not None:
            yield module, path
        folders = packages


def _is_installed_or_ours(path: Path) -> bool:
    keys = ("stdlib", "platstdlib", "purelib", "platlib")
    folders = [*(Path(sysconfig.get_path(key)).resolve() for key in keys), *OWN_CODE]
    return any(map(path.is_relative_to, folders)) or not {"site-packages", "dist-packages"}.isdisjoint(
        path.parts
    )


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
    """Return git's state of `root` alone, whatever else its repository holds."""
    status = _git(root, "status", "--porcelain=v2", "--branch", "-z", "--", ".")
    if status is None:
        return Git()
    lines = status.split("\0")
    headers = dict(line[2:].split(" ", 1) for line in lines if line.startswith("# "))
    commit, branch = (headers.get(key) for key in ("branch.oid", "branch.head"))
    commit = None if commit == "(initial)" else commit
    branch = None if branch == "(detached)" else branch
    dirty = any(line[:2] in ("1 ", "2 ", "u ") for line in lines)
    command = ("diff", "HEAD", "--no-ext-diff", "--no-color", "--", ".")
    diff = _git(root, *command) if dirty and commit else None
    untracked = tuple(line[2:] for line in lines if line.startswith("? "))
    return Git(commit, branch, dirty, redact(diff or ""), untracked[:_MAX_UNTRACKED])


def _git(root: Path, *arguments: str) -> str | None:
    """Return git's output, cut at a bound, or None if it fails."""
    hidden = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")  # set inside hooks, for another tree
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    try:
        output = subprocess.run(
            ["git", "-C", str(root), *arguments],
            env=environment | {"LC_ALL": "C", "GIT_OPTIONAL_LOCKS": "0"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_GIT_TIMEOUT_S,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    cut = "" if len(output) <= _MAX_DIFF_BYTES else f"\n[cut: {len(output)} bytes in all]\n"
    return output[:_MAX_DIFF_BYTES].decode(errors="replace") + cut


def installed_packages() -> dict[str, str]:
    """Return name and version of every installed package."""
    packages: dict[str, str] = {}
    # The names of metadata folders say both; opening the files takes 50 times longer.
    for folder in sys.path:
        with contextlib.suppress(OSError):
            for name in os.listdir(folder or "."):  # noqa: PTH208, names alone are wanted, and fast
                found = re.fullmatch(r"([^-]+)-([^-]+).*\.(dist|egg)-info", name)
                if found:
                    package = re.sub(r"[-_.]+", "-", found[1]).lower()
                    packages.setdefault(package, found[2])
    return packages


def machine() -> dict[str, str | int | list[str]]:
    """Describe the machine; GPUs are named without waking the CUDA driver."""
    affinity = getattr(os, "sched_getaffinity", None)
    facts: dict[str, str | int | list[str]] = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cores": os.cpu_count() or 1,
        "usable_cores": len(affinity(0)) if affinity else os.cpu_count() or 1,
        "gpus": _gpu_names(),
    }
    with contextlib.suppress(ValueError, OSError):
        facts["memory_bytes"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    torch = sys.modules.get("torch")
    if torch is not None:
        facts |= {"torch": str(torch.__version__), "cuda": str(torch.version.cuda)}
    return facts


def _cpu_model() -> str:
    names: list[str] = []
    with contextlib.suppress(OSError):
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    return names[0].strip() if names else platform.processor() or platform.machine()


def _gpu_names() -> list[str]:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    names = []
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        names += re.findall(r"^Model:\s*(.+?)\s*$", path.read_text(), re.M) or ["NVIDIA GPU"]
    return names
