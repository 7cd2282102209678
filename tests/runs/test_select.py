"""How runs are named, on the reading side: by SQLite's tables and by MLflow's client alike."""

import math
import sqlite3
from contextlib import closing
from functools import partial

import pytest

from made_runs import add_run
from tracklight.errors import BadInput
from tracklight.runs.reader import ClientReader, RunFilter, SqliteReader, open_reader
from tracklight.runs.select import check_id, check_trained, choose_id
from tracklight.tracking.tags import EVALUATES_TAG, OUTCOME_TAG, PARENT_TAG, REPRODUCES_TAG

UNFIT = ["", "zzzz", "../../etc/passwd", "a\nb", "abc", "G" * 32, "a" * 33, "%", "a'b' --"]


@pytest.fixture
def add(store):
    return partial(add_run, store)


@pytest.fixture(params=["sqlite", "client"])
def ledger(request, store):
    def open_it():
        if request.param == "sqlite":
            return SqliteReader(store.database)
        return ClientReader(store.client, store.shown_uri)

    return open_it


@pytest.mark.parametrize("word", UNFIT)
def test_word_that_can_be_no_id_is_refused_in_one_line(word):
    with pytest.raises(BadInput, match="hexadecimal") as caught:
        check_id(word)
    assert "\n" not in str(caught.value)


def test_id_and_unique_prefix_name_the_run(add, ledger):
    run_id = add(0.5)
    assert choose_id(ledger(), run_id) == choose_id(ledger(), run_id[:12]) == run_id


def test_prefix_of_two_runs_is_refused(add, ledger, tmp_path):
    add(0.1), add(0.2)
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as connection, connection:
        connection.execute("PRAGMA foreign_keys = off")
        rows = connection.execute("SELECT run_uuid FROM runs").fetchall()
        for table in ("runs", "tags", "params", "latest_metrics", "metrics"):
            for (old,) in rows:
                new = "abcd" + old[4:]
                connection.execute(
                    f"UPDATE {table} SET run_uuid = ? WHERE run_uuid = ?", (new, old)
                )
    with pytest.raises(BadInput, match="several runs begin with abcd"):
        choose_id(ledger(), "abcd")


def test_last_is_the_newest_run_that_training_made(add, ledger, store):
    add(0.9)
    newest = add(None, status="FAILED")
    add(0.9, tags={REPRODUCES_TAG: newest})
    store.create("tracklight", "an evaluation", {}).finish("FINISHED")
    assert choose_id(ledger(), "last") == newest


def test_best_is_among_those_scored_as_the_newest_on_the_same_data(add, ledger):
    add(0.99, data_name="other")
    add(0.999, params={"score.metric": "val/loss", "score.mode": "min"})
    best = add(0.8, data="split by another seed")
    add(math.nan)
    add(0.7)
    add(None, status="KILLED")
    add(0.9, tags={REPRODUCES_TAG: best})  # no new evidence, nor what was trained last
    assert choose_id(ledger(), "best") == best


def test_a_pruned_trial_is_never_the_best_but_may_be_the_last(add, ledger):
    pruned = {OUTCOME_TAG: "pruned"}
    add(0.95, tags=pruned)
    with pytest.raises(BadInput, match="there is no best run"):
        choose_id(ledger(), "best")
    best = add(0.8, tags={OUTCOME_TAG: "complete"})
    newest = add(0.9, tags=pruned)
    assert [choose_id(ledger(), word) for word in ("best", "last")] == [best, newest]


def test_best_of_a_loss_is_the_smallest(add, ledger):
    loss = {"score.metric": "val/loss", "score.mode": "min"}
    best = add(0.1, params=loss)
    add(0.2, params=loss)
    assert choose_id(ledger(), "best") == best


def test_best_and_last_look_into_the_experiment_named(add, ledger):
    here = add(0.5, experiment="here")
    add(0.9, experiment="there")
    assert choose_id(ledger(), "last", "here") == choose_id(ledger(), "best", "here") == here
    with pytest.raises(BadInput, match="no last run in experiment nowhere"):
        choose_id(ledger(), "last", "nowhere")


def test_a_deleted_run_is_said_to_be_so_and_how_it_is_brought_back(add, store, ledger):
    run_id = add(0.1)
    store.client.delete_run(run_id)
    for word in (run_id, run_id[:6]):
        with pytest.raises(BadInput, match=f"run {run_id} is deleted; restore it with"):
            choose_id(ledger(), word)


def test_an_evaluation_is_no_trained_run_and_names_the_one_it_tested():
    with pytest.raises(BadInput, match="run a1 is an evaluation of run b2; name that one"):
        check_trained("a1", {EVALUATES_TAG: "b2"})
    check_trained("b2", {})


def test_both_ledgers_give_the_same_answers(add, store, tmp_path):
    parent = add(0.1, tags={"tracklight.sweep": "s"})
    for seed in range(3):
        add(
            *(seed / 10, f"setting{seed % 2}", seed),
            tags={PARENT_TAG: parent},
            losses=[3, 2.5, math.nan, 1],
            params={"optimizer.lr": 10.0**-seed, "quoted": "it is"},
        )
    add(math.inf, experiment="else"), add(math.nan), add(None, status="FAILED")
    again = add(0.1, tags={REPRODUCES_TAG: parent})
    add(0.2, tags={OUTCOME_TAG: "pruned"}), add(0.2, tags={OUTCOME_TAG: "complete"})
    tables, client = open_reader(None, tmp_path), ClientReader(store.client, "")
    assert isinstance(tables, SqliteReader)
    for chosen in (
        *(
            RunFilter(),
            RunFilter("tracklight"),
            RunFilter("else"),
            RunFilter("no"),
            RunFilter(parent=parent),
        ),
        *(RunFilter(params={"optimizer.lr": "0.1"}), RunFilter(tags={"tracklight.sweep": "s"})),
        RunFilter(tags={REPRODUCES_TAG: parent}),
    ):
        assert tables.scored(chosen, "score") == client.scored(chosen, "score")
    ids = [run.run_id for run in tables.scored(RunFilter(), "score")]
    assert len(ids) == 9 and again not in ids
    assert [run.run_id for run in client.scored(RunFilter(ids=[again]), "score")] == [again]

    def settled(entries):  # NaN is not equal to itself
        return [repr(each) for each in entries]

    assert sorted(map(str, tables.entries(ids))) == sorted(settled(client.entries(ids)))
    assert tables.series(ids, "train/loss_epoch") == client.series(ids, "train/loss_epoch")
    assert tables.ids(ids[0][:8]) == client.ids(ids[0][:8]) == [ids[0]]


def test_many_ids_are_asked_for_in_parts(add, tmp_path, monkeypatch):
    from tracklight.runs import reader as module

    monkeypatch.setattr(module, "_MAX_VARIABLES", 2)
    ids = [add(0.1, losses=[1]) for _ in range(5)]
    found = open_reader(None, tmp_path)
    assert sorted(entry.run_id for entry in found.entries(ids)) == sorted(ids)
    assert sorted(found.series(ids, "train/loss_epoch")) == sorted(ids)


def test_reading_makes_no_store(tmp_path):
    with pytest.raises(BadInput, match="there is no store"):
        open_reader(None, tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("content", [b"hello", b"SQLite format 3\0" + b"x" * 200])
def test_file_that_is_no_store_is_refused(tmp_path, content):
    (tmp_path / "mlflow.db").write_bytes(content)
    with pytest.raises(BadInput, match=r"cannot be read|no MLflow database"):
        open_reader(None, tmp_path)
