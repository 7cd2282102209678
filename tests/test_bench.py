import math
import random
import sqlite3
from contextlib import closing
from statistics import fmean

import pytest

from benchmark.crowd import crowd
from benchmark.interval import Interval, of_mean, of_ratio
from benchmark.race import Relay, Rival, per_epoch, race, ratio
from benchmark.sweeps import idle
from benchmark.table import Claim, Section, keep
from tracklight.tracking.store import connect

STUDENT_4, STUDENT_1 = 2.776445, 12.706205  # 97.5 % quantiles of 4 and 1 degrees of freedom, tables


def test_a_mean_has_students_interval():
    interval = of_mean([1, 2, 3, 4, 5])
    half = STUDENT_4 * math.sqrt(2.5 / 5)  # their variance is 2.5
    assert interval.estimate == 3
    assert (interval.low, interval.high) == pytest.approx((3 - half, 3 + half))


def test_a_ratio_is_that_of_the_sums():
    interval = of_ratio([1, 5], [1, 3])
    # Residuals of the ratio 1.5 are -0.5 and 0.5; their variance is 0.5, the mean below 2.
    half = STUDENT_1 * math.sqrt(0.5 / 2) / 2
    assert interval.estimate == 1.5
    assert (interval.low, interval.high) == pytest.approx((1.5 - half, 1.5 + half))


def test_what_disturbs_both_of_a_pair_cancels():
    below = [1.0, 7.0, 2.0, 30.0]
    interval = of_ratio([0.5 * value for value in below], below)
    assert (interval.low, interval.estimate, interval.high) == pytest.approx((0.5, 0.5, 0.5))


def test_one_pair_tells_no_interval():
    assert of_ratio([1], [2]) == Interval(0.5, -math.inf, math.inf)


@pytest.mark.parametrize("number", [5, 20])
def test_an_interval_holds_the_true_ratio_as_often_as_it_says(number):
    draw = random.Random(0)
    held = []
    for _ in range(1000):
        pace = [draw.uniform(1, 2) for _ in range(number)]  # of the machine, felt by both
        above = [1.2 * each * draw.gauss(1, 0.05) for each in pace]
        below = [each * draw.gauss(1, 0.05) for each in pace]
        interval = of_ratio(above, below)
        held.append(interval.low <= 1.2 <= interval.high)
    assert fmean(held) == pytest.approx(0.95, abs=0.025)  # 3.6 standard errors of 1000 draws


class Walk:
    """Training that only notes who takes which step."""

    def __init__(self, name: str, steps: int, epochs: int, log: list[str]):
        self.name, self.steps, self.epochs, self.log = name, steps, epochs, log

    def __call__(self, relay: Relay) -> None:
        for _ in range(self.epochs):
            for _ in relay.epoch(lambda: range(self.steps)):
                self.log.append(self.name)
        relay.result = self.name.upper()
        relay.hand_over()


def test_rivals_take_all_their_steps_in_slices_that_end_with_the_epoch():
    log: list[str] = []
    rivals = [Rival("a", Walk("a", 150, 2, log)), Rival("b", Walk("b", 150, 2, log))]
    race(rivals, 6, lambda done: None)
    assert [rival.steps for rival in rivals] == [[64, 64, 22] * 2] * 2
    assert [rival.relay.result for rival in rivals] == ["A", "B"]
    for at, size in ((0, 128), (128, 128), (256, 44)):  # a round has one slice of each
        assert sorted(log[at : at + size]) == ["a"] * (size // 2) + ["b"] * (size // 2)


def test_an_error_of_a_rival_ends_the_race():
    def fail(relay: Relay) -> None:
        relay.hand_over()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        race([Rival("fails", fail)], 1, lambda done: None)


def timed(name: str, seconds: list[float]) -> Rival:
    rival = Rival(name, lambda relay: None)
    rival.seconds = seconds
    return rival


def test_rivals_are_compared_epoch_by_epoch():
    fast, slow = timed("fast", [1.0, 2.0] * 5), timed("slow", [8.0, 16.0] * 5)
    of_both = ratio(fast, slow, rounds_per_epoch=2)
    assert (of_both.low, of_both.estimate, of_both.high) == pytest.approx((1 / 8, 1 / 8, 1 / 8))
    assert per_epoch(slow, rounds_per_epoch=2).estimate == pytest.approx(24.0)


def test_a_slot_is_idle_only_while_a_trial_waits():
    lines = ["end 0", "start 1", "start 2", "end 4", "start 5", "end 9", "end 12"]
    # From 1 to 2 one of two slots, from 4 to 5 one of two; then nothing waits.
    assert idle(lines, 2, 3) == pytest.approx(2 / 8)


def claim(low: float, high: float, holds: bool = True) -> Claim:
    return Claim("ours / theirs", Interval((low + high) / 2, low, high), 1.0, "1.00", holds)


def test_a_target_is_reached_if_the_interval_reaches_it():
    assert claim(0.9, 1.2).verdict == "yes"
    assert claim(1.01, 1.2).verdict == "no"
    assert claim(0.9, 1.2, holds=False).verdict == "no"
    assert claim(-math.inf, math.inf).verdict == "unknown"


def test_a_section_replaces_its_elder_and_no_other(tmp_path):
    path = tmp_path / "BENCHMARKS.md"
    for title, note in (("CPU", "first"), ("GPU", "other"), ("CPU", "second")):
        keep(Section(title, [note], [claim(0.9, 1.2)], [("ours", Interval(1, 0.9, 1.1))]), path)
    text = path.read_text()
    assert text.count("## CPU") == text.count("## GPU") == 1
    assert "second" in text
    assert "other" in text
    assert "first" not in text
    assert "| ours / theirs | 1.05 | [0.900, 1.20] | 1.00 | yes |" in text


def test_a_crowded_store_holds_copies_that_mlflow_and_recovery_take_for_runs(tmp_path):
    store = connect(None, tmp_path)
    run = store.create("tracklight", "first", {"tracklight.identity": "x"})
    run.log_params({"lr": 0.1})
    run.log_series("train/loss", range(1, 201), [1.0] * 200)
    run.finish("FINISHED")
    crowd(tmp_path, 7)
    again = connect(None, tmp_path)
    again.recover()
    found = again.search("tags.`tracklight.identity` = 'x'")
    assert len(found) == 8
    assert {each.info.status for each in found} == {"FINISHED"}
    assert all(each.data.params == {"lr": "0.1"} for each in found)
    assert all((tmp_path / "artifacts" / each.info.run_id).is_dir() for each in found)
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as connection, connection:
        keys = connection.execute("SELECT value FROM tags WHERE key = 'tracklight.key'").fetchall()
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
    assert len({*keys}) == 8


@pytest.mark.slow
@pytest.mark.full_mnist
def test_ours_ends_a_race_with_the_bits_of_the_loop_by_hand(tmp_path, mnist_root, capsys):
    from benchmark.machine import Setting
    from benchmark.steps import on_cpu

    section = on_cpu(mnist_root, tmp_path, 1, Setting.here())
    assert "bit-identical" in capsys.readouterr().out
    assert len(section.times) == 11
