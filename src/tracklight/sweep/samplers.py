"""How a sweep searches and prunes: Optuna's classes by the names that `sweep` uses."""

import importlib.util
import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tracklight.errors import BadInput

SAMPLERS = {
    "tpe": "TPESampler",
    "random": "RandomSampler",
    "qmc": "QMCSampler",
    "grid": "GridSampler",
    "cmaes": "CmaEsSampler",
    "gp": "GPSampler",
}
PRUNERS = {
    "none": "NopPruner",
    "median": "MedianPruner",
    "percentile": "PercentilePruner",
    "hyperband": "HyperbandPruner",
    "asha": "SuccessiveHalvingPruner",
}
STEADY = ("qmc", "grid")  # draw a sequence: their seed must stay the same from trial to trial


@dataclass(frozen=True)
class Methods:
    """The sampler and the pruner of a sweep.

    Args:
        sampler_name: A key of `SAMPLERS`.
        sampler_options: Arguments of its class.
        pruner_name: A key of `PRUNERS`.
        pruner_options: Arguments of its class.
        seed: From which each trial's draws derive.
        max_epochs: Of a trial.
    """

    sampler_name: str
    sampler_options: Mapping[str, Any]
    pruner_name: str
    pruner_options: Mapping[str, Any]
    seed: int
    max_epochs: int

    @property
    def prunes(self) -> bool:
        """Whether trials are stopped early."""
        return self.pruner_name != "none"

    def check(self, distributions: Mapping[str, Any]) -> None:
        """Build both, and let them decide about a trial that is made up.

        Raises:
            BadInput: An option is unknown, of a wrong type or out of range, or the space does not
                suit.
        """
        from tracklight.sweep.study import optuna

        study = optuna.create_study(
            storage=optuna.storages.InMemoryStorage(),
            sampler=self.sampler(0, distributions),
            pruner=self.pruner(),
        )
        with _told("sampler", self.sampler_name, self.sampler_options):
            trial = study.ask(dict(distributions))
        with _told("pruner", self.pruner_name, self.pruner_options):
            trial.report(0.0, 1)
            trial.should_prune()

    def sampler(self, draw: int, distributions: Mapping[str, Any]) -> Any:
        """Return a sampler for the draw of this number, the same whenever it is asked for."""
        from optuna import samplers

        name, options = self.sampler_name, dict(self.sampler_options)
        if not distributions:
            return samplers.RandomSampler(seed=0)
        if name == "cmaes" and importlib.util.find_spec("cmaes") is None:
            raise BadInput("sweep.sampler=cmaes needs the package cmaes: pip install cmaes")
        if name == "grid":
            options["search_space"] = self.cells(distributions)
        if name == "cmaes" or name == "qmc":
            options.setdefault("warn_independent_sampling", False)
        entropy = [self.seed] if name in STEADY else [self.seed, draw]
        options["seed"] = _seed(entropy)
        if name == "qmc":  # until a trial has ended it leaves drawing to this one
            options["independent_sampler"] = samplers.RandomSampler(seed=_seed([self.seed, draw]))
        return _build("sampler", name, getattr(samplers, SAMPLERS[name]), options)

    def cells(self, distributions: Mapping[str, Any]) -> dict[str, list[Any]]:
        """Return the values of each axis for an exhaustive search.

        Raises:
            BadInput: An axis is an interval.
        """
        cells = {}
        for name, distribution in distributions.items():
            if hasattr(distribution, "choices"):
                cells[name] = list(distribution.choices)
            elif getattr(distribution, "step", None) and not distribution.log:
                steps = round((distribution.high - distribution.low) / distribution.step)
                cells[name] = [distribution.low + i * distribution.step for i in range(steps + 1)]
            else:
                raise BadInput(
                    f"sweep.sampler=grid cannot walk the interval of {name}; "
                    f"list its values, {name}=A,B, or try sweep.sampler=tpe"
                )
        return cells

    def pruner(self) -> Any:
        """Return the pruner."""
        from optuna import pruners

        name, options = self.pruner_name, dict(self.pruner_options)
        if name == "percentile":
            options.setdefault("percentile", 25.0)
        if name == "hyperband":
            options.setdefault("max_resource", self.max_epochs)
        if name == "asha":
            options.setdefault("min_resource", 1)
        return _build("pruner", name, getattr(pruners, PRUNERS[name]), options)


def _seed(entropy: Sequence[int]) -> int:
    import numpy as np

    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


def _build(kind: str, name: str, found: type, options: dict[str, Any]) -> Any:
    taken = [key for key in inspect.signature(found).parameters if key != "seed"]
    unknown = [key for key in options if key not in (*taken, "seed")]
    if unknown:
        raise BadInput(
            f"sweep.{kind}_options.{unknown[0]}: {kind} {name} has no such option; "
            f"it takes {', '.join(taken) or 'none'}"
        )
    with _told(kind, name, {key: options[key] for key in options if key != "seed"}):
        return found(**options)


@contextmanager
def _told(kind: str, name: str, options: Mapping[str, Any]) -> Iterator[None]:
    """Say of what Optuna raises whose options they were; it checks few of them itself."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some are called experimental
            yield
    except Exception as error:
        shown = ", ".join(f"{key}: {value}" for key, value in options.items())
        reason = " ".join(str(error).split())
        raise BadInput(
            f"sweep.{kind}_options={{{shown}}} cannot be those of {kind} {name}: {reason}"
        ) from error
