"""Whole runs in this process, of the less common kinds."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LinearRegression

from tracklight.config.compose import check_config, compose
from tracklight.config.overrides import check_overrides
from tracklight.errors import BadInput, RunFailed
from tracklight.experiment.build import build_data
from tracklight.experiment.train import run
from tracklight.models.mlp import MLP
from tracklight.tracking.mlflow_client import mlflow

SMALL = (
    "model=mlp",
    "data.download=false",
    "data.fallback=true",
    "trainer.accelerator=cpu",
    "tracking.figures=false",
)
WARNING = "ignore:data.root=nowhere. no MNIST files:UserWarning"


@pytest.mark.filterwarnings(WARNING)
@pytest.mark.filterwarnings("ignore:.*could not find the monitored key:UserWarning")
@pytest.mark.parametrize(
    "limit",
    [
        "trainer.max_steps=3",
        pytest.param("+trainer.check_val_every_n_epoch=9", marks=pytest.mark.slow),
        pytest.param("trainer.fast_dev_run=true", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_compares_no_epochs_ends_well_with_its_last_weights(train, spare_model, capsys, limit):
    limit = limit.removeprefix("+")
    finished = train(*SMALL, "data.root=nowhere", "trainer.max_epochs=1", limit)
    assert finished.run.info.status == "FINISHED" and finished.score is None
    best, last = (finished.checkpoint(name)["state_dict"] for name in ("best", "last"))
    assert all((best[key] == last[key]).all() for key in last)
    assert "best.ckpt holds the last weights" in capsys.readouterr().out


@pytest.mark.filterwarnings(WARNING)
def test_an_untracked_run_tells_its_scores_and_leaves_nothing(tmp_path, capsys):
    words = (*SMALL, "data.root=nowhere", "trainer.max_epochs=1", "tracking=none")
    score = run(compose([*words, f"tracking.dir={tmp_path}", "trainer.enable_progress_bar=false"]))
    told = capsys.readouterr().out
    assert f"val/accuracy {score:.5g} (last epoch)" in told and "test/accuracy" in told
    assert list(tmp_path.iterdir()) == []


def test_what_a_librarys_callback_lacks_is_one_line(train):
    node = "+callbacks.a={_target_:pytorch_lightning.callbacks.BackboneFinetuning}"
    with pytest.raises(
        RunFailed, match="AttributeError: 'LinearRegression' object has no attribute 'backbone'"
    ):
        train(node, "trainer.max_epochs=1", "tracking.figures=false")


def test_a_note_and_tags_of_ones_own_are_the_runs(train):
    words = ["tracking.tags.project=x", "tracking.tags.a.b=3", "tracking.note='with new data'"]
    finished = train(
        "trainer.max_epochs=1", "tracking.figures=false", *check_overrides(words, multirun=False)
    )
    own = {"project": "x", "a.b": "3", "mlflow.note.content": "with new data"}
    assert own.items() <= finished.run.data.tags.items()
    for word in ("tracking.tags.mlflow.user=me", "tracking.tags={tracklight: 1}", "tracking.tags=3"):
        with pytest.raises(BadInput, match="mlflow and tracklight are taken"):
            check_config(compose(check_overrides([word], multirun=False)))


def test_a_plain_run_takes_its_steps_in_blocks(train, capsys):
    train("trainer.max_epochs=2", "tracking.figures=false", "trainer.accelerator=cpu")
    assert "Steps are taken one by one" not in capsys.readouterr().out


@pytest.mark.parametrize("profiler", ["simple", "advanced"])
def test_a_profiler_leaves_its_table_among_the_artifacts_and_says_where(train, capsys, profiler):
    finished = train("trainer.max_epochs=2", "tracking.figures=false", f"trainer.profiler={profiler}")
    told = capsys.readouterr().out
    (line,) = [line for line in told.splitlines() if line.startswith("profile")]
    path = Path(line.split(maxsplit=1)[1])
    assert path.parent.parent.name == finished.run.info.run_id
    assert "run_training_batch" in path.read_text()
    assert f"trainer.profiler={profiler.title()}Profiler" in told and " object at " not in told


@pytest.mark.slow
def test_the_diabetes_preset_reaches_the_coefficients_of_least_squares(train):
    words = ("experiment=diabetes", "trainer.accelerator=cpu")
    finished = train(*words, "tracking.figures=false")
    data = build_data(compose(words))
    part = data.splits["train"]
    exact = LinearRegression().fit(data.transform(part.features).numpy(), part.targets.numpy())
    weight, bias = sorted(finished.checkpoint("last")["state_dict"].values(), key=lambda value: -value.ndim)
    largest = np.abs(exact.coef_).max()  # trained in single precision: relative to the largest
    np.testing.assert_allclose(weight.numpy(), exact.coef_, atol=1e-4 * largest)
    np.testing.assert_allclose(bias.numpy(), exact.intercept_, rtol=1e-4)
    assert finished.history("ols/gap")[0][1] < 1e-4


def test_a_schedule_with_a_frequency_steps_so_many_epochs_apart(train):
    words = ("scheduler=step", "scheduler.step_size=1", "scheduler.gamma=0.5", "+scheduler.frequency=2")
    finished = train(*words, "trainer.max_epochs=4", "trainer.accelerator=cpu", "tracking.figures=false")
    (state,) = finished.checkpoint("last")["optimizer_states"]
    assert state["param_groups"][0]["lr"] == pytest.approx(0.01 * 0.5**2, rel=1e-12)


def test_last_names_the_newest_run_to_start_from_or_to_continue(train, spare_model, tmp_path):
    short = ("trainer.accelerator=cpu", "tracking.figures=false", "trainer.max_epochs=2")
    first = train(*short)
    second = train(*short, "init_from=last")
    assert second.run.data.params["init_from"] == first.run.info.run_id
    losses = [value for _, value in first.history("train/loss")]
    assert second.history("train/loss")[0][1] < losses[-1]  # from its weights, not from new ones
    cfg = compose(["resume=last", f"tracking.dir={tmp_path / 'runs'}", "tracking.uri=null"])
    cfg.overrides = ["trainer.max_epochs=4"]
    run(cfg)
    assert [step for step, _ in second.history("train/loss")] == [1, 2, 3, 4]


def test_best_names_the_run_with_the_best_score_to_start_from(train, spare_model):
    short = ("trainer.accelerator=cpu", "tracking.figures=false", "trainer.max_epochs=3")
    scores = {}
    for rate in ("0.001", "0.02", "0.002"):
        finished = train(*short, f"optimizer.lr={rate}")
        scores[finished.score] = finished
    best = scores[min(scores)]
    assert best.run.data.params["optimizer.lr"] == "0.02"  # neither the first nor the newest
    started = train(*short, "init_from=best", "optimizer.lr=1e-9").run.data
    assert started.params["init_from"] == started.tags["tracklight.init_from"] == best.run.info.run_id
    assert started.metrics["score"] < min(scores)  # from its weights: none are trained here


def test_what_lightning_refuses_in_training_fails_the_run_in_one_line(train):
    words = ("callbacks=early_stopping", "callbacks.early_stopping.monitor=x", "trainer.max_epochs=2")
    rates = "+callbacks.rates={_target_: pytorch_lightning.callbacks.LearningRateMonitor}"
    with pytest.raises(RunFailed, match="^Early stopping conditioned on metric `x` which is not available"):
        train(*words, rates, "trainer.accelerator=cpu", "tracking.figures=false")


@pytest.mark.filterwarnings(WARNING)
def test_mlflows_own_client_reads_all_of_a_run(train, monkeypatch):
    finished = train(*SMALL, "data.root=nowhere", "trainer.max_epochs=2", "model.hidden=[16]")
    client, run = finished.client, finished.run
    assert run.data.params["model.hidden"] == "[16]"
    steps = [step for step, _ in finished.history("train/loss")]
    assert steps == list(range(1, 2 * 55 + 1))  # 3,500 images in minibatches of 64, two epochs
    names = {each.path for each in client.list_artifacts(run.info.run_id)}
    assert {"checkpoints", "config.yaml", "provenance"} <= names
    (dataset,) = [each.dataset for each in run.inputs.dataset_inputs]
    assert run.data.tags["tracklight.data"].startswith(dataset.digest)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", client.tracking_uri)
    (output,) = run.outputs.model_outputs
    images = torch.randn(5, 1, 28, 28)
    model = MLP(in_features=784, out_features=10, hidden=[16])
    model.load_state_dict(finished.checkpoint("best")["state_dict"])
    with torch.no_grad():
        wanted = model(images).numpy()
    logged = mlflow.pyfunc.load_model(f"models:/{output.model_id}")
    np.testing.assert_allclose(logged.predict(images.numpy()), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.full_mnist
def test_the_seed_mlp_scores_94_to_95_percent_after_five_epochs(train, mnist_root):
    words = ("model=mlp", "trainer.max_epochs=5", "trainer.accelerator=cpu")
    finished = train(*words, f"data.root={mnist_root}", "tracking.figures=false")
    assert 0.94 <= finished.history("test/accuracy")[0][1] <= 0.95


@pytest.mark.slow
@pytest.mark.full_mnist
def test_mnist_fast_scores_98_percent_in_at_most_five_epochs(train, mnist_root):
    words = ("experiment=mnist_fast", "trainer.accelerator=cpu", "tracking.figures=false")
    finished = train(*words, f"data.root={mnist_root}")
    assert finished.history("test/accuracy")[0][1] >= 0.98
    assert len(finished.history("val/accuracy")) <= 5
