"""What a sweep varies: overrides of `-m` and `sweep.space` as axes of a grid or a search."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import TYPE_CHECKING, Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, Transformer
from hydra.errors import HydraException

from tracklight.config.overrides import check_alone
from tracklight.errors import BadInput

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution


PLAIN = (bool, int, float, str, type(None))  # what Optuna and JSON can hold as a choice


@dataclass(frozen=True)
class Axis:
    """One override with several values.

    Args:
        override: As Hydra parsed it.
    """

    override: Override

    @property
    def name(self) -> str:
        """The key without Hydra's `+`, as in tags and tables."""
        return self.override.get_key_element().lstrip("+~")

    @property
    def written(self) -> str:
        """The values as they were typed."""
        return self.override.get_value_string()

    @property
    def is_interval(self) -> bool:
        """Whether it has no finite list of values."""
        return self.override.is_interval_sweep()

    @property
    def is_numeric(self) -> bool:
        """Whether its values have an order and distances, as those of a list have not."""
        return self.is_interval or self.override.is_range_sweep()

    def word(self, text: str) -> str:
        """Return the override that sets one value."""
        return f"{self.override.get_key_element()}={text}"

    @cached_property
    def texts(self) -> tuple[str, ...]:
        """Every value as in an override, each once; none of an interval."""
        if self.is_interval:
            return ()
        return tuple(self._choices)

    @cached_property
    def _choices(self) -> dict[str, Any]:
        """Values for Optuna by text; what it cannot hold stays text."""
        values = [*self.override.sweep_iterator()]  # once: `shuffle` gives another order each time
        return {Transformer.str(value): _held(value) for value in values}

    @property
    def _sweep(self) -> Any:
        return self.override.value()

    @property
    def _is_log(self) -> bool:
        return "log" in getattr(self._sweep, "tags", ())

    def check(self, searched: bool) -> None:
        """Refuse an axis without values.

        Raises:
            BadInput: It is empty, or its bounds do not fit.
        """
        key, written = self.name, self.written
        if not self.is_interval:
            if not self.texts:
                raise BadInput(f"{key}={written} has no values; try {key}=A,B")
            if searched and self._is_log:
                raise BadInput(
                    f"{key}={written}: only an interval is searched logarithmically; "
                    f"try {key}=tag(log,interval(A,B)), or list the values"
                )
            return
        low, high = self._sweep.start, self._sweep.end
        if not all(map(math.isfinite, (low, high))):
            raise BadInput(f"{key}={written}: both ends of an interval must be finite")
        if low >= high:
            whole = isinstance(low, int)  # as `int(interval(...))` made them
            swap = f"interval({high:g},{low:g})" if low > high else f"interval({low:g},{low + 1:g})"
            raise BadInput(
                f"{key}={written} is empty: the first {'whole ' * whole}number must be below the "
                f"second; try {key}={f'int({swap})' if whole else swap}"
            )
        if searched and self._is_log and low <= 0:
            raise BadInput(f"{key}={written}: a logarithmic interval must start above 0")

    def distribution(self) -> "BaseDistribution":
        """Return what Optuna draws from."""
        from optuna.distributions import (
            CategoricalDistribution,
            FloatDistribution,
            IntDistribution,
        )

        if isinstance(self._sweep, IntervalSweep):
            low, high = self._sweep.start, self._sweep.end
            assert low is not None
            assert high is not None
            whole = isinstance(low, int) and isinstance(high, int)
            kind = IntDistribution if whole else FloatDistribution
            return kind(low, high, log=self._is_log)  # pyright: ignore[reportArgumentType]
        if self.override.is_range_sweep() and len(self.texts) > 1:
            values = sorted(self._choices.values())
            step = abs(self._sweep.step)
            if all(isinstance(value, int) for value in values):
                return IntDistribution(values[0], values[-1], step=step)
            return FloatDistribution(values[0], values[-1], step=step)
        texts = sorted(self.texts) if getattr(self._sweep, "shuffle", False) else self.texts
        return CategoricalDistribution([self._choices[text] for text in texts])

    def text(self, value: Any) -> str:
        """Return a value that Optuna drew as it stands in an override."""
        if self.is_interval:
            return repr(value)
        if self.override.is_range_sweep():  # Optuna adds up the steps, Hydra does so in decimals
            return min(self.texts, key=lambda text: abs(self._choices[text] - value))
        for text, choice in self._choices.items():
            if type(choice) is type(value) and choice == value:
                return text
        return repr(value)

    def ends(self) -> tuple[str, ...]:
        """Values by which to check the axis: both ends of numbers, all of a list."""
        if self.is_interval:
            return repr(self._sweep.start), repr(self._sweep.end)
        if self.override.is_range_sweep():
            return tuple(dict.fromkeys((self.texts[0], self.texts[-1])))
        return self.texts


def _held(value: Any) -> Any:
    return value if isinstance(value, PLAIN) else Transformer.str(value)


@dataclass(frozen=True)
class Space:
    """What stays and what varies.

    Args:
        fixed: Overrides that every point shares.
        axes: Overrides with several values, in the order given.
    """

    fixed: tuple[str, ...]
    axes: tuple[Axis, ...]

    @property
    def has_interval(self) -> bool:
        """Whether only a search can walk it."""
        return any(axis.is_interval for axis in self.axes)

    def grid(self) -> Iterator[dict[str, str]]:
        """Yield every point as axis name to text, the last axis changing fastest."""
        for texts in product(*(axis.texts for axis in self.axes)):
            yield dict(zip((axis.name for axis in self.axes), texts, strict=True))

    def corners(self) -> Iterator[dict[str, str]]:
        """Yield points that hold, between them, each value by which an axis is checked."""
        first = {axis.name: axis.ends()[0] for axis in self.axes}
        yield first
        for axis in self.axes:
            for text in axis.ends()[1:]:
                yield first | {axis.name: text}

    def words(self, point: Mapping[str, str]) -> list[str]:
        """Return the overrides that set a point."""
        return [axis.word(point[axis.name]) for axis in self.axes]

    def distributions(self) -> "dict[str, BaseDistribution]":
        """Return axis name to what Optuna draws from."""
        return {axis.name: axis.distribution() for axis in self.axes}

    def written(self) -> dict[str, str]:
        """Return axis name to its values as typed."""
        return {axis.name: axis.written for axis in self.axes}


def read_space(
    arguments: Sequence[str], preset: Mapping[str, str], loader: ConfigLoader | None
) -> Space:
    """Read overrides by Hydra's grammar; those of the command line win over the preset's.

    Args:
        arguments: The overrides of the command line.
        preset: Key to values, as in `sweep.space`.
        loader: Knows the choices of a group, for `glob`.

    Raises:
        BadInput: An entry of the preset does not read.
    """
    parser = OverridesParser.create(config_loader=loader)
    parsed = list(zip(arguments, parser.parse_overrides(list(arguments)), strict=True))
    typed = {override.get_key_element().lstrip("+~") for _, override in parsed}
    for key, values in preset.items():
        if key.lstrip("+") in typed:
            continue
        word = f"{key}={values}"
        try:
            (override,) = parser.parse_overrides([word])
        except HydraException as error:
            raise BadInput(f"sweep.space: cannot read {word}: {error}") from error
        check_alone(word, override)
        parsed.append((word, override))
    fixed = tuple(word for word, override in parsed if not override.is_sweep_override())
    axes = tuple(Axis(override) for _, override in parsed if override.is_sweep_override())
    return Space(fixed, axes)
