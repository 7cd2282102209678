"""A store that was renamed, copied or mounted elsewhere: its addresses of artifacts follow."""

import re
import shutil
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

from tracklight.tracking.sqlite_file import find_former_root
from tracklight.tracking.store import connect


@pytest.fixture
def made(store):
    """A store with a run that has an artifact."""
    run = store.create("mine", None, {})
    run.artifacts.mkdir(parents=True, exist_ok=True)
    (run.artifacts / "config.yaml").write_text("seed: 0\n")
    run.finish("FINISHED")
    return store, run.run_id


def listed(store, run_id):
    """What MLflow itself finds, and downloads."""
    (found,) = store.client.list_artifacts(run_id)
    return found.path, Path(store.client.download_artifacts(run_id, found.path)).read_text()


@pytest.mark.parametrize("name", ["plain", "ü #1 a_b"])
def test_a_copy_reads_and_writes_its_own_artifacts_and_says_so_once(made, tmp_path_factory, name):
    store, run_id = made
    there = tmp_path_factory.mktemp("elsewhere") / name
    shutil.copytree(store.directory, there)
    shutil.rmtree(store.runs_folder / run_id)
    with pytest.warns(UserWarning, match=f"was {store.directory}: the artifacts of 1 run are now looked"):
        copy = connect(None, there)
    assert listed(copy, run_id) == ("config.yaml", "seed: 0\n")
    new = connect(None, there).create("mine", None, {})  # no second warning, which would be an error
    new.finish("FINISHED")
    assert copy.client.get_run(new.run_id).info.artifact_uri.startswith(there.as_uri())
    again = tmp_path_factory.mktemp("elsewhere") / "again"
    shutil.move(there, again)
    with pytest.warns(
        UserWarning, match=f"^{again} was {re.escape(str(there))}: the artifacts of 2 runs are"
    ):
        connect(None, again)
    with closing(sqlite3.connect(store.database)) as connection:
        assert connection.execute("SELECT artifact_uri FROM runs").fetchall() == [
            ((store.runs_folder / run_id / "artifacts").as_uri(),)
        ]


def test_logged_and_registered_models_follow(made, tmp_path_factory):
    store, run_id = made
    experiment = store.client.get_run(run_id).info.experiment_id
    model = store.client.create_logged_model(experiment, name="model", source_run_id=run_id)
    store.client.create_registered_model("digits")
    store.client.create_model_version("digits", model.artifact_location, run_id)
    there = tmp_path_factory.mktemp("elsewhere") / "runs"
    shutil.move(store.directory, there)
    with pytest.warns(UserWarning, match="looked for here"):
        moved = connect(None, there)
    assert moved.client.get_logged_model(model.model_id).artifact_location.startswith(there.as_uri())
    assert moved.client.get_model_version("digits", "1").source.startswith(there.as_uri())


@pytest.mark.parametrize("blocked", [False, True], ids=["gone", "blocked"])
def test_the_old_path_is_neither_made_again_nor_needed(made, tmp_path_factory, blocked):
    store, run_id = made
    there = tmp_path_factory.mktemp("elsewhere") / "runs"
    shutil.move(store.directory, there)
    if blocked:
        store.directory.write_text("in the way")
    with pytest.warns(UserWarning, match="of 1 run are now looked for here"):
        moved = connect(None, there)
    start_s = time.monotonic()
    for run in (moved.reopen(run_id), moved.create("mine", None, {})):
        run.log_metrics({"train/loss": 1.0})
        run.log_text("seed: 0\n", "config.yaml")
        run.upload_artifacts()
        run.finish("FINISHED")
        assert listed(moved, run.run_id) == ("config.yaml", "seed: 0\n")
    assert time.monotonic() - start_s < 10
    assert store.directory.is_file() == store.directory.exists() == blocked
    if not blocked:
        store.directory.mkdir()  # or the next test gets this path, with connections to the file moved away


def test_another_name_of_the_same_folder_and_artifacts_meant_to_lie_elsewhere_stay(made, tmp_path_factory):
    store, run_id = made
    other = tmp_path_factory.mktemp("elsewhere")
    (other / "link").symlink_to(store.directory)
    linked = connect(None, other / "link")
    assert linked.client.get_run(run_id).info.artifact_uri.startswith(store.directory.as_uri())
    shutil.copy(store.database, other / "mlflow.db")  # the database alone: its artifacts did not come along
    (other / "artifacts").mkdir()
    assert find_former_root(other / "mlflow.db", other / "artifacts") == ""
