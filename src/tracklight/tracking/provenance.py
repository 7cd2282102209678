"""What made a run: code, environment, machine and command, gathered in one short look.

Everything here also works where there is no git, no repository or no commit; what cannot be told
is left out.
"""

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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
OWN_CODE = (_PACKAGE, _PACKAGE.parent / "hydra_plugins" / "tracklight")

_MAX_DIFF_BYTES = 1_000_000
_MAX_UNTRACKED = 200
_MAX_TAG_CHARS = 5000  # MLflow takes 8000; a command line beyond this is no longer read
_GIT_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Git:
    """The state of the work tree; `commit` is None outside a repository or before its first commit.

    `dirty` is None outside a repository; files that git does not know do not make it dirty.
    """

    commit: str | None = None
    branch: str | None = None
    dirty: bool | None = None
    diff: str = ""
    untracked: tuple[str, ...] = ()


@dataclass(frozen=True)
class Provenance:
    """Where a run came from; `tags` and `texts` say it in MLflow's terms."""

    git: Git
    packages: dict[str, str]
    machine: dict[str, str | int | list[str]]
    command: str
    code: str

    def tags(self) -> dict[str, str]:
        """Return short facts as run tags, under MLflow's own names where it has one."""
        tags = {
            "mlflow.source.name": self.command.split(" ")[0],
            "mlflow.source.type": "LOCAL",
            "tracklight.command": self.command,
            "tracklight.code": self.code,
            "tracklight.python": str(self.machine["python"]),
        }
        with contextlib.suppress(OSError, KeyError, ImportError):  # a container may have no user
            tags["mlflow.user"] = getpass.getuser()
        if self.git.commit:
            tags["mlflow.source.git.commit"] = self.git.commit
        if self.git.branch:
            tags["mlflow.source.git.branch"] = self.git.branch
        if self.git.dirty is not None:
            tags["mlflow.source.git.dirty"] = str(self.git.dirty).lower()
        return {key: value[:_MAX_TAG_CHARS] for key, value in tags.items()}

    def texts(self) -> dict[str, str]:
        """Return what is too long for a tag, as artifact path and content."""
        packages = (f"{name}=={version}\n" for name, version in sorted(self.packages.items()))
        texts = {
            "provenance/packages.txt": "".join(packages),
            "provenance/machine.json": json.dumps(self.machine, indent=2) + "\n",
        }
        if self.git.diff:
            texts["provenance/diff.patch"] = self.git.diff
        if self.git.untracked:
            texts["provenance/untracked.txt"] = "".join(f"{p}\n" for p in self.git.untracked)
        return texts


def collect(root: Path, command: str, code: str) -> Provenance:
    """Gather a run's provenance.

    Args:
        root: The project's folder, the one git is asked about.
        command: The command line from the script's name on, already freed of secrets.
        code: The digest that `code_digest` gave.
    """
    return Provenance(git_state(root), installed_packages(), machine(), command, code)


def code_digest(modules: Iterable[str] = (), folders: Sequence[Path] = OWN_CODE) -> str:
    """Digest the code that a result depends on.

    Args:
        modules: Dotted names (`_target_` values or modules) whose file counts too. Those from
            installed packages and the standard library do not: their versions are recorded instead.
        folders: Folders of which every Python file counts.

    Returns:
        The sha256 in hex over names and contents, the same wherever the folders lie.
    """
    contents = dict(own_code() if folders == OWN_CODE else _contents(folders))
    for name in modules:
        module, path = _module_file(name)
        if path is not None and not any(path.is_relative_to(folder) for folder in folders):
            contents[module] = _sha256(path)
    digest = hashlib.sha256()
    for name in sorted(contents):
        digest.update(f"{name}\0{contents[name]}\n".encode())
    return digest.hexdigest()


@functools.cache
def own_code() -> dict[str, str]:
    """Digest each of our files, as they were when this process first asked."""
    return _contents(OWN_CODE)


def _contents(folders: Sequence[Path]) -> dict[str, str]:
    return {
        f"{folder.name}/{path.relative_to(folder).as_posix()}": _sha256(path)
        for folder in folders
        for path in folder.rglob("*.py")
    }


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def git_state(root: Path) -> Git:
    """Ask git about `root` alone, whatever else its repository holds."""
    status = _git(root, "status", "--porcelain=v2", "--branch", "-z", "--", ".")
    if status is None:
        return Git()
    lines = status.split("\0")
    headers = dict(line[2:].split(" ", 1) for line in lines if line.startswith("# "))
    commit, branch = headers.get("branch.oid"), headers.get("branch.head")
    commit = None if commit == "(initial)" else commit
    untracked = [line[2:] for line in lines if line.startswith("? ")]
    dirty = any(line[:2] in ("1 ", "2 ", "u ") for line in lines)
    diff = ""
    if dirty and commit:
        diff = _git(root, "diff", "HEAD", "--no-ext-diff", "--no-color", "--", ".") or ""
    return Git(
        commit=commit,
        branch=None if branch == "(detached)" else branch,
        dirty=dirty,
        diff=diff,
        untracked=tuple(untracked[:_MAX_UNTRACKED]),
    )


def installed_packages() -> dict[str, str]:
    """Return name and version of every installed package.

    Read from the names of their metadata folders: opening each metadata file takes 50 times longer.
    """
    packages: dict[str, str] = {}
    for entry in sys.path:
        try:
            names = os.listdir(entry or ".")  # noqa: PTH208, names alone are wanted, and fast
        except OSError:
            continue
        for name in names:
            stem, suffix = os.path.splitext(name)  # noqa: PTH122, a name, no path
            if suffix in (".dist-info", ".egg-info") and "-" in stem:
                package, version = stem.split("-")[:2]
                packages.setdefault(re.sub(r"[-_.]+", "-", package).lower(), version)
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
        facts["torch"] = str(torch.__version__)
        facts["cuda"] = str(torch.version.cuda)
    return facts


def _git(root: Path, *arguments: str) -> str | None:
    """Return git's answer, cut at a bound, or None where it has none."""
    hidden = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")  # set inside hooks, for another tree
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    environment |= {"LC_ALL": "C", "GIT_OPTIONAL_LOCKS": "0"}
    try:
        answer = subprocess.run(
            ["git", "-C", str(root), *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_GIT_TIMEOUT_S,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    cut = "" if len(answer) <= _MAX_DIFF_BYTES else f"\n[cut: {len(answer)} bytes in all]\n"
    return answer[:_MAX_DIFF_BYTES].decode(errors="replace") + cut


def _module_file(name: str) -> tuple[str, Path | None]:
    """Return the module that a dotted name lies in and its file, None for installed ones."""
    parts = name.split(".")
    if _is_installed(_source(parts[0])):  # asked first: finding a submodule imports its package
        return parts[0], None
    for end in range(len(parts), 0, -1):
        module = ".".join(parts[:end])
        path = _source(module)
        if path is not None:
            return module, path
    return name, None


def _source(module: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError, AttributeError):
        return None
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        return None
    return Path(spec.origin).resolve()


def _is_installed(path: Path | None) -> bool:
    folders = (sysconfig.get_path(key) for key in ("stdlib", "purelib", "platlib"))
    return path is not None and any(
        path.is_relative_to(Path(folder).resolve()) for folder in folders
    )


def _cpu_model() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        found = None
    if found:
        return found[1].strip()
    return platform.processor() or platform.machine()


def _gpu_names() -> list[str]:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    names = []
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        found = re.search(r"^Model:\s*(.+)$", path.read_text(), re.M)
        names.append(found[1].strip() if found else "NVIDIA GPU")
    return names
