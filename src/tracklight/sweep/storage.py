"""Where Optuna keeps the study of a sweep: a database, a journal file or memory; and its outages."""

import fcntl
import json
import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial
from sqlalchemy import exc

from tracklight.errors import BadInput
from tracklight.paths import read_bounded
from tracklight.redact import redact
from tracklight.tracking import address, mlflow_client

# Its one warning is a page of SQL about a query that is retried; if that fails too, it raises.
logging.getLogger("optuna.storages._rdb.storage").setLevel(logging.ERROR)

MAX_JOURNAL_BYTES = 1_000_000_000
STORAGE_TIMEOUT_S = 15.0  # not every driver has its own
OPENINGS = 4  # attempts to open a database
OUTAGE_S = 300.0  # a store that does not answer for longer ends the sweep
OUTAGES = (exc.OperationalError, exc.InterfaceError, exc.PendingRollbackError)  # of a database away
MACHINES = "-machines"  # ends the name of the study whose trials are machines

HEARTBEAT_S = 5  # from one sign of a machine to the next
GRACE_S = 30  # without one, until the others take over

# User attributes of a trial.
PARAMS_ATTR = "point"  # of a grid's trial: its params as text
RETRY_OF_ATTR = "retry_of"  # number of the trial that it replaces


def open_storage(url: str | None, journal: Path | None) -> BaseStorage:
    """Open Optuna's storage: a database, which must answer, else a journal file, else memory."""
    if url is None:
        return _open_journal(journal) if journal else optuna.storages.InMemoryStorage()
    try:
        return address.call_in_thread(partial(_open_database, url)).result(STORAGE_TIMEOUT_S)
    except Exception as error:
        reason = redact(" ".join(str(error).split("\n")[0].split()))[:200]
        if isinstance(error, TimeoutError):
            reason = f"does not answer within {STORAGE_TIMEOUT_S:.0f} s"
        cure = "a database that runs, sqlite:///FILE or postgresql://..., or null for a file in tracking.dir"
        raise BadInput(f"sweep.storage={redact(url)} cannot be opened ({reason}); give {cure}") from None


def _open_database(url: str) -> RDBStorage:
    heartbeat: dict[str, Any] = {"heartbeat_interval": HEARTBEAT_S, "grace_period": GRACE_S}
    make = partial(RDBStorage, url, **heartbeat, heartbeat_stale_trial_callback=_replace_stale)
    for _ in range(OPENINGS - 1):
        with suppress(exc.DBAPIError):  # another machine may be creating the tables
            return make()
        time.sleep(1.0)
    return make()


def trial_id(storage: Any, study_name: str, number: int) -> int:
    """Return a storage's own id of a trial, which is given by its number in a study."""
    return storage.get_trial_id_from_study_id_trial_number(storage.get_study_id_from_name(study_name), number)


def _replace_stale(study: optuna.Study, trial: FrozenTrial) -> None:
    if not study.study_name.endswith(MACHINES):
        enqueue_again(study, trial)


def enqueue_again(study: optuna.Study, trial: FrozenTrial) -> int:
    """Enqueue a trial that replaces one that has failed; return its number in the study."""
    attrs = {key: value for key, value in trial.user_attrs.items() if key == PARAMS_ATTR}
    params = trial.system_attrs.get("fixed_params", {}) | trial.params
    study.enqueue_trial(params, user_attrs={RETRY_OF_ATTR: trial.number} | attrs)
    trials = reversed(study.get_trials(deepcopy=False))  # another machine may add one meanwhile
    return next(each.number for each in trials if each.user_attrs.get(RETRY_OF_ATTR) == trial.number)


def _open_journal(path: Path) -> JournalStorage:
    try:
        if path.exists():  # a kill leaves a line half-written: Optuna would append to it, read neither
            text = read_bounded(path, MAX_JOURNAL_BYTES)
            whole = text[: text.rfind("\n") + 1]
            if not all(isinstance(json.loads(line), dict) for line in whole.splitlines()):
                raise ValueError("a line is no mapping")
            with os.fdopen(os.open(path, os.O_RDWR | os.O_NOFOLLOW), "r+b") as file:
                file.truncate(len(whole.encode()))
        # The kernel releases this lock when a process is killed; Optuna's own would last 30 s.
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(path.with_suffix(".lock"), flags, 0o666)
        flock = partial(fcntl.flock, descriptor)
        lock: Any = SimpleNamespace(
            acquire=partial(flock, fcntl.LOCK_EX), release=partial(flock, fcntl.LOCK_UN)
        )
        return JournalStorage(JournalFileBackend(str(path), lock))
    except Exception as error:  # Optuna checks nothing of what it reads
        reason = f"{type(error).__name__} {' '.join(str(error).split())[:200]}"
        raise BadInput(f"{path} is no journal of a sweep ({reason}); sweep.fresh=true starts over") from None


class PatientStorage:
    """A database that may be away: a call is repeated until it answers, and `is_waiting` meanwhile."""

    def __init__(self, storage: BaseStorage):
        self._storage, self.is_waiting = storage, False

    def __getattr__(self, name: str) -> Any:
        member = getattr(self._storage, name)
        return partial(self._repeat, member) if callable(member) else member

    def _repeat(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def is_outage(error: Exception) -> bool:  # and not at odds with the request
            cause = error.__cause__ if isinstance(error, StorageInternalError) else error
            is_away = isinstance(cause, OUTAGES)
            self.is_waiting |= is_away
            return is_away

        try:
            return mlflow_client.retry(partial(call, *args, **kwargs), OUTAGE_S, is_outage, "sweep.storage")
        except UpdateFinishedTrialError:
            if not self.is_waiting:
                raise
            return True  # only the answer was lost
        finally:
            self.is_waiting = False
