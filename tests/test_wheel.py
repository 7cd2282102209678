"""The wheel, installed where there is no repository: a new project goes through all commands."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import urllib.request
import zipfile
from pathlib import Path

import pytest

from process import free_port
from tracklight.paths import ROOT

pytestmark = pytest.mark.slow
FIRST = ("train", "experiment=first", "num_threads=1")


@pytest.fixture(scope="module")
def pip(tmp_path_factory) -> list[str | Path]:
    """pip in an environment of its own, to work on others with `--python`: uv makes them without."""
    pytest.importorskip("ensurepip", reason="needs the pip that comes with Python")
    folder = tmp_path_factory.mktemp("pip")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True, timeout=300)
    return [folder / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "--python"]


@pytest.fixture(scope="module")
def wheel(pip, tmp_path_factory) -> Path:
    pytest.importorskip("setuptools", reason="needs setuptools: nothing is downloaded to build with")
    source = tmp_path_factory.mktemp("source")
    for name in ("src", "conf"):
        shutil.copytree(
            ROOT / name,
            source / name,
            symlinks=True,
            ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"),
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [*pip, sys.executable, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "."]
    subprocess.run(command, cwd=source, check=True, timeout=300)
    (built,) = source.glob("*.whl")
    return built


class Installed:
    """A virtual environment with the wheel and, by a path file, the packages of this one."""

    def __init__(self, folder: Path, pip: list[str | Path], wheel: Path, hidden: Path | None = None):
        self.folder, self.bin = folder, folder / "venv" / "bin"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
        install = [*pip, self.bin / "python", "install", "--quiet", "--no-deps", "--no-index"]
        subprocess.run([*install, wheel], check=True, timeout=300)
        site = next((folder / "venv" / "lib").glob("python*/site-packages"))
        (site / "shared.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "PYTHON"))}
        self.env = kept | {"PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        if hidden is not None:
            self.env["PYTHONPATH"] = str(hidden)

    def __call__(self, folder: Path, *words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        ended = subprocess.run(
            words, cwd=folder, env=self.env, capture_output=True, text=True, timeout=300, check=False
        )
        assert ended.returncode == code, ended.stdout + ended.stderr
        return ended

    def json(self, folder: Path, *words: str) -> dict:
        return json.loads(self(folder, "tracklight", *words, "--json").stdout)


@pytest.fixture(scope="module")
def installed(pip, wheel, tmp_path_factory) -> Installed:
    return Installed(tmp_path_factory.mktemp("installed"), pip, wheel)


@pytest.fixture(scope="module")
def project(installed) -> Path:
    installed(installed.folder, "tracklight", "init", "my-rings")
    return installed.folder / "my-rings"


def test_the_wheel_holds_the_config_and_the_template_as_the_repository_has_them(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = {name: archive.read(name) for name in archive.namelist()}
    template = ROOT / "src" / "tracklight" / "commands" / "template"
    for folder, place in ((ROOT / "conf", "conf"), (template, "commands/template")):
        for path in (path for path in folder.rglob("*") if path.is_file()):
            assert held[f"tracklight/{place}/{path.relative_to(folder)}"] == path.read_bytes()
    assert "hydra_plugins/tracklight/sweeper.py" in held
    assert not [name for name in held if name.startswith(("tests", "scripts"))]


def test_it_is_the_wheel_that_runs(installed, project):
    script = "import tracklight.paths as p; print(p.PACKAGE, p.CLONE, p.ROOT, p.CONF)"
    package, clone, root, conf = installed(project / "src", "python", "-c", script).stdout.split()
    assert Path(package).is_relative_to(installed.bin.parent) and Path(conf) == Path(package) / "conf"
    assert (clone, Path(root)) == ("None", project)


def test_a_project_goes_through_all_commands(installed, project):
    assert "2 passed" in installed(project, "make", "test").stdout
    first = installed.json(project, *FIRST)
    assert first["metrics"]["test/accuracy"] == 1.0
    assert Path(first["folder"]).is_relative_to(project / "mlruns")
    below = project / "conf" / "model"  # wherever in it one stands
    swept = installed.json(below, *FIRST, "-m", "optimizer.lr=0.1,0.001", "trainer.max_epochs=2")
    assert swept["trials"] == 2
    boards = installed(below, "tracklight", "compare", "--json").stdout
    assert first["id"] in boards and swept["runs"][0] in boards
    tested = installed.json(project, "evaluate", first["id"], "--split", "test", "--no-log")
    assert tested["score"]["test/accuracy"] == first["metrics"]["test/accuracy"]
    (installed.folder / "points.csv").write_text("x,y\n1,0\n0,-2\n")
    answers = json.loads(
        installed(project, "tracklight", "predict", first["id"], "../points.csv", "--json").stdout
    )
    assert [answer["prediction"] for answer in answers] == ["inner", "outer"]
    assert installed.json(project, "reproduce", first["id"])["identical"]
    script = "import tracklight; run = tracklight.load('best'); print(run.score, run.load_model().training)"
    assert installed(project, "python", "-c", script).stdout.split()[1] == "False"
    assert not (project / "conf" / "model" / "mlruns").exists()


def test_a_killed_run_continues_to_the_same_bits(installed, project):
    words = (*FIRST, "trainer.max_epochs=300", "seed=5", "tracking.figures=false")
    process = subprocess.Popen(["tracklight", *words], cwd=project, env=installed.env, stdout=subprocess.PIPE)
    assert process.stdout is not None
    while not process.stdout.readline().startswith(b"epoch"):
        assert process.poll() is None, "ended early"
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    continued = installed(project, "tracklight", *words, "resume=auto", "--json")
    assert "continues" in continued.stderr
    whole = installed.json(project, *words, f"tracking.dir={project}/other")
    assert json.loads(continued.stdout)["metrics"] == whole["metrics"]


def test_the_ui_answers(installed, project):
    command = ["tracklight", "ui", "--port", str(free_port()), "--json"]
    process = subprocess.Popen(command, cwd=project, env=installed.env, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        text = ""
        while not text.endswith("}\n"):
            line = process.stdout.readline()
            assert line, "the server did not start"
            text += line
        with urllib.request.urlopen(json.loads(text)["url"].partition("#")[0], timeout=30) as page:
            assert page.status == 200
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
        process.stdout.close()


def test_without_extras_it_says_what_to_install(pip, wheel, tmp_path):
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text(
        "from importlib.machinery import PathFinder\n"
        "find = PathFinder.find_spec\n"
        "hidden = ('optuna', 'pytest')\n"
        "PathFinder.find_spec = lambda name, *rest: None if name in hidden else find(name, *rest)\n"
    )
    bare = Installed(tmp_path, pip, wheel, hidden)
    ended = bare(tmp_path, "tracklight", "train", "-m", "seed=1,2", code=2)
    assert re.search(r"pip install 'tracklight\[sweep\]'", ended.stderr), ended.stderr
    assert len(ended.stderr.splitlines()) == 1
    bare(tmp_path, "tracklight", "init", "bare-rings")
    tested = bare(tmp_path / "bare-rings", "make", "test", code=2)
    assert tested.stderr.startswith("pytest is not installed; type: pip install -e '.[dev]'\n")


def test_the_projects_ci_is_green_after_the_one_edit_that_its_readme_names(pip, wheel, tmp_path):
    runner = Installed(tmp_path, pip, wheel)
    runner(tmp_path, "tracklight", "init", "my-rings")
    project = tmp_path / "my-rings"
    (edit,) = re.findall(r"^dependencies = .*$", (project / "README.md").read_text(), re.M)
    edit = re.sub(r"git\+https://[^\"]*", wheel.as_uri(), edit)
    toml = (project / "pyproject.toml").read_text()
    (project / "pyproject.toml").write_text(re.sub("^dependencies = .*$", edit, toml, flags=re.M))
    steps = re.findall("- run: (.*)", (project / ".github/workflows/ci.yml").read_text())
    assert steps == ["pip install '.[dev]'", "make test"]
    offline = f"{shlex.join(map(str, pip))} {runner.bin / 'python'} --no-input install --no-index"
    runner(project, "sh", "-c", steps[0].replace("pip install", f"{offline} --no-build-isolation"))
    assert "my_rings" in runner(tmp_path, "python", "-c", "import my_rings; print(my_rings)").stdout
    assert "2 passed" in runner(project, "make", "test").stdout
