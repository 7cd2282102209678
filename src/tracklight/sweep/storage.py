"""Where Optuna remembers a sweep's trials: a journal in the sweep's folder, or a database."""

import fcntl
import os
from pathlib import Path
from typing import Any

from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend

from tracklight.config import redact
from tracklight.errors import BadInput
from tracklight.sweep.bounded import bounded
from tracklight.sweep.quiet import optuna

STORAGE_S = 15.0


class FileLock:
    """A lock that the kernel takes back from a killed process; Optuna's own would last 30 s."""

    def __init__(self, path: Path):
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def acquire(self) -> bool:
        """Wait for the lock."""
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        return True

    def release(self) -> None:
        """Let go."""
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)


def open_storage(url: str | None, journal: Path | None) -> BaseStorage:
    """Open where the trials are remembered.

    Args:
        url: A database; None for the journal.
        journal: Optuna's journal file; None to remember nothing beyond this process.

    Raises:
        BadInput: The database does not answer, or its driver is missing.
    """
    if url is None and journal is None:
        return optuna.storages.InMemoryStorage()
    if url is None:
        assert journal is not None
        _cut_torn_line(journal)
        lock: Any = FileLock(journal.with_suffix(".lock"))
        return JournalStorage(JournalFileBackend(str(journal), lock))
    shown = redact(url)
    try:
        return bounded(lambda: optuna.storages.RDBStorage(url), STORAGE_S)
    except TimeoutError:
        raise BadInput(
            f"sweep.storage={shown} does not answer within {STORAGE_S:.0f} s; start it, or try "
            "sweep.storage=null for a file in tracking.dir"
        ) from None
    except Exception as error:
        reason = redact(" ".join(str(error).split("\n")[0].split()))[:200]
        raise BadInput(
            f"sweep.storage={shown} cannot be opened ({reason}); give a database, sqlite:///FILE "
            "or postgresql://..., or null for a file in tracking.dir"
        ) from None


def _cut_torn_line(journal: Path) -> None:
    """Cut what a kill left half-written: Optuna would append to it and read neither."""
    if not journal.exists():
        return
    content = journal.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(journal, whole)
