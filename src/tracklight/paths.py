"""The current project: its runs, config files and code; and tracklight's own."""

import errno
import json
import os
import stat
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

PACKAGE = Path(__file__).resolve().parent
CONF = (PACKAGE / "conf").resolve()  # in the repository a link to its conf/, in a wheel a folder
CLONE = PACKAGE.parents[1] if (PACKAGE.parents[1] / "train.py").is_file() else None
KEYS = ("package", "conf", "allowed_targets")  # of [tool.tracklight]
REPLACES = "# replaces tracklight's own"
MAX_TOML_BYTES = 1_000_000
UI_PORT = 5001  # of MLflow's UI on this machine
SMALL_BYTES = 64 * 1024  # of a lock, a checksum, an offset


def read_bounded(path: Path, max_bytes: int = SMALL_BYTES) -> str:
    """Read a text file that another user, or a damaged disk, may have left in any state.

    Raises:
        OSError: It cannot be read, is a pipe or a device, or is larger than `max_bytes`.
        ValueError: It is not UTF-8.
    """
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        facts = os.fstat(file.fileno())
        if not stat.S_ISREG(facts.st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        if facts.st_size > max_bytes:
            raise OSError(errno.EFBIG, f"{facts.st_size:,} bytes, of which {max_bytes:,} are allowed")
        return file.read(max_bytes).decode()


def parse_mapping(text: str) -> dict[str, Any]:
    """Parse a JSON mapping; empty if the text is anything else."""
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return tree if isinstance(tree, dict) else {}


class Project(NamedTuple):
    """Whose runs, config, code and git state a command has to do with.

    Without a name it is the repository, or the folder one stands in. What is wrong with its
    pyproject.toml is a problem, told by whatever is started.
    """

    root: Path
    package: str = ""
    sources: Path | None = None  # the package's folder lies in it
    conf: Path | None = None
    allowed_targets: tuple[str, ...] = ()
    problem: str = ""
    outer: Path | None = None  # a project around it

    def warnings(self) -> Iterator[str]:
        """Yield what may not be meant: a project around it, a file of conf/ that hides one of ours."""
        if self.outer:
            yield f"the project {self.root} lies in another, {self.outer}, which has no part in this"
        for path in sorted(self.conf.rglob("*.yaml")) if self.conf else ():
            name = path.relative_to(self.conf or path)
            if (CONF / name).is_file() and REPLACES.encode() not in path.read_bytes():
                yield f"{path} replaces tracklight's own {name}; rename it, or add the line `{REPLACES}`"


def find_project(start: Path) -> Project:
    """Return the nearest project around a folder, else the repository, else that folder."""
    found = [(folder, table) for folder in (start, *start.parents) if (table := _read_table(folder))]
    if not found:
        return Project(CLONE or start)
    (root, table), outer = found[0], found[1][0] if found[1:] else None
    package, conf, targets = table.get("package", ""), table.get("conf"), table.get("allowed_targets", [])
    sources = next((each for each in (root / "src", root) if (each / str(package)).is_dir()), None)
    unknown, folder = table.keys() - {*KEYS}, root / str(conf or "conf")
    is_name = isinstance(package, str) and package.isidentifier()
    is_list = isinstance(targets, list) and all(isinstance(each, str) for each in targets)
    for is_wrong, problem in (
        (unknown, table.get("") or f"has a key {min(unknown, default='')}; it takes {', '.join(KEYS)}"),
        (not is_name, 'names no package; add package = "NAME", of the folder src/NAME or NAME beside it'),
        (sources is None, f"names {package}, but there is no folder src/{package} or {package} beside it"),
        (conf and not folder.is_dir(), f"conf = {conf!r} is no folder"),
        (not is_list, "allowed_targets must be a list of modules' names"),
    ):
        if is_wrong:
            return Project(root, problem=f"[tool.tracklight] in {root / 'pyproject.toml'} {problem}")
    conf = folder if folder.is_dir() else None
    return Project(root, package, sources, conf, (package, *targets), "", outer)


def _read_table(folder: Path) -> dict[str, Any] | None:
    """Return what a folder's pyproject.toml has under [tool.tracklight]; an error under the key ""."""
    text = ""
    try:
        text = read_bounded(folder / "pyproject.toml", MAX_TOML_BYTES)
        # In a folder like /tmp anybody may have put it.
        if "tracklight" not in text or folder.stat().st_mode & stat.S_ISVTX:
            return None
        table = tomllib.loads(text).get("tool", {}).get("tracklight")
        if table is None:
            return None
        return table or {"package": ""} if isinstance(table, dict) else {"": "must be a table"}
    except tomllib.TOMLDecodeError as error:
        return {"": f"cannot be read: {error}"} if "[tool.tracklight]" in text else None
    except (OSError, ValueError, AttributeError):
        return None


def group_choices(group: str) -> list[str]:
    """Return the names of a group's files in the project's conf/ and in ours; none if it is no group."""
    folders = [each for each in (PROJECT.conf, CONF) if each]
    return sorted({file.stem for folder in folders for file in (folder / group).glob("*.yaml")})


def uri_setting(uri: object) -> str:
    """Return the name of the setting that a tracking URI comes from."""
    name = "MLFLOW_TRACKING_URI"
    return name if uri is not None and os.environ.get(name) == uri else "tracking.uri"


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to disk: a rename is durable only then."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


try:
    _here = Path.cwd()
except OSError:  # it was deleted
    _here = Path(os.sep)
PROJECT = find_project(_here)
ROOT = PROJECT.root
HOME = ROOT / "mlruns"  # as conf/tracking/mlflow.yaml has it
IN_CLONE = ROOT == CLONE  # for messages: its scripts are there to be typed
ALLOW_LIST = "conf/config.yaml" if IN_CLONE else "[tool.tracklight] of pyproject.toml"
TRAIN = "python train.py" if IN_CLONE else "tracklight train"
UI = "python scripts/ui.py" if IN_CLONE else "tracklight ui"

# After the standard library, which nothing in the project shall shadow, and before what is installed.
if PROJECT.sources and str(PROJECT.sources) not in sys.path:
    installed = (i for i, path in enumerate(sys.path) if path.endswith("-packages"))
    sys.path.insert(next(installed, len(sys.path)), str(PROJECT.sources))
