import os
import sqlite3
import threading
import time
from contextlib import closing

import optuna
import pytest
import sqlalchemy.exc
from sqlalchemy import Engine, event

from commands import BLOBS, Swept, wait_until
from tracklight.errors import BadInput
from tracklight.sweep.space import read_space
from tracklight.sweep.storage import open_storage
from tracklight.sweep.study import OptunaSettings, OptunaStudy
from tracklight.tracking.address import call_in_thread


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


SPACE = read_space(["lr=1,2,3"], {}, None)


def open_study(storage, total=3):
    settings = OptunaSettings("random", {}, "none", {}, 0, 4)
    return OptunaStudy(storage, "study", "min", SPACE, settings, total)


@pytest.fixture
def held(tmp_path):
    """A study in a database, and what holds the database for a while from then on."""
    path = tmp_path / "study.db"
    storage = open_storage(f"sqlite:///{path}?timeout=0.05", None)
    study = open_study(storage)

    def hold(seconds):
        other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        other.execute("BEGIN EXCLUSIVE")
        threading.Timer(seconds, other.close).start()

    yield study, hold
    storage.remove_session()
    storage.engine.dispose()


def test_a_database_that_is_away_for_a_while_is_waited_for(held, caplog, monkeypatch):
    study, hold = held
    monkeypatch.setattr("tracklight.tracking.mlflow_client._WARN_AFTER_S", 0.0)
    for number in range(3):
        hold(0.3)
        request = study.ask()
        assert request.number == number
        hold(0.3)
        study.tell(number, "complete", float(number))
    assert study.ask() is None
    assert [trial.value for trial in study.finished_trials()] == [0.0, 1.0, 2.0]
    assert "waiting for sweep.storage: (sqlite3.OperationalError) database is locked" in caplog.text


def test_a_database_that_stays_away_is_given_up_and_a_signal_meanwhile_is_heard(held, monkeypatch):
    study, hold = held
    monkeypatch.setattr("tracklight.sweep.storage.OUTAGE_S", 0.3)
    assert not study.is_waiting
    hold(3)
    heard = []
    threading.Timer(0.2, lambda: heard.append(study.is_waiting)).start()
    with pytest.raises(optuna.exceptions.StorageInternalError):
        study.ask()
    assert heard == [True] and not study.is_waiting


def test_a_state_that_was_stored_though_its_answer_was_lost_is_not_stored_twice(held, monkeypatch):
    study, _ = held
    storage = study._storage._storage
    original, calls = storage.set_trial_state_values, []

    def lose_the_first_answer(*args, **kwargs):
        calls.append(original(*args, **kwargs))
        if len(calls) == 1:
            raise sqlalchemy.exc.OperationalError("COMMIT", None, Exception("gone"))
        return calls[-1]

    assert study.ask().number == 0
    monkeypatch.setattr(storage, "set_trial_state_values", lose_the_first_answer)
    study.tell(0, "complete", 0.5)
    assert [trial.value for trial in study.finished_trials()] == [0.5] and len(calls) == 1


@pytest.mark.slow
def test_a_sweep_outlives_seconds_without_its_postgresql(commander, tmp_path, postgres):
    directory = tmp_path / "runs"
    command = ("optimizer.lr=0.01,0.02,0.05,0.1,0.2,0.3", *BLOBS, "trainer.max_epochs=20")
    process = commander.start(
        directory, ("-m", *command, f"sweep.storage={postgres.url}", "sweep.pruner=median")
    )
    wait_until(lambda: "trial 0" in process.stdout, 60)
    postgres.stop()
    time.sleep(15)
    began = len(list(directory.glob("artifacts/*/artifacts")))
    postgres.start()
    assert process.wait() == 0, process.stderr
    assert "waiting for sweep.storage: " in process.stderr and "Traceback" not in process.stderr
    swept = Swept(directory)
    assert len(swept.children) == 6 and {run.status for run in swept.runs} == {"FINISHED"}
    assert began < 7  # what had not begun did not begin meanwhile


@pytest.mark.parametrize(
    "text",
    [
        *("no json\n", "[]\n", "7\n", "{}\n", '{"op_code": 99}\n', "[" * 50_000 + "\n"),
    ],
)
def test_a_journal_that_optuna_did_not_write_is_one_line(tmp_path, text):
    path = tmp_path / "study.journal"
    path.write_text(text)
    with pytest.raises(BadInput, match="is no journal of a sweep .*; sweep.fresh=true") as no:
        open_storage(None, path)
    assert "\n" not in str(no.value)


def test_a_journal_that_is_endless_or_elsewhere_is_refused_and_left_alone(tmp_path):
    path, elsewhere = tmp_path / "study.journal", tmp_path / "thesis"
    elsewhere.write_text("a line\nand half a one")
    path.symlink_to(elsewhere)
    with pytest.raises(BadInput, match="no journal"):
        open_storage(None, path)
    assert elsewhere.read_text() == "a line\nand half a one"
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(BadInput, match="no journal"):
        open_storage(None, path)
    path.unlink()
    path.touch()
    os.truncate(path, 10_000_000_000)
    with pytest.raises(BadInput, match="10,000,000,000 bytes"):
        open_storage(None, path)


def test_a_value_of_a_journal_or_a_store_is_text_and_never_resolved():
    secret = "${oc.env:HOME}"
    (axis,) = (space := read_space(["model.bias=true,false"], {}, None)).axes
    for params in ({"model.bias": secret}, {"model.bias": axis.to_text(secret)}):
        with pytest.raises(BadInput, match=r"model.bias=.*'\$\{' is refused"):
            space.overrides(params)
    typed = read_space([f"model.bias={secret},1"], {}, None)
    (text, _), params = typed.axes[0].texts, {"model.bias": typed.axes[0].texts[0]}
    with pytest.raises(BadInput):
        space.overrides(params)  # the same, escaped
    assert typed.overrides(params) == [f"model.bias={text}"]
