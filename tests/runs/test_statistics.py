import statistics

import pytest
from scipy import stats

from tracklight.runs.leaderboard import between, difference, half_width, quantile


@pytest.mark.parametrize("freedom", [1, 2, 7, 30, 31, 50, 1000])
def test_quantile_is_that_of_students_t(freedom):
    assert quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), abs=1e-4)


def test_half_width_is_that_of_the_t_interval():
    values = [0.91, 0.93, 0.90, 0.95]
    low, high = stats.t.interval(0.95, 3, statistics.fmean(values), stats.sem(values))
    assert half_width(values) == pytest.approx((high - low) / 2, rel=1e-4)


def test_one_value_has_no_interval():
    assert half_width([0.9]) is None
    assert difference([0.9], [0.8, 0.7]) is None


def test_difference_is_welchs():
    before, after = [0.90, 0.91, 0.92, 0.905], [0.93, 0.95, 0.94]
    expected = stats.ttest_ind(after, before, equal_var=False)
    low, high = expected.confidence_interval(0.95)
    found = difference(before, after)
    assert found.value == pytest.approx(statistics.fmean(after) - statistics.fmean(before))
    # The degrees of freedom are rounded down: never a narrower interval, hardly a wider one.
    assert found.low <= low + 1e-6
    assert found.high >= high - 1e-6
    assert found.high - found.low < 1.3 * (high - low)
    assert found.is_real


def test_scores_that_share_their_seeds_are_compared_in_pairs():
    before = {"0": 0.90, "1": 0.70, "2": 0.50, "3": 0.30}
    after = {"3": 0.33, "2": 0.52, "1": 0.71, "0": 0.93, "9": 0.1}
    found = between(before, after)
    expected = stats.ttest_rel([0.93, 0.71, 0.52, 0.33], list(before.values()))
    interval = expected.confidence_interval(0.95)
    assert found.is_paired and found.value == pytest.approx(0.0225)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-4)


def test_too_few_pairs_are_two_independent_means():
    before, after = {"0": 0.9, "1": 0.7, "2": 0.8}, {"0": 0.8, "1": 0.6, "7": 0.5}
    assert between(before, after) == difference([*before.values()], [*after.values()])
    assert between({"0": 1.0}, after) is None


def test_overlapping_scores_are_no_more_than_noise():
    assert not difference([0.90, 0.95, 0.92], [0.91, 0.96, 0.92]).is_real


def test_scores_that_never_vary_differ_for_sure_or_not_at_all():
    assert difference([1, 1], [2, 2]).is_real
    assert not difference([1, 1], [1, 1]).is_real
