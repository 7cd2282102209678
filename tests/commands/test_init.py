"""A new project is whole: it composes, its code is clean, its tests pass and its main job trains."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tracklight.commands.parser import main
from tracklight.errors import BadInput
from tracklight.paths import find_project

PROGRAM = [sys.executable, "-c", "from tracklight.cli import tracklight; tracklight()"]


@pytest.fixture
def project(tmp_path) -> Path:
    assert main("init", [str(tmp_path / "my-rings")]) == 0
    return tmp_path / "my-rings"


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)


def test_a_new_project_is_one_and_no_placeholder_is_left(project, capsys):
    found = find_project(project / "src")
    assert (found.root, found.package, found.conf) == (project, "my_rings", project / "conf")
    assert (found.problem, [*found.warnings()]) == ("", [])
    files = {str(path.relative_to(project)): path for path in project.rglob("*") if path.is_file()}
    assert {".gitignore", ".github/workflows/ci.yml", "README.md", "Makefile"} <= files.keys()
    assert {"src/my_rings/net.py", "conf/model/net.yaml", "tests/test_rings.py"} <= files.keys()
    for name, path in files.items():
        assert "NAME" not in name + path.read_text() or name.startswith(".schema")
    assert re.findall(r"^(\w+):", (project / "Makefile").read_text(), re.M) == ["train", "test"]


def test_its_code_is_formatted_and_free_of_lint(project):
    ruff = [str(Path(sys.executable).parent / "ruff")]
    assert run(project, *ruff, "format", "--check", ".").returncode == 0
    found = run(project, *ruff, "check", "--select", "E,F,I,UP,B,SIM,RET,PTH", ".")
    assert found.returncode == 0, found.stdout


def test_every_choice_of_a_new_project_composes(project):
    script = "from tracklight.config.compose import compose\n"
    for words in (["model=net"], ["model=plain"], ["experiment=first"], ["data=rings"]):
        script += f"compose({words})\n"
    ended = run(project, sys.executable, "-c", script)
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("torch", "there is a module torch already"),
        ("random", "there is a module random already"),
        ("3x", "cannot be the name of a package"),
        ("class", "cannot be the name of a package"),
        ("__main__", "cannot be the name of a package"),
        ("there", "File exists"),
    ],
)
def test_a_name_that_cannot_be_is_refused_and_nothing_is_made(tmp_path, name, said):
    (tmp_path / "there").mkdir()
    with pytest.raises(BadInput, match=said):
        main("init", [str(tmp_path / name)])
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match=r"file/rings cannot be made: Not a directory"):
        main("init", [str(tmp_path / "file" / "rings")])


@pytest.mark.slow
def test_its_tests_pass_and_its_jobs_train_as_the_preset_says(project):
    tests = run(project, sys.executable, "-m", "pytest", "-q")
    assert tests.returncode == 0, tests.stdout
    trained = run(project, *PROGRAM, "train", "experiment=first")
    assert trained.returncode == 0, trained.stderr
    expected = re.search(r"test/accuracy ([\d.]+)", (project / "conf/experiment/first.yaml").read_text())
    scored = re.search(r"test/accuracy ([\d.]+)", trained.stdout)
    assert expected and scored and float(scored[1]) == float(expected[1])
    assert "one by one" not in trained.stdout  # it has the engine's speed
    foreign = run(project, *PROGRAM, "train", "model=plain", "trainer.max_epochs=2")
    assert foreign.returncode == 0, foreign.stderr
    assert not {*project.rglob("*.ckpt")} - {*(project / "mlruns").rglob("*.ckpt")}
