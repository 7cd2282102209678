"""The space of a sweep: overrides of `-m` and of `sweep.space`, fixed or with several values."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Transformer
from hydra.errors import HydraException

from tracklight.config.instantiate import check_plain
from tracklight.config.overrides import check_no_nested_sweep, parse_overrides
from tracklight.errors import BadInput
from tracklight.redact import redact

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

OPTUNA_TYPES = (bool, int, float, str, type(None))  # of a categorical value that can be stored


class Axis:
    """An override with several values."""

    def __init__(self, override: Override):
        self.override = override
        self.name = override.get_key_element().lstrip("+~")  # as in tags and tables
        self.expression = override.get_value_string()  # the values as they were typed
        self.is_interval = override.is_interval_sweep()  # which has no list of values
        self.is_numeric = self.is_interval or override.is_range_sweep()  # so that its values are ordered
        self._sweep: Any = override.value()
        self._is_log = "log" in getattr(self._sweep, "tags", ())
        # Iterated once: `shuffle` gives another order each time.
        values = [] if self.is_interval else [*override.sweep_iterator()]
        pairs = [(Transformer.str(value), value) for value in values]
        self._choices = {t: v if isinstance(v, OPTUNA_TYPES) else t for t, v in pairs}
        self.texts = tuple(self._choices)  # each value once, as in an override; empty for an interval
        self.num_given = len(values)  # as they were typed, equal ones included

    def check(self, is_search: bool) -> None:
        """Refuse an axis that is secret or without values, or an interval whose bounds are invalid."""
        given = [{self.name: value} for value in self._choices.values() or [0.5]]
        if redact(given) != given:
            raise BadInput(f"{self.name} is secret and cannot vary: no sweep remembers it; give it one value")
        key, assignment = self.name, f"{self.name}={self.expression}"
        if not self.is_interval:
            if not self.texts:
                raise BadInput(f"{assignment} has no values; try {key}=A,B")
            if is_search and self._is_log:
                cure = f"try {key}=tag(log,interval(A,B)), or list the values"
                raise BadInput(f"{assignment}: only an interval is searched logarithmically; {cure}")
            return
        low, high = self._sweep.start, self._sweep.end
        if not (math.isfinite(low) and math.isfinite(high)):
            raise BadInput(f"{assignment}: both ends of an interval must be finite")
        if low >= high:
            is_int = isinstance(low, int)  # from `int(interval(...))`
            fix = f"interval({high:g},{low:g})" if low > high else f"interval({low:g},{low + 1:g})"
            problem = f"is empty: the first {'whole ' * is_int}number must be below the second"
            raise BadInput(f"{assignment} {problem}; try {key}={f'int({fix})' if is_int else fix}")
        if is_search and self._is_log and low <= 0:
            raise BadInput(f"{assignment}: a logarithmic interval must start above 0")

    def distribution(self) -> "BaseDistribution":
        """Return the Optuna distribution of the values."""
        from optuna import distributions as kinds

        if not self.is_interval and not (self.is_numeric and len(self.texts) > 1):
            texts = sorted(self.texts) if getattr(self._sweep, "shuffle", False) else self.texts
            return kinds.CategoricalDistribution([self._choices[text] for text in texts])
        sweep, values = self._sweep, sorted(self._choices.values())
        low, high = (sweep.start, sweep.end) if self.is_interval else (values[0], values[-1])
        is_int = all(isinstance(value, int) for value in (low, high, *values))
        kind: Any = kinds.IntDistribution if is_int else kinds.FloatDistribution
        options = {"log": self._is_log} if self.is_interval else {"step": abs(sweep.step)}
        return kind(low, high, **options)

    def to_text(self, value: Any) -> str:
        """Return a value that Optuna suggested as in an override."""
        if self.is_interval:
            return repr(value)
        if self.is_numeric:  # Optuna adds up the steps as floats, Hydra as decimals
            return min(self.texts, key=lambda text: abs(self._choices[text] - value))
        same = (t for t, c in self._choices.items() if type(c) is type(value) and c == value)
        return next(same, repr(value))

    def boundary_texts(self) -> tuple[str, ...]:
        """Return the values to check before a search: both ends of numbers, all of a list."""
        if self.is_interval:
            return repr(self._sweep.start), repr(self._sweep.end)
        return (self.texts[0], *self.texts[1:][-1:]) if self.is_numeric else self.texts


@dataclass(frozen=True)
class Space:
    """The overrides that all trials share, and the axes on which they differ, in the order given.

    A trial's params are the name of each axis to one of its values, as text.
    """

    fixed: tuple[str, ...]
    axes: tuple[Axis, ...]

    def grid(self) -> Iterator[dict[str, str]]:
        """Yield the params of every combination, the last axis changing fastest."""
        for texts in product(*(axis.texts for axis in self.axes)):
            yield dict(zip((axis.name for axis in self.axes), texts, strict=True))

    def corners(self) -> Iterator[dict[str, str]]:
        """Yield params that cover, between them, the boundary values of every axis."""
        first = {axis.name: axis.boundary_texts()[0] for axis in self.axes}
        yield first
        for axis in self.axes:
            for text in axis.boundary_texts()[1:]:
                yield first | {axis.name: text}

    def overrides(self, params: Mapping[str, str]) -> list[str]:
        """Return the override of each axis that sets these params."""
        for axis in self.axes:
            if (text := params.get(axis.name)) not in axis.texts:  # of a store or a journal
                (override,) = parse_overrides([f"{axis.override.get_key_element()}={text}"])
                for value in (text, override.value()):  # as written, and without escapes
                    check_plain(value, axis.name)
        return [f"{axis.override.get_key_element()}={params.get(axis.name)}" for axis in self.axes]

    def distributions(self) -> "dict[str, BaseDistribution]":
        """Return the Optuna distribution of each axis."""
        return {axis.name: axis.distribution() for axis in self.axes}

    def expressions(self) -> dict[str, str]:
        """Return the values of each axis as they were typed."""
        return {axis.name: axis.expression for axis in self.axes}


def read_space(overrides: Sequence[str], preset: Mapping[str, str], loader: ConfigLoader | None) -> Space:
    """Parse overrides with Hydra's grammar; those of the command line win over `sweep.space`."""
    parser = OverridesParser.create(config_loader=loader)
    parsed = dict(zip(overrides, parser.parse_overrides(list(overrides)), strict=True))
    typed = {override.get_key_element().lstrip("+~") for override in parsed.values()}
    for key, values in preset.items():
        if key.lstrip("+") in typed:
            continue
        text = f"{key}={values}"
        try:
            (override,) = parser.parse_overrides([text])
        except HydraException as error:
            raise BadInput(f"sweep.space: cannot read {text}: {error}") from error
        check_no_nested_sweep(text, override)
        parsed[text] = override
    fixed = tuple(text for text, override in parsed.items() if not override.is_sweep_override())
    return Space(fixed, tuple(Axis(o) for o in parsed.values() if o.is_sweep_override()))
