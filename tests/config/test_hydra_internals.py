"""Hydra's own nodes pass the gate: a `_target_` under `hydra.` is as good as one under `model.`"""

import os

import hydra
import pytest
from omegaconf import OmegaConf

from tracklight.config import hydra_internals
from tracklight.config.hydra_internals import compose_config, initialize
from tracklight.paths import ROOT

ENTER = f"import runpy; runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')"
EVIL = "mlflow.utils.process._exec_cmd"
CALLBACK = "+hydra.callbacks.x={{_target_:" + EVIL + ",cmd:[touch,{ran}]}}"
NODES = {
    "callback": [CALLBACK],
    "nested": ["+hydra.callbacks.x={{_target_:hydra.experimental.callbacks.PickleJobInfoCallback,"
               "y:{{_target_:" + EVIL + ",cmd:[touch,{ran}]}}}}"],
    "interpolated": ["+evil={{_target_:" + EVIL + ",cmd:[touch,{ran}]}}",
                     "+hydra.callbacks.x=${{evil}}"],
    "escaped": [r"+hydra.callbacks.x.y='\${{oc.create:{{_target_: " + EVIL + "}}}}'"],
    "reached": ["+hydra.callbacks.x={{_target_:hydra.experimental.callbacks.logging.os._exit,"
                "_args_:[3]}}"],
    "launcher": ["hydra.launcher._target_=" + EVIL, "+hydra.launcher.cmd=[touch,{ran}]"],
    "sweeper": ["hydra.sweeper._target_=" + EVIL, "+hydra.sweeper.cmd=[touch,{ran}]"],
    "logging class": ["hydra.job_logging={{version:1,root:{{handlers:[x]}},handlers:{{x:{{class:"
                      + EVIL + ",cmd:[touch,{ran}]}}}}}}"],
    "logging factory": ["hydra.hydra_logging={{version:1,root:{{handlers:[x]}},handlers:{{x:{{'()':"
                        + EVIL + ",cmd:[touch,{ran}]}}}}}}"],
    "logging stream": ["hydra.job_logging={{version:1,root:{{handlers:[x]}},handlers:{{x:{{class:"
                       "logging.StreamHandler,stream:'ext://antigravity.webbrowser'}}}}}}"],
}  # fmt: skip
MODES = {
    "single": [],
    "sweep": ["-m", "optimizer.lr=0.01,0.02", "sweep.dry_run=true"],
    "help": ["--help"],
    "config dir": ["--config-dir", "."],
}


PAIRS = [
    (node, mode) for node in NODES for mode in MODES
]  # each node in one mode, one node in each, are quick


@pytest.mark.parametrize(
    ("node", "mode"),
    [
        pytest.param(node, mode, marks=[pytest.mark.slow] * (node != "callback" and mode != "sweep"))
        for node, mode in PAIRS
    ],
)
def test_a_node_of_hydra_builds_and_calls_only_what_is_allowed(programs, node, mode, tmp_path):
    ran = tmp_path / "ran"
    words = [word.format(ran=ran) for word in NODES[node]]
    ended = programs.run(tmp_path, ENTER, *MODES[mode], *words, f"tracking.dir={ran}s")
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.startswith("error: ")
    assert len(ended.stderr.splitlines()) == 1
    assert [*tmp_path.iterdir()] == []


def test_what_hydra_brings_itself_is_allowed(programs, tmp_path):
    words = ["-m", "optimizer.lr=0.01,0.02", "sweep.dry_run=true", "hydra/job_logging=default"]
    words += ["hydra.job_logging.handlers.file.filename=" + str(tmp_path / "log")]
    words += ["+hydra.callbacks.x._target_=hydra.experimental.callbacks.LogJobReturnCallback"]
    ended = programs.run(tmp_path, ENTER, *words)
    assert ended.returncode == 0, ended.stderr
    assert "2 trials" in ended.stdout


def attempt(compose, words):
    """Return all of a composed config, or the error."""
    try:
        tree = OmegaConf.to_container(cfg := compose(words))
    except Exception as error:
        return type(error), str(error)
    del tree["hydra"]["job"]["override_dirname"]  # read by nothing
    tree["hydra"]["overrides"]["task"].sort()
    return tree, OmegaConf.is_struct(cfg), OmegaConf.is_struct(cfg.hydra)


def test_a_composition_from_memory_is_that_of_hydra():
    lines = (
        [],
        ["model=mlp", "optimizer.lr=0.5", "seed=3", "model.hidden=[1,2]"],
        ["experiment=debug", "optimizer=adam", "+model.extra={a: 1}", "++seed=7"],
        ["hydra/job_logging=default", "hydra.verbose=true", "seed=1"],
        ["~trainer.profiler", "trainer.max_epochs=${seed}"],
        *(["sede=1"], ["seed=1,2"], ["model=none"], ["+seed=1"], ["optimizer.lr=["], ["model@x=mlp"]),
        *(["nowhere/model=mlp"], ["optimizer={lr: 3}"], ["optimizer.lr.x=1"], ["~model"]),
    )
    with initialize():
        for words in lines:
            whole = attempt(lambda words: hydra.compose("config", words, return_hydra_config=True), words)
            for _ in ("read", "from memory"):
                assert attempt(compose_config, words) == whole, words


def test_a_config_file_that_changed_is_read_again(tmp_path, monkeypatch):
    project = hydra_internals.PROJECT._replace(conf=tmp_path)
    monkeypatch.setattr(hydra_internals, "PROJECT", project)
    (tmp_path / "optimizer").mkdir()
    for count, name in enumerate(("ours", "ours", "theirs")):
        file = tmp_path / "optimizer" / f"{name}.yaml"
        file.write_text(f"lr: {count}")
        os.utime(file, ns=(count, count))
        with initialize():
            cfg = compose_config([f"optimizer={name}"])
            cfg.optimizer.lr = 9  # of the copy
            assert compose_config([f"optimizer={name}"]).optimizer.lr == count
