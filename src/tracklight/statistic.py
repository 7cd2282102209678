"""Mean, interval and difference of scores under several seeds, without importing SciPy."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

CONFIDENCE = 0.95
MIN_PAIRS = 3  # of two, the interval would be wider than what it compares, almost always
# Two-sided 95 % quantiles of Student's t for 1 to 30 degrees of freedom; from scipy.stats.t.ppf.
_QUANTILES = (
    *(12.706204736, 4.302652730, 3.182446305, 2.776445105, 2.570581836, 2.446911851),
    *(2.364624252, 2.306004135, 2.262157163, 2.228138852, 2.200985160, 2.178812830),
    *(2.160368656, 2.144786688, 2.131449546, 2.119905299, 2.109815578, 2.100922040),
    *(2.093024054, 2.085963447, 2.079613845, 2.073873068, 2.068657610, 2.063898562),
    *(2.059538553, 2.055529439, 2.051830516, 2.048407142, 2.045229642, 2.042272456),
)


@dataclass(frozen=True)
class Difference:
    """How far apart two means are, and the interval that holds the true distance."""

    value: float
    low: float
    high: float
    is_paired: bool = False

    @property
    def is_real(self) -> bool:
        """Whether chance alone is an unlikely reason: the interval leaves zero out."""
        return self.low > 0 or self.high < 0


def quantile(freedom: float) -> float:
    """Return the 97.5 % quantile of Student's t.

    Args:
        freedom: Degrees of freedom, 1 or more; rounded down, which widens the interval.

    Source: Abramowitz and Stegun 26.7.5 beyond 30 degrees of freedom.
    """
    whole = int(freedom)
    if whole <= len(_QUANTILES):
        return _QUANTILES[max(whole, 1) - 1]
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    return z + (z**3 + z) / (4 * whole) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * whole**2)


def half_width(values: Sequence[float]) -> float | None:
    """Return half the width of the mean's 95 % interval; None for a single value.

    Source: Student 1908, "The probable error of a mean".
    """
    if len(values) < 2:
        return None
    return quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


def difference(before: Sequence[float], after: Sequence[float]) -> Difference | None:
    """Compare two means whose spreads may differ; None unless there are two values of each.

    Source: Welch 1947, "The generalization of 'Student's' problem when several different
    population variances are involved".
    """
    if len(before) < 2 or len(after) < 2:
        return None
    value = statistics.fmean(after) - statistics.fmean(before)
    parts = [statistics.variance(each) / len(each) for each in (before, after)]
    if sum(parts) == 0:
        return Difference(value, value, value)
    sizes = (len(before) - 1, len(after) - 1)
    freedom = sum(parts) ** 2 / sum(p**2 / n for p, n in zip(parts, sizes, strict=True))
    half = quantile(freedom) * math.sqrt(sum(parts))
    return Difference(value, value - half, value + half)


def between(before: Mapping[str, float], after: Mapping[str, float]) -> Difference | None:
    """Compare scores by seed: pairs where enough seeds are shared, else two independent means.

    A seed decides initial weights, order and perhaps the split of the data for both sides alike;
    what it does to both is no part of their difference.

    Args:
        before: Score by seed.
        after: Likewise.

    Source: Student 1908, "The probable error of a mean", for pairs.
    """
    deltas = [after[seed] - before[seed] for seed in before if seed in after]
    if len(deltas) < MIN_PAIRS:
        return difference([*before.values()], [*after.values()])
    value, half = statistics.fmean(deltas), half_width(deltas) or 0.0
    return Difference(value, value - half, value + half, is_paired=True)
