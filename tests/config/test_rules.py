"""Values out of range, and machines that lack what is asked for."""

import re
from pathlib import Path

import pytest

from tracklight.config import hardware, rules
from tracklight.config.compose import compose, to_plain
from tracklight.config.rules import RULES, check_relations, check_values
from tracklight.errors import BadInput

MLP = to_plain(compose(["model=mlp", "trainer.accelerator=cpu"]))


def changed(key, value):
    tree = {name: dict(part) if isinstance(part, dict) else part for name, part in MLP.items()}
    group, _, name = key.rpartition(".")
    (tree[group] if group else tree)[name] = value
    return tree


@pytest.mark.parametrize(
    ("key", "values"),
    {
        "optimizer.lr": ["abc", -1, 0, float("nan"), float("inf"), None, True, [0.1], {"a": 1}],
        "data.batch_size": [0, -1, 2.5, "many", True],
        "data.num_val": [-1, 1.5, "all", float("nan")],
        "trainer.max_epochs": [0, -5, 2.5, "ten", None],
        "seed": [-1, 2**32, 1.0, "x", None, True],
        "num_threads": [0, -1, 1.5],
        "model.hidden": [[0], [-3], ["a"], 128, [1.5], None],
        "model.dropout": [1.5, -0.1, 1, "x", float("nan")],
        "trainer.devices": [0, -2, "x", [], [-1], 1.5],
        "trainer.accelerator": ["gpuu", 1],
        "trainer.precision": ["8", 33],
        "trainer.limit_train_batches": [-1, 1.5, "x"],
        "trainer.log_every_n_steps": [0, -1],
        "score.mode": ["maximum", None],
        "score.metric": ["", 3],
        "compile": ["yes", 1],
        "resume": ["", "../../etc/passwd", "a\nb", float("inf"), "x" * 32, "a" * 33],
        "scheduler.interval": ["batch"],
        "trainer.strategy": ["foo", None, ["ddp"], {"a": 1}, "ddp_spoon", "deepspeed_stage_4"],
        "trainer.plugins": ["foo", [1], ["foo"], {"a": 1}, [{"a": 1}]],
        "trainer.profiler": ["foo", 1, {"a": 1}],
        "sweep.storage": ["x", "", "http://h/x", "sqlite://", "sqlite:///", "sqlite:a.db", "postgresql:/h"],
        "tracking.uri": ["ftp://host", "./mlruns", "file:///x", "", 5, "http://"],
    }.items(),
)
def test_a_value_out_of_range_is_named_with_its_key_and_a_cure(key, values):
    for value in values:
        with pytest.raises(BadInput) as refusal:
            check_values(changed(key, value))
        assert str(refusal.value).startswith(f"{key}=")
        assert f"; try {key}=" in str(refusal.value)


@pytest.mark.parametrize(
    ("key", "values"),
    {
        "seed": [0, 2**32 - 1],
        "data.batch_size": [1, None],
        "data.num_val": [0, 0.15, 10_000],
        "model.dropout": [0, 0.0, 0.999],
        "model.hidden": [[], [1], [800, 10]],
        "trainer.devices": [1, -1, "auto", "2", "0,1", [0]],
        "trainer.precision": [None, 16, "bf16-mixed"],
        "trainer.limit_val_batches": [None, 0, 10, 0.5, 1.0],
        "resume": [None, "auto", "abc", "0" * 32],
        "trainer.plugins": [None, {"_target_": "m.P"}, [{"_target_": "m.P"}], []],
        "trainer.profiler": [None, "simple", {"_target_": "m.P"}],
        "sweep.storage": [None, "sqlite:///a.db", "sqlite:////a/b.db", "postgresql+psycopg2://u:p@h/d"],
        "tracking.uri": [None, "sqlite:////a b/ü%.db", "HTTP://h:1", "postgresql+psycopg2://h/d"],
    }.items(),
)
def test_the_edges_of_a_range_belong_to_it(key, values):
    for value in values:
        check_values(changed(key, value))


def test_the_strategies_are_those_that_lightning_names():
    from pytorch_lightning.strategies import StrategyRegistry

    forks = re.compile("_(spawn|fork|notebook)")
    for name in ["auto", *StrategyRegistry.available_strategies()]:
        if not forks.search(name):
            check_values(changed("trainer.strategy", name))
        else:
            with pytest.raises(BadInput, match="does not fork: a copied process would write to MLflow"):
                check_values(changed("trainer.strategy", name))
    check_values(changed("trainer.strategy", {"_target_": "pytorch_lightning.strategies.DDPStrategy"}))


def test_an_object_in_a_message_is_named_by_its_class_without_its_address():
    assert rules.format_value([object(), 1, Path("a"), "b"]) == "[object,1,a,b]"


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.keys)
def test_the_cure_that_a_rule_offers_is_allowed_by_it(rule):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    value = OverridesParser.create().parse_override(f"key={rule.example}").value()
    assert rule.values.accepts(value)


def test_one_number_for_a_list_of_any_length_is_put_into_one():
    with pytest.raises(BadInput, match=r"model.hidden=800 must be a list.*; try model.hidden=\[800\]"):
        check_values(changed("model.hidden", 800))


def test_the_keys_of_other_peoples_models_are_theirs():
    for key, value in {"model.hidden": 128, "model.dropout": 1.0, "data.batch_size": [4, 8]}.items():
        foreign = changed(key, value)
        foreign[key.partition(".")[0]]["_target_"] = "my_package.Net"
        check_values(foreign)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["data.num_val=0"], "use score.metric=train/loss"),
        (["trainer.min_epochs=9"], "trainer.max_epochs=5; try trainer.max_epochs=9"),
        (["resume=auto", "tracking=none"], "use tracking=mlflow"),
    ],
)  # fmt: skip
def test_values_that_contradict_each_other_are_told(words, says):
    with pytest.raises(BadInput, match=says):
        compose(["model=mlp", *words])


def test_a_tracking_folder_must_be_one_and_writable(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    compose([f"tracking.dir={tmp_path}/new/folder"])
    for inside in ("file", "file/below"):
        with pytest.raises(BadInput, match="file is a file where a folder should be"):
            compose([f"tracking.dir={tmp_path}/{inside}"])
    monkeypatch.setattr(rules.os, "access", lambda *_: False)
    with pytest.raises(BadInput, match="is not writable"):
        compose([f"tracking.dir={tmp_path}/new"])
    compose([f"tracking.dir={tmp_path}/new", "tracking=none"])


def relations(accelerator, devices):
    check_relations(changed("trainer", MLP["trainer"] | {"accelerator": accelerator, "devices": devices}))


@pytest.mark.parametrize(
    ("gpus", "accelerator", "devices", "says"),
    [
        (0, "gpu", 1, "no GPU found on this machine; use trainer.accelerator=auto"),
        (0, "cuda", 1, "no GPU found on this machine; use trainer.accelerator=auto"),
        (0, "auto", 9, "room for 4; try trainer.devices=4"),
        (0, "cpu", "9", "room for 4"),
        (2, "auto", 9, "room for 2; try trainer.devices=2"),
        (2, "gpu", [2], "asks for 3 GPUs"),
        (2, "gpu", "0,2", "asks for 3 GPUs"),
    ],
)
def test_what_the_machine_lacks_is_told_before_torch_is_there(monkeypatch, gpus, accelerator, devices, says):
    monkeypatch.setattr(hardware, "count_gpus", lambda: gpus)
    monkeypatch.setattr(hardware, "count_cores", lambda: 4)
    with pytest.raises(BadInput, match=says):
        relations(accelerator, devices)


@pytest.mark.parametrize(
    ("gpus", "accelerator", "devices"),
    [
        (None, "gpu", 9),
        (2, "gpu", 2),
        (2, "auto", -1),
        (0, "auto", "auto"),
        (2, "cpu", 4),
        (0, "cpu", 2),
    ],
)
def test_what_may_be_there_is_left_to_lightning(monkeypatch, gpus, accelerator, devices):
    monkeypatch.setattr(hardware, "count_gpus", lambda: gpus)
    monkeypatch.setattr(hardware, "count_cores", lambda: 4)
    relations(accelerator, devices)


@pytest.mark.parametrize(
    ("files", "visible", "gpus"),
    [
        (["null", "tty"], None, 0),
        (["nvme0", "nvram"], None, 0),
        (["nvidia0", "nvidia1", "nvidiactl"], None, 2),
        (["nvidia0", "nvidia1"], "1", 1),
        (["nvidia0"], "", 0),
        (["nvidiactl"], None, None),
        (["dxg"], None, None),
        (["kfd"], None, None),
    ],
)
def test_gpus_are_counted_by_their_device_files(tmp_path, monkeypatch, files, visible, gpus):
    monkeypatch.setattr(hardware.platform, "system", lambda: "Linux")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    for name in files:
        (tmp_path / name).touch()
    assert hardware.count_gpus(tmp_path) == gpus


def test_on_a_mac_the_device_files_do_not_tell(monkeypatch):
    monkeypatch.setattr(hardware.platform, "system", lambda: "Darwin")
    assert hardware.count_gpus() is None


@pytest.mark.parametrize(
    ("devices", "number"),
    [(2, 2), (-1, None), ("auto", None), ("-1", None), ("2", 2), ([3], 1), ([0, 2], 2)]
    + [("0,2", 2), ("3,", 1)],
)
def test_devices_are_counted_however_they_are_named(devices, number):
    assert hardware.num_devices(devices) == number
