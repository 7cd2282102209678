"""Optuna: the sampler and the pruner of a sweep, and its trials."""

import importlib.util
import inspect
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import optuna
from optuna.storages import BaseStorage, RDBStorage, get_storage
from optuna.trial import FrozenTrial, Trial, TrialState
from typing_extensions import override

from tracklight.errors import BadInput
from tracklight.sweep.space import Space
from tracklight.sweep.storage import (
    PARAMS_ATTR,
    RETRY_OF_ATTR,
    PatientStorage,
    enqueue_again,
    open_storage,
    trial_id,
)

optuna.logging.set_verbosity(optuna.logging.WARNING)
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)

SAMPLERS = {"tpe": "TPESampler", "random": "RandomSampler", "qmc": "QMCSampler", "grid": "GridSampler"}
SAMPLERS |= {"cmaes": "CmaEsSampler", "gp": "GPSampler"}
PRUNERS = {"none": "NopPruner", "median": "MedianPruner", "percentile": "PercentilePruner"}
PRUNERS |= {"hyperband": "HyperbandPruner", "asha": "SuccessiveHalvingPruner"}
DIRECTIONS: dict[str, Literal["minimize", "maximize"]] = {"min": "minimize", "max": "maximize"}

# User attributes of a trial.
RUN_KEYS_ATTR = "runs"  # the keys of its runs
INVALID_ATTR = "refused"  # why its config is not valid
MACHINE_ATTR = "machine"  # which one runs it, of several that run the sweep
SURPLUS_ATTR = "surplus"  # another machine has a trial in its place


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


@dataclass(frozen=True)
class SharedTrial:
    """A trial in a database, for a process that is elsewhere and asks by itself whether to prune it."""

    url: str
    study: str
    number: int  # in the study
    settings: OptunaSettings

    def reporter(self) -> Callable[[int, float], bool]:
        """Return what reports the score after an epoch, and returns whether to prune the trial."""
        storage: Any = PatientStorage(get_storage(open_storage(self.url, None)))
        pruner = self.settings.build_pruner()
        study = optuna.load_study(study_name=self.study, storage=storage, pruner=pruner)
        return partial(_report, Trial(study, trial_id(storage, self.study, self.number)))


def _report(trial: Trial, epoch: int, value: float) -> bool:
    last = trial.study.get_trials(deepcopy=False)[trial.number].last_step
    if last is not None and epoch < last:
        return False  # repeated after a kill: it was not pruned here the first time
    if epoch != last:
        trial.report(value, epoch)
    return trial.should_prune()


@dataclass(frozen=True)
class TrialRequest:
    """A trial to run."""

    number: int  # of a retry, that of the trial it replaces
    params: dict[str, str]  # name of each axis to its value as text
    has_ended: bool = False  # finished by an earlier command, or on another machine
    is_retry: bool = field(default=False, compare=False)


class _SeededSampler(optuna.samplers.BaseSampler):
    """Samples each trial by a sampler of its own, which is built once the trial has its number."""

    def __init__(self, build: Callable[[int], optuna.samplers.BaseSampler]):
        self._build = build

    @override
    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self._sampler = self._build(trial.number)
        self._sampler.before_trial(study, trial)

    @override
    def infer_relative_search_space(self, *args: Any) -> Any:
        return self._sampler.infer_relative_search_space(*args)

    @override
    def sample_relative(self, *args: Any) -> Any:
        return self._sampler.sample_relative(*args)

    @override
    def sample_independent(self, *args: Any) -> Any:
        return self._sampler.sample_independent(*args)


class OptunaStudy:
    """The study of one sweep, continued if the storage has it.

    Of several machines that run the sweep, each has its own trials; whatever two of them do at once, no
    params are trained twice and no trial too many is.
    """

    def __init__(
        self,
        storage: BaseStorage,
        name: str,
        mode: str,
        space: Space,
        settings: OptunaSettings,
        num_trials: int | None,  # of a search, in all; None for a grid
        machine: str | None = None,  # the id of this one, if there may be others
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
        self.name, self._machine = name, machine
        self._running: dict[int, Trial] = {}
        # Of a grid, the numbers of the trials of each config: to look through all of them for each trial
        # would soon take longer than the trial.
        self._numbers = defaultdict[frozenset[tuple[str, str]], list[int]](list)
        self._num_indexed = 0
        self.running_ids: set[int] = set()  # in the storage, of the trials that run here
        running = [each for each in self.get_trials() if each.state == TrialState.RUNNING]
        running = [each for each in running if self._is_ours(each)]
        self._interrupted = [each.number for each in running if not self._is_torn(each)]
        for trial in filter(self._is_torn, running):  # its other params would differ if resumed
            self._study.tell(trial.number, state=TrialState.FAIL)

    def get_trials(self) -> list[FrozenTrial]:
        """Return all trials of the study, by Optuna's number."""
        return self._study.get_trials(deepcopy=False)

    def _is_ours(self, trial: FrozenTrial) -> bool:
        return self._machine is None or trial.user_attrs.get(MACHINE_ATTR) == self._machine

    @property
    def runs_elsewhere(self) -> bool:
        """Whether trials are left that another machine runs, or that one is to take over."""
        trials = [trial for trial in self.counted_trials() if not trial.state.is_finished()]
        return any(trial.state == TrialState.WAITING or not self._is_ours(trial) for trial in trials)

    def counted_trials(self) -> list[FrozenTrial]:
        """Return the trials that count: neither replaced by a retry, nor surplus, nor torn by a kill."""
        return self._counted(self.get_trials())

    def _counted(self, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
        trials = [trial for trial in trials if SURPLUS_ATTR not in trial.user_attrs]
        trials = [trial for trial in trials if not self._is_torn(trial)]
        replaced = {trial.user_attrs.get(RETRY_OF_ATTR) for trial in trials}
        return [trial for trial in trials if trial.number not in replaced]

    def _is_torn(self, trial: FrozenTrial) -> bool:
        """Return whether a kill left some of a trial's params unsampled."""
        unsampled = self._distributions.keys() - trial.params.keys()
        is_begun = trial.state.is_finished() or (trial.state == TrialState.RUNNING and self._is_ours(trial))
        return is_begun and bool(unsampled)

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
        # Seeded by how many trials came before: no restart, worker or machine repeats a sample.
        self._study.sampler = _SeededSampler(
            lambda number: self._settings.build_sampler(self._num_before(number), self._distributions)
        )
        trial = self._study.ask(self._distributions)
        request = self._request(trial)
        is_new = "fixed_params" not in self.get_trials()[trial.number].system_attrs
        is_surplus = is_new and self._num_before(trial.number) >= self._num_trials
        return self._withdraw(request.number) if is_surplus else request

    def _num_before(self, number: int) -> int:
        return sum(trial.number < number for trial in self.counted_trials())

    def _withdraw(self, number: int) -> None:
        """Give up a trial in whose place another machine began one a moment before."""
        self._running[number].set_user_attr(SURPLUS_ATTR, True)
        self.tell(number, "failed", None)

    def ask_config(self, params: Mapping[str, str]) -> TrialRequest | None:
        """Return the trial of a grid's config: new, interrupted or finished; None if it runs elsewhere."""
        same = self._trials_of(params)
        if not same:
            request = self._reopen(self._create({PARAMS_ATTR: dict(params)}))
            first = self._trials_of(params)[0].number
            return request if first == request.number else self._withdraw(request.number)
        trial = same[-1]
        if trial.state.is_finished():
            return TrialRequest(self.trial_number(trial), dict(params), has_ended=True)
        if trial.state == TrialState.WAITING:
            return self._claim(trial.number)
        return self._reopen(trial.number) if self._is_ours(trial) else None

    def _trials_of(self, params: Mapping[str, str]) -> list[FrozenTrial]:
        trials = self.get_trials()
        for trial in trials[self._num_indexed :]:
            self._numbers[frozenset(self.trial_params(trial).items())].append(trial.number)
        self._num_indexed = len(trials)
        return self._counted([trials[number] for number in self._numbers[frozenset(params.items())]])

    def _create(self, attrs: dict[str, Any]) -> int:
        """Create a running trial; return its number in the study."""
        attrs |= {MACHINE_ATTR: self._machine} if self._machine else {}
        trial = optuna.trial.create_trial(state=TrialState.RUNNING, user_attrs=attrs)
        study_id = self._storage.get_study_id_from_name(self.name)
        return self._storage.get_trial(self._storage.create_new_trial(study_id, trial)).number

    def _claim(self, number: int) -> TrialRequest | None:
        """Return a trial that waits, unless another machine has just begun it."""
        claimed = self._storage.set_trial_state_values(
            trial_id(self._storage, self.name, number), TrialState.RUNNING
        )
        return self._reopen(number) if claimed else None

    def enqueue_retry(self, number: int) -> int:
        """Enqueue a trial that replaces a finished one; return its number in the study."""
        trial = next(each for each in self.finished_trials() if self.trial_number(each) == number)
        return enqueue_again(self._study, trial)

    def ask_retry(self, number: int) -> TrialRequest | None:
        """Return a trial that replaces a finished one."""
        return self._claim(self.enqueue_retry(number))

    def _reopen(self, number: int) -> TrialRequest:
        return self._request(Trial(self._study, trial_id(self._storage, self.name, number)))

    def _request(self, trial: Trial) -> TrialRequest:
        if self._machine:
            running = trial_id(self._storage, self.name, trial.number)
            self._storage.record_heartbeat(running)
            trial.set_user_attr(MACHINE_ATTR, self._machine)
            self.running_ids.add(running)
        frozen = self.get_trials()[trial.number]
        number = self.trial_number(frozen)
        self._running[number] = trial
        return TrialRequest(number, self.trial_params(frozen), is_retry=RETRY_OF_ATTR in frozen.user_attrs)

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
        return _report(self._running[number], epoch, value)

    def share(self, number: int, url: str) -> SharedTrial:
        """Return a trial for a process elsewhere, where the storage has this address."""
        return SharedTrial(url, self.name, self._running[number].number, self._settings)

    def fail_invalid(self, number: int, reason: str) -> None:
        """Fail a trial whose config is not valid, for good."""
        self._running[number].set_user_attr(INVALID_ATTR, reason)
        self.tell(number, "failed", None)

    def tell(self, number: int, kind: str, score: float | None) -> None:
        """Store how a trial ended; a stopped one stays RUNNING, to be continued."""
        trial = self._running.pop(number)
        if self._machine:
            self.running_ids.discard(trial_id(self._storage, self.name, trial.number))
        self._study.sampler = optuna.samplers.RandomSampler()  # a grid's would stop the study
        if kind == "complete":
            self._study.tell(trial, score)
        elif kind != "stopped":
            state = TrialState.PRUNED if kind == "pruned" else TrialState.FAIL
            self._study.tell(trial, state=state)
