import functools
import os
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from disturbances import clock_set_back, full_disk, locked, points_of

from made_runs import add_run
from tracklight.errors import BadInput, RunFailed
from tracklight.runs.reader import RunFilter, latest_seeds, reader_of
from tracklight.runs.select import select_id
from tracklight.tracking.lock import RunLock
from tracklight.tracking.store import Store, connect


def hold_run(directory, run_id, ready):
    run = connect(None, directory).reopen(run_id)
    ready.set()
    time.sleep(60)
    run.finish("FINISHED")


def connect_as_nobody(directory, answer):
    os.setuid(65534)
    try:
        connect(None, directory)
    except BadInput as error:
        answer.put(str(error))
    else:
        answer.put("no error")


def test_a_run_is_created_with_its_tags_name_and_artifact_folder(store):
    run = store.create("mine", "first", {"tracklight.identity": "abc"})
    found = store.client.get_run(run.run_id)
    assert found.info.status == "RUNNING" and found.info.run_name == "first"
    assert found.data.tags["tracklight.identity"] == "abc"
    assert found.data.tags["mlflow.user"] and found.data.tags["mlflow.source.name"] == sys.argv[0]
    assert len(found.data.tags["tracklight.key"]) == 32
    assert store.client.get_experiment(found.info.experiment_id).name == "mine"
    assert run.artifacts == store.directory / "artifacts" / run.run_id / "artifacts"
    assert found.info.artifact_uri == run.artifacts.as_uri()
    run.finish("FINISHED")


def test_a_run_says_how_it_is_seen(store, monkeypatch, tmp_path):
    info = SimpleNamespace(experiment_id="7", run_id="abc")
    assert store.ui_hint(info) == f"python scripts/ui.py --dir {store.directory}"
    monkeypatch.setattr("tracklight.tracking.store.HOME", store.directory)
    assert store.ui_hint(info) == "make ui"
    other = f"sqlite:///{tmp_path}/a b.db"
    assert Store(None, other, tmp_path).ui_hint(info) == f"python scripts/ui.py --uri '{other}'"
    served = Store(None, "https://me:secret@host:80/", tmp_path)
    assert served.ui_hint(info) == "https://***@host:80/#/experiments/7/runs/abc"


def test_a_run_without_a_name_gets_one(store):
    run = store.create("mine", None, {})
    assert run.name == store.client.get_run(run.run_id).info.run_name != ""
    run.finish("FINISHED")


def test_a_deleted_experiment_is_bad_input(store):
    experiment = store.client.create_experiment("old")
    store.client.delete_experiment(experiment)
    with pytest.raises(BadInput, match="tracking.experiment=old"):
        store.create("old", None, {})
    assert store.search("") == []


def test_search_gives_runs_newest_first_and_no_deleted_ones(store):
    ids = []
    for number, identity in enumerate(["a", "b", "a", "a"]):
        run = store.create(f"experiment {number}", None, {"tracklight.identity": identity})
        run.finish("FINISHED")
        ids.append(run.run_id)
        time.sleep(0.002)
    store.client.delete_run(ids[2])
    assert [run.info.run_id for run in store.search("tags.`tracklight.identity` = 'a'")] == [ids[3], ids[0]]


def test_a_run_in_progress_is_refused_with_its_pid_and_not_written_to(directory, processes):
    store = connect(None, directory)
    run = store.create("mine", None, {})
    run.finish("KILLED")
    ready = processes.Event()
    holder = processes.Process(target=hold_run, args=(directory, run.run_id, ready))
    holder.start()
    assert ready.wait(60)
    before = (run.folder / "points.wal").read_bytes()
    with pytest.raises(BadInput, match=rf"run {run.run_id} is in progress \(pid {holder.pid}\)"):
        store.reopen(run.run_id)
    assert (run.folder / "points.wal").read_bytes() == before
    holder.kill()
    holder.join()
    store.reopen(run.run_id).finish("FINISHED")
    assert store.client.get_run(run.run_id).info.status == "FINISHED"


def test_a_run_whose_process_died_and_is_being_recovered_is_waited_for(store, processes):
    run = store.create("mine", None, {})
    run.finish("KILLED")
    died = processes.Process(target=int)
    died.start()
    died.join()
    RunLock(run.folder, store.lock_content | {"pid": died.pid}).close()
    recovering = RunLock(run.folder, None)
    threading.Timer(0.2, recovering.close).start()
    store.reopen(run.run_id).finish("FAILED")
    assert store.client.get_run(run.run_id).info.status == "FAILED"


def test_a_continued_run_is_running_again_and_keeps_every_point_once(store):
    run = store.create("mine", None, {})
    run.log_series("loss", [1, 2, 3], [0.3, 0.2, 0.1])
    run.finish("KILLED")
    assert store.client.get_run(run.run_id).info.status == "KILLED"
    run = store.reopen(run.run_id)
    assert store.client.get_run(run.run_id).info.status == "RUNNING"
    run.log_series("loss", [2, 3, 4], [0.2, 0.1, 0.05])
    run.finish("FINISHED")
    assert store.client.get_run(run.run_id).info.status == "FINISHED"
    assert points_of(store, run.run_id, "loss") == [(1, 0.3), (2, 0.2), (3, 0.1), (4, 0.05)]


@pytest.mark.parametrize("damage", ["removed", "emptied", "cut"])
def test_a_lost_write_ahead_file_doubles_nothing(store, damage):
    run = store.create("mine", None, {})
    for step in (1, 2, 3):
        run.log_series("loss", [step], [step / 10])
    run.finish("KILLED")
    path = run.folder / "points.wal"
    if damage == "removed":
        path.unlink()
    else:
        os.truncate(path, 0 if damage == "emptied" else 20)
    run = store.reopen(run.run_id)
    run.log_series("loss", [2, 3, 4], [0.2, 0.3, 0.4])
    run.finish("FINISHED")
    assert points_of(store, run.run_id, "loss") == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4)]


def test_search_finds_more_than_one_page(store, monkeypatch):
    ids = [store.client.create_run("0").info.run_id for _ in range(5)]
    real = store.client.search_runs
    small = functools.partial(real, max_results=2)
    monkeypatch.setattr(store.client, "search_runs", small)
    assert sorted(run.info.run_id for run in store.search("")) == sorted(ids)


@pytest.mark.parametrize("run_id", ["", "0" * 32, "../../etc/passwd", "a\nb", "' OR 1=1"])
def test_a_run_id_that_is_none_is_refused_in_one_line(store, run_id):
    with pytest.raises(BadInput) as caught:
        store.reopen(run_id)
    assert "\n" not in str(caught.value)
    assert not (store.directory / "artifacts" / "..").joinpath("passwd").exists()


def test_a_deleted_run_cannot_be_continued(store):
    run = store.create("mine", None, {})
    run.finish("FINISHED")
    store.client.delete_run(run.run_id)
    with pytest.raises(BadInput, match="is deleted"):
        store.reopen(run.run_id)


@pytest.mark.parametrize("name", ["file", "file/deeper"])
def test_a_file_where_the_directory_should_be_is_refused(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match="tracking.dir"):
        connect(None, tmp_path / name)


@pytest.mark.skipif(os.getuid() != 0, reason="becomes another user, which only root can")
def test_a_directory_that_cannot_be_written_is_refused(processes):
    directory = Path(tempfile.mkdtemp())  # pytest's own folders are closed to other users
    directory.chmod(0o755)
    answer = processes.Queue()
    child = processes.Process(target=connect_as_nobody, args=(directory, answer))
    child.start()
    assert f"tracking.dir={directory} cannot be written" in answer.get(timeout=60)
    child.join()
    assert list(directory.iterdir()) == []
    shutil.rmtree(directory)


def test_a_run_folder_that_cannot_be_written_is_refused_before_training(store):
    run = store.create("mine", None, {})
    run.finish("KILLED")
    shutil.rmtree(run.folder)
    run.folder.touch()
    with pytest.raises(BadInput, match="cannot write run folder"):
        store.reopen(run.run_id)
    assert store.client.get_run(run.run_id).info.status == "KILLED"


def test_a_writer_that_holds_the_database_for_seconds_delays_and_loses_nothing(store):
    held = threading.Event()

    def hold():
        with locked(store.database):
            held.set()
            time.sleep(2)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    run = store.create("mine", None, {})
    thread.join()
    assert store.client.get_run(run.run_id).info.status == "RUNNING"
    run.finish("FINISHED")


@pytest.mark.slow
def test_a_writer_that_holds_the_database_for_30_s_loses_nothing(store):
    run = store.create("mine", None, {})

    def hold():
        with locked(store.database):
            held.set()
            time.sleep(30)

    held = threading.Event()
    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    run.log_series("loss", [1, 2], [1.0, 2.0])
    second = store.create("another", None, {})
    thread.join()
    run.finish("FINISHED")
    second.finish("FINISHED")
    assert points_of(store, run.run_id, "loss") == [(1, 1.0), (2, 2.0)]
    assert [found.info.status for found in store.search("")] == ["FINISHED"] * 2


def test_a_store_that_fails_makes_one_line_and_no_run(store, monkeypatch):
    monkeypatch.setattr(store, "timeout_s", 0.0)
    with full_disk(100_000), pytest.raises(RunFailed) as caught:
        store.create("mine", None, {})
    assert "\n" not in str(caught.value)
    store.recover()
    assert store.search("") == []


def test_the_newest_run_is_the_one_made_last_whatever_the_clock_says(store):
    first = add_run(store, 0.5, "setting")
    with clock_set_back(3600):
        last = add_run(store, 0.4, "setting")
    found = reader_of(store)
    assert [run.info.run_id for run in store.search("")] == [last, first]
    assert select_id(found, "last") == last
    assert [run.run_id for run in found.get_runs([first, last])] == [last, first]
    assert latest_seeds(found.search_scores(RunFilter(), "score"))[0].run_id == last
