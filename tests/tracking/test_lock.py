import os
import signal
import time

import pytest

from tracklight.tracking.lock import FILE_NAME, LockHeld, RunLock, read_lock, was_abandoned


def hold(folder, ready, release):
    lock = RunLock(folder, {})
    ready.set()
    release.wait(30)
    lock.remove()


def test_a_second_process_is_told_who_holds_the_lock(tmp_path, processes):
    ready, release = processes.Event(), processes.Event()
    holder = processes.Process(target=hold, args=(tmp_path, ready, release))
    holder.start()
    assert ready.wait(30)
    with pytest.raises(LockHeld) as caught:
        RunLock(tmp_path, {})
    assert caught.value.pid == holder.pid
    release.set()
    holder.join()
    assert not (tmp_path / FILE_NAME).exists()


def test_a_run_is_left_once_nobody_holds_its_lock_file(tmp_path):
    assert not was_abandoned(tmp_path / "elsewhere") and not was_abandoned(tmp_path)
    lock = RunLock(tmp_path, {})
    assert not was_abandoned(tmp_path)
    lock.close()
    assert was_abandoned(tmp_path)
    RunLock(tmp_path, {}).remove()  # looking has not taken it
    assert not was_abandoned(tmp_path)


def test_the_kernel_releases_the_lock_of_a_killed_process(tmp_path, processes):
    ready, release = processes.Event(), processes.Event()
    holder = processes.Process(target=hold, args=(tmp_path, ready, release))
    holder.start()
    assert ready.wait(30)
    holder.kill()
    holder.join()
    assert read_lock(tmp_path)["pid"] == holder.pid
    RunLock(tmp_path, None).remove()


def test_one_process_cannot_hold_a_lock_twice(tmp_path):
    lock = RunLock(tmp_path, {"store": "here"})
    with pytest.raises(LockHeld) as caught:
        RunLock(tmp_path, None)
    assert caught.value.pid == os.getpid()
    lock.close()
    assert read_lock(tmp_path) == {"pid": os.getpid(), "store": "here"}
    RunLock(tmp_path, None).close()


def test_a_lock_file_removed_between_open_and_lock_is_not_taken_for_the_lock(tmp_path, monkeypatch):
    import fcntl

    first = RunLock(tmp_path, {})
    real = fcntl.flock

    def remove_meanwhile(fd, operation):
        monkeypatch.setattr(fcntl, "flock", real)
        first.remove()
        real(fd, operation)

    monkeypatch.setattr(fcntl, "flock", remove_meanwhile)
    second = RunLock(tmp_path, {})
    with pytest.raises(LockHeld):
        RunLock(tmp_path, {})
    second.remove()


@pytest.mark.parametrize(
    "text",
    ["", "7", "{", "[]", "[" * 50_000, " " * 70_000 + "{}"]
    + [f'{{"pid": {pid}}}' for pid in ('"1"', "1e300", "-1", "9" * 30, "9" * 9_999, "true")],
)
def test_a_senseless_note_counts_as_none(tmp_path, text):
    (tmp_path / FILE_NAME).write_text(text)
    assert read_lock(tmp_path) == {}


def hold_fork_and_die(folder, children):
    RunLock(folder, {})
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    children.send(child)
    os._exit(0)


def test_a_forked_child_that_survives_its_parent_does_not_keep_the_lock(tmp_path, processes):
    children, sender = processes.Pipe()
    parent = processes.Process(target=hold_fork_and_die, args=(tmp_path, sender))
    parent.start()
    child = children.recv()
    parent.join()
    try:
        RunLock(tmp_path, {}).close()
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_lock_file_that_is_a_pipe_or_leads_elsewhere_is_no_lock(tmp_path):
    elsewhere, linked, piped = tmp_path / "elsewhere", tmp_path / "linked", tmp_path / "piped"
    elsewhere.write_text("thesis")
    linked.mkdir(), piped.mkdir()
    (linked / FILE_NAME).symlink_to(elsewhere)
    os.mkfifo(piped / FILE_NAME)
    for folder in (linked, piped):
        with pytest.raises(OSError):
            RunLock(folder, {"store": "here"})
    assert elsewhere.read_text() == "thesis"
    assert read_lock(piped) == {}
    was_abandoned(piped)  # returns: nothing waits for its other end
