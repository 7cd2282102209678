"""Locks that the kernel holds for a living process; they end with it, however it ends."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tracklight.paths import parse_mapping, read_bounded, sync_folder

FILE_NAME = "run.lock"

_held: set[int] = set()


def _close_in_child() -> None:
    # A data loader's workers, which survive their parent for some seconds, would keep the lock.
    for fd in _held:
        os.close(fd)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)


@contextmanager
def exclusive_lock(path: Path) -> Iterator[None]:
    """Wait for the lock on a file and hold it; the file is created, and stays."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@dataclass(eq=False)
class LockHeld(Exception):
    """Another process holds the lock; `pid` is its owner according to the file, or None."""

    pid: int | None

    @property
    def is_transient(self) -> bool:
        """Whether the owner is dead: then another process is recovering the run."""
        return self.pid is None or not psutil.pid_exists(self.pid)


class RunLock:
    """The lock file of a run's folder, held from construction to `close` or `remove`.

    The file outlives its holder: recovery takes one that nobody holds for an unclean end.

    Raises:
        LockHeld: Another process, or another object of this one, holds the lock.
        OSError: The folder cannot be written; or `content` is None, and there is no lock file.
    """

    def __init__(self, folder: Path, content: dict[str, Any] | None):
        self._path = folder / FILE_NAME
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT if content is not None else 0)
        is_current = False
        while not is_current:
            self._fd = os.open(self._path, flags, 0o666)
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(self._fd)
                raise LockHeld(read_lock(folder).get("pid")) from None
            # The holder may have removed the file between our open and our lock.
            with suppress(FileNotFoundError):
                is_current = os.path.samestat(self._path.stat(), os.fstat(self._fd))
            if not is_current:
                os.close(self._fd)
        _held.add(self._fd)
        if content is not None:  # else what is there stays
            text = json.dumps({"pid": os.getpid()} | content).encode()
            try:
                os.pwrite(self._fd, text, 0)  # before it is cut: a full disk leaves what was there
                os.ftruncate(self._fd, len(text))
            except OSError:
                self.close()
                raise

    def rename_folder(self, target: Path) -> None:
        """Rename the run's folder, durably."""
        self._path.parent.rename(target)
        sync_folder(target.parent)
        self._path = target / FILE_NAME

    def close(self) -> None:
        """Release the lock and keep the file: the run has something left to recover."""
        if self._fd in _held:
            _held.discard(self._fd)
            os.close(self._fd)

    def remove(self) -> None:
        """Remove the file, then release the lock: the run ended cleanly."""
        self._path.unlink(missing_ok=True)
        self.close()


def was_abandoned(folder: Path) -> bool:
    """Return whether the process of a run died: its lock file is there, and nobody holds it."""
    try:
        with os.fdopen(os.open(folder / FILE_NAME, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:  # held, or no such folder, as of a run on another machine
        return False
    return True


def read_lock(folder: Path) -> dict[str, Any]:
    """Return the content of a folder's lock file; empty if there is none, or none that parses."""
    content: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        content = parse_mapping(read_bounded(folder / FILE_NAME))
    pid = content.get("pid")
    return content if pid is None or (type(pid) is int and 0 < pid < 2**31) else {}
