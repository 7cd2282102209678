"""What Tab offers in a shell, and how long it takes."""

import resource
import shutil
import subprocess
import sys

import pytest

from tracklight.commands.completion import complete
from tracklight.commands.parser import main
from tracklight.config.compose import compose
from tracklight.paths import CONF


def test_commands_groups_choices_keys_and_values_are_offered():
    assert {"train ", "compare ", "init "} <= {*complete("tracklight ")}
    assert complete("tracklight tr") == ["train "]
    assert {"model=", "optimizer=", "seed=", "trainer.max_epochs="} <= {*complete("tracklight train ")}
    optimizers = sorted(f"optimizer={path.stem} " for path in (CONF / "optimizer").glob("*.yaml"))
    assert complete("tracklight train optimizer=") == optimizers
    assert complete("tracklight train -m optimizer=ada") == ["optimizer=adagrad ", *optimizers[1:3]]
    assert complete("tracklight train sweep.sampler=q") == ["sweep.sampler=qmc "]
    assert complete("tracklight train compile=") == ["compile=false ", "compile=true "]
    assert complete("tracklight train optimizer.lr=") == []
    assert complete("tracklight evaluate b") == ["best "]


@pytest.mark.parametrize("choice", ["model=mlp", "data=table", "optimizer=adamw", "scheduler=onecycle"])
def test_every_key_of_what_was_chosen_is_offered(choice):
    group = choice.partition("=")[0]
    keys = {f"{group}.{key}=" for key in compose([choice])[group]}
    assert keys <= {*complete(f"tracklight train {choice} {group}.")}


def test_what_another_choice_has_is_not_offered():
    assert "optimizer.momentum=" in complete("tracklight train optimizer=sgd optimizer.")
    assert "optimizer.momentum=" not in complete("tracklight train optimizer=adam optimizer.")


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_gets_the_words_in_a_fraction_of_a_second(tmp_path, capsys):
    assert main("completion", []) == 0
    script = capsys.readouterr().out
    (tmp_path / "yaml.py").write_text("raise RuntimeError('imported from where one stands')\n")
    for line, offered in (
        ("tracklight train optimizer=ada", "adagrad |adam |adamw "),  # bash takes = for the end of a word
        ("tracklight train trainer.max_ep", "trainer.max_epochs="),
    ):
        typed = f'COMP_LINE="{line}"; COMP_POINT={len(line)}; _tracklight; IFS="|"; echo "${{COMPREPLY[*]}}"'
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = ["bash", "--norc", "-c", script + typed]
        ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert (ended.stdout, ended.stderr) == (f"{offered}\n", "")
        assert after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime < 0.3


def test_choices_of_a_project_are_offered(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "conf" / "model").mkdir(parents=True)
    (tmp_path / "pyproject.toml").write_text('[tool.tracklight]\npackage = "mine"\n')
    (tmp_path / "conf" / "model" / "net.yaml").write_text("_target_: mine.Net\nwidth: 3\n")
    for line, offered in (("model=ne", "net \n"), ("model=net model.w", "model.width=\n")):
        command = [sys.executable, "-P", "-m", "tracklight.commands.completion", f"tracklight train {line}"]
        ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert ended.stdout == offered


def test_nothing_heavy_is_imported():
    code = "import sys, tracklight.commands.completion; print(*{m.split('.')[0] for m in sys.modules})"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"hydra", "omegaconf", "rich", "numpy", "torch", "mlflow"} & {*ended.stdout.split()}
