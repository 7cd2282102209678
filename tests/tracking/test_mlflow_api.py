"""MLflow's own API within a run: each call does what MLflow does, but in our run and through its log."""

import hashlib
import json
import logging
import os
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from disturbances import points_of
from matplotlib.figure import Figure
from mlflow import MlflowClient
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.demos.boring_classes import BoringModel
from pytorch_lightning.loggers import MLFlowLogger

from tracklight.tracking.mlflow_api import logging_to
from tracklight.tracking.mlflow_client import mlflow
from tracklight.tracking.sender import MlflowWriter
from tracklight.tracking.store import connect

QUIET = {
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "num_sanity_val_steps": 0,
}


@pytest.fixture
def run(store):
    run = store.create("mine", "its name", {})
    yield run
    run.finish("FINISHED")


def log_all(client: MlflowClient, run_id: str, folder) -> None:
    """Every logging call of a client that a module might make."""
    figure = Figure()
    figure.subplots().plot([1, 2])
    (folder / "notes.md").write_text("# notes")
    (folder / "many").mkdir(exist_ok=True)
    (folder / "many" / "a.txt").write_text("a")
    client.log_figure(run_id, figure, "figures/mine.png")
    client.log_image(run_id, np.zeros((4, 4), np.uint8), "images/still.png")
    client.log_image(run_id, np.zeros((4, 4), np.uint8), key="moving", step=3)
    client.log_text(run_id, "hello", "texts/hello.txt")
    client.log_dict(run_id, {"a": [1, 2]}, "dicts/a.json")
    client.log_artifact(run_id, str(folder / "notes.md"), "docs")
    client.log_artifacts(run_id, str(folder / "many"), "many")
    client.log_table(run_id, {"x": [1, 2]}, "table.json")
    client.log_table(run_id, {"x": [3]}, "table.json")
    client.log_table(run_id, {"y": [3]}, "other.json")
    client.log_metric(run_id, "mine/a", 0.5, step=7)
    client.log_metric(run_id, "mine/b", 1.5, step=8, synchronous=False)
    client.log_param(run_id, "width", 3)
    client.set_tag(run_id, "colour", "red")
    client.log_batch(
        run_id,
        metrics=[mlflow.entities.Metric("mine/a", 0.25, 5, 9)],
        params=[mlflow.entities.Param("depth", "2")],
        tags=[mlflow.entities.RunTag("shape", "round")],
    )


def contents(client: MlflowClient, run_id: str) -> dict:
    """All that was logged to a run, apart from the times."""
    run = client.get_run(run_id)
    files, folders = {}, [None]
    while folders:
        for each in client.list_artifacts(run_id, folders.pop()):
            if each.is_dir:
                folders.append(each.path)
            else:
                name = each.path.partition("+")[0]  # of a picture at a step: its time follows
                files.setdefault(name, []).append(each.path.rpartition(".")[2])
    return {
        "metrics": {key: points(client, run_id, key) for key in run.data.metrics},
        "params": run.data.params,
        "tags": {
            key: value
            for key, value in run.data.tags.items()
            if key in ("colour", "shape", "mlflow.loggedArtifacts", "mlflow.loggedImages")
        },
        "files": {name: sorted(kinds) for name, kinds in files.items()},
    }


def points(client: MlflowClient, run_id: str, key: str) -> list[tuple[int, float]]:
    return sorted((each.step, each.value) for each in client.get_metric_history(run_id, key))


def test_every_call_of_experiment_leaves_what_mlflows_own_client_leaves(store, run, tmp_path):
    plain = store.client.create_run("0", run_name="plain").info.run_id
    log_all(store.client, plain, tmp_path)
    log_all(run.experiment, run.run_id, tmp_path)
    run.finish("FINISHED")
    assert contents(store.client, run.run_id) == contents(store.client, plain)
    theirs = Path(store.client.download_artifacts(plain, "table.json", str(tmp_path))).read_text()
    assert json.loads((run.artifacts / "table.json").read_text()) == json.loads(theirs)
    assert json.loads(theirs)["data"] == [[1], [2], [3]]


def test_no_call_waits_for_a_store_that_is_away_and_all_arrives_later(store, swift, monkeypatch):
    run = store.create("mine", None, {})
    assert run.flush(20)

    def away(*args, **kwargs):
        raise ConnectionError("away")

    monkeypatch.setattr(MlflowWriter, "send_next", away)
    for name in ("log_batch", "log_metric", "log_param", "set_tag", "get_run", "update_run_info"):
        monkeypatch.setattr(type(run.store.real), name, away)
    figure, client = Figure(), run.experiment
    client.log_figure(run.run_id, figure, "mine.png")
    client.log_metric(run.run_id, "mine", 1.0, step=4)
    client.log_param(run.run_id, "width", 3)
    client.set_tag(run.run_id, "colour", "red")
    seen = client.get_run(run.run_id).data
    assert (seen.metrics, seen.params, seen.tags["colour"]) == ({"mine": 1.0}, {"width": "3"}, "red")
    monkeypatch.undo()
    run.finish("FINISHED")
    found = store.client.get_run(run.run_id)
    assert found.data.metrics == {"mine": 1.0} and found.data.params == {"width": "3"}
    assert (run.artifacts / "mine.png").exists()


def test_the_fluent_functions_log_to_the_run_and_nowhere_else(store, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before, uri = dict(os.environ), mlflow.get_tracking_uri()
    with logging_to(run):
        mlflow.log_metric("fluent", 0.5, step=3)
        mlflow.log_params({"width": 3})
        mlflow.end_run()
        with mlflow.start_run(tags={"colour": "red"}) as active:
            mlflow.log_text("hello", "hello.txt")
            with mlflow.start_run(nested=True) as child:
                mlflow.log_metric("below", 1.0)
        assert active.info.run_id == run.run_id != child.info.run_id
        mlflow.log_metric("fluent", 0.25, step=4)
        assert os.environ["MLFLOW_TRACKING_URI"] == store.uri  # what a process started here would use
    assert mlflow.active_run() is None and mlflow.get_tracking_uri() == uri and dict(os.environ) == before
    assert run.flush(20)
    found = store.client.get_run(run.run_id)
    assert found.info.status == "RUNNING" and found.data.params == {"width": "3"}
    assert found.data.tags["colour"] == "red"
    assert points_of(store, run.run_id, "fluent") == [(3, 0.5), (4, 0.25)]
    assert store.client.get_run(child.info.run_id).data.tags["mlflow.parentRunId"] == run.run_id
    assert (run.artifacts / "hello.txt").read_text() == "hello"
    assert len(store.search("")) == 2 and not (tmp_path / "mlruns").exists()


def test_without_a_run_nothing_is_logged_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with logging_to(None):
        with mlflow.start_run():
            mlflow.log_metric("fluent", 0.5)
            mlflow.log_text("hello", "hello.txt")
        mlflow.log_param("width", 3)
    assert list(tmp_path.iterdir()) == [] and mlflow.active_run() is None


def test_a_run_ended_by_someone_elses_hand_goes_on(store, run):
    run.experiment.set_terminated(run.run_id, "FAILED")
    run.finalize("success")
    assert run.flush(20)
    assert store.client.get_run(run.run_id).info.status == "RUNNING"
    run.experiment.update_run(run.run_id, name="renamed")
    assert run.flush(20)
    assert store.client.get_run(run.run_id).info.run_name == "renamed"


# Lightning's tests of its MLFlowLogger (tests_pytorch/loggers of 2.6), asked of ours.


def test_it_is_lightnings_mlflow_logger_to_whoever_asks(run):
    assert isinstance(run, MLFlowLogger)
    assert isinstance(run.experiment, MlflowClient)
    assert (run.version, run.run_id, run.experiment_id) == (
        run.run_id,
        run.run_id,
        run._info["experiment_id"],
    )


@pytest.mark.parametrize(
    ("name", "logged"),
    [
        ("val_acc@1", "val_acc1"),
        ("f1 (macro)", "f1 macro"),
        ("[some_metric]", "some_metric"),
        ("a//b", "a/b"),
        ("/a/", "a"),
        ("../a", "a"),
        ("x" * 300, "x" * 250),
        ("", "unnamed"),
    ],
)
def test_a_metric_name_that_mlflow_refuses_is_changed_and_said_once(store, run, caplog, name, logged):
    with caplog.at_level(logging.WARNING):
        for step in (1, 2):
            run.log_metrics({name: step / 2}, step=step)
    run.finish("FINISHED")
    assert points_of(store, run.run_id, logged) == [(1, 0.5), (2, 1.0)]
    assert len(caplog.records) == 1 and repr(logged) in caplog.text


def test_of_two_names_that_become_one_both_are_said(store, run, caplog):
    with caplog.at_level(logging.WARNING):
        run.log_metrics({"f1 (macro)": 0.25, "f1 [macro]": 0.5}, step=1)
    run.finish("FINISHED")
    assert sorted(points_of(store, run.run_id, "f1 macro")) == [(1, 0.25), (1, 0.5)]
    assert [record.args or record.getMessage() for record in caplog.records] == [
        f"metric {name!r} is logged as 'f1 macro': MLflow does not allow its name"
        for name in ("f1 (macro)", "f1 [macro]")
    ]


@pytest.mark.parametrize("value", ["good", {"a": 1.0}, None, [1.0, 2.0]], ids=str)
def test_a_value_that_is_no_number_is_said_once_and_left_out(store, run, caplog, value):
    with caplog.at_level(logging.WARNING):
        for step in (1, 2):
            run.log_metrics({"mood": value, "loss": 0.5}, step=step)
    run.finish("FINISHED")
    assert set(store.client.get_run(run.run_id).data.metrics) == {"loss"}
    assert len(caplog.records) == 1 and "metric mood is no number" in caplog.text


def test_hyperparameters_are_params_under_the_modules_names(store, run):
    run.log_hyperparams({"lr": 0.1, "net": {"width": 3, "act": "relu"}, 4: None, "odd name!": [1, 2]})
    run.log_hyperparams(Namespace(seed=7))
    run.finish("FINISHED")
    assert store.client.get_run(run.run_id).data.params == {
        "lr": "0.1",
        "net/width": "3",
        "net/act": "relu",
        "4": "None",
        "odd name": "[1, 2]",
        "seed": "7",
    }


def test_a_param_that_the_run_has_stays_and_the_other_value_is_said(store, run, caplog):
    run.log_params({"seed": 0})
    with caplog.at_level(logging.WARNING):
        run.log_hyperparams({"seed": 3, "lr": 0.1})
        run.log_hyperparams({"lr": 0.1, "net": torch.nn.ReLU, "object": object()})
        run.log_hyperparams({"object": object()})  # at another address
    run.finish("FINISHED")
    assert store.client.get_run(run.run_id).data.params["seed"] == "0"
    assert [record.getMessage() for record in caplog.records] == [
        "param seed of this run is 0 and stays so, not 3"
    ]


class Steps(BoringModel):
    """Logs at steps of its own, in each of the ways there are."""

    def training_step(self, batch, batch_idx):
        out = super().training_step(batch, batch_idx)
        self.log("own_axis", 1.0)
        return out

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.logger.log_metrics({"explicit": float(batch_idx)}, step=10 * batch_idx)

    def on_train_epoch_end(self):
        self.log_dict({"step": float(100 + self.current_epoch), "by_epoch": 2.0, "epoch": 5.0})

    def on_validation_epoch_end(self):
        self.log("val", 0.5)


def fit(module: LightningModule, logger, **arguments) -> Trainer:
    from tracklight.engine.lightning_internals import logging_step

    trainer = Trainer(logger=logger, log_every_n_steps=1, **QUIET | {"max_epochs": 2} | arguments)
    logger.steps_completed = lambda: trainer.global_step
    logger.lightning_step = lambda: logging_step(trainer)
    trainer.fit(module)
    return trainer


def test_a_step_that_a_module_gives_is_obeyed_and_the_rest_is_on_the_axis_of_steps(store, run, tmp_path):
    fit(Steps(), run, limit_train_batches=3, limit_val_batches=1, default_root_dir=tmp_path)
    run.finish("FINISHED")
    assert points_of(store, run.run_id, "own_axis") == [(step, 1.0) for step in range(1, 7)]
    assert points_of(store, run.run_id, "explicit") == [
        (0, 0.0),
        (0, 0.0),
        *[(10, 1.0)] * 2,
        *[(20, 2.0)] * 2,
    ]
    assert points_of(store, run.run_id, "by_epoch") == [(100, 2.0), (101, 2.0)]
    assert points_of(store, run.run_id, "val") == [(3, 0.5), (6, 0.5)]


@pytest.mark.filterwarnings("ignore:Attribute 'net' is an instance of:UserWarning")
@pytest.mark.parametrize("logger", [True, False])
def test_save_hyperparameters_logs_them_unless_told_not_to(store, run, logger, tmp_path):
    class Saving(BoringModel):
        def __init__(self, width, net):
            super().__init__()
            self.save_hyperparameters(logger=logger)

    fit(
        Saving(3, torch.nn.ReLU()),
        run,
        max_epochs=1,
        limit_train_batches=1,
        limit_val_batches=0,
        default_root_dir=tmp_path,
    )
    run.finish("FINISHED")
    params = store.client.get_run(run.run_id).data.params
    assert params == ({"width": "3", "net": "ReLU()"} if logger else {})


def test_long_hyperparameters_that_differ_in_their_end_differ_in_mlflow(store, run):
    texts = ["x" * 300 + end for end in "ab"]
    run.log_hyperparams({"one": texts[0], "two": {"inner": texts[1]}, "list": [{"a": texts[0]}], "n": 3})
    run.log_hyperparams(Namespace(three=texts[1], short="y" * 250))
    run.finish("FINISHED")
    params = store.client.get_run(run.run_id).data.params
    assert params["one"] != params["two/inner"] == params["three"] and params["one"] == params["list/0/a"]
    assert params["one"].startswith("x" * 200)
    assert hashlib.sha256(texts[0].encode()).hexdigest()[:16] in params["one"]
    assert (params["n"], params["short"]) == ("3", "y" * 250)


def test_fit_validate_and_test_end_no_run(store, run, tmp_path):
    trainer = fit(BoringModel(), run, max_epochs=1, limit_train_batches=1, limit_val_batches=1)
    trainer.validate(BoringModel(), verbose=False)
    trainer.test(BoringModel(), verbose=False)
    assert run.flush(20)
    assert store.client.get_run(run.run_id).info.status == "RUNNING"


@pytest.mark.server
@pytest.mark.slow
def test_on_a_server_artifacts_wait_in_the_runs_folder_and_are_uploaded_at_its_end(shared_server, tmp_path):
    store = connect(shared_server.uri, tmp_path / "here")
    run = store.create("mine", None, {})
    with logging_to(run):
        log_all(run.experiment, run.run_id, tmp_path)
        mlflow.log_text("hello", "fluent.txt")
    assert store.client.list_artifacts(run.run_id) == []
    plain = store.client.create_run(run.experiment_id).info.run_id
    log_all(store.client, plain, tmp_path)
    store.client.log_text(plain, "hello", "fluent.txt")
    run.finish("FINISHED")
    assert contents(store.client, run.run_id) == contents(store.client, plain)
