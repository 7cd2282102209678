"""MLflow's UI over a finished sweep, as one sees it: the browser asks for pages alone."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

import ui_server
from process import COMMANDS
from tracklight.engine.checkpoint_io import load_plain

ROOT = Path(__file__).resolve().parents[1]
ARTIFACTS = ROOT / "test-artifacts"
BROWSERS = ("chromium", "chromium-browser", "chrome", "google-chrome", "google-chrome-stable")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
RATES = ("0.01", "0.03", "0.05")
WAIT_MS = 30_000
TRAINED_S = 120

pytestmark = [
    *(pytest.mark.browser, pytest.mark.server, pytest.mark.slow),
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]


READ_ONLY = (
    "unshare",
    "-m",
    "sh",
    "-c",
    'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$@"',
)


def program(*words: str | Path, prefix: Sequence[str] = ()) -> str:
    """What a program of the repository prints."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
    command = [*prefix, sys.executable, *map(str, words)]
    done = subprocess.run(command, check=True, timeout=TRAINED_S, env=env, capture_output=True, text=True)
    return done.stdout


@pytest.fixture(scope="module")
def ui(tmp_path_factory) -> Iterator[tuple[str, list[Run]]]:
    """The UI's address, and the trials of the sweep it shows."""
    directory = tmp_path_factory.mktemp("ui")
    command = [sys.executable, str(ROOT / "train.py"), "-m", "model=linear"]
    command += [f"optimizer.lr={','.join(RATES)}", "trainer.max_epochs=20", "num_threads=1"]
    env = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
    subprocess.run(
        [*command, f"tracking.dir={directory}"],
        check=True,
        timeout=TRAINED_S,
        env=env,
        stdout=subprocess.DEVNULL,
    )
    store = f"sqlite:///{directory / 'mlflow.db'}"
    client = MlflowClient(store)
    experiment = client.get_experiment_by_name("tracklight")
    runs = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time"])
    with ui_server.ui(directory) as (address, _):
        yield address, [run for run in runs if "mlflow.parentRunId" in run.data.tags]


@pytest.fixture
def page(ui) -> Iterator:
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright: make install")
    with api.sync_playwright() as playwright:
        # Chromium's own sandbox needs rights that a container's root does not have.
        flags = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        shown = browser.new_page(viewport={"width": 1440, "height": 900})
        # MLflow opens its chat once in a browser that it has not seen.
        seen = "mlflow.assistant.fab.autoOpenedOnFirstLoad_v1"
        shown.add_init_script(f'localStorage.setItem("{seen}", "true")')
        shown.set_default_timeout(WAIT_MS)
        yield shown
        browser.close()


def keep(page, name):
    ARTIFACTS.mkdir(exist_ok=True)
    page.screenshot(path=ARTIFACTS / f"{name}.png")


def plotted(page):
    """The lowest and the highest value of each axis of the plot, by what the axis says it is."""
    found = {}
    for axis in page.locator(".js-plotly-plot .y-axis").all():
        ends = [axis.locator(f".axis-extent-{end}-text").text_content() for end in ("bottom", "top")]
        found[axis.locator(".axis-title").text_content()] = [float(end or "nan") for end in ends]
    return found


def tabulated(page, metric):
    """The values in the metric's own row of the comparison's table, by the run of their column."""
    label = page.locator('a[title="Plot chart"]').get_by_text(metric, exact=True)
    label.scroll_into_view_if_needed()
    row = label.bounding_box()
    runs = page.locator('th.data-value a[href*="/runs/"]')
    found = {}
    for at in range(runs.count()):
        column = runs.nth(at).bounding_box()
        # The table is drawn of cells put in their place: the value is where row and column meet.
        value = page.evaluate(
            "([x, y]) => document.elementFromPoint(x, y).textContent",
            [column["x"] + 5, row["y"] + 5],
        )
        found[runs.nth(at).text_content()] = float(value)
    return found


def test_sweep_is_unfolded_selected_and_compared_with_its_charts_and_values(ui, page):
    address, trials = ui
    assert [run.data.params["optimizer.lr"] for run in trials] == list(RATES)
    page.goto(address.partition("&viewStateShareKey=")[0])
    page.get_by_text("sweep optimizer.lr").first.wait_for()
    names = [run.info.run_name for run in trials]
    assert not any(page.get_by_text(name, exact=True).count() for name in names)  # nested
    page.locator('.ag-cell[col-id*="Run Name"] button').first.click()
    for name in names:
        page.get_by_text(name, exact=True).first.wait_for()
    keep(page, "runs")

    boxes = page.locator(".ag-row input.ag-checkbox-input")
    for at in range(1, 1 + len(trials)):  # the first is the parent's
        boxes.nth(at).check(force=True)
    page.get_by_role("button", name="Compare", exact=True).click()
    page.get_by_text(f"Comparing {len(trials)} Runs from 1 Experiment").wait_for()
    page.locator(".js-plotly-plot .axis-title").first.wait_for()
    keep(page, "compare")
    lowest_and_highest = {
        key: [min(values), max(values)]
        for key, values in (
            ("optimizer.lr", [float(run.data.params["optimizer.lr"]) for run in trials]),
            ("score", [run.data.metrics["score"] for run in trials]),
        )
    }
    axes = plotted(page)
    assert [*axes][:: len(axes) - 1] == [*lowest_and_highest]
    for key, ends in lowest_and_highest.items():
        assert axes[key] == pytest.approx(ends, abs=5e-6), key
    assert tabulated(page, "train/loss") == {
        run.info.run_id: pytest.approx(run.data.metrics["train/loss"], abs=5e-4) for run in trials
    }
    assert tabulated(page, "score") == {
        run.info.run_id: pytest.approx(run.data.metrics["score"], abs=5e-4) for run in trials
    }

    switch = page.locator('[role="switch"]').first  # of the parameters
    switch.scroll_into_view_if_needed()
    same = page.locator("th, td").get_by_text("trainer.max_epochs", exact=True)
    same.first.wait_for()
    switch.click()
    same.first.wait_for(state="detached")
    page.locator("th, td").get_by_text("optimizer.lr", exact=True).first.wait_for()
    keep(page, "difference")

    uri, run = address.partition("/#")[0], trials[0]
    page.goto(f"{uri}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}/model-metrics")
    page.get_by_text(f"{run.info.run_name} (train/loss)", exact=True).wait_for()
    steps = MlflowClient(uri).get_metric_history(run.info.run_id, "train/loss")
    page.wait_for_function(
        "steps => [...document.querySelectorAll('.js-plotly-plot')]"
        ".some(plot => plot.querySelectorAll('.points .point').length === steps)",
        arg=len(steps),
    )
    keep(page, "curves")


def test_a_sweeps_view_shows_the_best_value_at_once_and_its_curves_after_one_click(ui, page):
    address, trials = ui
    ranked = sorted(trials, key=lambda run: run.data.metrics["score"])
    assert f"&viewStateShareKey=sweep-{ranked[0].data.tags['mlflow.parentRunId'][:8]}" in address
    page.goto(address)
    cells = page.locator('.ag-row [col-id*="optimizer.lr"]')
    page.get_by_text(ranked[0].info.run_name, exact=True).first.wait_for()
    cells.first.wait_for()
    shown = [each.inner_text() for each in cells.all()]
    assert shown == [run.data.params["optimizer.lr"] for run in ranked]  # a row each, the best on top
    keep(page, "view")
    page.locator('label:has(input[value="CHART"])').click()
    page.get_by_text("Parallel Coordinates").first.wait_for()
    curves = "document.querySelectorAll('.js-plotly-plot .scatterlayer .trace').length"
    page.wait_for_function(f"{curves} >= {len(trials)}")
    keep(page, "view-curves")


def test_an_experiments_view_has_the_parameters_that_vary_and_the_curves(ui, page):
    address, trials = ui
    page.goto(re.sub("viewStateShareKey=.*", "viewStateShareKey=runs", address))
    page.get_by_text("sweep optimizer.lr").first.wait_for()
    keep(page, "experiment")
    headers = page.locator(".ag-header")
    headers.get_by_text("optimizer.lr", exact=True).first.wait_for()
    assert headers.get_by_text("score", exact=True).count() and not headers.get_by_text("seed").count()
    page.locator('.ag-cell[col-id*="Run Name"] button').first.click()  # a sweep's runs are folded
    page.get_by_text(trials[0].info.run_name, exact=True).first.wait_for()
    page.locator('label:has(input[value="CHART"])').click()
    page.get_by_text("Parallel Coordinates").first.wait_for()
    curves = "document.querySelectorAll('.js-plotly-plot .scatterlayer .trace').length"
    page.wait_for_function(f"{curves} >= {len(trials)}")
    keep(page, "experiment-curves")


def test_a_store_moved_three_times_shows_its_artifacts_answers_every_command_and_continues(page, tmp_path):
    last, words = tmp_path / "last", ["model=linear", "num_threads=1", "optimizer.lr=0.05"]
    train = (ROOT / "train.py", *words, "trainer.max_epochs=20")
    program(*train, f"tracking.dir={tmp_path / 'first'}")
    program(ROOT / "train.py", *words, "trainer.max_epochs=30", f"tracking.dir={tmp_path / 'at once'}")
    (path,) = tmp_path.glob("first/artifacts/*/artifacts")
    run_id = path.parent.name
    rows = tmp_path / "rows.csv"
    rows.write_text("x\n1\n")
    (tmp_path / "first").rename(tmp_path / "renamed ü")
    answers = [ask(tmp_path / "renamed ü", run_id, rows, page)]
    shutil.copytree(tmp_path / "renamed ü", tmp_path / "copy")
    shutil.rmtree(tmp_path / "renamed ü")
    read_only = [*READ_ONLY, str(tmp_path / "copy")]
    if shutil.which("unshare") and not subprocess.run([*read_only, "true"], capture_output=True).returncode:
        answers.append(ask(tmp_path / "copy", run_id, rows, page, read_only))
    (tmp_path / "copy").rename(last)
    answers.append(ask(last, run_id, rows, page))
    assert len(answers[0]) == 8 and answers == answers[:1] * len(answers)
    program(ROOT / "train.py", f"resume={run_id}", "trainer.max_epochs=30", f"tracking.dir={last}")
    (at_once,) = tmp_path.glob("at once/artifacts/*/artifacts/checkpoints/last.ckpt")
    moved = last / "artifacts" / run_id / "artifacts" / "checkpoints" / "last.ckpt"
    weights = [load_plain(path)["state_dict"] for path in (moved, at_once)]
    assert weights[0].keys() == weights[1].keys()
    assert all(weights[0][key].equal(weights[1][key]) for key in weights[0])


def ask(directory: Path, run_id: str, rows: Path, page, prefix: Sequence[str] = ()) -> list[str]:
    """What the commands say of a run, once the browser has shown its figure and its model."""
    with ui_server.ui(directory, prefix) as (address, _):
        uri = address.partition("/#")[0]
        info = MlflowClient(uri).get_run(run_id).info
        page.goto(f"{uri}/#/experiments/{info.experiment_id}/runs/{run_id}/artifacts")
        page.get_by_text("figures", exact=True).first.click()
        page.get_by_text("learning_curves.png", exact=True).first.click()
        page.wait_for_function("[...document.images].some(each => each.naturalWidth > 400)")
        keep(page, f"moved-{directory.name}")
    where = ["--dir", str(directory)]
    asked = [
        ["compare", *where, "--csv"],
        ["predict", run_id, str(rows), *where, "--format", "csv"],
        ["evaluate", run_id, "--no-log", *where, "--json"],
        ["reproduce", run_id, *where],
    ]
    answers = program("-c", COMMANDS, json.dumps(asked), prefix=prefix).splitlines()
    assert [line for line in answers if line.startswith("exit")] == [f"exit {words[0]} 0" for words in asked]
    return [
        line
        for line in answers
        if re.match("1,train|.*rows.csv|exit|identical", line) or '"train/loss"' in line
    ]
