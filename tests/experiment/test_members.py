"""Populations in this process: what happens to members when something happens to them."""

import importlib
import statistics
from typing import Any

import pytest
import torch
from scipy import stats

from doc_pages import PAGES, blocks
from tracklight.config.compose import compose
from tracklight.experiment import group, population
from tracklight.paths import ROOT
from tracklight.tracking.store import connect

WORDS = (
    "num_threads=1",
    "trainer.accelerator=cpu",
    "trainer.max_epochs=6",
    "tracking.figures=false",
)


BLOBS = (
    *("model=mlp", "model.hidden=[16]", "data._target_=foreign.Blobs", "data.batch_size=16"),
    *(f"~data.{key}" for key in ("root", "download", "fallback", "shift", "fold", "num_folds")),
    *("~data.mean", "~data.std", "data.num_val=64", "score.metric=val/loss", "score.mode=min"),
    *("allowed_targets=[tracklight.models,torch.optim,foreign,mine]", "tracking.keep=all"),
)


@pytest.fixture
def train_members(directory):
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


def test_a_group_for_which_the_memory_is_short_is_halved_until_it_fits(
    train_members, directory, monkeypatch, capsys
):
    train_epoch = population.Training._train_epoch

    def short(self):
        train_epoch(self)
        if len(self.members) > 2 and self.epoch == 3:
            raise torch.OutOfMemoryError("short")

    expected = [history(directory, each["run_id"]) for each in train_members(*SEEDS)]
    monkeypatch.setattr(population.Training, "_train_epoch", short)
    ended = train_members(*SEEDS)
    assert [each["kind"] for each in ended] == ["complete"] * 5
    assert [history(directory, each["run_id"]) for each in ended] == [
        pytest.approx(each) for each in expected
    ]
    said = capsys.readouterr().out
    assert "out of memory with 5 members: 3 are trained at once" in said
    assert "out of memory with 3 members: 2 are trained at once" in said


def test_no_more_members_are_trained_at_once_than_allowed(train_members, monkeypatch):
    sizes = []
    fit = population.Training.fit
    monkeypatch.setattr(population.Training, "fit", lambda self: (sizes.append(len(self.members)), fit(self)))
    assert [each["kind"] for each in train_members(*SEEDS, max_members=2)] == ["complete"] * 5
    assert sizes == [2, 2, 1]


def test_a_member_whose_settings_are_refused_fails_alone(train_members):
    cycle = ("scheduler=onecycle",)
    good, bad, other = train_members(cycle, (*cycle, "scheduler.total_steps=3"), (*cycle, "seed=1"))
    assert good["kind"] == other["kind"] == "complete"
    assert bad["kind"] == "failed" and bad["is_input"] and bad["run_id"] is None


def test_a_metric_that_one_member_measures_badly_is_no_others(train_members, directory):
    ended = train_members(("optimizer.lr=0.01",), ("optimizer.lr=1e20",))
    assert [each["kind"] for each in ended] == ["complete", "failed"]
    client = connect(None, directory).client
    assert [client.get_run(each["run_id"]).info.status for each in ended] == ["FINISHED", "FAILED"]


def test_models_that_are_faster_alone_are_not_trained_together(train_members, monkeypatch):
    seconds = iter([10.0, 0.9])  # of a step of eight members, and of one alone
    monkeypatch.setattr(group, "_time", lambda step: (step(), next(seconds))[1])
    with pytest.raises(population.NotStackable, match="single steps take 0.72 of the time of stacked ones"):
        train_members(*SEEDS)


def histories(client, run_id: str) -> dict[str, list[tuple[int, float]]]:
    points = {key: client.get_metric_history(run_id, key) for key in client.get_run(run_id).data.metrics}
    return {key: sorted((each.step, each.value) for each in history) for key, history in points.items()}


def assert_as_alone(directory, ended: dict[str, Any], alone, rel: float) -> None:
    """A member has the points, score, checkpoints and schedule of the run alone."""
    client, run_id = connect(None, directory).client, ended["run_id"]
    found, expected = histories(client, run_id), histories(alone.client, alone.run.info.run_id)
    means = max(rel, 1e-6)  # of an epoch: Lightning keeps them in float32
    assert ended["kind"] == "complete" and ended["score"] == pytest.approx(alone.score, rel=means)
    assert found.keys() == {key for key in expected if not key.startswith("test/")}
    for key, points in found.items():
        steps, values = zip(*expected[key], strict=True)
        assert [step for step, _ in points] == [*steps], key
        assert [value for _, value in points] == pytest.approx(
            values, rel=rel if key == "train/loss" else means
        ), key
    for name in ("last", "best"):
        path = directory / "artifacts" / run_id / "artifacts" / "checkpoints" / f"{name}.ckpt"
        mine, other = torch.load(path, weights_only=True), alone.checkpoint(name)
        assert (mine["epoch"], mine["global_step"]) == (other["epoch"], other["global_step"])
        for key, tensor in other["state_dict"].items():
            assert (mine["state_dict"][key] - tensor).norm() <= rel * tensor.norm()
    last = torch.load(path.with_name("last.ckpt"), weights_only=True)
    for mine, other in zip(
        last["optimizer_states"], alone.checkpoint("last")["optimizer_states"], strict=True
    ):
        (group,), (expected,) = mine["param_groups"], other["param_groups"]
        # Where the schedule led; `foreach` is how a step is taken alone.
        assert group | {"foreach": None} == expected | {"foreach": None}


SCHEDULERS = [path.stem for path in sorted((ROOT / "conf" / "scheduler").glob("*.yaml"))]
ADAMW = ("optimizer=adamw", "optimizer.lr=0.02", "optimizer.weight_decay=0.1", "trainer.precision=64-true")
OPTIONS = {
    "plateau": ("scheduler.patience=0", "scheduler.threshold=0.3"),
    "step": ("scheduler.step_size=2",),
    "linear_warmup": ("scheduler.total_iters=40",),
}


@pytest.mark.slow
def test_under_each_scheduler_a_member_is_what_its_config_gives_alone(train, train_members, directory):
    words = [(*BLOBS, *ADAMW, f"scheduler={name}", *OPTIONS.get(name, ())) for name in SCHEDULERS]
    ended = dict(zip(SCHEDULERS, train_members(*words), strict=True))
    assert len(ended) == 7
    for name, own in zip(SCHEDULERS, words, strict=True):
        alone = train(*WORDS, *own)
        assert_as_alone(directory, ended[name], alone, rel=1e-10)
        (group,) = alone.checkpoint("last")["optimizer_states"][0]["param_groups"]
        assert (group["lr"] == pytest.approx(0.02)) == (
            name in ("none", "linear_warmup")
        )  # others have taken steps


@pytest.mark.slow
def test_a_model_of_the_users_own_takes_part_without_a_line_more(
    train, train_members, directory, tmp_path, monkeypatch
):
    (page,) = (page for page in PAGES if page.name == "your-model.md")
    (text,) = (block.text for block in blocks(page) if block.file.endswith("wide_linear.py"))
    promise = "class WideLinear(Supervised):\n"
    (tmp_path / "mine.py").write_text(text.replace(promise, f"{promise}    pure = True\n\n"))
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    gone = ("dropout", "hidden", "activation")
    own = ("model._target_=mine.WideLinear", "+model.width=6", *(f"~model.{key}" for key in gone))
    own += tuple(word for word in BLOBS if not word.startswith("model.hidden"))
    words = [(*own, f"seed={seed}", f"optimizer.lr={lr}") for seed, lr in ((1, 0.1), (2, 0.1), (2, 0.03))]
    for each, ended in zip(words, train_members(*words), strict=True):
        assert_as_alone(directory, ended, train(*WORDS, *each), rel=1e-4)


@pytest.mark.slow
def test_with_dropout_members_score_on_average_what_as_many_runs_alone_do(train, train_members):
    words = [(*BLOBS, "model.dropout=0.8", f"seed={seed}") for seed in range(12)]
    found = [each["score"] for each in train_members(*words)]
    alone = [train(*WORDS, *each).score for each in words]
    assert found != pytest.approx(alone, rel=1e-3)  # the numbers drawn are others
    error = stats.sem(alone) * stats.t.ppf(0.975, len(alone) - 1)
    assert abs(statistics.mean(found) - statistics.mean(alone)) < error
