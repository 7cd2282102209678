"""The ranking of a sweep's configs, and statistics over seeds."""

import statistics
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from tracklight.runs.leaderboard import (
    TrialRun,
    difference,
    half_width,
    rank_trials,
    read_trial_run,
    result_params,
    t_quantile,
    welch_difference,
)

ROW = TrialRun(0, {"lr": "0.1"}, 0, "complete", 0.5, 3, 1.0, "id")


def rows(*told):
    return [
        replace(ROW, trial=n, params={"lr": str(n)}, state=state, score=score, run_id=f"r{n}")
        for n, (state, score) in enumerate(told)
    ]


@pytest.mark.parametrize(("mode", "order"), [("max", [2, 0, 1]), ("min", [1, 0, 2])])
def test_points_are_ranked_by_score_and_only_complete_ones(mode, order):
    found = rank_trials(
        rows(("complete", 0.5), ("complete", 0.4), ("complete", 0.9), ("pruned", 0.95)), mode, 1
    )
    assert [each.trial for each in found] == [*order, 3]
    assert [each.rank for each in found] == [1, 2, 3, None]


def test_equal_scores_rank_by_trial():
    found = rank_trials(rows(("complete", 0.5), ("complete", 0.5)), "max", 1)
    assert [each.trial for each in found] == [0, 1]


def test_a_point_that_lacks_seeds_or_has_a_failed_one_is_not_ranked():
    runs = [replace(ROW, seed=seed, score=float(seed)) for seed in range(3)]
    assert rank_trials(runs, "max", 3)[0].rank == 1
    assert rank_trials(runs[:2], "max", 3)[0].rank is None
    failed = [*runs[:2], replace(ROW, seed=2, state="failed", score=None)]
    assert (rank_trials(failed, "max", 3)[0].rank, rank_trials(failed, "max", 3)[0].state) == (
        None,
        "failed",
    )


def test_a_config_of_which_a_seed_diverged_is_not_ranked_by_the_others():
    good = [replace(ROW, params={"lr": "1"}, seed=seed, score=0.5) for seed in range(2)]
    diverged = [replace(ROW, params={"lr": "2"}, trial=1, seed=s, score=v) for s, v in ((0, 0.1), (1, None))]
    ranked = rank_trials([*good, *diverged], "min", 2)
    assert [(row.params["lr"], row.rank) for row in ranked] == [("1", 1), ("2", None)]


def test_the_mean_of_seeds_decides_and_not_their_best():
    steady = [replace(ROW, params={"lr": "1"}, seed=s, score=0.8) for s in range(2)]
    lucky = [replace(ROW, params={"lr": "2"}, seed=s, score=v) for s, v in enumerate((0.99, 0.1))]
    assert rank_trials([*lucky, *steady], "max", 2)[0].params == {"lr": "1"}


def test_the_interval_of_a_mean_is_students():
    """By hand: t of 4 degrees of freedom at 97.5 % is 2.776445105."""
    scores = [1.0, 2.0, 3.0, 4.0, 5.0]
    runs = [replace(ROW, seed=seed, score=score) for seed, score in enumerate(scores)]
    (found,) = rank_trials(runs, "max", 5)
    assert found.to_dict()["std"] == pytest.approx(np.std(scores, ddof=1), rel=1e-12)
    half = 2.776445105 * np.sqrt(2.5 / 5)
    ends = found.to_dict()["ci95_low"], found.to_dict()["ci95_high"]
    assert ends == pytest.approx((3 - half, 3 + half), rel=1e-8)


def test_a_value_that_stands_for_another_config_now_is_ranked_by_the_newest(tmp_path):
    old = replace(ROW, score=0.9, setting="old")
    new = replace(ROW, score=0.4, setting="new", run_id="new")
    (found,) = rank_trials([new, old], "max", 1)
    assert (found.score, found.run_ids) == (0.4, ["new"])


def test_the_reason_of_a_failure_that_passed_is_gone():
    tags = {"tracklight.trial": "3", "tracklight.reason": "killed by SIGKILL", "lr": "0.1"}
    info = SimpleNamespace(status="FINISHED", start_time=0, end_time=1000, run_id="id")
    run = SimpleNamespace(info=info, data=SimpleNamespace(tags=tags, metrics={}, params={}))
    assert (read_trial_run(run, ["lr"]).state, read_trial_run(run, ["lr"]).reason) == (
        "complete",
        "",
    )
    info.status = "FAILED"
    assert read_trial_run(run, ["lr"]).reason == "killed by SIGKILL"


@pytest.mark.parametrize("freedom", [1, 2, 7, 30, 31, 50, 1000])
def test_quantile_is_that_of_students_t(freedom):
    assert t_quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), abs=1e-4)


def test_half_width_is_that_of_the_t_interval():
    values = [0.91, 0.93, 0.90, 0.95]
    low, high = stats.t.interval(0.95, 3, statistics.fmean(values), stats.sem(values))
    assert half_width(values) == pytest.approx((high - low) / 2, rel=1e-4)


def test_one_value_has_no_interval():
    assert half_width([0.9]) is None
    assert welch_difference([0.9], [0.8, 0.7]) is None


def test_difference_is_welchs():
    before, after = [0.90, 0.91, 0.92, 0.905], [0.93, 0.95, 0.94]
    expected = stats.ttest_ind(after, before, equal_var=False)
    low, high = expected.confidence_interval(0.95)
    found = welch_difference(before, after)
    assert found.value == pytest.approx(statistics.fmean(after) - statistics.fmean(before))
    # The degrees of freedom are rounded down: never a narrower interval, hardly a wider one.
    assert found.low <= low + 1e-6
    assert found.high >= high - 1e-6
    assert found.high - found.low < 1.3 * (high - low)
    assert found.is_significant


def test_scores_that_share_their_seeds_are_compared_in_pairs():
    before = {"0": 0.90, "1": 0.70, "2": 0.50, "3": 0.30}
    after = {"3": 0.33, "2": 0.52, "1": 0.71, "0": 0.93, "9": 0.1}
    found = difference(before, after)
    expected = stats.ttest_rel([0.93, 0.71, 0.52, 0.33], list(before.values()))
    interval = expected.confidence_interval(0.95)
    assert found.is_paired and found.value == pytest.approx(0.0225)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-4)


def test_too_few_pairs_are_two_independent_means():
    before, after = {"0": 0.9, "1": 0.7, "2": 0.8}, {"0": 0.8, "1": 0.6, "7": 0.5}
    assert difference(before, after) == welch_difference([*before.values()], [*after.values()])
    assert difference({"0": 1.0}, after) is None


def test_overlapping_scores_are_no_more_than_noise():
    assert not welch_difference([0.90, 0.95, 0.92], [0.91, 0.96, 0.92]).is_significant


def test_scores_that_never_vary_differ_for_sure_or_not_at_all():
    assert welch_difference([1, 1], [2, 2]).is_significant
    assert not welch_difference([1, 1], [1, 1]).is_significant


def test_short_params_are_no_columns_beside_the_full_ones():
    full = {
        "model.features": "[1,2]",
        "data.features": "[a]",
        "model.hidden": "[8]",
        "model.width": "3",
        "model._target_": "m.MLP",
    }
    short = {"model-features": "1-2", "data-features": "a", "hidden": "8", "model": "MLP"}
    short |= {"width": "3"}  # by `save_hyperparameters()`
    assert result_params(SimpleNamespace(params=full | short)) == full


def test_an_argument_of_a_model_hides_no_key_of_that_name():
    params = {"seed": "1", "model.seed": "5", "num_threads": "2"}
    assert result_params(SimpleNamespace(params=params)) == params
