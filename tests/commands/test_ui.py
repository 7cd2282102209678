"""The script behind `make ui`."""

import json
import socket
import subprocess
import sys
import urllib.error
import urllib.request

import pytest

import ui_server
from process import free_port
from tracklight.commands import ui
from tracklight.commands.parser import main
from tracklight.errors import BadInput, RunFailed
from tracklight.redact import redact
from tracklight.tracking import store as store_module
from tracklight.tracking.tags import EPOCHS_TAG

RUNS = "runs?workflowType=machine_learning&viewStateShareKey=runs"


@pytest.fixture
def served(monkeypatch):
    """The page at which the UI would open."""
    pages = []
    monkeypatch.setattr(ui, "_serve", lambda store, port, page, uri, folder: pages.append(page))
    return pages


def test_it_opens_at_the_runs_of_the_experiment_trained_last(store, add, served):
    add(0.5, experiment="first")
    add(0.5, experiment="second")
    second = store.client.get_experiment_by_name("second").experiment_id
    first = store.client.get_experiment_by_name("first").experiment_id
    assert main("ui", ["--dir", str(store.directory)]) == 0
    assert main("ui", ["--dir", str(store.directory), "--experiment", "first"]) == 0
    assert served == [f"/#/experiments/{number}/{RUNS}" for number in (second, first)]


def test_an_experiments_view_has_the_parameters_that_vary_and_the_curves(store, add, served):
    for rate, score in (("0.1", 0.5), ("0.2", 0.25)):
        params = {"optimizer.lr": rate, "trainer.max_epochs": "3"}
        # The second was extended: its parameter stays.
        add(score, params=params, tags={EPOCHS_TAG: "36"[rate == "0.2"]}, experiment="mine")
    assert main("ui", ["--dir", str(store.directory), "--experiment", "mine"]) == 0
    tags = store.client.get_experiment_by_name("mine").tags
    view = json.loads(tags["mlflow.sharedViewState.runs"])
    assert view["selectedColumns"] == [*("metrics.`score`", "params.`optimizer.lr`", f"tags.`{EPOCHS_TAG}`")]
    assert (view["orderByKey"], view["orderByAsc"]) == ("attributes.start_time", False)
    axes, *lines = view["compareRunCharts"]
    assert (axes["selectedParams"], axes["selectedMetrics"]) == (
        ["optimizer.lr", "trainer.max_epochs"],
        ["score"],
    )
    assert [line["metricKey"] for line in lines] == ["val/accuracy", "train/loss"]


def test_it_opens_before_anything_was_trained(tmp_path, served, monkeypatch):
    monkeypatch.setattr(ui, "HOME", tmp_path / "mlruns")  # which a new project does not have yet
    assert main("ui", ["--dir", str(tmp_path / "mlruns")]) == 0
    assert served == ["/#/experiments?workflowType=machine_learning"]


@pytest.mark.parametrize("words", [["--port", "0"], ["--port", "70000"], ["--experiment", "none"]])
def test_what_cannot_be_shown_is_said(store, words, served):
    with pytest.raises(BadInput, match=f"{words[0]} {words[1]}"):
        main("ui", ["--dir", str(store.directory), *words])
    with pytest.raises(BadInput, match="is no folder"):
        main("ui", ["--dir", str(store.directory / "elsewhere")])
    assert not served


def test_a_port_that_is_taken_is_bad_input(store, served):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(BadInput, match=f"--port {port} cannot be had .*--port {port + 1}") as refused:
            main("ui", ["--dir", str(store.directory), "--port", str(port)])
    # The UI may be what has the port: then its address helps, as far as it is not starred out.
    shown = redact(str(refused.value))
    assert (
        f"open http://127.0.0.1:{port}/#/experiments?workflowType=machine_learning if it is this UI's, or"
        in shown
    )
    assert not served


@pytest.mark.parametrize("read_only", [False, True])
def test_its_server_starts_where_nobody_else_writes(store, monkeypatch, read_only):
    """It imports from there first; anybody may write a store's folder, or /tmp."""
    found = []

    def start(command, cwd, stdout, **options):
        found.extend(path.name for path in cwd.iterdir())
        found.append(cwd.stat().st_mode & 0o777)
        raise RunFailed("as asked for")

    monkeypatch.setattr(ui.subprocess, "Popen", start)
    if read_only:
        monkeypatch.setattr(store_module, "_why_read_only", lambda *_: "it may only be read")
    with pytest.raises(RunFailed, match="as asked for"):
        main("ui", ["--dir", str(store.directory), "--port", str(free_port())])
    assert found == [ui.LOG, 0o700]


def test_a_server_that_does_not_start_says_why(store, monkeypatch):
    start, broken = subprocess.Popen, [sys.executable, "-c", "raise SystemExit('first\\nit is broken')"]
    monkeypatch.setattr(ui.subprocess, "Popen", lambda command, **options: start(broken, **options))
    with pytest.raises(RunFailed, match="did not start, or ended by itself: it is broken$"):
        main("ui", ["--dir", str(store.directory), "--port", str(free_port())])


@pytest.mark.server
@pytest.mark.slow
def test_it_serves_until_it_is_told_to_stop(store, add, tmp_path, monkeypatch):
    add(0.5)
    here = tmp_path / "here"  # whose files are nobody's to import
    here.mkdir()
    for name in ("random", "uvicorn", "mlflow"):
        for folder in (here, store.directory):
            (folder / f"{name}.py").write_text("raise SystemExit('a file that is nobody's was imported')")
    monkeypatch.chdir(here)
    with ui_server.ui(store.directory) as (address, process):
        uri = address.partition("/#")[0]
        assert uri.startswith("http://127.0.0.1:") and RUNS in address
        with urllib.request.urlopen(uri, timeout=30) as response:
            assert b"MLflow" in response.read()
        process.terminate()
        assert process.wait(30) == 143
        with pytest.raises(urllib.error.URLError):
            urllib.request.urlopen(uri, timeout=5)
