"""What counts as a run's score: measured, in that epoch, and a number."""

import re
import sys
import warnings

import pytest
import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

import foreign
from tracklight.config.compose import compose
from tracklight.config.overrides import split_for_resume
from tracklight.engine import progress
from tracklight.engine.blocks import NonFinite
from tracklight.engine.monitors import PruningCallback
from tracklight.errors import BadInput, RunFailed
from tracklight.experiment.train import run
from tracklight.runs.reader import SqliteReader
from tracklight.sweep.trial import TrialSpec, final_result, run_trial
from tracklight.tracking.mlflow_client import mlflow

pytestmark = pytest.mark.usefixtures("spare_model")
ALLOWED = (
    "allowed_targets=[tracklight.models,tracklight.data,torch.optim,pytorch_lightning.callbacks,foreign]"
)
QUICK = ("num_threads=1", "trainer.accelerator=cpu", "tracking.figures=false", ALLOWED)
TOLD = ("data=table", "model._target_=foreign.Scripted", "score.metric=val/told", "score.mode=min", *QUICK)
UNUSED = [f"~data.{key}" for key in ("seed", "slope", "intercept", "noise", "num_points", "num_features")]
UNUSED += ["~data.fold", "~data.num_folds"]
FOREIGN = (
    *("model._target_=foreign.Net", "~model.bias", "data._target_=foreign.NoisyData", *UNUSED),
    *("data.batch_size=50", "+data.num_workers=0", "score.metric=val_loss"),
)
EPOCHS = "trainer.max_epochs="


def told(*values: float) -> str:
    return "+model.told='" + ";".join(map(str, values)) + "'"


def only_run(tmp_path):
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    (found,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    return found


def resumed(tmp_path, *words: str) -> None:
    """Continue a run as `train.py` would; its id is among the words."""
    words = (*words, ALLOWED, f"tracking.dir={tmp_path / 'runs'}", "tracking.uri=null")
    now, later = split_for_resume(words)
    cfg = compose(now)
    cfg.overrides = later
    run(cfg)


@pytest.mark.parametrize(
    "value", ["nan", *(pytest.param(v, marks=pytest.mark.slow) for v in ("inf", "-inf"))]
)
def test_a_score_that_is_never_a_number_is_said_at_once_and_fails_the_run(train, tmp_path, capsys, value):
    with pytest.raises(NonFinite, match=f"val/told is {value} in epoch 1 and finite in no later one"):
        train(*TOLD, told(value), EPOCHS + "2")
    assert capsys.readouterr().out.count(f"val/told is {value} in epoch 1: no score") == 1
    found = only_run(tmp_path)
    assert (found.info.status, "score" in found.data.metrics) == ("FAILED", False)
    result = final_result(found)  # of a sweep: for good, as when the loss diverges
    assert result is not None and result.kind == "failed"


def test_an_epoch_whose_score_is_no_number_is_never_the_best_and_early_stopping_waits(train, capsys):
    words = (*TOLD, told("nan", 3, "-inf", 2, 1), EPOCHS + "5")
    finished = train(*words, "callbacks=early_stopping", "callbacks.early_stopping.patience=2")
    assert finished.score == 1.0  # the least number, in the fifth epoch
    assert [value for _, value in finished.history("score")] == [1.0]
    out = capsys.readouterr().out
    assert [f"in epoch {n}: no score" in out for n in range(1, 6)] == [True, False, True, False, False]


@pytest.mark.parametrize("tracking", ["mlflow", "none"])
def test_a_trial_whose_score_is_no_number_is_failed_with_its_epoch(tmp_path, tracking):
    words = (*TOLD, told(5, "nan") if tracking == "none" else told("nan"), EPOCHS + "2")
    where = (f"tracking.dir={tmp_path / 'runs'}", "tracking.uri=null", f"tracking={tracking}")
    cfg = compose([*words, *where, "trainer.enable_progress_bar=false"])
    result = run_trial(TrialSpec(dict(cfg)))
    epoch = 2 if tracking == "none" else 1
    assert result.kind == "failed" and f"val/told is nan in epoch {epoch}" in result.reason


def test_only_what_an_epoch_measured_is_printed_and_reported(tmp_path, capsys):
    reported = {}
    pruning = PruningCallback("val/told", lambda epoch, value: bool(reported.update({epoch: value})))
    words = (*TOLD, told(4, 3), EPOCHS + "5", "trainer.check_val_every_n_epoch=2", "tracking=none")
    run(compose([*words, f"tracking.dir={tmp_path}"]), callbacks=[pruning])
    assert reported == {2: 4.0, 4: 3.0}
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]
    assert ["val/told" in line for line in lines] == [False, True, False, True, False]
    assert all("train/loss_epoch" in line for line in lines)


def test_a_training_metric_is_ranked_by_the_epoch_that_measured_it_where_validation_is_rarer(train):
    words = ("data=table", "score.metric=train/loss_epoch", "trainer.check_val_every_n_epoch=2", *QUICK)
    finished = train(*words, EPOCHS + "5", "optimizer.lr=0.05")
    history = dict(finished.history("train/loss_epoch"))
    step = min(history, key=history.__getitem__)
    assert finished.history("score") == [(step, pytest.approx(history[step]))]
    assert finished.checkpoint("best")["global_step"] == step


@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_a_plateau_steps_when_there_is_a_new_value_and_only_then(train, interval):
    values = [2.0, 2.0, 1.0, 1.0, 1.0]  # of the validations after epochs 2, 4, 6, 8 and 10
    words = (*TOLD, told(*values), EPOCHS + "11", "trainer.check_val_every_n_epoch=2", "scheduler=plateau")
    finished = train(*words, "scheduler.patience=0", f"scheduler.interval={interval}", "optimizer.lr=0.1")
    (state,) = finished.checkpoint("last")["lr_schedulers"]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    expected = ReduceLROnPlateau(optimizer, patience=0)
    for value in values:
        expected.step(value)
    assert state["_last_lr"] == expected.state_dict()["_last_lr"] == [pytest.approx(1e-4)]
    assert (state["best"], state["num_bad_epochs"]) == (1.0, expected.num_bad_epochs)


def test_a_stop_that_no_longer_holds_is_continued_as_if_asked_at_once(train, tmp_path):
    values = told(3, 2, 2, 1, 1)
    stopping = ("callbacks=early_stopping", EPOCHS + "6", "scheduler=plateau", "scheduler.patience=0")
    stopped = train(*TOLD, values, *stopping, "callbacks.early_stopping.patience=1")
    assert stopped.checkpoint("last")["epoch"] == 3  # as the third epoch is no better
    run_id = f"resume={stopped.run.info.run_id}"
    resumed(
        tmp_path, run_id, "model.told='1;1;1'", "callbacks.early_stopping.patience=4", "allow_changes=true"
    )
    whole = train(*TOLD, values, *stopping, "callbacks.early_stopping.patience=4")
    found, expected = stopped.checkpoint("last"), whole.checkpoint("last")
    assert found["epoch"] == expected["epoch"] == 6
    assert all((found["state_dict"][key] == expected["state_dict"][key]).all() for key in found["state_dict"])
    assert found["lr_schedulers"][0]["_last_lr"] == expected["lr_schedulers"][0]["_last_lr"]


def test_a_stop_that_still_holds_holds_for_more_epochs(train, tmp_path):
    words = ("callbacks=early_stopping", EPOCHS + "6", "callbacks.early_stopping.patience=1")
    stopped = train(*TOLD, told(3, 2, 2, 1), *words)
    resumed(tmp_path, f"resume={stopped.run.info.run_id}", EPOCHS + "9")
    assert stopped.checkpoint("last")["epoch"] == 3


def test_a_run_that_its_time_ended_goes_on_once_the_time_is_no_limit(train, tmp_path):
    ended = train(*QUICK, "trainer.max_time=00:00:00:01", EPOCHS + "100000")
    epochs = ended.checkpoint("last")["epoch"]
    more = (f"{EPOCHS}{epochs + 20}", "trainer.max_time=null", "allow_changes=true")
    resumed(tmp_path, f"resume={ended.run.info.run_id}", *more)
    whole = train(*QUICK, f"{EPOCHS}{epochs + 20}")
    found, expected = (each.checkpoint("last")["state_dict"] for each in (ended, whole))
    assert all((found[key] == expected[key]).all() for key in found)


def test_averaged_weights_of_a_run_that_is_extended_are_those_of_one_as_long(train, tmp_path):
    words = ("data=table", "callbacks=ema", "callbacks.ema.decay=0.9", "optimizer=adam", *QUICK)
    first = train(*words, EPOCHS + "2")
    resumed(tmp_path, f"resume={first.run.info.run_id}", EPOCHS + "4")
    whole = train(*words, EPOCHS + "4")
    for name in ("best", "last"):
        one, other = (each.checkpoint(name)["state_dict"] for each in (first, whole))
        assert one.keys() == other.keys() and all(map(torch.equal, one.values(), other.values()))
    assert first.history("val/loss") == whole.history("val/loss")


def test_a_run_ended_amid_an_epoch_is_not_taken_up_there(train, tmp_path, capsys):
    ended = train("data=table", "data.batch_size=100", "trainer.max_steps=5", EPOCHS + "9", *QUICK)
    run_id, before = f"resume={ended.run.info.run_id}", ended.checkpoint("last")
    with pytest.raises(BadInput, match="in the middle of an epoch, whose rest cannot be taken up"):
        resumed(tmp_path, run_id, "trainer.max_steps=9", "allow_changes=true")
    found = only_run(tmp_path)
    assert (found.info.status, found.info.end_time) == ("FINISHED", ended.run.info.end_time)
    assert "nothing is trained" not in capsys.readouterr().out
    resumed(tmp_path, run_id)  # asked for no more, it has nothing to take up
    assert (
        f"has finished, so nothing is trained; init_{run_id.replace('resume', 'from')}"
        in capsys.readouterr().out
    )
    assert ended.checkpoint("last")["global_step"] == before["global_step"] == 5


def test_resume_auto_leaves_a_finished_run_alone_and_its_id_extends_it(train, tmp_path, capsys):
    first = train(*QUICK, EPOCHS + "3")
    second = train(*QUICK, EPOCHS + "6", "resume=auto")
    ids = first.run.info.run_id, second.run.info.run_id
    assert ids[0] != ids[1] and first.client.get_run(ids[0]).data.tags["tracklight.epochs"] == "3"
    with pytest.raises(BadInput, match="has finished its 3 epochs; give more"):
        resumed(tmp_path, f"resume={ids[0]}", EPOCHS + "2")
    assert first.client.get_run(ids[0]).info.status == "FINISHED"
    resumed(tmp_path, f"resume={ids[0]}")
    assert "nothing is trained; a larger trainer.max_epochs than 3 trains on" in capsys.readouterr().out
    resumed(tmp_path, f"resume={ids[0]}", EPOCHS + "6")
    assert "nothing is trained" not in capsys.readouterr().out
    found = first.client.get_run(ids[0])
    assert (found.data.tags["tracklight.epochs"], found.data.params["trainer.max_epochs"]) == ("6", "3")
    records = SqliteReader(tmp_path / "runs" / "mlflow.db").get_runs(ids)  # what comparisons show
    assert [each.params["trainer.max_epochs"] for each in records] == ["6", "6"]
    assert first.history("train/loss")[5] == second.history("train/loss")[5]


def test_a_run_in_which_nothing_was_trained_fails_and_has_no_score(train, tmp_path):
    with pytest.raises(RunFailed, match="nothing was trained"):
        train(*QUICK, "trainer.max_time=00:00:00:00")
    found = only_run(tmp_path)
    assert (found.info.status, found.data.metrics) == ("FAILED", {})
    with pytest.raises(BadInput, match="trainer.limit_train_batches=0 must be 1 batch or more"):
        compose(["trainer.limit_train_batches=0"])


@pytest.mark.filterwarnings("ignore:.*returned `None`", "ignore:.*does not have many workers")
def test_a_run_whose_batches_have_no_loss_fails_and_has_no_score(train, tmp_path, monkeypatch):
    monkeypatch.setattr(foreign.Net, "training_step", lambda *_: None)
    with pytest.raises(RunFailed, match="nothing was trained: training_step returned a loss for none"):
        train(*FOREIGN, *QUICK, EPOCHS + "1")
    found = only_run(tmp_path)
    assert found.info.status == "FAILED" and "score" not in found.data.metrics


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        pytest.param((), 3 * 310, id="all"),
        pytest.param(("trainer.limit_train_batches=2",), 3 * 64, id="two"),
        pytest.param(("experiment=debug",), 3 * 4 * 32, id="four"),
        pytest.param(("trainer.fast_dev_run=true",), 32, id="one"),
    ],
)
def test_the_speed_counts_the_examples_that_were_trained_on(tmp_path, monkeypatch, limits, expected):
    told = []
    monkeypatch.setattr(progress, "format_time", lambda *times: told.append(times) or "")
    words = ("data=table", EPOCHS + "3", *limits, *QUICK, "tracking=none")
    run(compose([*words, f"tracking.dir={tmp_path}", "trainer.enable_progress_bar=false"]))
    assert told[0][1] == expected  # 442 rows less 66 for validation and 66 for the test


def test_what_a_model_with_its_own_optimizer_ignores_is_said_and_not_recorded(train, monkeypatch):
    words = [*FOREIGN, "scheduler=cosine", *QUICK]
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    with (
        warnings.catch_warnings(),
        pytest.warns(UserWarning, match="its own optimizer: ignored scheduler=cosine"),
    ):
        warnings.filterwarnings("ignore", ".*does not have many workers")
        finished = train(*words, EPOCHS + "1")
    keys = finished.run.data.params
    assert (
        not [key for key in keys if re.match("(optimizer|scheduler)[.]", key)] and "model.hidden" not in keys
    )
