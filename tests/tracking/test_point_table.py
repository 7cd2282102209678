import math
import sqlite3
from contextlib import closing

import pytest
from disturbances import locked
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tracklight.tracking import sqlite_file
from tracklight.tracking.mlflow_client import mlflow
from tracklight.tracking.sqlite_file import RunTables, has_known_columns
from tracklight.tracking.wal import Call, Points

VALUES = st.sampled_from([0.1, -2.5, math.nan, math.inf, -math.inf, 1e300, 0.0])
POINTS = st.builds(
    lambda timestamp, key, points: Points(
        timestamp, key, tuple(step for step, _ in points), tuple(value for _, value in points)
    ),
    st.integers(1, 3),
    st.sampled_from(["loss", "val/accuracy"]),
    st.lists(st.tuples(st.integers(-2, 4), VALUES), min_size=1, max_size=4),
)


def rows(database, table, run_id):
    with closing(sqlite3.connect(database)) as connection, connection:
        return connection.execute(
            "SELECT key, value, typeof(value), timestamp, step, is_nan, typeof(is_nan) "
            f"FROM {table} WHERE run_uuid = ? ORDER BY 1, 2, 4, 5, 6",
            (run_id,),
        ).fetchall()


def test_the_score_comes_first_for_who_reads_a_run(store):
    runs = [store.client.create_run("0").info.run_id for _ in range(2)]
    for run in runs:
        table = RunTables(store.database, run)
        table.write([Points(1, "loss", (1, 2), (0.3, 0.2)), Points(1, "accuracy", (2,), (0.9,))])
        table.write([Points(2, "score", (2,), (0.9,)), Points(2, "test/loss", (2,), (0.4,))])
        table.write([Points(3, "score", (3,), (0.95,))])
        table.close()
    for run in runs:
        metrics = store.client.get_run(run).data.metrics
        assert [*metrics] == ["score", "loss", "accuracy", "test/loss"]
        assert metrics["score"] == 0.95


def log_batch(store, run_id, records):
    store.client.log_batch(
        run_id,
        metrics=[
            mlflow.entities.Metric(record.key, value, record.timestamp_ms, step)
            for record in records
            for step, value in zip(record.steps, record.values, strict=True)
        ],
    )


@given(batches=st.lists(st.lists(POINTS, min_size=1, max_size=4), min_size=1, max_size=3))
@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_rows_are_those_that_log_batch_writes(store, batches):
    theirs, ours = (store.client.create_run("0").info.run_id for _ in range(2))
    table = RunTables(store.database, ours)
    for batch in [*batches, batches[0]]:  # the first one sent twice, as after an outage
        log_batch(store, theirs, batch)
        table.write(batch)
    table.close()
    for name in ("metrics", "latest_metrics"):
        assert rows(store.database, name, ours) == rows(store.database, name, theirs)


def test_more_points_than_one_statement_holds_all_arrive(store):
    run_id = store.client.create_run("0").info.run_id
    table = RunTables(store.database, run_id)
    table.write([Points(1, "loss", tuple(range(938)), tuple(i / 7 for i in range(938)))])
    table.close()
    history = store.client.get_metric_history(run_id, "loss")
    assert [(m.step, m.value) for m in history] == [(i, i / 7) for i in range(938)]


def test_params_tags_and_the_end_of_a_run_are_as_the_client_writes_them(store):
    theirs, ours = (store.client.create_run("0", 1, {"seen": "no"}, "name").info.run_id for _ in range(2))
    params, tags = {"seed": "1", "optimizer.lr": "0.1", "empty": ""}, {"seen": "yes", "mlflow.note": "so"}
    entities = mlflow.entities
    of_params = [entities.Param(*each) for each in params.items()]
    store.client.log_batch(theirs, params=of_params, tags=[entities.RunTag(*each) for each in tags.items()])
    store.client.set_terminated(theirs, "FAILED", 7)
    table = RunTables(store.database, ours)
    for _ in range(2):  # sent twice, as after an outage
        calls = [Call(1, "params", {"values": params}), Call(1, "tags", {"values": tags})]
        calls.append(Call(1, "status", {"status": "FAILED", "end_ms": 7}))
        assert all(call.fills_tables for call in calls)
        table.write(calls)
    table.close()
    found, expected = (store.client.get_run(run_id) for run_id in (ours, theirs))
    assert found.data.to_dictionary() == expected.data.to_dictionary()
    of_ours = {"run_id": theirs, "artifact_uri": expected.info.artifact_uri}
    assert dict(found.info) | of_ours == dict(expected.info)


def test_a_call_that_does_more_than_to_fill_tables_is_left_to_the_client():
    assert not Call(1, "tags", {"values": {"mlflow.runName": "new"}}).fills_tables
    assert not Call(1, "status", {"status": "RUNNING"}).fills_tables
    assert not Call(1, "input", {"name": "line"}).fills_tables


def test_a_batch_is_written_whole_or_not_at_all(store):
    run_id = store.client.create_run("0").info.run_id
    table = RunTables(store.database, run_id)
    too_large = 2**63
    with pytest.raises(OverflowError):
        table.write([Points(1, "a", tuple(range(200)), (1.0,) * 200), Points(1, "b", (too_large,), (1.0,))])
    assert rows(store.database, "metrics", run_id) == []
    table.write([Points(1, "a", (1,), (1.0,))])
    assert len(rows(store.database, "metrics", run_id)) == 1
    table.close()


def test_a_deleted_or_unknown_run_takes_no_points(store):
    run_id = store.client.create_run("0").info.run_id
    store.client.delete_run(run_id)
    for unfit in (run_id, "0" * 32):
        table = RunTables(store.database, unfit)
        with pytest.raises(sqlite3.IntegrityError):
            table.write([Points(1, "loss", (1,), (1.0,))])
        assert rows(store.database, "metrics", unfit) == []
        table.close()


def test_another_writer_is_waited_for_a_bounded_time(store, monkeypatch):
    monkeypatch.setattr(sqlite_file, "_BUSY_S", 0.2)
    run_id = store.client.create_run("0").info.run_id
    table = RunTables(store.database, run_id)
    with locked(store.database), pytest.raises(sqlite3.OperationalError, match="locked"):
        table.write([Points(1, "loss", (1,), (1.0,))])
    table.write([Points(1, "loss", (1,), (1.0,))])
    table.close()
    assert len(rows(store.database, "metrics", run_id)) == 1


def test_a_database_that_is_gone_is_not_made_anew(store):
    store.database.rename(store.database.with_name("away"))
    with pytest.raises(sqlite3.OperationalError):
        RunTables(store.database, "0" * 32)
    assert not store.database.exists()


@pytest.mark.parametrize(
    "change",
    [
        *(f"TABLE {name} ADD COLUMN unit TEXT" for name in ("metrics", "latest_metrics", "params", "tags")),
        "TABLE runs RENAME COLUMN end_time TO ended",
    ],
)
def test_tables_of_another_shape_are_not_touched(store, change):
    assert has_known_columns(store.database)
    with closing(sqlite3.connect(store.database)) as connection, connection:
        connection.execute(f"ALTER {change}")
    connection.close()
    assert not has_known_columns(store.database)
