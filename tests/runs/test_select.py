"""How runs are named, on the reading side: by SQLite's tables and by MLflow's client alike."""

import math
import sqlite3
from contextlib import closing
from functools import partial

import pytest

from made_runs import add_run
from tracklight.errors import BadInput
from tracklight.runs.reader import ClientReader, SqliteReader
from tracklight.runs.select import select_id, trained_id
from tracklight.tracking.tags import EVALUATES_TAG, OUTCOME_TAG, REPRODUCES_TAG

UNFIT = ["", "zzzz", "../../etc/passwd", "a\nb", "abc", "G" * 32, "a" * 33, "%", "a'b' --"]


@pytest.fixture
def add(store):
    return partial(add_run, store)


@pytest.fixture(params=["sqlite", "client"])
def open_one(request, store):
    def open_it():
        if request.param == "sqlite":
            return SqliteReader(store.database)
        return ClientReader(store)

    return open_it


@pytest.mark.parametrize("word", UNFIT)
def test_word_that_can_be_no_id_is_refused_in_one_line(word, open_one):
    with pytest.raises(BadInput, match="hexadecimal") as caught:
        select_id(open_one(), word)
    assert "\n" not in str(caught.value)


def test_id_and_unique_prefix_name_the_run(add, open_one):
    run_id = add(0.5)
    assert select_id(open_one(), run_id) == select_id(open_one(), run_id[:12]) == run_id


def test_prefix_of_two_runs_is_refused(add, open_one, tmp_path):
    add(0.1), add(0.2)
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as connection, connection:
        connection.execute("PRAGMA foreign_keys = off")
        rows = connection.execute("SELECT run_uuid FROM runs").fetchall()
        for table in ("runs", "tags", "params", "latest_metrics", "metrics"):
            for (old,) in rows:
                new = "abcd" + old[4:]
                connection.execute(f"UPDATE {table} SET run_uuid = ? WHERE run_uuid = ?", (new, old))
    with pytest.raises(BadInput, match="several runs begin with abcd"):
        select_id(open_one(), "abcd")


def test_last_is_the_newest_run_that_training_made(add, open_one, store):
    add(0.9)
    newest = add(None, status="FAILED")
    add(0.9, tags={REPRODUCES_TAG: newest})
    store.create("tracklight", "an evaluation", {}).finish("FINISHED")
    assert select_id(open_one(), "last") == newest


def test_best_is_among_those_scored_as_the_newest_on_the_same_data(add, open_one):
    add(0.99, data_name="other")
    add(0.999, params={"score.metric": "val/loss", "score.mode": "min"})
    best = add(0.8, data="split by another seed")
    add(math.nan)
    add(0.7)
    add(None, status="KILLED")
    add(0.9, tags={REPRODUCES_TAG: best})  # no new evidence, nor what was trained last
    assert select_id(open_one(), "best") == best


def test_a_pruned_trial_is_never_the_best_but_may_be_the_last(add, open_one):
    pruned = {OUTCOME_TAG: "pruned"}
    add(0.95, tags=pruned)
    with pytest.raises(BadInput, match="there is no best run"):
        select_id(open_one(), "best")
    best = add(0.8, tags={OUTCOME_TAG: "complete"})
    newest = add(0.9, tags=pruned)
    assert [select_id(open_one(), word) for word in ("best", "last")] == [best, newest]


def test_best_of_a_loss_is_the_smallest(add, open_one):
    loss = {"score.metric": "val/loss", "score.mode": "min"}
    best = add(0.1, params=loss)
    add(0.2, params=loss)
    assert select_id(open_one(), "best") == best


def test_best_and_last_look_into_the_experiment_named(add, open_one):
    here = add(0.5, experiment="here")
    add(0.9, experiment="there")
    assert select_id(open_one(), "last", "here") == select_id(open_one(), "best", "here") == here
    with pytest.raises(BadInput, match="no last run in experiment nowhere"):
        select_id(open_one(), "last", "nowhere")


def test_a_deleted_run_is_said_to_be_so_and_how_it_is_brought_back(add, store, open_one):
    run_id = add(0.1)
    store.client.delete_run(run_id)
    for word in (run_id, run_id[:6]):
        with pytest.raises(BadInput, match=f"run {run_id} is deleted; restore it with"):
            select_id(open_one(), word)


def test_an_evaluation_is_no_trained_run_and_names_the_one_it_tested():
    with pytest.raises(BadInput, match="run a1 is an evaluation of run b2; name that one"):
        trained_id("a1", {EVALUATES_TAG: "b2"})
    assert trained_id("b2", {}) == "b2"
