"""No password leaves."""

import pytest

from tracklight.redact import redact


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("http://me:hunter2@host:5000/x", "http://***@host:5000/x"),
        ("postgresql://me:p@ss/w:rd@host/db", "postgresql://***@host/db"),
        ("https://t0ken@host", "https://***@host"),
        ("http://host/?user=me&password=hunter2&x=1", "http://host/?user=me&password=***&x=1"),
        ("http://host/?pwd=hunter2&key=k3y&monkey=1", "http://host/?pwd=***&key=***&monkey=1"),
        ("an interval stands alone, as in KEY=interval(1,2)",) * 2,
        ("cannot reach http://a:b@c: timed out", "cannot reach http://***@c: timed out"),
        ("sqlite:////tmp/a b/mlflow.db", "sqlite:////tmp/a b/mlflow.db"),
        ("http://host:5000", "http://host:5000"),
    ],
)
def test_no_secret_of_a_uri_is_shown(text, safe):
    assert redact(text) == safe


def test_keys_that_name_secrets_are_starred_out_at_any_depth():
    tree = {
        "a": [{"db_password": 1234, "API_KEY": "k"}],
        "token": "t",
        "max_tokens": 8,
        "secret": None,
    }
    safe = {
        "a": [{"db_password": "***", "API_KEY": "***"}],
        "token": "***",
        "max_tokens": 8,
        "secret": None,
    }
    assert redact(tree) == safe


def test_what_a_variable_of_a_telling_name_holds_is_starred_out_wherever_it_stands(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "pl4nt3d")
    monkeypatch.setenv("PGPASSWORD", "short")  # five characters are part of other words
    monkeypatch.setenv("MNIST_ROOT", "/data/mnist")
    tree = {"data": {"path": "s3://pl4nt3d/x", "root": "/data/mnist"}, "a": ["shorter", "pl4nt3d"]}
    safe = {"data": {"path": "s3://***/x", "root": "/data/mnist"}, "a": ["shorter", "***"]}
    assert redact(tree) == safe
