import json
import math
import sqlite3
from contextlib import closing

import pytest
from disturbances import locked
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tracklight.errors import BadInput, RunFailed
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
        table = RunTables(store.database)
        table.write(run, [Points(1, "loss", (1, 2), (0.3, 0.2)), Points(1, "accuracy", (2,), (0.9,))])
        table.write(run, [Points(2, "score", (2,), (0.9,)), Points(2, "test/loss", (2,), (0.4,))])
        table.write(run, [Points(3, "score", (3,), (0.95,))])
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
    table = RunTables(store.database)
    for batch in [*batches, batches[0]]:  # the first one sent twice, as after an outage
        log_batch(store, theirs, batch)
        table.write(ours, batch)
    table.close()
    for name in ("metrics", "latest_metrics"):
        assert rows(store.database, name, ours) == rows(store.database, name, theirs)


def test_more_points_than_one_statement_holds_all_arrive(store):
    run_id = store.client.create_run("0").info.run_id
    table = RunTables(store.database)
    table.write(run_id, [Points(1, "loss", tuple(range(938)), tuple(i / 7 for i in range(938)))])
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
    table = RunTables(store.database)
    for _ in range(2):  # sent twice, as after an outage
        calls = [Call(1, "params", {"values": params}), Call(1, "tags", {"values": tags})]
        calls.append(Call(1, "status", {"status": "FAILED", "end_ms": 7}))
        assert all(call.fills_tables for call in calls)
        table.write(ours, calls)
    table.close()
    found, expected = (store.client.get_run(run_id) for run_id in (ours, theirs))
    assert found.data.to_dictionary() == expected.data.to_dictionary()
    of_ours = {"run_id": theirs, "artifact_uri": expected.info.artifact_uri}
    assert dict(found.info) | of_ours == dict(expected.info)


def test_a_call_that_does_more_than_to_fill_tables_is_left_to_the_client():
    assert not Call(1, "tags", {"values": {"mlflow.runName": "new"}}).fills_tables
    assert not Call(1, "status", {"status": "RUNNING"}).fills_tables
    assert not Call(1, "publish", {}).fills_tables


def test_a_batch_is_written_whole_or_not_at_all(store):
    run_id = store.client.create_run("0").info.run_id
    table = RunTables(store.database)
    too_large = 2**63
    with pytest.raises(OverflowError):
        table.write(
            run_id, [Points(1, "a", tuple(range(200)), (1.0,) * 200), Points(1, "b", (too_large,), (1.0,))]
        )
    assert rows(store.database, "metrics", run_id) == []
    table.write(run_id, [Points(1, "a", (1,), (1.0,))])
    assert len(rows(store.database, "metrics", run_id)) == 1
    table.close()


def test_a_deleted_or_unknown_run_takes_no_points(store):
    run_id = store.client.create_run("0").info.run_id
    store.client.delete_run(run_id)
    for unfit in (run_id, "0" * 32):
        table = RunTables(store.database)
        with pytest.raises(sqlite3.IntegrityError):
            table.write(unfit, [Points(1, "loss", (1,), (1.0,))])
        assert rows(store.database, "metrics", unfit) == []
        table.close()


def test_another_writer_is_waited_for_a_bounded_time(store, monkeypatch):
    monkeypatch.setattr(sqlite_file, "_BUSY_S", 0.2)
    run_id = store.client.create_run("0").info.run_id
    table = RunTables(store.database)
    with locked(store.database), pytest.raises(sqlite3.OperationalError, match="locked"):
        table.write(run_id, [Points(1, "loss", (1,), (1.0,))])
    table.write(run_id, [Points(1, "loss", (1,), (1.0,))])
    table.close()
    assert len(rows(store.database, "metrics", run_id)) == 1


def test_a_database_that_is_gone_is_not_made_anew(store):
    store.database.rename(store.database.with_name("away"))
    with pytest.raises(sqlite3.OperationalError):
        RunTables(store.database)
    assert not store.database.exists()


OF_POINTS = ("metrics", "latest_metrics", "params", "tags")


@pytest.mark.parametrize("table", [*OF_POINTS, "experiments", "runs", "datasets", "inputs", "input_tags"])
def test_tables_of_another_shape_are_not_touched(store, table):
    assert has_known_columns(store.database) and has_known_columns(store.database, fills_all=True)
    with closing(sqlite3.connect(store.database)) as connection, connection:
        connection.execute(f"ALTER TABLE {table} ADD COLUMN unit TEXT")
    connection.close()
    assert has_known_columns(store.database) is (table not in OF_POINTS)
    assert not has_known_columns(store.database, fills_all=True)
    store.send_directly()
    run = store.create("lines", "first", {"own": "tag"})  # by MLflow's client
    run.set_tags({"further": "tag"})
    run.finish("FINISHED")
    assert store.client.get_run(run.run_id).data.tags.items() >= {"own": "tag", "further": "tag"}.items()


def test_what_sqlite_refuses_while_a_run_is_made_directly_is_one_line(store, monkeypatch):
    store.send_directly()

    def full(*_, **__):
        raise sqlite3.DatabaseError("database or disk is full")

    monkeypatch.setattr(RunTables, "create_run", full)
    with pytest.raises(RunFailed, match=r"cannot make a run at .*: database or disk is full$"):
        store.create("lines", "first", {})
    assert not [*store.runs_folder.glob("*")]


def without_ids(run):
    """Return a run as plain values, its own id and time replaced."""
    text = json.dumps(run.to_dictionary(), sort_keys=True)
    tree = json.loads(text.replace(run.info.run_id, "ID"))
    tree["info"]["start_time"] = None
    tree["data"]["tags"]["tracklight.key"] = "KEY"
    return tree


def test_a_run_made_and_described_directly_is_the_one_that_mlflow_makes(store):
    made = []
    for is_direct in (False, True, True):
        if is_direct:
            store.send_directly()
        run = store.create("lines", "first of 'two'", {"seed": "1", "mlflow.parentRunId": "0" * 32})
        assert isinstance(run.entity().info.start_time, int)
        for _ in range(2):
            run.log_input("line", "d1", "y = 2 x", "training")
        run.log_params({"seed": 1})
        run.finish("FINISHED")
        entity = store.client.get_run(run.run_id)
        assert entity.info.start_time <= entity.info.end_time
        entity.info._end_time = None
        made.append(entity)
    first, *others = made
    assert len({each.info.run_id for each in made}) == 3
    for each in others:
        assert without_ids(each) == without_ids(first)
    with closing(sqlite3.connect(store.database)) as connection:
        for table, num in (("datasets", 1), ("inputs", 3), ("input_tags", 3)):
            assert connection.execute(f"SELECT count(*) FROM {table}").fetchone() == (num,)
        columns = (
            "typeof(run_uuid), name, source_type, source_name, entry_point_name, user_id, source_version"
        )
        columns += ", lifecycle_stage, typeof(start_time), typeof(experiment_id), deleted_time"
        assert len({*connection.execute(f"SELECT {columns} FROM runs")}) == 1


def test_in_an_experiment_that_is_deleted_or_elsewhere_no_run_is_made_directly(store, tmp_path):
    store.send_directly()
    elsewhere = store.client.create_experiment("elsewhere", tmp_path.as_uri())
    run = store.create("elsewhere", "first", {})
    assert store.client.get_run(run.run_id).info.artifact_uri.startswith(tmp_path.as_uri())
    run.finish("FINISHED")
    store.client.delete_experiment(elsewhere)
    with pytest.raises(BadInput, match="tracking.experiment=elsewhere is deleted"):
        store.create("elsewhere", "second", {})
