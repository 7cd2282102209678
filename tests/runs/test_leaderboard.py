"""What a sweep's runs amount to."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from tracklight.runs.leaderboard import Row, row, standings

ROW = Row(0, {"lr": "0.1"}, 0, "complete", 0.5, 3, 1.0, "id")


def rows(*told):
    return [
        replace(ROW, trial=n, params={"lr": str(n)}, state=state, score=score, run_id=f"r{n}")
        for n, (state, score) in enumerate(told)
    ]


@pytest.mark.parametrize(("mode", "order"), [("max", [2, 0, 1]), ("min", [1, 0, 2])])
def test_points_are_ranked_by_score_and_only_complete_ones(mode, order):
    found = standings(
        rows(("complete", 0.5), ("complete", 0.4), ("complete", 0.9), ("pruned", 0.95)), mode, 1
    )
    assert [each.trial for each in found] == [*order, 3]
    assert [each.rank for each in found] == [1, 2, 3, None]


def test_equal_scores_rank_by_trial():
    found = standings(rows(("complete", 0.5), ("complete", 0.5)), "max", 1)
    assert [each.trial for each in found] == [0, 1]


def test_a_point_that_lacks_seeds_or_has_a_failed_one_is_not_ranked():
    runs = [replace(ROW, seed=seed, score=float(seed)) for seed in range(3)]
    assert standings(runs, "max", 3)[0].rank == 1
    assert standings(runs[:2], "max", 3)[0].rank is None
    failed = [*runs[:2], replace(ROW, seed=2, state="failed", score=None)]
    assert (standings(failed, "max", 3)[0].rank, standings(failed, "max", 3)[0].state) == (
        None,
        "failed",
    )


def test_the_mean_of_seeds_decides_and_not_their_best():
    steady = [replace(ROW, params={"lr": "1"}, seed=s, score=0.8) for s in range(2)]
    lucky = [replace(ROW, params={"lr": "2"}, seed=s, score=v) for s, v in enumerate((0.99, 0.1))]
    assert standings([*lucky, *steady], "max", 2)[0].params == {"lr": "1"}


def test_the_interval_of_a_mean_is_students():
    """By hand: t of 4 degrees of freedom at 97.5 % is 2.776445105."""
    scores = [1.0, 2.0, 3.0, 4.0, 5.0]
    runs = [replace(ROW, seed=seed, score=score) for seed, score in enumerate(scores)]
    (found,) = standings(runs, "max", 5)
    assert found.std == pytest.approx(np.std(scores, ddof=1), rel=1e-12)
    half = 2.776445105 * np.sqrt(2.5 / 5)
    assert found.interval == pytest.approx((3 - half, 3 + half), rel=1e-8)


def test_a_value_that_stands_for_another_config_now_is_ranked_by_the_newest(tmp_path):
    old = replace(ROW, score=0.9, setting="old", start_ms=1)
    new = replace(ROW, score=0.4, setting="new", start_ms=2, run_id="new")
    (found,) = standings([old, new], "max", 1)
    assert (found.score, [row.run_id for row in found.runs]) == (0.4, ["new"])


def test_the_reason_of_a_failure_that_passed_is_gone():
    tags = {"tracklight.trial": "3", "tracklight.reason": "killed by SIGKILL", "lr": "0.1"}
    info = SimpleNamespace(status="FINISHED", start_time=0, end_time=1000, run_id="id")
    run = SimpleNamespace(info=info, data=SimpleNamespace(tags=tags, metrics={}, params={}))
    assert (row(run, ["lr"]).state, row(run, ["lr"]).reason) == ("complete", "")
    info.status = "FAILED"
    assert row(run, ["lr"]).reason == "killed by SIGKILL"
