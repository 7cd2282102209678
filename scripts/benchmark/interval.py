"""Means and ratios of repeated measurements, each with the interval that its scatter allows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """An estimate and where the true value lies with 95 % confidence; infinite if unknown."""

    estimate: float
    low: float
    high: float

    def scaled(self, factor: float) -> "Interval":
        """Return the interval in another unit, `factor` of which make one of the present."""
        return Interval(self.estimate * factor, self.low * factor, self.high * factor)


def of_mean(values: Sequence[float]) -> Interval:
    """Return the mean of independent measurements, with Student's interval."""
    return of_ratio(values, [1.0] * len(values))


def of_ratio(above: Sequence[float], below: Sequence[float]) -> Interval:
    """Return the ratio of two sums of measurements taken in pairs.

    The sums, not the mean of the pairs' ratios: a pair counts by the time it took. What disturbs
    both of a pair cancels. Unlike a bootstrap's percentiles, which are too narrow for five pairs,
    Student's quantile allows for their number.

    Args:
        above: Measurements above the line.
        below: The one that belongs to each, positive.

    Returns:
        The ratio with its interval, infinite for a single pair.

    Source: Cochran 1977, "Sampling Techniques", 3rd edition, eq. 6.13 (variance of the ratio
    estimate, without finite population correction).
    """
    number = len(above)
    ratio = sum(above) / sum(below)
    if number < 2:
        return Interval(ratio, -math.inf, math.inf)
    residuals = (a - ratio * b for a, b in zip(above, below, strict=True))
    variance = sum(residual**2 for residual in residuals) / (number - 1)
    half = _student(number - 1) * math.sqrt(variance / number) / fmean(below)
    return Interval(ratio, ratio - half, ratio + half)


def _student(freedom: int) -> float:
    from scipy.stats import t  # a second that the commands' own process sizes must not hold

    return float(t.ppf((1 + CONFIDENCE) / 2, freedom))
