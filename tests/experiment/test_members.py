"""Populations in this process: what happens to members when something happens to them."""

from typing import Any

import pytest
import torch

from tracklight.config.compose import compose
from tracklight.experiment import group, population
from tracklight.tracking.store import connect

WORDS = (
    "model=linear",
    "num_threads=1",
    "trainer.accelerator=cpu",
    "trainer.max_epochs=6",
    "tracking.figures=false",
)


@pytest.fixture
def train(directory):
    """Train members, given by their overrides; return how each ended."""

    def train(*members: tuple[str, ...], max_members: int | None = None) -> list[dict[str, Any]]:
        here = (f"tracking.dir={directory}", "tracking.uri=null", "trainer.enable_progress_bar=false")
        cfgs = [compose([*WORDS, *here, *words]) for words in members]
        ended: dict[int, dict[str, Any]] = {}
        many = [{}] * len(cfgs), [None] * len(cfgs), max_members
        population.run(cfgs, *many, lambda *_: set(), lambda index, **result: ended.update({index: result}))
        return [ended[index] for index in range(len(cfgs))]

    return train


SEEDS = tuple((f"seed={seed}",) for seed in range(5))


def history(directory, run_id: str) -> dict[int, float]:
    points = connect(None, directory).client.get_metric_history(run_id, "train/loss")
    assert len({point.step for point in points}) == len(points)
    return {point.step: point.value for point in points}


def test_a_group_for_which_the_memory_is_short_is_halved_until_it_fits(train, directory, monkeypatch, capsys):
    train_epoch = population.Training._train_epoch

    def short(self):
        train_epoch(self)
        if len(self.members) > 2 and self.epoch == 3:
            raise torch.OutOfMemoryError("short")

    expected = [history(directory, each["run_id"]) for each in train(*SEEDS)]
    monkeypatch.setattr(population.Training, "_train_epoch", short)
    ended = train(*SEEDS)
    assert [each["kind"] for each in ended] == ["complete"] * 5
    assert [history(directory, each["run_id"]) for each in ended] == [
        pytest.approx(each) for each in expected
    ]
    said = capsys.readouterr().out
    assert "out of memory with 5 members: 3 are trained at once" in said
    assert "out of memory with 3 members: 2 are trained at once" in said


def test_no_more_members_are_trained_at_once_than_allowed(train, monkeypatch):
    sizes = []
    fit = population.Training.fit
    monkeypatch.setattr(population.Training, "fit", lambda self: (sizes.append(len(self.members)), fit(self)))
    assert [each["kind"] for each in train(*SEEDS, max_members=2)] == ["complete"] * 5
    assert sizes == [2, 2, 1]


def test_a_member_whose_settings_are_refused_fails_alone(train):
    cycle = ("scheduler=onecycle",)
    good, bad, other = train(cycle, (*cycle, "scheduler.total_steps=3"), (*cycle, "seed=1"))
    assert good["kind"] == other["kind"] == "complete"
    assert bad["kind"] == "failed" and bad["is_input"] and bad["run_id"] is None


def test_a_metric_that_one_member_measures_badly_is_no_others(train, directory):
    ended = train(("optimizer.lr=0.01",), ("optimizer.lr=1e20",))
    assert [each["kind"] for each in ended] == ["complete", "failed"]
    client = connect(None, directory).client
    assert [client.get_run(each["run_id"]).info.status for each in ended] == ["FINISHED", "FAILED"]


def test_models_that_are_faster_alone_are_not_trained_together(train, monkeypatch):
    seconds = iter([10.0, 0.9])  # of a step of eight members, and of one alone
    monkeypatch.setattr(group, "_time", lambda step: (step(), next(seconds))[1])
    with pytest.raises(population.NotStackable, match="single steps take 0.72 of the time of stacked ones"):
        train(*SEEDS)
