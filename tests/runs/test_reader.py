"""Runs read from SQLite's tables and by MLflow's client."""

import math
from functools import partial

import pytest

from made_runs import add_run
from tracklight.errors import BadInput
from tracklight.runs.reader import ClientReader, RunFilter, SqliteReader, open_reader
from tracklight.tracking.tags import OUTCOME_TAG, PARENT_TAG, REPRODUCES_TAG


@pytest.fixture
def add(store):
    return partial(add_run, store)


def test_both_readers_give_the_same_answers(add, store, tmp_path):
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
    tables, client = open_reader(None, tmp_path), ClientReader(store)
    assert isinstance(tables, SqliteReader)
    for chosen in (
        *(
            RunFilter(),
            RunFilter("tracklight"),
            RunFilter("else"),
            RunFilter("no"),
            RunFilter(tags={PARENT_TAG: parent}),
        ),
        *(RunFilter(params={"optimizer.lr": "0.1"}), RunFilter(tags={"tracklight.sweep": "s"})),
        RunFilter(tags={REPRODUCES_TAG: parent}),
    ):
        assert tables.search_scores(chosen, "score") == client.search_scores(chosen, "score")
    ids = [run.run_id for run in tables.search_scores(RunFilter(), "score")]
    assert len(ids) == 9 and again not in ids
    assert [
        run.run_id for run in client.search_scores(RunFilter(tags={REPRODUCES_TAG: parent}), "score")
    ] == [again]

    def as_text(runs):  # NaN is not equal to itself
        return [repr(each) for each in runs]

    assert sorted(map(str, tables.get_runs(ids))) == sorted(as_text(client.get_runs(ids)))
    assert tables.get_histories(ids, "train/loss_epoch") == client.get_histories(ids, "train/loss_epoch")
    assert tables.find_ids(ids[0][:8]) == client.find_ids(ids[0][:8]) == [ids[0]]


def test_many_ids_are_asked_for_in_parts(add, tmp_path, monkeypatch):
    from tracklight.runs import reader

    monkeypatch.setattr(reader, "BATCH_SIZE", 2)
    ids = [add(0.1, losses=[1]) for _ in range(5)]
    found = open_reader(None, tmp_path)
    assert sorted(run.run_id for run in found.get_runs(ids)) == sorted(ids)
    assert sorted(found.get_histories(ids, "train/loss_epoch")) == sorted(ids)


def test_reading_makes_no_store(tmp_path):
    with pytest.raises(BadInput, match="there is no store"):
        open_reader(None, tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("content", [b"hello", b"SQLite format 3\0" + b"x" * 200])
def test_file_that_is_no_store_is_refused(tmp_path, content):
    (tmp_path / "mlflow.db").write_bytes(content)
    with pytest.raises(BadInput, match=r"cannot be read|no MLflow database"):
        open_reader(None, tmp_path)
