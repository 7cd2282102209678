"""The server dies, hangs and loses answers; every test starts from a real one."""

import logging
import shutil
import time

import pytest
from disturbances import Server, points_of, wait_for

from tracklight.tracking.store import connect

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
