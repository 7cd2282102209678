"""The folder of configs against the libraries it configures, and against itself."""

import inspect

import pytest
import yaml

from tracklight.config.compose import allowed_targets, compose
from tracklight.config.instantiate import find_class
from tracklight.config.rules import OWNED
from tracklight.paths import CONF

GROUPS = ("model", "data", "optimizer", "scheduler", "trainer", "callbacks", "tracking", "sweep")
CHOICES = [f"{group}={file.stem}" for group in GROUPS for file in sorted((CONF / group).glob("*.yaml"))]
PRESETS = sorted((CONF / "experiment").glob("*.yaml"))


def written(group: str, choice: str) -> dict:
    return yaml.safe_load((CONF / group / f"{choice}.yaml").read_text())


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_of_every_group_composes(choice, monkeypatch):
    if choice == "tracking=server":  # which needs an address
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    group, _, name = choice.partition("=")
    assert group in compose([choice]), name


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_every_preset_composes_and_opens_with_command_score_and_time(preset):
    compose([f"experiment={preset.stem}"])
    package, command, expected, time, *_ = preset.read_text().splitlines()
    assert package == "# @package _global_"
    assert command.startswith(f"# python train.py experiment={preset.stem}")
    assert expected.startswith("# Expected: ")
    assert time.startswith("# Time: ")
    assert "CPU" in time or "GPU" in time


def test_each_group_of_the_contract_has_its_choices():
    contract = {
        "model": {"linear", "mlp", "cnn"},
        "data": {"line", "table", "mnist", "fashion_mnist", "kmnist"},
        "optimizer": {"sgd", "adam", "adamw", "rmsprop", "adagrad"},
        "scheduler": {"none", "cosine", "onecycle", "step"},
        "callbacks": {"none", "early_stopping"},
        "tracking": {"mlflow", "none", "server"},
        "experiment": {"seed_linear", "seed_mlp", "mnist_fast", "debug", "diabetes"},
    }
    for group, choices in contract.items():
        assert choices <= {file.stem for file in (CONF / group).glob("*.yaml")}


def test_a_model_brings_its_data_and_an_explicit_choice_wins():
    assert compose(["model=mlp"]).data._target_ == "tracklight.data.mnist.MNIST"
    assert compose(["model=mlp", "data=table"]).data._target_ == "tracklight.data.table.Table"
    assert compose(["data=table", "model=mlp"]).data._target_ == "tracklight.data.table.Table"


def test_the_score_comes_with_the_data_and_reaches_all_who_read_it():
    cfg = compose(["model=mlp", "scheduler=plateau", "callbacks=early_stopping"])
    assert (cfg.score.metric, cfg.score.mode) == ("val/accuracy", "max")
    stopping = cfg.callbacks.early_stopping
    assert (stopping.monitor, stopping.mode) == ("val/accuracy", "max")
    assert (cfg.scheduler.monitor, cfg.scheduler.mode) == ("val/accuracy", "max")


def test_the_seed_is_written_once():
    assert compose(["seed=7"]).data.seed == 7


def test_the_defaults_are_the_seed_program():
    cfg = compose()
    assert cfg.optimizer._target_ == "torch.optim.SGD"
    assert (cfg.optimizer.lr, cfg.trainer.max_epochs, cfg.score.metric) == (0.01, 100, "train/loss")


def test_the_trainer_group_lists_every_argument_that_is_not_ours():
    from pytorch_lightning import Trainer

    assert set(written("trainer", "default")) == set(inspect.signature(Trainer).parameters) - {*OWNED}
    assert set(inspect.signature(Trainer).parameters) >= {*OWNED}


@pytest.mark.parametrize("choice", [choice for choice in CHOICES if choice.startswith("optimizer=")])
def test_each_optimizer_lists_every_argument(choice):
    tree = written(*choice.split("="))
    signature = inspect.signature(find_class(tree.pop("_target_"), allowed_targets(), choice))
    assert set(tree) == set(signature.parameters) - {"params"}


@pytest.mark.parametrize("choice", [choice for choice in CHOICES if choice.startswith("optimizer=")])
def test_an_optimizer_differs_from_its_library_in_the_learning_rate_of_sgd_alone(choice):
    tree = written(*choice.split("="))
    signature = inspect.signature(find_class(tree.pop("_target_"), allowed_targets(), choice))
    default = {name: signature.parameters[name].default for name in tree}
    default = {name: list(value) if isinstance(value, tuple) else value for name, value in default.items()}
    assert tree == (default | {"lr": 0.01} if choice == "optimizer=sgd" else default)


@pytest.mark.parametrize("choice", [c for c in CHOICES if c.startswith("scheduler=") and "none" not in c])
def test_each_scheduler_lists_arguments_that_exist_and_its_interval(choice):
    tree = written(*choice.split("="))
    signature = inspect.signature(find_class(tree.pop("_target_"), allowed_targets(), choice))
    assert tree.pop("interval") in ("step", "epoch")
    tree.pop("monitor", None)
    assert set(tree) <= set(signature.parameters)
    assert set(signature.parameters) - set(tree) <= {
        "optimizer",
        "last_epoch",
        "epochs",
        "steps_per_epoch",
    }


def test_every_named_class_exists_and_passes_the_gate():
    for choice in CHOICES:
        tree = written(*choice.split("="))
        tree = tree.get(choice.partition("=")[0], tree)
        if tree.get("_target_"):
            find_class(tree["_target_"], allowed_targets(), choice)
