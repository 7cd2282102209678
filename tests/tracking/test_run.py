import hashlib
import logging
import math
import os
import time
from pathlib import Path

import pytest
import torch
from disturbances import clock_set_back, full_disk, locked, points_of, wait_for
from pytorch_lightning import Trainer
from pytorch_lightning.demos.boring_classes import BoringModel

from tracklight.engine.lightning_internals import logging_step
from tracklight.errors import BadInput, RunFailed
from tracklight.tracking import sqlite_file


class Tracked(BoringModel):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("train/loss", loss["loss"])
        return loss


def test_lightning_logs_through_it_on_the_axis_of_steps_completed(store, tmp_path):
    run = store.create("mine", None, {})
    trainer = Trainer(
        logger=run,
        max_epochs=1,
        limit_train_batches=3,
        limit_val_batches=0,
        log_every_n_steps=1,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    run.steps_completed = lambda: trainer.global_step
    run.lightning_step = lambda: logging_step(trainer)
    model = Tracked()
    trainer.fit(model, torch.utils.data.DataLoader(torch.ones(6, 32), batch_size=2))
    assert store.client.get_run(run.run_id).info.status == "RUNNING"
    run.finish("FINISHED")
    assert [step for step, _ in points_of(store, run.run_id, "train/loss")] == [1, 2, 3]
    assert set(store.client.get_run(run.run_id).data.metrics) == {"train/loss"}


@pytest.mark.parametrize("status", ["FINISHED", "FAILED", "KILLED"])
def test_everything_logged_is_in_mlflow_when_the_run_ends(store, status):
    run = store.create("mine", None, {})
    run.log_params({"optimizer.lr": 0.1, "model.hidden": [800]})
    run.set_tags({"a": 1, "b": "first"})
    run.set_tags({"b": "second"})
    run.log_input("MNIST", "d" * 64, "/data", "train")
    run.log_text("seed: 1\n", "config/config.yaml")
    values = [i / 7 for i in range(2500)]
    run.log_series("train/loss", range(1, 2501), values)
    run.steps_completed, run.lightning_step = lambda: 2500, lambda: 2499
    run.log_metrics({"val/loss": torch.tensor(0.25), "val/nan": math.nan, "epoch": 3}, step=2499)
    run.finish(status)

    found = store.client.get_run(run.run_id)
    assert found.info.status == status and found.info.end_time >= found.info.start_time
    assert found.data.params == {"optimizer.lr": "0.1", "model.hidden": "[800]"}
    assert found.data.tags["a"] == "1" and found.data.tags["b"] == "second"
    dataset = found.inputs.dataset_inputs[0]
    assert (dataset.dataset.name, dataset.dataset.digest) == ("MNIST", "d" * 36)
    assert [(tag.key, tag.value) for tag in dataset.tags] == [("mlflow.data.context", "train")]
    assert points_of(store, run.run_id, "train/loss") == list(zip(range(1, 2501), values, strict=True))
    assert points_of(store, run.run_id, "val/loss") == [(2500, 0.25)]
    assert set(found.data.metrics) == {"train/loss", "val/loss", "val/nan"}
    assert [f.path for f in store.client.list_artifacts(run.run_id)] == ["config"]
    assert sorted(path.name for path in run.folder.iterdir()) == [
        "artifacts",
        "points.sent",
        "points.wal",
    ]
    run.finish("FAILED")
    assert store.client.get_run(run.run_id).info.status == status


def test_points_reach_mlflow_while_the_run_goes_on(store, swift):
    run = store.create("mine", None, {})
    run.log_series("loss", [1, 2], [1.0, 2.0])
    wait_for(lambda: points_of(store, run.run_id, "loss") == [(1, 1.0), (2, 2.0)])
    run.finish("FINISHED")


def test_a_param_cannot_change_its_value(store):
    run = store.create("mine", None, {})
    run.log_params({"lr": 0.1})
    run.log_params({"lr": 0.1, "seed": 1})
    run.finish("KILLED")
    run = store.reopen(run.run_id)
    run.log_params({"lr": 0.2})
    run.finish("FINISHED")
    assert store.client.get_run(run.run_id).data.params == {"lr": "0.1", "seed": "1"}


def test_values_beyond_mlflows_limits_are_cut_and_not_lost(store):
    run = store.create("mine", None, {})
    run.log_params({"long": "x" * 7000, "other": "x" * 7000 + "y"} | {f"p{i}": i for i in range(150)})
    run.set_tags({"long": "y" * 9000})
    run.finish("FINISHED")
    found = store.client.get_run(run.run_id).data
    assert found.params["long"].startswith("x" * 5900) and len(found.params) == 152
    ending = hashlib.sha256(b"x" * 7000).hexdigest()[:16]
    assert found.params["long"].endswith(f"xx... sha256:{ending}")
    assert found.params["other"] != found.params["long"]  # of which the first 7,000 letters are the same
    assert [len(each) for each in (found.params["long"], found.tags["long"])] == [6000, 8000]


@pytest.mark.parametrize("name", ["", "a@b", "/a", "a//b", "../a", "a/", "x" * 251, "."])
def test_a_name_that_mlflow_refuses_is_bad_input_at_once(store, name):
    run = store.create("mine", None, {})
    for log in (lambda: run.log_params({name: 1}), lambda: run.set_tags({name: 1})):
        with pytest.raises(BadInput):
            log()
    run.finish("FINISHED")


@pytest.mark.parametrize("name", ["a", "train/loss_epoch", "a.b-c d:e", "größe/x", "a/.b/..."])
def test_a_name_that_mlflow_takes_is_taken(store, name):
    run = store.create("mine", None, {})
    run.log_series(name, [1], [1.0])
    run.log_params({name: 1})
    run.set_tags({name: 1})
    run.finish("FINISHED")
    assert points_of(store, run.run_id, name) == [(1, 1.0)]


def test_artifacts_lie_in_the_run_folder_and_are_found_there(store):
    run = store.create("mine", None, {})
    run.log_text("png", "figures/x.png")
    run.upload_artifacts()
    run.finish("FINISHED")
    assert (run.folder / "artifacts/figures/x.png").read_bytes() == b"png"
    assert [f.path for f in store.client.list_artifacts(run.run_id, "figures")] == ["figures/x.png"]


@pytest.mark.parametrize("path", ["../x", "/etc/x", "a/../../x"])
def test_an_artifact_stays_inside_the_run(store, path):
    run = store.create("mine", None, {})
    with pytest.raises(BadInput):
        run.log_text("x", path)
    run.finish("FINISHED")


def test_a_locked_database_stops_neither_logging_nor_the_end(
    store, swift, monkeypatch, caplog, sending_threads
):
    monkeypatch.setattr(sqlite_file, "_BUSY_S", 0.1)
    run = store.create("mine", None, {})
    with locked(store.database), caplog.at_level(logging.WARNING):
        run.log_series("loss", [1, 2], [1.0, 2.0])
        wait_for(lambda: "locked" in caplog.text)
        time.sleep(1)
        run.log_series("loss", [3], [3.0])
    run.finish("FINISHED")
    told = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert ["answers again" in record.getMessage() for record in told] == [False, True]
    assert sending_threads == {"tracklight-sender"}  # logging waits for no database
    assert points_of(store, run.run_id, "loss") == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert store.client.get_run(run.run_id).info.status == "FINISHED"


def test_a_full_disk_under_the_database_is_told_and_outlived(store, swift, caplog):
    run = store.create("mine", None, {})
    with full_disk(store.database.stat().st_size), caplog.at_level(logging.WARNING):
        run.log_series("loss", range(20_000), [0.5] * 20_000)
        wait_for(lambda: "takes nothing now" in caplog.text)
    run.finish("FINISHED")
    assert len(points_of(store, run.run_id, "loss")) == 20_000


def test_a_full_disk_under_the_run_folder_names_the_file_and_ends_the_run(store, swift):
    run = store.create("mine", None, {})
    run.log_series("loss", [1], [1.0])
    run.sync()
    assert run.flush(20)
    full = full_disk(run.folder.joinpath("points.wal").stat().st_size)
    with full, pytest.raises(RunFailed, match=r"bytes to .*points\.wal"):
        run.log_series("loss", [2], [2.0])
    run.finish("FAILED")
    assert store.client.get_run(run.run_id).info.status == "FAILED"
    assert points_of(store, run.run_id, "loss") == [(1, 1.0)]


def test_a_run_that_ends_on_a_full_disk_is_recovered_later(store, swift, monkeypatch):
    monkeypatch.setattr(store, "timeout_s", 0.5)
    run = store.create("mine", None, {})
    run.log_series("loss", [1], [1.0])
    assert run.flush(20)
    with full_disk(run.folder.joinpath("points.wal").stat().st_size):
        run.finish("FAILED")
    store.recover()
    assert store.client.get_run(run.run_id).info.status == "KILLED"


def test_a_status_that_the_run_folder_cannot_take_is_told_to_mlflow_at_once(store, monkeypatch):
    run = store.create("mine", None, {})

    def full(*args, **kwargs):
        raise RunFailed("no room")

    monkeypatch.setattr(run.wal, "_append", full)
    run.finish("FAILED")
    assert store.client.get_run(run.run_id).info.status == "FAILED"
    assert not (run.folder / "run.lock").exists()


def test_lightning_is_told_where_the_run_lies(store):
    run = store.create("mine", "its name", {})
    assert (run.name, run.version, Path(run.save_dir)) == ("its name", run.run_id, run.folder)
    run.finish("FINISHED")


@pytest.mark.parametrize("is_killed", [False, True])
def test_a_clock_set_back_in_a_run_leaves_its_duration_and_the_order_of_its_points(store, is_killed):
    began_s = time.monotonic()
    run = store.create("mine", None, {})
    run.log_series("loss", [1], [1.0])
    with clock_set_back(3600):
        run.log_series("loss", [2], [0.5])
        if is_killed:
            run.abandon()
            os.utime(run.folder / "points.wal", (time.time(), time.time()))
            store.recover()
        else:
            run.finish("FINISHED")
    found = store.client.get_run(run.run_id)
    assert 0 <= found.info.end_time - found.info.start_time <= 1000 * (time.monotonic() - began_s) + 2
    first, second = store.client.get_metric_history(run.run_id, "loss")
    assert found.info.start_time <= first.timestamp <= second.timestamp <= found.info.end_time


@pytest.mark.parametrize("status", ["FINISHED", "FAILED"])
def test_an_end_that_no_database_takes_is_an_error_and_waits_for_the_next_start(store, status, caplog):
    run = store.create("mine", None, {})
    run.log_series("loss", [1], [1.0])
    assert run.flush(20)
    began_s = time.monotonic()
    with full_disk(4096):  # room for the log alone
        if status == "FINISHED":
            with pytest.raises(RunFailed, match=f"does not take the end of run {run.run_id}; it waits in "):
                run.finish(status)
        else:  # which has its own exit code
            run.finish(status)
            assert "does not take the end" in caplog.text
    assert time.monotonic() - began_s < 10
    assert store.client.get_run(run.run_id).info.status == "RUNNING"
    store.recover()
    assert store.client.get_run(run.run_id).info.status == status


def test_an_end_that_fits_nowhere_is_an_error_and_the_run_counts_as_killed(store):
    run = store.create("mine", None, {})
    with full_disk(0), pytest.raises(RunFailed, match="it is lost, as of a killed run"):
        run.finish("FINISHED")
    store.recover()
    assert store.client.get_run(run.run_id).info.status == "KILLED"


def test_a_text_that_does_not_fit_leaves_nothing_behind(store):
    run = store.create("mine", None, {})
    run.log_text("old", "notes.txt")
    with full_disk(100), pytest.raises(OSError, match="File too large"):
        run.log_text("new" * 100, "notes.txt")
    assert [path.name for path in run.artifacts.iterdir()] == ["notes.txt"]
    assert (run.artifacts / "notes.txt").read_text() == "old"
    run.finish("FAILED")
