"""The parent run of a sweep: a store that does not answer, and what it shows."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import mlflow
import pytest
from mlflow.store.entities import PagedList

from tracklight.runs.leaderboard import TrialRun, rank_trials
from tracklight.sweep.parent_run import ParentRun

TAGS = {"tracklight.point": "key"}
PLAN = SimpleNamespace(
    space=SimpleNamespace(axes=[SimpleNamespace(name="lr")]),
    metric="loss",
    mode="min",
    settings={"seeds": 1},
    num_runs=1,
    first_cfg=SimpleNamespace(tracking=SimpleNamespace(note=None)),
)


class FakeStore:
    """A store that answered until just now."""

    timeout_s = 0.0

    def __init__(self):
        info = SimpleNamespace(start_time=0, experiment_id="0")
        run = SimpleNamespace(info=info, data=SimpleNamespace(tags={}))
        self.gone = False
        self.client = SimpleNamespace(
            get_run=lambda _: run,
            get_experiment=lambda _: SimpleNamespace(name="sweeps"),
            search_experiments=self.search,
            search_runs=lambda *_, **__: PagedList([], None),
            delete_run=self.search,
        )

    def search(self, *_):
        if self.gone:
            raise mlflow.exceptions.MlflowException("connection refused")
        return []

    def folder(self, run_id):
        return Path(run_id)

    def ui_hint(self, _):
        return "make ui"

    def create(self, *_):
        raise AssertionError("the run that there may be was not looked for")


def make_parent():
    store = FakeStore()
    run = SimpleNamespace(run_id="parent", upload_artifacts=lambda: None, log_text=lambda *_: None)
    run.set_tags = run.log_series = lambda *_: None
    run.now_ms = lambda: 12_250
    return store, ParentRun(store, PLAN, run.run_id, run)  # pyright: ignore


def test_a_failure_that_cannot_be_recorded_does_not_end_the_sweep():
    store, parent = make_parent()
    store.gone = True
    assert parent.outage_s == 0
    parent.record_failure(None, "0 lr=1", TAGS, "odd")
    assert parent.outage_s > 0


def test_a_store_is_away_until_it_answers():
    store, parent = make_parent()
    store.gone = True
    parent.delete_child("run")
    assert parent.outage_s > 0
    assert parent.refresh() is None and parent.outage_s > 0
    store.gone = False
    parent._refresh_due_s = 0.0
    assert parent.refresh() == [] and parent.outage_s == 0


def test_only_the_last_refresh_waits_for_the_store(monkeypatch):
    _, parent = make_parent()
    waited = []
    monkeypatch.setattr(parent, "children", lambda timeout_s: waited.append(timeout_s) or [])
    parent.refresh()
    parent.refresh(final=True)
    assert waited == [0.0, None]


def test_the_last_score_is_logged_though_the_sweep_ends_within_the_second(monkeypatch):
    _, parent = make_parent()
    logged = []
    parent.run.log_series = lambda *point: logged.append(point)
    scores = iter([0.5, 0.25])
    row = TrialRun(0, {"lr": "0.1"}, 0, "complete", None)
    parent._rank = lambda _: rank_trials([replace(row, score=next(scores))], "min", 1)
    monkeypatch.setattr(parent, "_plot", lambda *_: None)
    parent.refresh(final=True)
    parent.refresh(final=True)
    assert [point for point in logged if point[0] == "score"] == [
        ("score", (12,), (0.5,)),
        ("score", (13,), (0.25,)),
    ]


def test_the_leaderboard_is_a_table_that_mlflow_shows_in_full_and_the_description_of_the_parent():
    _, parent = make_parent()
    texts, tags = {}, {}
    parent.run.log_text = lambda text, path: texts.update({path: text})
    parent.run.set_tags = tags.update
    runs = [
        TrialRun(i, {"optimizer.lr": f"0.{i + 1}", "note": "a|b"}, 0, "complete", i / 3) for i in range(25)
    ]
    parent._log_table(rank_trials(runs, "min", 1))
    columns = json.loads(texts["leaderboard.json"])["columns"]
    assert "lr" in columns and not any("." in column for column in columns)  # a dot would blank the cells
    assert "optimizer.lr" in texts["leaderboard.csv"].splitlines()[0].split(",")
    head, _, first, *rest = tags["mlflow.note.content"].splitlines()
    assert head.startswith("| rank | trial | lr | note | score |")
    assert first.startswith("| 1 | 0 | 0.1 | a\\|b | 0 |")
    assert rest[-1] == "5 more in leaderboard.json"


@pytest.mark.parametrize(
    ("uri", "hint", "said", "address"),
    [
        (
            "sqlite:///runs/mlflow.db",
            "make ui",
            "; while it runs (by default on port 5001), the sweep is at",
            "",
        ),
        (
            "https://team.example/mlflow",
            "https://team.example/mlflow/#/run",
            "",
            "https://team.example/mlflow",
        ),
    ],
)
def test_the_address_of_a_sweep_is_shown_with_what_serves_it(monkeypatch, uri, hint, said, address):
    monkeypatch.setattr(FakeStore, "ui_hint", lambda *_: hint)
    store, parent = make_parent()
    store.uri = store.display_uri = uri
    store.client.set_experiment_tag = lambda *_: None
    parent._plan = SimpleNamespace(**vars(PLAN), num_folds=1)  # pyright: ignore
    parent.save_view([])
    page = "/#/experiments/0/runs?workflowType=machine_learning&viewStateShareKey=sweep-parent"
    assert parent.ui_hint == f"{hint}{said}\nview   {address or 'http://127.0.0.1:5001'}{page}"
