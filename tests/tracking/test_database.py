import os
import shutil
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy
from disturbances import full_disk, wait_for

from tracklight.errors import BadInput, RunFailed
from tracklight.tracking import mlflow_client, sqlite_file
from tracklight.tracking.store import connect


@pytest.fixture
def made_by_mlflow(monkeypatch) -> None:
    """New databases are made as for users, not copied as for other tests."""
    monkeypatch.setattr(sqlite_file, "create_database", mlflow_client.create_database)


def test_only_a_database_that_is_being_made_is_written_without_syncing(tmp_path, monkeypatch):
    from mlflow.store.tracking import sqlalchemy_store

    def levels() -> list[int]:
        """How each of two databases is synced by a connection that begins now."""
        found = []
        for name in ("new.db", "other.db"):
            engine = sqlalchemy.create_engine(f"sqlite:///{tmp_path / name}")
            with engine.connect() as connection:
                found.append(connection.exec_driver_sql("PRAGMA synchronous").scalar())
            engine.dispose()
        return found

    class Opened:
        engine = sqlalchemy.create_engine("sqlite://")

        def __init__(self, *_: str):
            meanwhile.append(levels())

    meanwhile = []
    monkeypatch.setattr(sqlalchemy_store, "SqlAlchemyStore", Opened)
    mlflow_client.create_database(tmp_path / "new.db", "")
    assert meanwhile == [[0, 2]] and levels() == [2, 2]


def open_and_create(directory, barrier):
    barrier.wait(60)
    run = connect(None, directory).create("together", None, {})
    run.log_series("loss", [1, 2], [1.0, 2.0])
    run.finish("FINISHED")


def open_only(directory):
    connect(None, directory)


def test_many_processes_may_open_a_fresh_store_at_once(tmp_path, processes):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "mlflow.db").touch()  # SQLite's own idea of a fresh one
    count = 4
    barrier = processes.Barrier(count)
    children = [
        processes.Process(target=open_and_create, args=(tmp_path / "new", barrier)) for _ in range(count)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
    assert [child.exitcode for child in children] == [0] * count
    store = connect(None, tmp_path / "new")
    runs = store.search("attributes.status = 'FINISHED'")
    assert len(runs) == count
    assert all(run.data.metrics == {"loss": 2.0} for run in runs)
    assert len(store.client.search_experiments(filter_string="name = 'together'")) == 1


@pytest.mark.parametrize("delay_s", [0.0, 0.5])
def test_a_kill_while_the_store_is_made_leaves_nothing_broken(tmp_path, processes, delay_s):
    child = processes.Process(target=open_only, args=(tmp_path,))
    child.start()
    wait_for(lambda: list(tmp_path.glob(".mlflow.db.new-*")))
    time.sleep(delay_s)
    child.kill()
    child.join()
    store = connect(None, tmp_path)
    assert store.client.create_run("0").info.status == "RUNNING"
    names = {path.name for path in tmp_path.iterdir()}
    assert names <= {"mlflow.db", "mlflow.db-journal", ".mlflow.db.lock", "artifacts"}


def test_what_is_no_mlflow_database_is_refused_at_once_in_one_line(tmp_path, template, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("waits for what cannot pass"))
    path = tmp_path / "x.db"

    def refused() -> str:
        with pytest.raises(BadInput) as caught:
            connect(f"sqlite:///{path}", tmp_path / "mlruns")
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)
        return str(caught.value)

    path.write_text("these are not the bytes you are looking for")
    assert "no SQLite database" in refused()
    path.unlink()
    sqlite3.connect(path).execute("CREATE TABLE alembic_version (version_num)").connection.close()
    assert "half made" in refused()
    path.unlink()
    path.mkdir()
    assert "no regular file" in refused()
    path.rmdir()
    os.mkfifo(path)
    assert "no regular file" in refused()
    path.unlink()
    shutil.copy(template, path)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = 'e5e5'")
    connection.close()
    assert "newer than MLflow" in refused()


@pytest.mark.parametrize(
    "found", ["bytes", "another database", "a newer schema", "no folder", "a locked folder"]
)
def test_the_environment_variable_that_named_an_unusable_store_is_blamed(
    tmp_path, template, monkeypatch, found
):
    path = tmp_path / "x.db"
    if found == "bytes":
        path.write_text("these are not the bytes you are looking for")
    elif found == "no folder":
        path = Path("/proc/x.db")
    elif found == "another database":
        sqlite3.connect(path).execute("CREATE TABLE a (b)").connection.close()
    else:
        shutil.copy(template, path)
        with closing(sqlite3.connect(path)) as connection, connection:
            connection.execute("UPDATE alembic_version SET version_num = 'e5e5'")
        if found == "a locked folder":
            monkeypatch.setattr("os.access", lambda each, mode: each != path)
    uri = f"sqlite:///{path}"
    for name in ("tracking.uri", "MLFLOW_TRACKING_URI"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri if name != "tracking.uri" else "")
        with pytest.raises(BadInput) as caught:
            connect(uri, tmp_path / "mlruns")
        assert name in str(caught.value) and "tracking.dir" not in str(caught.value)


@pytest.mark.parametrize("name", ["with space", "50% ü 漢字", "a#b&c", "it's"])
def test_odd_characters_in_the_directory_work(tmp_path, template, name):
    directory = tmp_path / name / "mlruns"
    directory.mkdir(parents=True)
    shutil.copy(template, directory / "mlflow.db")
    store = connect(None, directory)
    run = store.create("e", "n", {})
    run.log_text("hello", "deep/er/file.txt")
    run.log_series("loss", [1], [1.0])
    run.finish("FINISHED")
    assert [file.path for file in store.client.list_artifacts(run.run_id, "deep/er")] == ["deep/er/file.txt"]
    fetched = store.client.download_artifacts(run.run_id, "deep/er/file.txt")
    assert Path(fetched).read_text() == "hello"
    assert {path.name for path in tmp_path.iterdir()} == {name}


@pytest.mark.parametrize("size", [0, 4096, 100_000, 400_000])
def test_a_disk_too_full_for_a_new_store_is_one_line_at_once_and_leaves_nothing(
    tmp_path, size, monkeypatch, made_by_mlflow
):
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("waits for what cannot pass"))
    with full_disk(size), pytest.raises(BadInput) as caught:
        connect(None, tmp_path)
    assert str(caught.value).startswith(f"cannot make {tmp_path}/mlflow.db: ") and "\n" not in str(
        caught.value
    )
    assert {path.name for path in tmp_path.iterdir()} <= {".mlflow.db.lock", "artifacts"}


@pytest.fixture
def mounted(tmp_path) -> Iterator[Callable[[str], Path]]:
    """Mounts file systems of their own with the given options."""
    folders = []

    def mount(options: str) -> Path:
        folder = tmp_path / f"disk-{len(folders)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("needs the right to mount a file system (root)")
        folders.append(folder)
        return folder

    yield mount
    for folder in folders:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_file_system_without_inodes_is_one_line_at_once_and_leaves_nothing(mounted, template):
    outcomes = []
    for free in range(10):
        directory = mounted(f"nr_inodes={2 + free}")
        shutil.copy(template, directory / "mlflow.db")
        began_s = time.monotonic()
        try:
            connect(None, directory).create("mine", None, {}).finish("FINISHED")
            outcomes.append("made")
        except (BadInput, RunFailed) as error:
            assert "\n" not in str(error)
            outcomes.append("refused")
        assert time.monotonic() - began_s < 10
        assert list(directory.rglob("*new-*")) == []
    assert outcomes[0] == "refused" and outcomes[-1] == "made"
    assert outcomes == sorted(outcomes, reverse=True)


def test_a_new_store_without_inodes_is_one_line_at_once(mounted, made_by_mlflow):
    for free in range(4):
        directory = mounted(f"nr_inodes={1 + free}")
        began_s = time.monotonic()
        with pytest.raises(BadInput) as caught:
            connect(None, directory)
        assert "\n" not in str(caught.value) and time.monotonic() - began_s < 10
        assert list(directory.rglob("*new-*")) == []


@pytest.mark.parametrize("name", ["x" * 256, "/".join(["x" * 100] * 6)])
def test_a_path_that_no_database_can_have_is_refused_at_once(tmp_path, name):
    began_s = time.monotonic()
    with pytest.raises(BadInput, match="try a shorter one"):
        connect(None, tmp_path / name)
    assert time.monotonic() - began_s < 1 and list(tmp_path.iterdir()) == []


def test_the_longest_path_that_is_not_refused_works(tmp_path, template):
    """By SQLite's own limit: one byte more, and it does not open the file."""
    rest = 504 - len(bytes(tmp_path)) - len("/mlflow.db")
    directory = tmp_path.joinpath("x" * 200, "y" * (rest - 202))
    directory.mkdir(parents=True)
    shutil.copy(template, directory / "mlflow.db")
    assert len(bytes(directory / "mlflow.db")) == 504
    connect(None, directory).create("mine", None, {}).finish("FINISHED")
    shutil.copy(template, directory / "mlflow2.db")
    with pytest.raises(sqlite3.OperationalError, match="unable to open"):
        sqlite3.connect(directory / "mlflow2.db").execute("SELECT * FROM runs")
