"""Locks: held by the kernel for a living process, gone with it, however it died."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FILE_NAME = "run.lock"

_held: set[int] = set()


def _close_in_child() -> None:
    # A lock is shared with forked processes: a data loader's workers, which survive their parent
    # for some seconds, would keep it.
    for fd in _held:
        os.close(fd)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Wait until no other process is inside with the same file, which is made and stays."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


class LockHeld(Exception):
    """Another process holds the lock; `pid` is what its owner wrote there, or None."""

    def __init__(self, pid: int | None):
        super().__init__(pid)
        self.pid = pid

    @property
    def passes(self) -> bool:
        """Whether its owner is gone: then it is held to recover the run, and soon free."""
        if self.pid is None:
            return True
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:  # alive, of another user
            pass
        return False


class RunLock:
    """The lock file of one run folder, held from construction to `close` or `remove`.

    The file outlives its holder: a lock file that nobody holds says that the run did not end
    cleanly, which is what recovery looks for.

    Args:
        folder: The run's folder, which must exist.
        note: Plain values to leave in the file; None keeps what is there.

    Raises:
        LockHeld: Another process, or another object of this one, holds the lock.
        FileNotFoundError: With `note` None, there is no lock file.
        OSError: The folder cannot be written.
    """

    def __init__(self, folder: Path, note: dict[str, Any] | None):
        self._path = folder / FILE_NAME
        flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if note is not None else 0)
        while True:
            self._fd = os.open(self._path, flags, 0o644)
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(self._fd)
                raise LockHeld(read_note(folder).get("pid")) from None
            if self._is_current():
                break
            os.close(self._fd)  # the holder removed the file between our open and our lock
        _held.add(self._fd)
        if note is not None:
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, json.dumps({"pid": os.getpid()} | note).encode(), 0)

    def _is_current(self) -> bool:
        try:
            on_disk = self._path.stat()
        except FileNotFoundError:
            return False
        return os.path.samestat(on_disk, os.fstat(self._fd))

    def moved(self, folder: Path) -> None:
        """Say that the run folder was renamed."""
        self._path = folder / FILE_NAME

    def close(self) -> None:
        """Let go and leave the file: the run has something left to recover."""
        _held.discard(self._fd)
        os.close(self._fd)

    def remove(self) -> None:
        """Remove the file, then let go: the run ended cleanly."""
        self._path.unlink(missing_ok=True)
        self.close()


def is_left(folder: Path) -> bool:
    """Whether a process died over the run in this folder: its lock file is there, held by nobody.

    False where there is no such folder, as of a run on another machine.
    """
    try:
        fd = os.open(folder / FILE_NAME, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def read_note(folder: Path) -> dict[str, Any]:
    """What the lock file's last holder left in it; empty if there is no such file, or no sense."""
    try:
        note = json.loads((folder / FILE_NAME).read_text())
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}
