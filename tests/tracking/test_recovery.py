import json
import logging
import os
import shutil
import signal
import time

import pytest
from disturbances import points_of

from tracklight.errors import BadInput
from tracklight.tracking import tags
from tracklight.tracking.lock import FILE_NAME
from tracklight.tracking.store import Store, connect


def die_training(directory, answer):
    """Log some, see to it that not all is sent, and be killed."""
    run = connect(None, directory).create("mine", None, {"tracklight.identity": "it"})
    run.log_series("loss", [1], [1.0])
    assert run.flush(30)
    run.log_series("loss", [2, 3], [2.0, 3.0])
    run.set_tags({"late": "yes"})
    answer.put(run.run_id)
    answer.close()
    answer.join_thread()
    os.kill(os.getpid(), signal.SIGKILL)


def die_creating(directory, moment):
    store = connect(None, directory)
    if moment == "before the request":
        store.client.create_run = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)
    else:
        real = store.client.create_run

        def create_and_die(*args, **kwargs):
            real(*args, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)

        store.client.create_run = create_and_die
    store.create("mine", None, {"tracklight.identity": "it"})


@pytest.mark.parametrize("name", ["points.sent", "artifacts/.config.yaml.tmp"])
def test_a_link_in_a_runs_folder_makes_nobody_write_elsewhere(directory, tmp_path, caplog, name):
    store, thesis = connect(None, directory), tmp_path / "thesis.txt"
    thesis.write_text("three years")
    run = store.create("mine", None, {"tracklight.identity": "it"})
    run.log_series("loss", [1], [1.0])
    run.abandon()
    link = run.folder / name
    link.parent.mkdir(exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(thesis)
    (run.folder / FILE_NAME).write_text(json.dumps({"pid": 1} | store.lock_content))
    store.recover()
    assert f"{name} leads out of its folder" in caplog.text
    with pytest.raises(BadInput, match="leads out of its folder"):
        store.reopen(run.run_id)
    assert thesis.read_text() == "three years"


def test_a_killed_run_gets_its_points_and_the_status_killed(directory, processes):
    answer = processes.Queue()
    child = processes.Process(target=die_training, args=(directory, answer))
    child.start()
    run_id = answer.get(timeout=60)
    child.join()
    assert child.exitcode == -signal.SIGKILL
    store = connect(None, directory)
    assert store.client.get_run(run_id).info.status == "RUNNING"
    store.recover()
    found = store.client.get_run(run_id)
    assert found.info.status == "KILLED" and found.data.tags["late"] == "yes"
    assert found.info.start_time <= found.info.end_time <= time.time() * 1000
    assert points_of(store, run_id, "loss") == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert not (directory / "artifacts" / run_id / FILE_NAME).exists()
    store.reopen(run_id).finish("FINISHED")
    assert store.client.get_run(run_id).info.status == "FINISHED"


@pytest.mark.parametrize("moment", ["before the request", "after it"])
def test_a_process_killed_while_it_creates_its_run_leaves_no_orphan(directory, processes, moment):
    child = processes.Process(target=die_creating, args=(directory, moment))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    store = connect(None, directory)
    store.recover()
    runs = store.search("tags.`tracklight.identity` = 'it'")
    assert [run.info.status for run in runs] == ([] if moment == "before the request" else ["KILLED"])
    for run in runs:
        store.reopen(run.info.run_id).finish("FINISHED")
    left = [path.name for path in (directory / "artifacts").iterdir()]
    assert left == [run.info.run_id for run in runs]


def test_a_server_has_an_hour_to_create_the_run_that_a_killed_process_asked_for(directory, processes):
    child = processes.Process(target=die_creating, args=(directory, "before the request"))
    child.start()
    child.join(60)
    store = connect(None, directory)
    store.database = None  # as of a server
    store.recover()
    (folder,) = (directory / "artifacts").glob(f"{tags.NEW_PREFIX}*")
    os.utime(folder, (0, 0))
    store.recover()
    assert not folder.exists()


def test_a_run_in_progress_is_left_alone(store):
    run = store.create("mine", None, {})
    store.recover()
    assert store.client.get_run(run.run_id).info.status == "RUNNING"
    run.log_series("loss", [1], [1.0])
    run.finish("FINISHED")
    assert store.client.get_run(run.run_id).info.status == "FINISHED"


def test_the_status_a_run_came_to_say_is_kept(store, monkeypatch):
    run = store.create("mine", None, {})
    monkeypatch.setattr(store, "timeout_s", 0.0)
    monkeypatch.setattr(run._sender, "drain", lambda timeout_s: False)
    run.log_series("loss", [1], [1.0])
    run.finish("FAILED")
    assert store.client.get_run(run.run_id).info.status == "RUNNING"
    monkeypatch.setattr(store, "timeout_s", 20.0)
    store.recover()
    assert store.client.get_run(run.run_id).info.status == "FAILED"
    assert points_of(store, run.run_id, "loss") == [(1, 1.0)]


def test_recovery_twice_changes_nothing(store):
    run = store.create("mine", None, {})
    run.log_series("loss", [1], [1.0])
    run.abandon()
    store.recover()
    first = store.client.get_run(run.run_id).to_dictionary()
    (run.folder / "points.sent").unlink()  # as if the confirmation had been lost
    (run.folder / FILE_NAME).write_text(json.dumps(store.lock_content))
    store.recover()
    assert store.client.get_run(run.run_id).to_dictionary() == first
    assert points_of(store, run.run_id, "loss") == [(1, 1.0)]


def test_runs_of_another_store_are_not_sent_to_this_one(directory, template):
    shutil.copy(template, directory / "other.db")
    other = connect(f"sqlite:///{directory}/other.db", directory)
    run = other.create("mine", None, {})
    run.abandon()
    store = connect(None, directory)
    store.recover()
    assert (run.folder / FILE_NAME).exists()
    other.recover()
    assert other.client.get_run(run.run_id).info.status == "KILLED"


def test_a_directory_that_was_moved_is_still_recovered(directory, tmp_path_factory):
    run = connect(None, directory).create("mine", None, {})
    run.abandon()
    moved = tmp_path_factory.mktemp("elsewhere") / "mlruns"
    shutil.move(directory, moved)
    with pytest.warns(UserWarning, match="artifacts of 1 run are now looked for here"):
        store = connect(None, moved)
    store.recover()
    assert store.client.get_run(run.run_id).info.status == "KILLED"


def test_a_deleted_run_does_not_stop_the_others(store, caplog):
    runs = [store.create("mine", None, {}) for _ in range(3)]
    for run in runs:
        run.abandon()
    store.client.delete_run(runs[1].run_id)
    with caplog.at_level(logging.WARNING):
        store.recover()
    assert caplog.text.count("was deleted") == 1
    statuses = [store.client.get_run(run.run_id).info.status for run in runs]
    assert statuses == ["KILLED", "RUNNING", "KILLED"]
    caplog.clear()
    store.recover()
    assert caplog.text == ""


def test_with_nothing_to_do_no_request_is_made(store):
    for _ in range(3):
        store.create("mine", None, {}).finish("FINISHED")
    (store.directory / "artifacts" / "stray file").touch()
    Store(None, store.uri, store.directory).recover()
