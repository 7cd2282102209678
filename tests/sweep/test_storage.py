import sqlite3
from contextlib import closing

import optuna
import pytest

from tracklight.errors import BadInput
from tracklight.sweep.storage import open_storage


@pytest.mark.parametrize(
    "url", ["sqlite:////nowhere/at/all.db", "oracle://x", "nonsense", "postgresql://u:pw@h:1/d"]
)
def test_a_storage_that_does_not_open_is_one_line_without_its_password(url):
    with pytest.raises(BadInput) as refused:
        open_storage(url, None)
    told = str(refused.value)
    assert told.startswith("sweep.storage=") and "\n" not in told and "pw" not in told


def test_a_database_that_fails_while_trials_are_read_says_so_once(tmp_path, capfd):
    path = tmp_path / "study.db"
    storage = open_storage(f"sqlite:///{path}?timeout=0.1", None)
    study = optuna.create_study(storage=storage)
    study.enqueue_trial({})
    capfd.readouterr()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        with pytest.raises(optuna.exceptions.StorageInternalError) as failed:
            study.get_trials()
    assert "database is locked" in str(failed.value.__cause__)
    assert capfd.readouterr().err == ""
