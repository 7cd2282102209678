"""The one door to Optuna: what it says of itself goes off while it is imported."""

import fcntl
import logging
import os
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import optuna
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from tracklight.errors import BadInput
from tracklight.redact import redact
from tracklight.sweep.samplers import Methods
from tracklight.sweep.space import Space

optuna.logging.set_verbosity(optuna.logging.WARNING)
# Its one warning tells, in a page of SQL, that a query failed and is asked in another way; where
# that fails too, the error says so.
logging.getLogger("optuna.storages._rdb.storage").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)

__all__ = ["optuna"]


T = TypeVar("T")


def bounded(call: Callable[[], T], limit_s: float) -> T:
    """Return the call's result; it runs in a thread that is left behind if it takes too long.

    Raises:
        TimeoutError: It took longer than the limit.
        Exception: What the call raised.
    """
    ended: list[tuple[bool, Any]] = []

    def run() -> None:
        try:
            ended.append((True, call()))
        except Exception as error:
            ended.append((False, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(limit_s)
    if not ended:
        raise TimeoutError
    succeeded, result = ended[0]
    if not succeeded:
        raise result
    return result


pass
pass

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


pass

POINT = "point"  # of a grid's trial: its parameters as text
RUNS = "runs"  # the keys of a trial's runs
REFUSED = "refused"  # of a trial that is no valid config: why
RETRY_OF = "retry_of"  # of a trial that takes the place of an earlier one: Optuna's number of that


def direction(mode: str) -> Literal["minimize", "maximize"]:
    """Return Optuna's word for a mode."""
    return "minimize" if mode == "min" else "maximize"


@dataclass(frozen=True)
class TrialRequest:
    """A trial to run: its number, what varies as text, and why it cannot run, if so."""

    number: int
    params: dict[str, str]
    has_ended: bool = False
    refused: str = ""


class OptunaStudy:
    """The study of one sweep.

    Args:
        storage: Where it is remembered.
        name: The study's.
        mode: `min` or `max`.
        space: What varies.
        methods: How to search and prune.
        total: OptunaStudy of a search; None for a grid.
    """

    def __init__(
        self,
        storage: BaseStorage,
        name: str,
        mode: str,
        space: Space,
        methods: Methods,
        total: int | None,
    ):
        self._space = space
        self._methods = methods
        self._total = total
        self._distributions = space.distributions() if total is not None else {}
        self._study: Study = optuna.create_study(
            storage=storage,
            study_name=name,
            direction=direction(mode),
            pruner=methods.pruner(),
            sampler=methods.sampler(0, self._distributions),
            load_if_exists=True,
        )
        self._live: dict[int, Trial] = {}
        self._left = [each for each in self._all() if each.state == TrialState.RUNNING]

    @property
    def is_search(self) -> bool:
        """Whether Optuna draws the points."""
        return self._total is not None

    def _all(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False)

    def counted(self) -> list[FrozenTrial]:
        """The trials that stand: neither torn by a kill as they were drawn, nor replaced."""
        trials = self._all()
        replaced = {trial.user_attrs.get(RETRY_OF) for trial in trials}
        return [
            trial for trial in trials if trial.number not in replaced and not self._is_torn(trial)
        ]

    def _is_torn(self, trial: FrozenTrial) -> bool:
        whole = self._distributions.keys() <= trial.params.keys()
        return not (whole or "fixed_params" in trial.system_attrs)

    def number(self, trial: FrozenTrial) -> int:
        """Return the number of a trial: Optuna's of the one whose place it has taken in the end."""
        trials, number = self._all(), trial.number
        while (earlier := trials[number].user_attrs.get(RETRY_OF)) is not None:
            number = earlier
        return number

    def params(self, trial: FrozenTrial) -> dict[str, str]:
        """Return what a trial varies, as text."""
        if POINT in trial.user_attrs:
            return dict(trial.user_attrs[POINT])
        fixed = trial.system_attrs.get("fixed_params", {})  # of one that still waits
        values = fixed | trial.params
        return {axis.name: axis.text(values[axis.name]) for axis in self._space.axes}

    def take(self, params: Mapping[str, str]) -> TrialRequest:
        """Return the trial of a grid's point: a new one, one left behind, or one that has ended."""
        same = [trial for trial in self.counted() if self.params(trial) == params]
        if not same:
            self._study.enqueue_trial({}, user_attrs={POINT: dict(params)})
            return self._popped(len(self._all()) - 1)
        found = same[-1]
        if found.state == TrialState.WAITING:
            return self._popped(found.number)
        if found.state == TrialState.RUNNING:
            return self._started(Trial(self._study, found._trial_id))
        return TrialRequest(self.number(found), dict(params), has_ended=True)

    def retry(self, number: int) -> None:
        """Put a trial in the queue that takes the place of an ended one."""
        trial = next(trial for trial in self.ended() if self.number(trial) == number)
        attrs = {RETRY_OF: trial.number} | {
            key: value for key, value in trial.user_attrs.items() if key == POINT
        }
        self._study.enqueue_trial(
            trial.system_attrs.get("fixed_params", {}) | trial.params, user_attrs=attrs
        )

    def retried(self, number: int) -> TrialRequest:
        """Replace an ended trial by one to run now."""
        self.retry(number)
        return self._popped(len(self._all()) - 1)

    def _popped(self, number: int) -> TrialRequest:
        while True:
            trial = self._study.ask()
            if trial.number == number:
                return self._started(trial)

    def ended(self) -> list[FrozenTrial]:
        """The trials that stand and have ended."""
        return [trial for trial in self.counted() if trial.state.is_finished()]

    def note_runs(self, number: int, keys: Sequence[str]) -> None:
        """Remember which runs a trial is made of."""
        if self._live[number].user_attrs.get(RUNS) != list(keys):
            self._live[number].set_user_attr(RUNS, list(keys))

    def ask(self) -> TrialRequest | None:
        """Return the next trial to run: those left behind first, then the queue, then a new one."""
        while self._left:
            left = self._left.pop(0)
            trial = Trial(self._study, left._trial_id)
            if self._is_torn(left):  # drawing the rest would not draw what was to be drawn
                self._study.tell(trial, state=TrialState.FAIL)
                continue
            return self._started(trial)
        counted = self.counted()
        waiting = any(trial.state == TrialState.WAITING for trial in counted)
        if not waiting and (self._total is None or len(counted) >= self._total):
            return None
        # A function of how many trials there are: neither a restart nor a second worker repeats it.
        self._study.sampler = self._methods.sampler(len(counted), self._distributions)
        return self._started(self._study.ask())

    def _started(self, trial: Trial) -> TrialRequest:
        for name, distribution in self._distributions.items():
            trial._suggest(name, distribution)
        frozen = self._study._storage.get_trial(trial._trial_id)
        number = self.number(frozen)
        self._live[number] = trial
        return TrialRequest(number, self.params(frozen))

    @property
    def waiting(self) -> int:
        """How many trials have not been asked for yet."""
        counted = self.counted()
        in_queue = sum(trial.state == TrialState.WAITING for trial in counted)
        drawn = 0 if self._total is None else max(0, self._total - len(counted))
        return in_queue + drawn + len(self._left)

    def report(self, number: int, epoch: int, value: float) -> bool:
        """Remember a trial's score after an epoch; return whether to prune it."""
        trial = self._live[number]
        last = self._study._storage.get_trial(trial._trial_id).last_step
        if last is not None and epoch < last:
            return False  # run again after a kill; it went on from here once, so it does again
        if epoch != last:
            trial.report(value, epoch)
        return trial.should_prune()

    def refuse(self, number: int, reason: str) -> None:
        """Remember that a trial is no valid config, and never will be."""
        self._live[number].set_user_attr(REFUSED, reason)
        self.tell(number, "failed", None)

    def tell(self, number: int, kind: str, score: float | None) -> None:
        """Remember how a trial ended; of a stopped one nothing, so that it is taken up again."""
        trial = self._live.pop(number)
        self._study.sampler = optuna.samplers.RandomSampler()  # a grid's would stop the study here
        if kind == "complete":
            self._study.tell(trial, score)
        elif kind != "stopped":
            state = TrialState.PRUNED if kind == "pruned" else TrialState.FAIL
            self._study.tell(trial, state=state)
