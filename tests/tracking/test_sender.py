"""The server dies, hangs and loses answers; every test starts from a real one."""

import logging
import shutil
import time

import pytest
from disturbances import Server, points_of, wait_for
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import BAD_REQUEST, PERMISSION_DENIED

from tracklight.tracking.store import connect
from tracklight.tracking.tags import KEY_TAG

pytestmark = pytest.mark.server


@pytest.fixture
def local(tmp_path):
    return tmp_path / "mlruns"


def test_a_server_killed_and_back_in_the_middle_misses_and_doubles_nothing(
    processes, template, tmp_path, local, swift, short_requests, caplog, sending_threads
):
    (tmp_path / "server").mkdir()
    shutil.copy(template, tmp_path / "server" / "mlflow.db")
    server = Server(processes, tmp_path / "server")
    server.start()
    store = connect(server.uri, local)
    run = store.create("mine", None, {})
    run.log_series("loss", range(1, 1501), [0.5] * 1500)
    run.flush(30)

    server.kill()
    for step in range(1501, 1521):
        run.log_series("loss", [step], [0.25])
        time.sleep(0.01)
    run.log_params({"lr": 0.1})
    run.set_tags({"during": "outage"})
    wait_for(lambda: "takes nothing now" in caplog.text)
    assert sending_threads == {"tracklight-sender"}  # logging waits for no server
    server.start()
    wait_for(lambda: "answers again" in caplog.text)
    run.finish("FINISHED")
    server_lines = [r for r in caplog.records if r.name.startswith("tracklight")]
    assert len(server_lines) == 2

    values = [0.5] * 1500 + [0.25] * 20
    assert points_of(store, run.run_id, "loss") == list(zip(range(1, 1521), values, strict=True))
    found = store.client.get_run(run.run_id)
    assert found.info.status == "FINISHED"
    assert found.data.params == {"lr": "0.1"} and found.data.tags["during"] == "outage"

    # Gone for good: the run ends in bounded time, and the next start of anything sends the rest.
    run = store.create("mine", None, {})
    run.log_text("hello", "a/b.txt")
    server.kill()
    run.timeout_s = 2.0
    run.log_series("loss", [1, 2], [1.0, 2.0])
    run.upload_artifacts()
    run.finish("FINISHED")
    assert (run.folder / "run.lock").exists()
    server.start()
    store = connect(server.uri, local)
    assert store.client.get_run(run.run_id).info.status == "RUNNING"
    store.recover()
    assert store.client.get_run(run.run_id).info.status == "FINISHED"
    assert points_of(store, run.run_id, "loss") == [(1, 1.0), (2, 2.0)]
    assert [f.path for f in store.client.list_artifacts(run.run_id, "a")] == ["a/b.txt"]
    assert not (run.folder / "run.lock").exists()
    server.kill()


@pytest.mark.parametrize(
    ("spoilt", "times"),
    [("500", 1), ("500", 1000), pytest.param("hang", 1, marks=pytest.mark.slow)],
)
def test_lost_answers_to_create_run_make_no_orphan(proxy, local, short_requests, spoilt, times):
    def lose_first(method, path):
        creations = [p for p in proxy.requests if p.endswith("runs/create")]
        return spoilt if path.endswith("runs/create") and len(creations) <= times else None

    store = connect(proxy.uri, local)
    proxy.spoil = lose_first
    identity = f"{spoilt} {times}"
    run = store.create(f"creation {identity}", None, {"tracklight.identity": identity})
    run.finish("FINISHED")
    assert [found.info.run_id for found in store.search(f"tags.`tracklight.identity` = '{identity}'")] == [
        run.run_id
    ]
    assert [path.name for path in (local / "artifacts").iterdir()] == [run.run_id]


@pytest.mark.parametrize("may_delete", [True, False])
def test_a_run_that_a_server_makes_late_of_a_repeated_request_is_gone_when_the_run_ends(
    shared_server, local, swift, caplog, monkeypatch, may_delete
):
    store = connect(shared_server.uri, local)
    run = store.create("late", None, {"mine": "1"})
    run.log_params({"lr": 0.1})
    made = store.client.get_run(run.run_id)
    args = (run.experiment_id, made.info.start_time, made.data.tags)
    late, used, other = (store.client.create_run(*args).info.run_id for _ in range(3))
    store.client.log_metric(used, "loss", 1.0)
    store.client.set_tag(other, KEY_TAG, "of another run")
    if not may_delete:

        def refuse(run_id):
            raise MlflowException("Permission denied", PERMISSION_DENIED)

        monkeypatch.setattr(run._writer.client, "delete_run", refuse)
    run.finish("FINISHED")
    found = {each.info.run_id for each in store.search("", experiment="late")}
    assert found == {run.run_id, used, other} | (set() if may_delete else {late})
    assert store.client.get_run(run.run_id).info.status == "FINISHED"
    assert ("may not be deleted" in caplog.text) != may_delete
    monkeypatch.undo()
    for each in found:
        store.client.delete_run(each)


@pytest.mark.parametrize("driver", ["sqlite3.IntegrityError", "psycopg.errors.UniqueViolation"])
def test_a_data_set_that_two_runs_record_at_once_is_recorded_without_a_word(
    shared_server, local, caplog, monkeypatch, driver
):
    store = connect(shared_server.uri, local)
    run = store.create("twice", None, {})
    log_inputs, calls = store.client.log_inputs, []

    def conflict_at_first(*args):
        calls.append(args)
        if len(calls) == 1:
            raise MlflowException(f"BAD_REQUEST: ({driver}) UNIQUE", BAD_REQUEST)
        return log_inputs(*args)

    monkeypatch.setattr(run._writer.client, "log_inputs", conflict_at_first)
    run.log_input("digits", "0123", "here", "train")
    run.finish("FINISHED")
    found = store.client.get_run(run.run_id)
    assert [each.dataset.digest for each in found.inputs.dataset_inputs] == ["0123"] and len(calls) == 2
    assert found.info.status == "FINISHED" and not caplog.records


@pytest.mark.parametrize("spoilt", ["500", pytest.param("hang", marks=pytest.mark.slow)])
def test_a_lost_answer_to_log_batch_doubles_no_point(proxy, local, swift, short_requests, caplog, spoilt):
    lost = []

    def lose_some(method, path):
        if path.endswith("log-batch") and len(lost) < 2:
            lost.append(path)
            return spoilt
        return None

    store = connect(proxy.uri, local)
    run = store.create("batches", None, {})
    proxy.spoil = lose_some
    run.log_series("loss", range(1200), [i / 3 for i in range(1200)])
    with caplog.at_level(logging.WARNING):
        run.finish("FINISHED")
    assert len(lost) == 2
    assert points_of(store, run.run_id, "loss") == [(i, i / 3) for i in range(1200)]
    assert store.client.get_run(run.run_id).info.status == "FINISHED"


def test_artifacts_go_where_the_server_keeps_them_once_each(shared_server, local, tmp_path):
    store = connect(shared_server.uri, local)
    run = store.create("artifacts", None, {})
    assert run.artifacts == local / "artifacts" / run.run_id / "artifacts"
    run.log_text("one", "top.txt")
    run.log_text("two", "deep/er.txt")
    run.upload_artifacts()
    run.log_text("three", "deep/er.txt")
    run.upload_artifacts()
    run.finish("FINISHED")
    fetched = store.client.download_artifacts(run.run_id, "", str(tmp_path))
    assert {p.name: p.read_text() for p in tmp_path.rglob("*.txt") if str(local) not in str(p)} == {
        "top.txt": "one",
        "er.txt": "three",
    }, fetched


def test_a_param_that_the_server_refuses_holds_nothing_up(shared_server, local, swift, caplog):
    store = connect(shared_server.uri, local)
    run = store.create("refused", None, {})
    store.client.log_param(run.run_id, "lr", "1")  # by someone else
    run.log_params({"lr": 2})
    run.log_series("loss", [1], [1.0])
    run.finish("FINISHED")
    assert "refused params" in caplog.text
    assert points_of(store, run.run_id, "loss") == [(1, 1.0)]
