import socket
import sqlite3

import pytest

from tracklight.tracking import mlflow_client
from tracklight.tracking.mlflow_client import mlflow

# isort: split
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, TEMPORARILY_UNAVAILABLE

Error = mlflow.exceptions.MlflowException


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(mlflow_client, "_PAUSE_S", 0.01)


def failing(times: int, error: Exception):
    calls = []

    def call() -> int:
        calls.append(1)
        if len(calls) <= times:
            raise error
        return len(calls)

    return call


@pytest.mark.parametrize(
    "error",
    [
        sqlite3.OperationalError("database is locked"),
        ConnectionError("away"),
        Error("locked", error_code=TEMPORARILY_UNAVAILABLE),
    ],
)
def test_what_passes_is_tried_again(error):
    assert mlflow_client.retry(failing(3, error), 20) == 4


def test_what_does_not_pass_is_raised_at_once():
    call = failing(1, Error("no such run", error_code=RESOURCE_DOES_NOT_EXIST))
    with pytest.raises(Error):
        mlflow_client.retry(call, 20)
    assert call() == 2


def test_patience_ends():
    with pytest.raises(ConnectionError):
        mlflow_client.retry(failing(10**9, ConnectionError("away")), 0.05)


def test_a_reason_is_one_short_line_without_passwords():
    said = mlflow_client.short_reason(ValueError("at http://me:s3cret@host:1 " + "x" * 1000 + "\nTraceback"))
    assert "s3cret" not in said and "\n" not in said and len(said) <= 300
    assert mlflow_client.short_reason(KeyError()) == "KeyError"
    advice = "(raised as a result of Query-invoked autoflush; consider using a session.no_autoflush block)"
    cause = "(sqlite3.OperationalError) attempt to write a readonly database"
    assert mlflow_client.short_reason(ValueError(f"{advice}\n{cause}\n[SQL: INSERT]")) == cause


def test_a_server_that_is_away_is_said_in_few_words(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as taken:  # bound, and not listening: who connects is refused
        taken.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(Error) as failed:
            mlflow.MlflowClient(uri).search_experiments()
    assert mlflow_client.short_reason(failed.value) == f"{uri} does not answer"
