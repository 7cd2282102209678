"""Optuna: the sampler and the pruner of a sweep, where its study is stored, and its trials."""

import fcntl
import importlib.util
import inspect
import json
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import optuna
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage, get_storage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy import exc

from tracklight.errors import BadInput
from tracklight.paths import read_bounded
from tracklight.redact import redact
from tracklight.sweep.space import Space
from tracklight.tracking import address, mlflow_client

optuna.logging.set_verbosity(optuna.logging.WARNING)
# Its one warning is a page of SQL about a query that is retried; if that fails too, it raises.
logging.getLogger("optuna.storages._rdb.storage").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)

SAMPLERS = {"tpe": "TPESampler", "random": "RandomSampler", "qmc": "QMCSampler", "grid": "GridSampler"}
SAMPLERS |= {"cmaes": "CmaEsSampler", "gp": "GPSampler"}
PRUNERS = {"none": "NopPruner", "median": "MedianPruner", "percentile": "PercentilePruner"}
PRUNERS |= {"hyperband": "HyperbandPruner", "asha": "SuccessiveHalvingPruner"}
DIRECTIONS: dict[str, Literal["minimize", "maximize"]] = {"min": "minimize", "max": "maximize"}
MAX_JOURNAL_BYTES = 1_000_000_000
STORAGE_TIMEOUT_S = 15.0  # not every driver has its own
OUTAGE_S = 300.0  # a store that does not answer for longer ends the sweep
OUTAGES = (exc.OperationalError, exc.InterfaceError, exc.PendingRollbackError)  # of a database away

# User attributes of a trial.
PARAMS_ATTR = "point"  # of a grid's trial: its params as text
RUN_KEYS_ATTR = "runs"  # the keys of its runs
INVALID_ATTR = "refused"  # why its config is not valid
RETRY_OF_ATTR = "retry_of"  # number of the trial that it replaces


@dataclass(frozen=True)
class OptunaSettings:
    """The sampler and the pruner of a sweep by name, with the arguments of their classes."""

    sampler: str
    sampler_options: Mapping[str, Any]
    pruner: str
    pruner_options: Mapping[str, Any]
    seed: int
    max_epochs: int
    # Unless the pruner's options say it, no trial is pruned before so many are complete (median, percentile)
    # and before it has run for so many epochs: a count, or below 1 a fraction of `max_epochs`.
    warmup_trials: int = 5
    warmup_epochs: float = 0

    def check(self, distributions: Mapping[str, Any]) -> None:
        """Refuse options or a space not valid for the sampler or the pruner: try them in memory."""
        sampler = self.build_sampler(0, distributions) if distributions else None
        study = optuna.create_study(sampler=sampler, pruner=self.build_pruner())
        with _option_errors("sampler", self.sampler, self.sampler_options):
            trial = study.ask(dict(distributions))
        with _option_errors("pruner", self.pruner, self.pruner_options):
            trial.report(0.0, 1)
            trial.should_prune()

    def build_sampler(self, index: int, distributions: Mapping[str, Any]) -> Any:
        """Return the sampler of the trial with this index, seeded by it."""
        samplers, options = optuna.samplers, dict(self.sampler_options)
        if self.sampler == "cmaes" and importlib.util.find_spec("cmaes") is None:
            raise BadInput("sweep.sampler=cmaes needs the package cmaes: pip install cmaes")
        if self.sampler == "grid":
            options["search_space"] = self.grid_cells(distributions)
        if self.sampler in ("cmaes", "qmc"):
            options.setdefault("warn_independent_sampling", False)
        options["seed"] = own_seed = _derive_seed(self.seed, index)
        if self.sampler in ("qmc", "grid"):  # a sequence, which has one seed for all trials
            options["seed"] = _derive_seed(self.seed)
        if self.sampler == "qmc":  # it samples with this one until a trial has finished
            options["independent_sampler"] = samplers.RandomSampler(seed=own_seed)
        return _build("sampler", self.sampler, getattr(samplers, SAMPLERS[self.sampler]), options)

    def grid_cells(self, distributions: Mapping[str, Any]) -> dict[str, list[Any]]:
        """Return the values of each axis for the grid sampler, which allows no intervals."""
        cells = {}
        for name, distribution in distributions.items():
            if hasattr(distribution, "choices"):
                cells[name] = list(distribution.choices)
            elif distribution.step and not distribution.log:
                low, high, step = distribution.low, distribution.high, distribution.step
                cells[name] = [low + i * step for i in range(round((high - low) / step) + 1)]
            else:
                cure = f"list its values, {name}=A,B, or try sweep.sampler=tpe"
                raise BadInput(f"sweep.sampler=grid cannot enumerate the interval of {name}; {cure}")
        return cells

    def build_pruner(self) -> Any:
        """Return the pruner, with defaults that suit epochs as steps."""
        fraction = self.warmup_epochs if self.warmup_epochs < 1 else 0.0
        epochs = math.ceil(fraction * self.max_epochs) or int(self.warmup_epochs)
        warmup = {"n_startup_trials": self.warmup_trials, "n_warmup_steps": epochs}
        least = {"min_resource": min(max(1, epochs), self.max_epochs)}
        defaults = {
            "median": warmup,
            "percentile": warmup | {"percentile": 25.0},
            "hyperband": least | {"max_resource": self.max_epochs},
            "asha": least,
        }
        options = {**defaults.get(self.pruner, {}), **self.pruner_options}
        return _build("pruner", self.pruner, getattr(optuna.pruners, PRUNERS[self.pruner]), options)


def _derive_seed(*entropy: int) -> int:
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


def _build(kind: str, name: str, cls: type, options: dict[str, Any]) -> Any:
    allowed = [key for key in inspect.signature(cls).parameters if key != "seed"]
    given = {key: value for key, value in options.items() if key != "seed"}
    for key in given:
        if key not in allowed:
            takes = f"{kind} {name} has no such option; it takes {', '.join(allowed) or 'none'}"
            raise BadInput(f"sweep.{kind}_options.{key}: {takes}")
    with _option_errors(kind, name, given):
        return cls(**options)


@contextmanager
def _option_errors(kind: str, name: str, options: Mapping[str, Any]) -> Iterator[None]:
    """Name the options in what Optuna raises; it checks few of them itself."""
    try:
        with warnings.catch_warnings(action="ignore"):  # some are called experimental
            yield
    except Exception as error:
        pairs = ", ".join(f"{key}: {value}" for key, value in options.items())
        reason = f"cannot be those of {kind} {name}: {' '.join(str(error).split())}"
        raise BadInput(f"sweep.{kind}_options={{{pairs}}} {reason}") from error


def open_storage(url: str | None, journal: Path | None) -> BaseStorage:
    """Open Optuna's storage: a database, which must answer, else a journal file, else memory."""
    if url is None:
        return _open_journal(journal) if journal else optuna.storages.InMemoryStorage()
    try:
        return address.call_in_thread(partial(optuna.storages.RDBStorage, url)).result(STORAGE_TIMEOUT_S)
    except Exception as error:
        reason = redact(" ".join(str(error).split("\n")[0].split()))[:200]
        if isinstance(error, TimeoutError):
            reason = f"does not answer within {STORAGE_TIMEOUT_S:.0f} s"
        cure = "a database that runs, sqlite:///FILE or postgresql://..., or null for a file in tracking.dir"
        raise BadInput(f"sweep.storage={redact(url)} cannot be opened ({reason}); give {cure}") from None


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


@dataclass(frozen=True)
class TrialRequest:
    """A trial to run."""

    number: int  # of a retry, that of the trial it replaces
    params: dict[str, str]  # name of each axis to its value as text
    has_ended: bool = False  # finished by an earlier command


class OptunaStudy:
    """The study of one sweep, continued if the storage has it."""

    def __init__(
        self,
        storage: BaseStorage,
        name: str,
        mode: str,
        space: Space,
        settings: OptunaSettings,
        num_trials: int | None,  # of a search, in all; None for a grid
    ):
        is_database = isinstance(storage, RDBStorage)
        self._storage: Any = PatientStorage(get_storage(storage)) if is_database else storage
        self._space = space
        self._settings = settings
        self._num_trials = num_trials or 0
        self._distributions = space.distributions() if num_trials is not None else {}
        self._study = optuna.create_study(
            storage=self._storage,
            study_name=name,
            direction=DIRECTIONS[mode],
            pruner=settings.build_pruner(),
            sampler=optuna.samplers.RandomSampler(),  # `ask` sets the one to sample with
            load_if_exists=True,
        )
        self._running: dict[int, Trial] = {}
        running = [each for each in self.get_trials() if each.state == TrialState.RUNNING]
        self._interrupted = [each.number for each in running if not self._is_torn(each)]
        for trial in filter(self._is_torn, running):  # its other params would differ if resumed
            self._study.tell(trial.number, state=TrialState.FAIL)

    def get_trials(self) -> list[FrozenTrial]:
        """Return all trials of the study, by Optuna's number."""
        return self._study.get_trials(deepcopy=False)

    def counted_trials(self) -> list[FrozenTrial]:
        """Return the trials that count: neither replaced by a retry nor torn by a kill."""
        trials = [trial for trial in self.get_trials() if not self._is_torn(trial)]
        replaced = {trial.user_attrs.get(RETRY_OF_ATTR) for trial in trials}
        return [trial for trial in trials if trial.number not in replaced]

    def _is_torn(self, trial: FrozenTrial) -> bool:
        """Return whether a kill left some of a trial's params unsampled."""
        unsampled = self._distributions.keys() - trial.params.keys()
        return trial.state != TrialState.WAITING and bool(unsampled)

    def finished_trials(self) -> list[FrozenTrial]:
        """Return the trials that count and are finished."""
        return [trial for trial in self.counted_trials() if trial.state.is_finished()]

    def trial_number(self, trial: FrozenTrial) -> int:
        """Return a trial's number; of a retry, that of the first trial it replaces."""
        earlier = trial.user_attrs.get(RETRY_OF_ATTR)
        return trial.number if earlier is None else self.trial_number(self.get_trials()[earlier])

    def trial_params(self, trial: FrozenTrial) -> dict[str, str]:
        """Return a trial's params as text."""
        if PARAMS_ATTR in trial.user_attrs:
            return dict(trial.user_attrs[PARAMS_ATTR])
        values = trial.system_attrs.get("fixed_params", {}) | trial.params  # the first: WAITING
        return {axis.name: axis.to_text(values[axis.name]) for axis in self._space.axes}

    def ask(self) -> TrialRequest | None:
        """Return the next trial of a search: interrupted, enqueued or new; None after the last."""
        if self._interrupted:
            return self._reopen(self._interrupted.pop(0))
        trials = self.counted_trials()
        has_waiting = any(trial.state == TrialState.WAITING for trial in trials)
        if not has_waiting and len(trials) >= self._num_trials:
            return None
        # Seeded by the number of trials: neither a restart nor a second worker repeats a sample.
        self._study.sampler = self._settings.build_sampler(len(trials), self._distributions)
        return self._request(self._study.ask(self._distributions))

    def ask_config(self, params: Mapping[str, str]) -> TrialRequest:
        """Return the trial of a grid's config: new, interrupted or finished."""
        same = [trial for trial in self.counted_trials() if self.trial_params(trial) == params]
        if not same:
            self._study.enqueue_trial({}, user_attrs={PARAMS_ATTR: dict(params)})
            return self._ask_waiting(len(self.get_trials()) - 1)
        trial = same[-1]
        if not trial.state.is_finished():
            ask = self._ask_waiting if trial.state == TrialState.WAITING else self._reopen
            return ask(trial.number)
        return TrialRequest(self.trial_number(trial), dict(params), has_ended=True)

    def enqueue_retry(self, number: int) -> int:
        """Enqueue a trial that replaces a finished one; return its number in the study."""
        trial = next(each for each in self.finished_trials() if self.trial_number(each) == number)
        attrs = {key: value for key, value in trial.user_attrs.items() if key == PARAMS_ATTR}
        params = trial.system_attrs.get("fixed_params", {}) | trial.params
        self._study.enqueue_trial(params, user_attrs={RETRY_OF_ATTR: trial.number} | attrs)
        return len(self.get_trials()) - 1

    def ask_retry(self, number: int) -> TrialRequest:
        """Return a trial that replaces a finished one."""
        return self._ask_waiting(self.enqueue_retry(number))

    def _ask_waiting(self, number: int) -> TrialRequest:
        while True:
            trial = self._study.ask(self._distributions)
            if trial.number == number:
                return self._request(trial)

    def _reopen(self, number: int) -> TrialRequest:
        study_id = self._storage.get_study_id_from_name(self._study.study_name)
        trial_id = self._storage.get_trial_id_from_study_id_trial_number(study_id, number)
        return self._request(Trial(self._study, trial_id))

    def _request(self, trial: Trial) -> TrialRequest:
        frozen = self.get_trials()[trial.number]
        number = self.trial_number(frozen)
        self._running[number] = trial
        return TrialRequest(number, self.trial_params(frozen))

    @property
    def is_waiting(self) -> bool:
        """Whether the storage is away and a call waits for it."""
        return getattr(self._storage, "is_waiting", False)

    @property
    def num_remaining(self) -> int:
        """Number of a search's trials that `ask` has not returned yet."""
        trials = self.counted_trials()
        num_waiting = sum(trial.state == TrialState.WAITING for trial in trials)
        return max(0, self._num_trials - len(trials)) + num_waiting + len(self._interrupted)

    def set_run_keys(self, number: int, keys: Sequence[str]) -> None:
        """Store the keys of a trial's runs."""
        self._running[number].set_user_attr(RUN_KEYS_ATTR, list(keys))

    def report(self, number: int, epoch: int, value: float) -> bool:
        """Report a trial's score after an epoch; return whether to prune the trial."""
        trial = self._running[number]
        last = self.get_trials()[trial.number].last_step
        if last is not None and epoch < last:
            return False  # repeated after a kill: it was not pruned here the first time
        if epoch != last:
            trial.report(value, epoch)
        return trial.should_prune()

    def fail_invalid(self, number: int, reason: str) -> None:
        """Fail a trial whose config is not valid, for good."""
        self._running[number].set_user_attr(INVALID_ATTR, reason)
        self.tell(number, "failed", None)

    def tell(self, number: int, kind: str, score: float | None) -> None:
        """Store how a trial ended; a stopped one stays RUNNING, to be continued."""
        trial = self._running.pop(number)
        self._study.sampler = optuna.samplers.RandomSampler()  # a grid's would stop the study
        if kind == "complete":
            self._study.tell(trial, score)
        elif kind != "stopped":
            state = TrialState.PRUNED if kind == "pruned" else TrialState.FAIL
            self._study.tell(trial, state=state)
