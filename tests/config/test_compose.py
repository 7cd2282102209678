"""Composing, resolving, identifying and comparing configs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import pytorch_lightning.callbacks  # noqa: F401, opens its libraries before anything is watched
import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from tracklight.config import compose as config
from tracklight.config import instantiate as gate
from tracklight.config.compose import (
    allowed_targets,
    apply_overrides,
    check_config,
    compose,
    config_digest,
    diff_configs,
    flatten,
    list_targets,
    short_params,
    to_config,
    to_configs,
    to_plain,
)
from tracklight.config.instantiate import instantiate
from tracklight.errors import BadInput
from tracklight.paths import CONF, ROOT

LINE = to_plain(compose())
MLP = to_plain(compose(["model=mlp"]))


def varied(*words):
    chooses = any((CONF / word.partition("=")[0]).is_dir() for word in words)
    return compose(["model=mlp", *words]) if chooses else apply_overrides(MLP, words)


@pytest.mark.parametrize(
    "words",
    [
        ["resume=auto"],
        ["allow_changes=true"],
        ["tracking=none"],
        ["tracking.uri=http://elsewhere", "tracking.dir=/elsewhere", "tracking.run_name=x"],
        ["sweep.trials=7"],
        ["data.root=/elsewhere"],
        ["trainer.max_epochs=77"],
        ["trainer.enable_progress_bar=false", "trainer.profiler=simple"],
        ["allowed_targets=[tracklight,torch.optim]"],
        ["optimizer=sgd", "data=mnist"],
        ["model.dropout=0"],  # 0.0 in conf/
    ],
)
def test_what_the_result_does_not_depend_on_leaves_the_identity(words):
    assert config_digest(varied(*words)) == config_digest(MLP)


def test_a_whole_number_is_a_fraction_only_where_they_mean_the_same():
    same = {(f"data.slope={text}", f"data.slope={other}") for text in ("3", "3.0") for other in ("3e0", "3")}
    for word, other in same:
        assert config_digest(apply_overrides(LINE, [word])) == config_digest(apply_overrides(LINE, [other]))
    clipped = [varied(f"trainer.gradient_clip_val={text}") for text in ("1", "1.0")]  # null in conf/
    assert len({config_digest(each) for each in clipped}) == 1
    for words in (
        ("optimizer.momentum=0", "-0.0"),
        ("optimizer=adam optimizer.betas=[0,0.9]", "[-0.0,0.90]"),
    ):
        key = words[0].rpartition("=")[0]
        one, other = (compose(f"{key}={value}".split()) for value in (words[0].rpartition("=")[2], words[1]))
        assert config_digest(one) == config_digest(other), words
        if "betas" in key:  # torch refuses a whole number beside a fraction
            assert [*map(type, one.optimizer.betas)] == [float, float]
    hidden = compose(["model=mlp", "model.hidden=[128,64]"]).model.hidden
    assert [*map(type, hidden)] == [int, int]
    for key in ("trainer.overfit_batches", "trainer.limit_val_batches"):  # 1 batch, or all of them
        one, all_ = (apply_overrides(LINE, [f"{key}={text}"]) for text in ("1", "1.0"))
        assert config_digest(one) != config_digest(all_)


@pytest.mark.parametrize(
    "word",
    [
        *("seed=1", "num_threads=2", "compile=true", "init_from=abc", "optimizer.lr=0.02"),
        *("optimizer=adam", "scheduler=cosine", "callbacks=early_stopping", "score.mode=min"),
        *("data.batch_size=65", "data.num_val=1", "model.dropout=0.1", "model.hidden=[128,128]"),
        *("trainer.devices=2", "trainer.num_nodes=2", "trainer.precision=64-true", "data=table"),
        *("+model.extra=1", "trainer.min_epochs=1"),
    ],
)
def test_what_the_result_depends_on_changes_the_identity(word):
    assert config_digest(varied(word)) != config_digest(MLP)


def test_the_identity_survives_storing_and_reading():
    stored = json.loads(json.dumps(MLP))
    assert config_digest(stored) == config_digest(OmegaConf.create(stored)) == config_digest(MLP)
    assert config_digest(dict(reversed(MLP.items()))) == config_digest(MLP)
    assert len(config_digest(MLP)) == 64


def test_a_composed_config_is_resolved_and_closed_to_new_keys():
    cfg = compose(["seed=3"])
    assert OmegaConf.to_container(cfg) == to_plain(cfg)
    with pytest.raises(AttributeError):
        cfg.sede = 1


def test_composing_leaves_hydra_as_it_was():
    compose(["experiment=debug"])
    assert not GlobalHydra.instance().is_initialized()
    assert not HydraConfig.initialized()


def test_runs_lie_beside_train_py_wherever_one_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert compose().tracking.dir == str(ROOT / "mlruns")
    assert (ROOT / "train.py").is_file()
    assert not list(tmp_path.iterdir())


def test_the_environment_names_the_server_and_the_command_line_wins(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://there")
    assert compose().tracking.uri == "http://there"
    assert compose(["tracking.uri=http://here"]).tracking.uri == "http://here"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert compose().tracking.uri is None


def test_parameters_are_flat_numbers_and_text():
    flat = flatten({"a": {"b": 1, "c": [1, "x", None]}, "d": True, "e": None, "f": 0.5, "g": {}})
    assert flat == {"a.b": 1, "a.c": "[1,x,null]", "d": "true", "e": "null", "f": 0.5, "g": "{}"}
    assert flatten({"tracking": {"uri": "http://a:b@c"}}) == {"tracking.uri": "http://***@c"}


def test_differences_show_key_old_and_new():
    old = {"optimizer": {"lr": 0.1, "gone": None}, "a": 1, "uri": "http://a:b@c"}
    new = {"optimizer": {"lr": 0.01}, "a": 1.0, "uri": "http://a:d@c", "new": [1]}
    assert diff_configs(old, new) == [
        "optimizer.lr: 0.1 -> 0.01",
        "optimizer.gone: null -> absent",
        "a: 1 -> 1.0",
        "uri: http://***@c -> http://***@c",
        "new: absent -> [1]",
    ]
    assert diff_configs(old, old) == []


def test_a_stored_config_takes_single_keys():
    amended = apply_overrides(MLP, ["optimizer.lr=0.5", "model.hidden=[3]", "+model.extra=1"])
    assert (amended.optimizer.lr, amended.model.hidden, amended.model.extra) == (0.5, [3], 1)
    assert diff_configs(MLP, amended) == [
        "optimizer.lr: 0.01 -> 0.5",
        "model.hidden: [128] -> [3]",
        "model.extra: absent -> 1",
    ]


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("optimizer.lrr=1", "did you mean optimizer.lr?"),
        ("model=linear", "only single keys"),
        ("~seed", "only single keys"),
        ("seed=[1", "cannot read"),
    ],
)
def test_a_stored_config_takes_nothing_else(word, says):
    with pytest.raises(BadInput, match=says.replace("?", r"\?")):
        apply_overrides(MLP, [word])


def test_the_allow_list_of_a_stored_config_is_not_believed():
    amended = apply_overrides(MLP | {"allowed_targets": ["os"], "model": {"_target_": "os.system"}}, [])
    assert amended.allowed_targets == allowed_targets()
    with pytest.raises(BadInput, match="allow-list"):
        check_config(amended)


def test_what_is_typed_extends_the_allow_list():
    ours = allowed_targets()
    assert compose(["allowed_targets=[fractions]"]).allowed_targets == [*ours, "fractions"]
    assert apply_overrides(MLP, ["allowed_targets=[fractions]"]).allowed_targets == [*ours, "fractions"]
    assert compose([]).allowed_targets == ours
    for text in ("null", "fractions", "[1]"):
        with pytest.raises(BadInput, match="allowed_targets"):
            compose([f"allowed_targets={text}"])


def test_tags_go_with_a_preset_however_deep():
    words = ["experiment=seed_mlp", "++tracking.tags.team.name=x", "++tracking.tags.plain=y"]
    assert compose(words).tracking.tags == {"team": {"name": "x"}, "plain": "y"}


TEXTS = st.sampled_from(
    [
        *("${seed}", "${oc.env:HOME}", r"\${oc.env:HOME}", r"\\${oc.env:HOME}", "${root:x}"),
        *(
            "${oc.create:{_target_: os.system}}",
            r"\${oc.create:{_target_: os._exit}}",
            "${",
            "$${a}",
        ),
        *(
            "os.system",
            "plain",
            "$HOME",
            "{seed}",
            "*anchor",
            "&anchor x",
            "!!python/name:os.system",
        ),
    ]
)
LEAVES = st.one_of(TEXTS, st.integers(), st.booleans(), st.none())
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(["a", "b", "_target_", "_args_", "_partial_", "_recursive_"]),
            inner,
            max_size=3,
        ),
    ),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None)
@given(TREES)
def test_whatever_a_stored_config_holds_it_is_refused_or_stays_what_it_says(tree):
    stored = yaml.safe_load(yaml.safe_dump({**LINE, "extra": {"x": tree}}))
    try:
        amended = apply_overrides(stored, [])
        check_config(amended)
        built = instantiate(amended.extra, amended.allowed_targets)
    except BadInput as error:
        assert "\n" not in str(error)
        assert os.environ["HOME"] not in str(error)
        return
    assert "${" not in yaml.safe_dump(tree)
    assert to_plain(amended)["extra"]["x"] == tree
    assert built == {"x": without_directives(tree)}


PLANTED = "-".join(["pl4nt3d", "s3cr3t"])
EXECUTE = "_target_: mlflow.utils.process._exec_cmd, cmd: [touch, ran]"
SCALARS = st.sampled_from(
    [
        *("1", "null", "plain", "''", "*a", "*b", "&a x", "&b [1, *a]", "&a [*a]", "<<: *a", "2001-99-99"),
        *("'${oc.env:PLANTED}'", r"'\${oc.env:PLANTED}'", "'${oc.decode:${oc.env:PLANTED}}'", "'${seed}'"),
        *("'${oc.create:{" + EXECUTE + "}}'", r"'\${oc.create:{" + EXECUTE + "}}'", "'${hydra:runtime.cwd}'"),
        *(
            "!!python/object/apply:os.system ['touch ran']",
            "!!python/name:os.system",
            "!!binary aGk=",
            "!!set {x}",
        ),
        *(
            "{" + EXECUTE + "}",
            "{_target_: os.system, _args_: ['touch ran']}",
            "{_target_: os.putenv, _args_: [A, b]}",
        ),
        *(
            "{_target_: torch.nn.Linear, in_features: 1, out_features: 1}",
            "{_target_: torch.nn.modules.os.system}",
        ),
        *("{_target_: torch.optim.SGD, _partial_: true}", "{_target_: pytorch_lightning.callbacks.Timer}"),
        *(
            "{_target_: pytorch_lightning.callbacks.ModelCheckpoint, dirpath: /ran}",
            "{_target_: '${model._target_}'}",
        ),
    ]
)
KEYS = st.sampled_from(
    ["a", "_target_", "_args_", "_partial_", "_recursive_", "defaults", "bias", "'${seed}'"]
)
DOCUMENTS = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda each: f"[{', '.join(each)}]"),
        st.dictionaries(KEYS, inner, max_size=3).map(
            lambda each: "{" + ", ".join(f"{key}: {value}" for key, value in each.items()) + "}"
        ),
        st.tuples(st.sampled_from("ab"), inner).map(lambda pair: f"&{pair[0]} {pair[1]}"),
    ),
    max_leaves=8,
)
CALLS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.putenv", "os.unsetenv")
CALLS += (
    "os.remove",
    "os.rename",
    "os.mkdir",
    "os.rmdir",
    "shutil.rmtree",
    "socket.connect",
    "ctypes.dlopen",
)
escaped: list[str] = []
is_watched = False


def watch(event: str, arguments: tuple) -> None:
    """Note what Python's own audit reports of processes, files and the environment."""
    if not is_watched or "__pycache__" in str(arguments):  # written at the first import of a module
        return
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    if writes or event in CALLS:
        escaped.append(f"{event}{arguments}")


sys.addaudithook(watch)


@settings(max_examples=100, deadline=None)
@given(DOCUMENTS, st.sampled_from(["model", "data", "callbacks", "extra", "seed", "trainer"]))
def test_whatever_text_a_stored_config_is_no_process_file_or_variable_is_touched(document, section):
    global is_watched
    base = {key: value for key, value in LINE.items() if key != section}
    text, environment = f"{yaml.safe_dump(base)}{section}: {document}\n", dict(os.environ)
    os.environ["PLANTED"] = PLANTED
    is_watched, seen = True, ""
    try:
        stored = config.parse_stored(text)
        config.check_stored_paths(stored, [], ROOT / "mlruns" / "artifacts" / "a")
        amended = apply_overrides(stored, [])
        check_config(amended)
        seen = json.dumps(to_plain(amended))
        seen += repr(instantiate(amended[section], amended.allowed_targets) if section != "seed" else "")
    except (BadInput, ValueError, TypeError, yaml.YAMLError) as error:
        seen += str(error)
    finally:
        is_watched = False
        del os.environ["PLANTED"]
    assert escaped == []
    assert PLANTED not in seen
    assert dict(os.environ) == environment
    assert not (ROOT / "ran").exists() and not Path("ran").exists()


def test_the_audit_sees_a_process_a_file_and_a_variable(tmp_path):
    """The oracle of the test above."""
    global is_watched
    is_watched = True
    try:
        subprocess.run(["true"], check=True)
        (tmp_path / "file").write_text("x")
        os.environ["PLANTED"] = PLANTED
        del os.environ["PLANTED"]
    finally:
        is_watched = False
    kinds = {each.partition("(")[0] for each in escaped}
    escaped.clear()
    assert kinds >= {"subprocess.Popen", "open", "os.putenv", "os.unsetenv"}


def without_directives(tree):
    if isinstance(tree, dict):
        return {k: without_directives(v) for k, v in tree.items() if k not in gate.DIRECTIVES}
    return [*map(without_directives, tree)] if isinstance(tree, list) else tree


def test_the_classes_of_a_config_are_listed_once():
    assert list_targets(MLP) == sorted(
        ["tracklight.data.mnist.MNIST", "tracklight.models.mlp.MLP", "torch.optim.SGD"]
    )


def test_a_preset_of_ones_own_is_held_to_the_keys_there_are(tmp_path, monkeypatch):
    import shutil

    conf = tmp_path / "conf"
    shutil.copytree(CONF, conf)
    (conf / "experiment" / "mine.yaml").write_text("# @package _global_\noptimizer:\n  lrr: 1\n")
    (conf / "callbacks" / "mine.yaml").write_text(
        "stop:\n  _target_: pytorch_lightning.callbacks.EarlyStopping\n  monitor: ${score.metric}\n"
    )
    monkeypatch.setattr("tracklight.config.hydra_internals.CONF", conf)
    assert compose(["callbacks=mine"]).callbacks.stop.monitor == "train/loss"
    with pytest.raises(BadInput, match="experiment=mine sets optimizer.lrr, which optimizer=sgd"):
        compose(["experiment=mine"])


def test_what_mlflows_charts_would_cut_has_a_short_text_beside_it():
    cfg = compose(["model=mlp", "model.hidden=[128,64]", "optimizer=adamw"])
    short = short_params(flatten(cfg))
    assert (short["optimizer"], short["model"], short["hidden"]) == ("AdamW", "MLP", "128-64")
    for key, values in {
        "hidden": [
            *("[256,256,256,64]", "[256,256,256,128]", "[256,256,64,64]"),
            *("[512,256,128,64]", "[512,256,128,32]", "[512,256,64,128,64,32]", "[512,256,64,128,64,16]"),
        ],
        "scheduler": [f"torch.optim.lr_scheduler.CosineAnnealing{end}" for end in ("LR", "WarmRestarts")],
    }.items():
        keys = {"hidden": "model.hidden", "scheduler": "scheduler._target_"}
        texts = [short_params(flatten(varied(f"{keys[key]}={value}")))[key][:10] for value in values]
        assert len({*texts}) == len(values), texts


def test_many_configs_made_at_once_are_those_made_alone():
    trees = [
        to_plain(compose(["model=mlp", "optimizer=adam", *words]))
        for words in (
            [],
            ["optimizer.betas=[0.5,0.9]", "model.hidden=[1]"],
            ["scheduler=onecycle", "callbacks=early_stopping", "+tracking.tags={a.b: 1}"],
            ["model=linear", "optimizer=sgd", "trainer.gradient_clip_val=1"],
        )
    ]
    trees += [trees[0] | {"seed": value} for value in (1, 1.0, True, "1", None)]
    trees += [{**trees[0], "extra": {}}, {"seed": 1}]
    for base in trees:
        for made, tree in zip(to_configs([base, *trees]), [base, *trees], strict=True):
            alone = to_config(tree)
            assert repr(to_plain(made)) == repr(to_plain(alone)) == repr(tree)
            assert OmegaConf.is_struct(made) and made.seed == tree["seed"]


def test_lists_of_one_name_have_a_short_text_each():
    tree = {"model": {"features": [1, 2], "data": ["x"]}, "data": {"features": ["a"], "target": ["y"]}}
    assert short_params(flatten(tree)) == {
        **{"model-features": "1-2", "data-features": "a"},
        **{"model-data": "x", "target": "y"},  # `data` is a group
    }


def test_a_key_that_nothing_would_read_is_not_offered_to_be_added():
    for word, is_offered in (("epochs=3", False), ("score.metrc=x", False), ("trainer.max_epoch=3", True)):
        with pytest.raises(BadInput, match="unknown key") as no:
            compose([word])
        assert ("adds it" in str(no.value)) is is_offered, word
