import sqlite3
import time
from contextlib import closing

import optuna
import pytest
from sqlalchemy import Engine, event

from tracklight.errors import BadInput
from tracklight.sweep.study import open_storage
from tracklight.sweep.trial import call_in_thread


@pytest.mark.parametrize(
    "url", ["sqlite:////nowhere/at/all.db", "oracle://x", "nonsense", "postgresql://u:pw@h:1/d"]
)
def test_a_storage_that_does_not_open_is_one_line_without_its_password(url):
    with pytest.raises(BadInput) as raised:
        open_storage(url, None)
    message = str(raised.value)
    assert message.startswith("sweep.storage=") and "\n" not in message and "pw" not in message


def test_a_database_locked_between_two_queries_says_so_once(tmp_path, caplog):
    path = tmp_path / "study.db"
    storage = open_storage(f"sqlite:///{path}?timeout=0.1", None)
    study = optuna.create_study(storage=storage)
    caplog.clear()
    with closing(sqlite3.connect(path)) as other:

        @event.listens_for(Engine, "before_cursor_execute")
        def lock(connection, cursor, statement, *_):
            if "FROM trials" in statement and not other.in_transaction:
                other.execute("BEGIN EXCLUSIVE")

        try:
            with pytest.raises(optuna.exceptions.StorageInternalError) as failed:
                study.get_trials()
        finally:
            event.remove(Engine, "before_cursor_execute", lock)
            storage.remove_session()
            storage.engine.dispose()
    assert "database is locked" in str(failed.value.__cause__)
    assert not caplog.records


def test_a_function_that_takes_too_long_is_abandoned():
    with pytest.raises(TimeoutError):
        call_in_thread(lambda: time.sleep(5)).result(0.05)


def test_results_and_errors_come_through():
    assert call_in_thread(lambda: 3).result(5) == 3
    with pytest.raises(ZeroDivisionError):
        call_in_thread(lambda: 1 / 0).result(5)
