"""The parent run, its store away."""

import time
from dataclasses import replace
from types import SimpleNamespace

import mlflow
from mlflow.store.entities import PagedList

from tracklight.runs.leaderboard import Row, standings
from tracklight.sweep import parent_run as module
from tracklight.sweep.parent_run import ParentRun

TAGS = {"tracklight.point": "key"}


class Away:
    """A store that answered until just now."""

    patience_s = 0.0

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

    def create(self, *_):
        raise AssertionError("the run that there may be was not looked for")


def board():
    store = Away()
    run = SimpleNamespace(run_id="parent", publish=lambda: None, log_text=lambda *_: None)
    run.set_tags = run.log_series = lambda *_: None
    return store, ParentRun(store, run, ["lr"], "loss", "min", 1)  # pyright: ignore


def test_a_failure_that_cannot_be_recorded_does_not_end_the_sweep():
    store, found = board()
    store.gone = True
    assert found.away_s == 0
    found.record_failure(None, "0 lr=1", TAGS, "odd")
    assert found.away_s > 0


def test_a_store_is_away_until_it_answers():
    store, found = board()
    store.gone = True
    found.discard("run")
    assert found.away_s > 0
    assert found.refresh() is None and found.away_s > 0
    store.gone = False
    found._refreshed_s = -1e9
    assert found.refresh() == [] and found.away_s == 0


def test_only_the_last_refresh_waits_for_the_store(monkeypatch):
    _, found = board()
    waited = []
    monkeypatch.setattr(
        module, "children", lambda store, run_id, wait_s: waited.append(wait_s) or []
    )
    found.refresh()
    found.refresh(final=True)
    assert waited == [0.0, None]


def test_the_last_word_is_logged_though_the_sweep_ends_within_the_second(monkeypatch):
    _, found = board()
    logged = []
    found.run.log_series = lambda *point: logged.append(point)
    scores = iter([0.5, 0.25])
    row = Row(0, {"lr": "0.1"}, 0, "complete", None)
    found._standings = lambda _: standings([replace(row, score=next(scores))], "min", 1)
    monkeypatch.setattr(found, "_plot", lambda *_: None)
    monkeypatch.setattr(time, "time", lambda: 12.25)
    found.refresh(final=True)
    found.refresh(final=True)
    assert [point for point in logged if point[0] == "best/loss"] == [
        ("best/loss", (12,), (0.5,)),
        ("best/loss", (13,), (0.25,)),
    ]
