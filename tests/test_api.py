"""The Python API, in processes of their own: what it imports, and what its page says."""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tracklight.paths import ROOT

PAGE = (ROOT / "docs" / "python-api.md").read_text()


def run(folder: Path, script: str) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env=env, timeout=600, check=False
    )


@pytest.fixture
def project(tmp_path) -> Path:
    (tmp_path / "mine").mkdir()
    (tmp_path / "pyproject.toml").write_text('[tool.tracklight]\npackage = "mine"\n')
    return tmp_path


def test_importing_the_package_imports_nothing_else(tmp_path):
    ended = run(
        tmp_path,
        """
        import sys, time
        before, start_s = {*sys.modules}, time.process_time()
        import tracklight
        assert time.process_time() - start_s < 0.1
        assert {*sys.modules} - before == {"tracklight"}, {*sys.modules} - before
        try:
            tracklight.trian
        except AttributeError as error:
            print(error)
        """,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == "module 'tracklight' has no attribute 'trian'\n"


def test_runs_are_trained_and_found_whatever_was_imported_before_and_what_cannot_be_run_raises(
    project, template
):
    (project / "conf" / "optimizer").mkdir(parents=True)
    (project / "conf" / "optimizer" / "sgd.yaml").write_text("_target_: torch.optim.SGD\nlr: 0.01\n")
    ended = run(
        project,
        """
        import shutil
        import tracklight.runs.reader as reader, tracklight
        from pathlib import Path
        from tracklight.errors import BadInput
        tracklight.runs.__call__  # a module, yet
        for words in (["optimizer.lrr=1"], ["seed=1,2"], ["seed=1", "seed=2"]):
            try:
                tracklight.train(words)
            except BadInput as error:
                print(error)
        run = tracklight.train(["tracking=none", "trainer.max_epochs=1"])
        assert (run.id, run.folder, run.score) == (None, None, run.metrics["train/loss"])
        try:
            run.load_model()
        except BadInput as error:
            print(error)
        assert not Path("mlruns").exists()
        Path("mlruns").mkdir()
        shutil.copy("TEMPLATE", "mlruns")  # to make a new one takes seconds
        from tracklight.experiment import record
        record.log_model = lambda *_, **__: None  # whose imports take seconds
        made = tracklight.train(["trainer.max_epochs=1", "tracking.figures=false"])
        frames = [tracklight.runs()]
        try:
            tracklight.load(5)
        except tracklight.errors.BadInput as error:
            allowed = "last, best or 4 to 32 hexadecimal digits, as MLflow shows it"
            assert str(error) == f"run id '5' must be {allowed}"
        assert tracklight.runs.reader is reader
        from tracklight.runs import select
        from tracklight import runs
        import tracklight.api, cloudpickle
        frames += [tracklight.runs(), runs(experiment="none"), tracklight.api.runs()]
        assert [[*frame.index] for frame in frames] == [[made.id], [made.id], [], [made.id]]
        assert cloudpickle.loads(cloudpickle.dumps(lambda: tracklight))() is tracklight
        """.replace("TEMPLATE", str(template)),
    )
    assert ended.returncode == 0, ended.stderr
    said = [line for line in ended.stdout.splitlines() if line[:5] in ("unkno", "seed=", "seed ", "this ")]
    assert len(said) == 4
    assert ended.stderr.count("replaces tracklight's own optimizer/sgd.yaml") == 1, ended.stderr


@pytest.mark.slow
def test_it_warns_once_as_the_command_line_does(project):
    (project / "conf" / "optimizer").mkdir(parents=True)
    (project / "conf" / "optimizer" / "sgd.yaml").write_text("_target_: torch.optim.SGD\nlr: 0.5\n")
    inner = project / "inner"
    inner.mkdir()
    (inner / "pyproject.toml").write_text('[tool.tracklight]\npackage = "mine"\n')
    (inner / "mine").mkdir()
    script = """
        import tracklight
        from tracklight.errors import BadInput
        for call in (tracklight.runs, tracklight.load, lambda: tracklight.train(["nothing=1"])):
            try:
                call()
            except BadInput as error:
                print(error)
    """
    for folder, warning in (
        (project, "replaces tracklight's own optimizer/sgd.yaml"),
        (inner, "lies in another"),
    ):
        ended = run(folder, script)
        assert ended.returncode == 0, ended.stderr
        assert ended.stderr.count(warning) == 1, ended.stderr
        assert "unknown key nothing" in ended.stdout


@pytest.mark.slow
def test_the_page_runs_as_it_stands(project):
    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.S))
    assert code.count("tracklight.") >= 4
    checks = """
    import json, math
    loss = float(((inputs.flatten() * 2 - model(inputs).flatten()) ** 2).mean())
    assert math.isclose(loss, run.score, rel_tol=0.2)  # of the weights one step later
    assert (newest.id, [*frame.index], frame.loc[run.id, "score"]) == (run.id, [run.id], run.score)
    summary = json.loads((run.folder / "summary.json").read_text())
    assert (summary["id"], summary["score"], summary["metric"]) == (run.id, run.score, "train/loss")
    assert summary["metrics"]["train/loss"] == run.metrics["train/loss"]
    assert (run.folder / "config.yaml").is_file() and (run.folder / "checkpoints" / "best.ckpt").is_file()
    assert run.folder.is_relative_to(os.getcwd())
    from tracklight.runs import select
    assert callable(tracklight.runs)
    """
    ended = run(project, f"import os\n{code}\n{textwrap.dedent(checks)}")
    assert ended.returncode == 0, ended.stderr
