"""What may be built, and how it is refused."""

import json
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from pytorch_lightning import Callback, LightningModule
from pytorch_lightning.callbacks import EarlyStopping

from tracklight.config.compose import allowed_targets, check_config, compose, to_plain
from tracklight.config.instantiate import find_class, instantiate
from tracklight.errors import BadInput

ALLOWED = allowed_targets()


@pytest.mark.parametrize(
    "target",
    [
        *("os.system", "os._exit", "torch.load", "pandas.read_pickle", "builtins.eval", "eval", ""),
        *("torch.optimizer.SGD", "torch.optim", "tracklight.cli.main", "tracklight.modelsx.A"),
    ],
)
def test_a_target_outside_the_allow_list_is_refused_by_name_alone(target):
    with pytest.raises(BadInput, match="_target_"):
        instantiate({"_target_": target}, ALLOWED)


@pytest.mark.parametrize(
    "target",
    [
        *("torch.nn.modules.module.warnings.warn", "torch.nn.os.system", "torch.optim.sgd.cast"),
        *("torch.optim.lr_scheduler.Path", "torch.nn.functional.relu", "torch.optim.NoSuch"),
        *("pytorch_lightning.callbacks.model_checkpoint.shutil.rmtree", "torch.nn.modules"),
        "pytorch_lightning.callbacks.ModelCheckpoint.format_checkpoint_name",
    ],
)
def test_what_is_reached_through_an_allowed_module_is_not_allowed_for_that(target):
    with pytest.raises(BadInput, match="_target_"):
        instantiate({"_target_": target}, ALLOWED)


NESTS = st.recursive(
    st.just({"_target_": "os.system", "_args_": ["true"]}),
    lambda inner: st.one_of(
        inner.map(lambda node: {"key": node}),
        inner.map(lambda node: [1, node]),
        inner.map(lambda node: {"_target_": "torch.nn.Sequential", "_args_": [node]}),
        inner.map(lambda node: {"_target_": "torch.nn.ReLU", "_partial_": True, "x": node}),
        inner.map(lambda node: {"_target_": "torch.nn.ReLU", "_recursive_": False, "x": {"y": node}}),
    ),
    max_leaves=4,
)


@settings(max_examples=50, deadline=None)
@given(NESTS)
def test_however_deep_a_forbidden_target_lies_nothing_is_built(tree):
    for node in (tree, OmegaConf.create({"model": tree}).model):
        with pytest.raises(BadInput, match=r"os\.system is not on the allow-list"):
            instantiate(node, ALLOWED)


def test_the_refusal_names_the_key_the_target_and_the_line_to_add():
    cfg = compose()
    cfg.model._target_ = "my_package.nets.Net"
    with pytest.raises(BadInput, match=r"model\._target_=my_package.nets.Net .* list my_package.nets under"):
        check_config(cfg)
    with pytest.raises(BadInput, match=r"model\._target_=my_package.nets.Net .*list my_package.nets under"):
        instantiate(cfg.model, ALLOWED)


def test_one_line_lets_a_module_of_ones_own_in(tmp_path, monkeypatch):
    (tmp_path / "my_nets.py").write_text(
        "class Net:\n    def __init__(self, widths):\n        self.widths = widths\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    node = {"_target_": "my_nets.Net", "widths": [1, 2]}
    with pytest.raises(BadInput, match="allow-list"):
        instantiate(node, ALLOWED)
    assert "my_nets" not in sys.modules
    assert instantiate(node, [*ALLOWED, "my_nets"]).widths == [1, 2]


def test_constructors_receive_plain_values(tmp_path, monkeypatch):
    (tmp_path / "my_plain.py").write_text(
        "class Net:\n    def __init__(self, **all):\n        self.all = all\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    tree = {"_target_": "my_plain.Net", "_convert_": "none", "a": [1, [2]], "b": {"c": {"d": None}}}
    built = instantiate(OmegaConf.create({"x": tree}).x, ["my_plain"]).all
    assert json.dumps(built) == json.dumps({"a": [1, [2]], "b": {"c": {"d": None}}})
    assert type(built["a"]) is list
    assert type(built["b"]["c"]) is dict


def test_a_partial_takes_the_rest_later():
    factory = instantiate(compose().optimizer, ALLOWED, torch.optim.Optimizer, partial=True)
    optimizer = factory([torch.nn.Parameter(torch.zeros(1))])
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.defaults["lr"] == 0.01


def test_arguments_of_the_caller_win_and_are_passed_as_they_are():
    parameters = [torch.nn.Parameter(torch.zeros(1))]
    optimizer = instantiate(compose().optimizer, ALLOWED, lr=0.5, params=parameters)
    assert optimizer.param_groups[0]["params"][0] is parameters[0]
    assert optimizer.defaults["lr"] == 0.5


def test_a_class_of_another_kind_is_refused():
    with pytest.raises(BadInput, match=r"optimizer\._target_=torch.optim.SGD is no torch.nn"):
        instantiate(compose().optimizer, ALLOWED, torch.nn.Module, partial=True)


def test_a_class_of_ones_own_over_the_arguments_of_another_is_sent_to_a_file_of_its_own():
    said = (
        "^model: got an unexpected keyword argument 'in_features'; Plain takes width, lr; write those to "
        "conf/model/NAME.yaml, its _target_ too, and choose model=NAME$"
    )
    node = {"_target_": "module_kinds.Plain", "in_features": None, "bias": True}
    with pytest.raises(BadInput, match=said):
        instantiate(node, ["module_kinds"], where="model")


def test_an_argument_that_is_not_taken_is_named_with_those_that_are():
    with pytest.raises(BadInput, match="unexpected keyword argument 'no_such'.*SGD takes params, lr"):
        instantiate({"_target_": "torch.optim.SGD", "no_such": 1}, ALLOWED, partial=True)
    with pytest.raises(BadInput, match=r"callbacks\.mine: .*no_such"):
        node = {
            "_target_": "pytorch_lightning.callbacks.EarlyStopping",
            "monitor": "a",
            "no_such": 1,
        }
        instantiate(OmegaConf.create({"callbacks": {"mine": node}}).callbacks, ALLOWED)


def test_what_a_constructor_objects_to_is_bad_input():
    with pytest.raises(BadInput, match="Nesterov"):
        instantiate(compose(["optimizer.nesterov=true"]).optimizer, ALLOWED, params=[torch.zeros(1)])


def test_a_group_without_a_target_builds_what_it_holds():
    built = instantiate(compose(["callbacks=early_stopping"]).callbacks, ALLOWED)
    assert type(built) is dict
    assert built["early_stopping"].monitor == "train/loss"
    assert instantiate(compose().scheduler, ALLOWED) == {}
    assert instantiate(compose().trainer, ALLOWED) == to_plain(compose().trainer)


def test_a_module_written_for_the_package_lightning_gives_what_our_trainer_takes(tmp_path, monkeypatch):
    (tmp_path / "of_lightning.py").write_text(
        "import lightning as L\n"
        "import lightning.pytorch as pl\n"
        "from lightning import Fabric, LightningDataModule, seed_everything\n"
        "from lightning.fabric.utilities import rank_zero_only as zero\n"
        "from lightning.pytorch.callbacks import EarlyStopping\n"
        "from lightning.pytorch.utilities.types import STEP_OUTPUT\n"
        "class Net(L.LightningModule):\n"
        "    bases = (pl.LightningModule, L.pytorch.LightningModule)\n"
        "class Stopping(EarlyStopping): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    net = instantiate({"_target_": "of_lightning.Net"}, ["of_lightning"], LightningModule)
    assert net.bases == (LightningModule, LightningModule)
    assert find_class("of_lightning.Stopping", ["of_lightning"], "x").__mro__[1] is EarlyStopping
    node = {"_target_": "lightning.pytorch.callbacks.EarlyStopping", "monitor": "val_loss"}
    assert type(instantiate(node, ["pytorch_lightning.callbacks"], Callback)) is EarlyStopping
    with pytest.raises(BadInput, match="allow-list"):
        instantiate({"_target_": "lightning.pytorch.Trainer"}, ["pytorch_lightning.callbacks"])
