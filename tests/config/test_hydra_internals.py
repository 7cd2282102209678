"""Hydra's own nodes pass the gate: a `_target_` under `hydra.` is as good as one under `model.`"""

import pytest

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


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("node", NODES)
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
