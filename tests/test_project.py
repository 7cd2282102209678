"""A project of one's own: whose config, code, runs and trust count in it."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

PROGRAM = "from tracklight.cli import tracklight; tracklight()"
NET = "import tracklight.models.linear_regression as ours\n\n\nclass Net(ours.LinearRegression):\n    pass\n"
MODEL = "# @package _global_\nmodel:\n  _target_: mine.net.Net\n  in_features: null\n  out_features: null\n"


@pytest.fixture
def run(programs) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `tracklight ARGUMENTS` in a folder."""
    return lambda folder, *arguments: programs.run(folder, PROGRAM, *arguments)


@pytest.fixture
def project(tmp_path) -> Path:
    root = tmp_path / "project"
    for name, text in {
        "pyproject.toml": '[tool.tracklight]\npackage = "mine"\nallowed_targets = ["fractions"]\n',
        "src/mine/net.py": NET,
        "src/mine/plain.py": "class Plain:\n    pass\n",
        "src/random.py": "raise RuntimeError('this hides the standard library')\n",
        "conf/model/net.yaml": MODEL,
        "conf/optimizer/small.yaml": "_target_: torch.optim.SGD\nlr: 0.25\n",
        "deep/down/.keep": "",
    }.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


FACTS = """
import json, sys
from tracklight.config.compose import allowed_targets, compose
from tracklight.config.instantiate import find_class
from tracklight.errors import BadInput
from tracklight.tracking.provenance import code_digest
cfg = compose(["model=net", "optimizer=small"])
refused = ""
try:
    find_class("collections.OrderedDict", cfg.allowed_targets, "model._target_")
except BadInput as error:
    refused = str(error)
print(json.dumps({
    "dir": cfg.tracking.dir, "lr": cfg.optimizer.lr, "allowed": list(cfg.allowed_targets),
    "same": list(cfg.allowed_targets) == allowed_targets(), "refused": refused,
    "own": find_class("mine.plain.Plain", cfg.allowed_targets, "model._target_").__module__,
    "extended": find_class("fractions.Fraction", cfg.allowed_targets, "x").__name__,
    "code": code_digest(),
}))
"""


def test_config_runs_code_and_trust_are_the_projects(programs, project):
    def facts(folder: Path) -> dict:
        ended = programs.run(folder, FACTS)
        assert ended.returncode == 0, ended.stderr
        return json.loads(ended.stdout)

    found = facts(project / "deep" / "down")
    assert found["dir"] == str(project / "mlruns")
    assert found["lr"] == 0.25
    assert found["allowed"][-2:] == ["mine", "fractions"]
    assert found["same"]
    assert (found["own"], found["extended"]) == ("mine.plain", "Fraction")
    assert "list collections under allowed_targets in [tool.tracklight] of pyproject.toml" in found["refused"]
    assert not (project / "mlruns").exists()
    (project / "notes.py").write_text("")
    assert facts(project)["code"] == found["code"]
    (project / "src" / "mine" / "other.py").write_text("")
    assert facts(project)["code"] != found["code"]


def test_config_dir_comes_before_the_projects_conf_and_that_before_ours(run, project, tmp_path):
    for folder, lr in ((project / "conf", 0.5), (tmp_path / "further", 0.75)):
        path = folder / "optimizer" / "adam.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# replaces tracklight's own\n_target_: torch.optim.Adam\nlr: {lr}\n")
    words = ["train", "optimizer=adam", "--cfg", "job", "--package", "optimizer"]
    assert "lr: 0.5" in run(project, *words).stdout
    assert "lr: 0.75" in run(project, *words, "--config-dir", str(tmp_path / "further")).stdout
    assert "lr: 0.001" in run(tmp_path, *words).stdout


@pytest.mark.parametrize("words", [[], ["-m", "seed=1,2"]])
def test_a_config_file_stored_elsewhere_grants_itself_nothing(run, project, tmp_path, words):
    ran, further = tmp_path / "ran", tmp_path / "further"
    (further / "model").mkdir(parents=True)
    (further / "model" / "evil.yaml").write_text(
        "# @package _global_\nallowed_targets: [subprocess]\nmodel:\n"
        f"  _target_: subprocess.Popen\n  args: [touch, {ran}]\n"
    )
    ended = run(project, "train", "--config-dir", str(further), "model=evil", *words)
    assert (ended.returncode, len(ended.stderr.splitlines())) == (2, 1), ended.stderr
    assert "model._target_=subprocess.Popen is not on the allow-list" in ended.stderr
    assert not ran.exists()


def test_a_project_that_is_not_right_is_one_line_of_every_command(run, project):
    (project / "pyproject.toml").write_text("[tool.tracklight]\n")
    for words in (["train"], ["compare"], ["evaluate", "last"]):
        ended = run(project, *words)
        assert (ended.returncode, ended.stdout) == (2, "")
        assert len(ended.stderr.splitlines()) == 1
        assert "names no package" in ended.stderr


def test_the_program_lists_its_commands_and_names_the_nearest(run, tmp_path):
    listed = run(tmp_path)
    assert listed.returncode == 0
    for command in ("train", "compare", "evaluate", "predict", "reproduce", "ui"):
        assert f"\n  {command} " in listed.stdout
    refused = run(tmp_path, "trian")
    assert refused.returncode == 2
    assert refused.stderr == (
        "error: tracklight trian is no command; did you mean train?; `tracklight --help` lists them\n"
    )


@pytest.mark.parametrize("words", [[], ["-m", "seed=1,2"], ["--cfg", "job"]])
@pytest.mark.parametrize(
    ("content", "said"),
    [(b"lr: [", "node content"), (b"lr: 1 # \xe9\n", "not UTF-8"), (b"lr: 1 # \0\n", "#x0000")],
)
def test_a_config_file_that_cannot_be_read_is_named_in_one_line(run, project, words, content, said):
    path = project / "conf" / "optimizer" / "mine.yaml"
    path.write_bytes(content)
    ended = run(project, "train", "model=net", "optimizer=mine", *words)
    assert (ended.returncode, len(ended.stderr.splitlines())) == (2, 1), ended.stderr
    assert str(path) in ended.stderr
    assert said in ended.stderr


def test_a_file_that_hides_one_of_ours_is_told_though_it_is_not_utf_8(run, project):
    path = project / "conf" / "optimizer" / "adam.yaml"
    path.write_bytes(b"lr: 1 # \xe9\n")
    ended = run(project, "train", "model=net", "--cfg", "job")
    assert ended.returncode == 0, ended.stderr
    assert f"{path} replaces tracklight's own optimizer/adam.yaml" in ended.stderr


@pytest.mark.slow
def test_sweeps_and_ranks_of_a_project_train_its_own_model(project):
    import sqlite3

    script = project / "program"  # as pip writes it: ranks and trials are started with it, too
    script.write_text(
        "from tracklight.cli import tracklight\n\nif __name__ == '__main__':\n    tracklight()\n"
    )
    words = [sys.executable, str(script), "train", "model=net", "trainer.max_epochs=2"]
    two = ["trainer.accelerator=cpu", "trainer.devices=2", "data.num_points=8"]
    for more in (["-m", "seed=1,2"], two):
        ended = subprocess.run([*words, *more], cwd=project / "deep", capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
    with sqlite3.connect(project / "mlruns" / "mlflow.db") as database:
        values = database.execute("SELECT value FROM params WHERE key = 'model._target_'").fetchall()
    assert values == [("mine.net.Net",)] * 3
