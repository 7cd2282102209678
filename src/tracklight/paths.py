"""Paths of the checkout, its config files and its runs."""

import errno
import os
import stat
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
ROOT = PACKAGE.parents[1]  # train.py's folder
CONF = ROOT / "conf"
HOME = ROOT / "mlruns"  # as conf/tracking/mlflow.yaml has it
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
