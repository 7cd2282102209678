"""Modules that know nothing of tracklight: trained, continued, swept and tested as by plain Lightning."""

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import ModelCheckpoint

import module_kinds
from process import Trainees, TrialResult
from tracklight import paths
from tracklight.commands.parser import main
from tracklight.config import compose as composing
from tracklight.config import hydra_internals
from tracklight.config import overrides as overriding
from tracklight.config.compose import compose
from tracklight.engine import checkpoint_io
from tracklight.engine.seeding import seed_run
from tracklight.errors import RunFailed
from tracklight.experiment.train import run
from tracklight.tracking.mlflow_client import mlflow

pytestmark = [
    pytest.mark.filterwarnings("ignore:Attribute '.*' is an instance of `nn.Module`:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
]
TESTS = Path(__file__).resolve().parents[1]
MODULES = "module_kinds,public_modules,foreign"
QUICK = (
    *("num_threads=1", "trainer.accelerator=cpu", "tracking.figures=false"),
    f"allowed_targets=[torch.optim,pytorch_lightning.callbacks,{MODULES}]",
)


def words(target, data="module_kinds.Ordered", metric="val_loss", mode="min"):
    """The command line for a module of another's."""
    where = ("model=own", "data=own", f"model._target_={target}", f"data._target_={data}")
    return (*where, f"score.metric={metric}", f"score.mode={mode}", *QUICK)


PUBLIC = {
    "image classifier": (
        *words("public_modules.ImageLitModule", "public_modules.ImageDataModule", "val/acc", "max"),
        "+model.net={_target_: public_modules.SimpleDenseNet}",
        "+model.optimizer={_target_: torch.optim.Adam, _partial_: true, lr: 0.01}",
        "+model.scheduler={_target_: torch.optim.lr_scheduler.StepLR, _partial_: true, step_size: 1}",
    ),
    "GAN": words("public_modules.GAN", "public_modules.ImageDataModule", "val_d_real", "max"),
    "language model": (
        *words("public_modules.LanguageModel", "public_modules.SequenceDataModule"),
        "+model.vocab_size=12",
    ),
}
COMMANDS = {kind.__name__: words(f"module_kinds.{kind.__name__}") for kind in module_kinds.KINDS} | PUBLIC
slow = pytest.mark.slow
NAMES = [pytest.param(name, marks=() if name == "InSetup" else slow, id=name) for name in COMMANDS]


def write_own(conf: Path) -> None:
    """The two config files that a user writes for a module and data of another's."""
    for group in ("model", "data"):
        (conf / group).mkdir(parents=True, exist_ok=True)
        (conf / group / "own.yaml").write_text("_target_: ???\n")


@pytest.fixture(autouse=True)
def project(monkeypatch, tmp_path_factory) -> None:
    """A project with these config files, which lists these modules, as their owner would."""
    conf = tmp_path_factory.mktemp("own") / "conf"
    write_own(conf)
    own = paths.PROJECT._replace(conf=conf, allowed_targets=tuple(MODULES.split(",")))
    for module in (paths, composing, hydra_internals, overriding):
        monkeypatch.setattr(module, "PROJECT", own)
    monkeypatch.setattr(checkpoint_io, "INTERVAL_S", 0.0)


def weights(checkpoint) -> dict[str, torch.Tensor]:
    kept = checkpoint.get("mine", checkpoint["state_dict"])
    return {key.rstrip("!"): kept[key].clone() for key in sorted(kept)}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(map(torch.equal, one.values(), other.values()))


def plain(name: str, folder: Path, epochs: int) -> tuple[dict, dict, dict[str, float]]:
    """What plain Lightning gives: the last and the best weights, and the test scores of the best."""
    torch.set_num_threads(1)
    seed_run(0)
    module = getattr(module_kinds, name)()
    best = ModelCheckpoint(folder, "best", "val_loss")
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[best],
        logger=False,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(module, module_kinds.Ordered())
    last, path = weights({"state_dict": module.state_dict()}), best.best_model_path
    (scores,) = trainer.test(
        module, module_kinds.Ordered(), ckpt_path=path, weights_only=False, verbose=False
    )
    return last, weights(torch.load(path, weights_only=False)), scores


SILENT = [each for each in NAMES if each.id not in {*PUBLIC, "OddNames", "Fluent"}]


@pytest.mark.parametrize("name", SILENT)
def test_it_ends_as_in_plain_lightning_and_evaluate_finds_the_same(train, name, tmp_path, capsys):
    last, best, scores = plain(name, tmp_path / "plain", 3)
    finished = train(*COMMANDS[name], "trainer.max_epochs=3")
    assert same(weights(finished.checkpoint("last")), last)
    assert same(weights(finished.checkpoint("best")), best)
    assert [step for step, _ in finished.history("train_loss")] == list(
        range(1, 13) if name != "Manual" else [1, 3, 4, 6, 7, 9, 10, 12, 13, 15, 16, 18]
    )
    assert finished.history("test_loss")[0][1] == scores["test_loss"]
    told = capsys.readouterr().out
    assert re.search(rf"^test +test_loss {scores['test_loss']:.5g}$", told, re.MULTILINE)
    main("evaluate", [finished.run.info.run_id, "--dir", str(tmp_path / "runs")])
    told = capsys.readouterr().out
    assert f"test_loss {scores['test_loss']:.5g}" in told and "the same to the bit" in told


@slow
@pytest.mark.parametrize("name", COMMANDS)
def test_stopped_in_an_epoch_and_continued_it_ends_in_the_same_bits_with_each_point_once(
    train, name, tmp_path
):
    whole = train(*COMMANDS[name], "trainer.max_epochs=3")
    stop = f"+callbacks.stop={{_target_: module_kinds.Stop, epoch: 2, mark: {tmp_path / 'mark'}}}"
    with pytest.raises(RuntimeError, match="stopped here"):
        train(*COMMANDS[name], "trainer.max_epochs=3", stop)
    continued = train(*COMMANDS[name], "trainer.max_epochs=3", stop, "resume=auto")
    assert continued.run.info.run_id != whole.run.info.run_id
    for which in ("best", "last"):
        assert same(weights(continued.checkpoint(which)), weights(whole.checkpoint(which)))
    assert continued.run.data.metrics.keys() == whole.run.data.metrics.keys()
    for key in whole.run.data.metrics:
        assert continued.history(key) == whole.history(key), key


def sweep(trainees: Trainees, folder: Path, *words: str) -> list[str]:
    """Sweep with the config files in `folder`, tracked there; return the statuses of its runs."""
    write_own(folder / "conf")
    process = trainees.sweep(
        folder / "runs", "--config-dir", str(folder / "conf"), *words, "trainer.max_epochs=2"
    )
    assert process.exit_code == 0, process.stderr
    return [status for _, status in TrialResult(folder / "runs").runs]


@slow
@pytest.mark.parametrize("name", COMMANDS)
def test_it_sweeps(name, trainees, tmp_path):
    assert sweep(trainees, tmp_path, *COMMANDS[name], "seed=1,2") == ["FINISHED"] * 3


@slow
def test_in_two_processes_the_first_alone_logs_whatever_way_a_module_takes(tmp_path):
    write_own(tmp_path / "conf")
    two = ("trainer.devices=2", "trainer.strategy=ddp", "trainer.max_epochs=2")
    where = ("--config-dir", str(tmp_path / "conf"), f"tracking.dir={tmp_path / 'runs'}")
    process = subprocess.run(
        [sys.executable, TESTS.parent / "train.py", *words("module_kinds.Talkative"), *two, *where],
        env={**os.environ, "PYTHONPATH": f"{TESTS.parent / 'src'}:{TESTS}"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    (run,) = client.search_runs(["1"])
    assert run.info.status == "FINISHED"
    for key, steps in (("fluent", [2, 4]), ("val_acc1", [2, 4]), ("train_loss", [1, 2, 3, 4])):
        points = client.get_metric_history(run.info.run_id, key)
        assert [point.step for point in points] == steps, key  # 64 rows in two halves, in batches of 16
    folder = tmp_path / "runs" / "artifacts" / run.info.run_id / "artifacts"
    assert sorted(path.name for path in (folder / "notes").iterdir()) == ["0.txt", "1.txt"]


def test_a_score_under_a_name_that_mlflow_refuses_is_the_score_under_the_name_that_it_takes(
    train, spare_model, caplog
):
    command = words("module_kinds.Talkative", metric="val_acc@1", mode="max")
    with caplog.at_level(logging.WARNING, "tracklight"):
        finished = train(*command, "trainer.max_epochs=2")
    assert finished.score == max(value for _, value in finished.history("val_acc1"))
    assert finished.run.data.metrics["score"] == finished.score
    assert caplog.text.count("'val_acc@1' is logged as 'val_acc1'") == 1


def test_parts_that_are_split_without_a_seed_share_no_row_and_are_those_of_evaluate(
    train, spare_model, tmp_path, capsys
):
    np.random.seed(1)  # each process begins with another state
    finished = train(*words("module_kinds.Drawing", "module_kinds.Unseeded"), "trainer.max_epochs=1")
    assert finished.run.data.metrics["test_shared"] == 0
    assert finished.run.data.metrics["score"] == finished.score == finished.history("val_loss")[0][1]
    assert finished.history("model/score") == [(step, 100.0) for step in (1, 2, 3)]
    capsys.readouterr()
    np.random.seed(2)
    main("evaluate", [finished.run.info.run_id, "--dir", str(tmp_path / "runs")])
    assert "the same to the bit" in capsys.readouterr().out


@slow
def test_checkpoints_that_lightning_left_for_a_job_of_slurm_are_not_read(
    train, spare_model, tmp_path, monkeypatch
):
    variables = (
        "JOB_ID=77",
        "STEP_ID=0",
        "STEP_NUM_TASKS=1",
        "NTASKS=1",
        "PROCID=0",
        "LOCALID=0",
        "NODEID=0",
    )
    for name, _, value in (each.partition("=") for each in variables):
        monkeypatch.setenv(f"SLURM_{name}", value)
    (tmp_path / "runs").mkdir()
    for name in ("hpc_ckpt_1.ckpt", "hpc_ckpt_2.ckpt.sha256.json"):
        (tmp_path / "runs" / name).write_bytes(b"another run's")
    finished = train(*COMMANDS["Plain"], "trainer.max_epochs=1")
    assert [step for step, _ in finished.history("train_loss")] == [1, 2, 3, 4]
    here = ("tracking=none", f"tracking.dir={tmp_path / 'runs'}", "trainer.enable_progress_bar=false")
    assert run(compose([*COMMANDS["Plain"], "trainer.max_epochs=1", *here])) == finished.score


@slow
@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_module_is_tracked_tested_and_evaluated(train, name, tmp_path, capsys, caplog):
    finished = train(*PUBLIC[name], "trainer.max_epochs=3")
    run = finished.run
    main("evaluate", [run.info.run_id, "--dir", str(tmp_path / "runs")])
    assert "the same to the bit as recorded" in capsys.readouterr().out
    assert any(key.startswith("test") for key in run.data.metrics)
    pictures = [each.path for each in finished.client.list_artifacts(run.info.run_id, "generated")]
    assert len(pictures) == (3 if name == "GAN" else 0)
    if name == "GAN":
        assert run.data.params["latent_dim"] == "8"
    assert (finished.folder / "embedding.json").exists() == (name == "language model")
    logged = [] if run.outputs is None else run.outputs.model_outputs
    assert len(logged) == (name != "language model")  # whose forward is not defined
    said = [line for line in caplog.messages if "was not logged as an MLflow model: " in line]
    assert len(said) == (name == "language model") and all(
        'missing the required "forward"' in s for s in said
    )


@slow
def test_the_logged_model_of_another_ones_module_answers_as_its_best_weights(train, monkeypatch):
    finished = train(*COMMANDS["Plain"], "trainer.max_epochs=1")
    (output,) = finished.run.outputs.model_outputs
    module = module_kinds.Plain()
    module.load_state_dict(finished.checkpoint("best")["state_dict"])
    rows = torch.randn(5, 8)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", finished.client.tracking_uri)
    answered = mlflow.pyfunc.load_model(f"models:/{output.model_id}").predict(rows.numpy())
    np.testing.assert_allclose(answered, module(rows).detach().numpy(), rtol=1e-5, atol=1e-6)


def test_checkpoints_leave_objects_out_and_keep_what_is_plain(train, spare_model):
    finished = train(*COMMANDS["Objects"], "trainer.max_epochs=1")
    kept = finished.checkpoint("last")["hyper_parameters"]
    assert kept == {"width": 6}
    assert finished.run.data.params["net"].startswith("functools.partial(<class 'torch.nn")


@slow
def test_what_no_checkpoint_can_hold_ends_the_run_at_the_first_one_and_is_named(train, tmp_path):
    remembering = "+callbacks.mine={_target_: module_kinds.Remembering}"
    with pytest.raises(RunFailed, match="plain values and tensors, not module_kinds.Stop of"):
        train(*COMMANDS["Plain"], "trainer.max_epochs=30", remembering)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    (found,) = client.search_runs(["1"])
    assert found.info.status == "FAILED" and found.data.metrics["train_loss"] is not None
    assert max(point.step for point in client.get_metric_history(found.info.run_id, "train_loss")) == 4


def test_what_a_module_logs_by_other_ways_is_in_the_run(train, spare_model, caplog, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.WARNING, "tracklight"):
        finished = train(*COMMANDS["OddNames"], "trainer.max_epochs=2")
    assert {"test_acc1", "f1 macro"} <= finished.run.data.metrics.keys()
    assert [(finished.folder / "notes" / f"{i}.txt").read_text() for i in (0, 1)] == ["epoch 0", "epoch 1"]
    assert "metric mood is no number" in caplog.text


@slow
def test_what_a_module_logs_by_fluent_functions_is_in_the_run(train, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    finished = train(*COMMANDS["Fluent"], "trainer.max_epochs=2")
    assert finished.history("fluent") == [(4, 0.0), (8, 1.0)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]  # no ./mlflow.db, no ./mlruns


@slow
def test_autologging_beside_us_logs_to_our_run(train, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    finished = train(*words("module_kinds.Autologged"), "trainer.max_epochs=2")
    mlflow.pytorch.autolog(disable=True)
    assert finished.run.data.params["optimizer_name"] == "Adam"
    assert finished.run.info.status == "FINISHED"
    assert len(finished.client.search_runs(["0", "1"])) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]


@slow
def test_weights_to_start_from_are_loaded_once_the_layers_are_made(train, tmp_path):
    first = train(*COMMANDS["InSetup"], "trainer.max_epochs=2")
    rate = ("+model.lr=1e-30",)  # nothing moves: the best weights are those it started from
    second = train(*COMMANDS["InSetup"], *rate, "trainer.max_epochs=1", f"init_from={first.run.info.run_id}")
    for key, value in weights(first.checkpoint("best")).items():
        torch.testing.assert_close(weights(second.checkpoint("best"))[key], value, rtol=0, atol=0)


@slow
def test_an_untracked_module_logs_by_its_logger_to_nowhere(tmp_path):
    command = (*COMMANDS["OddNames"], "trainer.max_epochs=1", "tracking=none", f"tracking.dir={tmp_path}")
    assert run(compose([*command, "trainer.enable_progress_bar=false"])) is not None
    assert list(tmp_path.iterdir()) == []


@slow
def test_a_progress_bar_of_ones_own_replaces_ours(tmp_path, capsys):
    bar = "+callbacks.bar={_target_: pytorch_lightning.callbacks.TQDMProgressBar, refresh_rate: 0}"
    here = ("trainer.max_epochs=1", "tracking=none", f"tracking.dir={tmp_path}")
    run(compose([*COMMANDS["Plain"], *here, bar]))
    assert "epoch 1/1" not in capsys.readouterr().out
