"""Stores that one may only read, and stores of a group: who may write what, and who is told."""

import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import pytest
from small_runs import train

from process import COMMANDS, TrialResult, free_port
from tracklight.commands.parser import main
from tracklight.config import rules
from tracklight.errors import BadInput
from tracklight.experiment.stored import load_config
from tracklight.paths import HOME, ROOT
from tracklight.tracking import store as module
from tracklight.tracking.store import connect

NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
MOUNTED = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$@"'
STARTS_ANOTHER = "import subprocess, sys, torch; subprocess.run([sys.executable, '-c', ''], check=True)"


def contents(directory: Path) -> dict[str, tuple[int, bytes]]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def test_on_a_store_that_is_only_read_nothing_is_recorded_and_that_is_said(kept, copied, monkeypatch, capsys):
    monkeypatch.setattr(module, "_why_read_only", lambda *_: "it cannot be written")
    before = contents(copied)
    where = ["--dir", str(copied)]
    assert main("evaluate", [kept.line, *where]) == 0
    assert "logged  nothing: it cannot be written" in capsys.readouterr().out
    with pytest.raises(BadInput, match="--into-run: it cannot be written; leave it out"):
        main("evaluate", [kept.line, "--into-run", *where])
    with pytest.raises(BadInput, match="it cannot be written; try another"):
        connect(None, copied)
    monkeypatch.undo()
    assert contents(copied) == before


def test_only_the_folder_that_is_named_is_asked_whether_it_can_be_written(kept, copied, monkeypatch):
    def access(path, mode):
        assert not Path(path).is_relative_to(HOME), "the default folder has no part in this"
        return True

    monkeypatch.setattr(rules.os, "access", access)
    assert main("evaluate", [kept.line, "--no-log", "--dir", str(copied)]) == 0
    store = connect(None, copied)
    assert load_config(store, store.client.get_run(kept.line), trains=True).tracking.dir == str(copied)


def test_what_a_run_leaves_in_a_groups_store_the_group_may_write(tmp_path):
    directory = tmp_path / "shared"
    directory.mkdir()
    directory.chmod(0o2775)
    before = os.umask(0o002)
    try:
        train(directory, "trainer.max_epochs=1", "tracking.figures=true")
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in directory.rglob("*")}
    assert {"mlflow.db", "points.wal", "best.ckpt", "MLmodel"} <= {path.name for path in modes}
    assert {p.name: oct(mode) for p, mode in modes.items() if mode & 0o060 != 0o060} == {}


@pytest.mark.slow
def test_two_users_of_a_group_train_into_one_store(open_to_all):
    directory = open_to_all.parent / "shared"
    directory.mkdir()
    as_reader("user", directory)  # skips where one may not
    os.chown(directory, -1, 4343)
    directory.chmod(0o2775)
    env = os.environ | {"HOME": str(open_to_all.parent / "home"), "TMPDIR": str(open_to_all.parent / "home")}
    words = ["data=line", "model=linear", "trainer.max_epochs=1", f"tracking.dir={directory}"]
    for user in ("4242", "4343"):
        member = ["setpriv", f"--reuid={user}", "--regid=4343", "--clear-groups"]
        command = [*member, sys.executable, ROOT / "train.py", *words]
        done = subprocess.run(command, env=env, capture_output=True, text=True, cwd="/", umask=0o002)
        assert (done.returncode, done.stderr) == (0, "")
    assert [status for _, status in TrialResult(directory).runs] == ["FINISHED"] * 2
    assert (directory / "mlflow.db").stat().st_uid == 4242


@pytest.fixture
def open_to_all(kept):
    """The store in a place that every user can reach; pytest's own folders are closed to others."""
    above = Path(tempfile.mkdtemp())
    above.chmod(0o755)
    shutil.copytree(kept.directory, above / "runs")
    for path in (above / "runs", *(above / "runs").rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    (above / "home").mkdir()
    (above / "home").chmod(0o777)
    yield above / "runs"
    shutil.rmtree(above)


def as_reader(how: str, directory: Path, probe: str = "import torch") -> list[str]:
    """Return the command under which the store may only be read; skip where one may not do that."""
    prefix = list(NOBODY) if how == "user" else ["unshare", "-m", "sh", "-c", MOUNTED, str(directory)]
    python = [*prefix, sys.executable, "-c", probe]
    if shutil.which(prefix[0]) is None or subprocess.run(python, capture_output=True, cwd="/").returncode:
        pytest.skip(f"needs {prefix[0]} with the right to use it, and a Python that all users can run")
    for path in (directory, *directory.rglob("*")) if how == "user" else ():
        path.chmod(path.stat().st_mode & ~0o222)
    return [*prefix, sys.executable]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["user", "mount"])
def test_evaluate_predict_reproduce_compare_and_ui_work_on_a_store_that_may_only_be_read(
    kept, open_to_all, how
):
    directory, home = open_to_all, open_to_all.parent / "home"
    rows = home / "rows.csv"
    rows.write_text("x\n1\n")
    (directory / "artifacts" / kept.line / "artifacts" / "here.txt").touch()  # the store was elsewhere before
    reader = as_reader(how, directory, STARTS_ANOTHER)
    before = contents(directory)
    env = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
    env |= {"HOME": str(home), "TMPDIR": str(home), "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    where = ["--dir", str(directory)]
    asked = [
        ["evaluate", kept.line, *where],
        ["predict", kept.line, str(rows), *where],
        ["reproduce", kept.line, *where],
        ["compare", *where],
        ["compare", kept.line, kept.table, *where],
        ["evaluate", kept.line, "--into-run", *where],
    ]
    command = [*reader, "-c", COMMANDS, json.dumps(asked)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=home, timeout=300)
    ends = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("exit ")]
    codes = ["0"] * 5 + ["2"]
    assert ends == [[words[0], code] for words, code in zip(asked, codes, strict=True)], done
    assert "Traceback" not in done.stderr
    assert "logged  nothing: " in done.stdout and "cannot be written" in done.stdout
    assert "the new run is not kept" in done.stdout and "identical: " in done.stdout
    ui = [*reader, str(ROOT / "scripts" / "ui.py"), "--port", str(free_port()), *where]
    with subprocess.Popen(ui, env=env, stdout=subprocess.PIPE, text=True, cwd=home) as process:
        try:
            lines = [process.stdout.readline() for _ in range(2)]
            assert lines[1].startswith("MLflow UI: "), (home / "ui.log").read_text()
            page = lines[1].split()[2].partition("/#")[0]
            with urllib.request.urlopen(f"{page}/ajax-api/2.0/mlflow/runs/get?run_id={kept.line}") as answer:
                assert json.load(answer)["run"]["info"]["run_id"] == kept.line
            with urllib.request.urlopen(
                f"{page}/ajax-api/2.0/mlflow/artifacts/list?run_id={kept.line}"
            ) as answer:
                assert "here.txt" in {each["path"] for each in json.load(answer)["files"]}
        finally:
            process.terminate()
            process.wait(30)
    assert contents(directory) == before


@pytest.mark.slow
def test_a_database_that_may_only_be_read_is_named_at_once_where_one_trains(open_to_all):
    directory = open_to_all
    reader = as_reader("user", directory)
    for path in (directory, *directory.rglob("*")):
        path.chmod(0o777 if path.is_dir() else 0o644)
    script = "import pathlib, sys\nfrom tracklight.tracking.store import connect\n"
    script += "connect(None, pathlib.Path(sys.argv[1]))"
    start_s = time.monotonic()
    env = os.environ | {"PYTHONPATH": str(ROOT / "src"), "HOME": str(directory.parent / "home")}
    done = subprocess.run(
        [*reader, "-c", script, str(directory)], env=env, capture_output=True, text=True, cwd="/"
    )
    last = done.stderr.strip().splitlines()[-1]
    assert f"BadInput: {directory}/mlflow.db cannot be written (of user 0, mode 644)" in last
    assert time.monotonic() - start_s < 30  # of which the imports are nearly all


def test_a_store_in_a_folder_that_is_closed_is_refused_in_one_line(tmp_path, monkeypatch):
    def closed(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_file", closed)
    with pytest.raises(BadInput, match=r"mlflow\.db cannot be read \(Permission denied\)"):
        main("compare", ["--dir", str(tmp_path)])
