from pathlib import Path

import pytest

from tracklight.errors import BadInput
from tracklight.redact import redact
from tracklight.tracking.address import is_server, resolve_uri, sqlite_path


def test_no_uri_is_the_sqlite_file_of_the_directory():
    assert resolve_uri(None, Path("/a b/ü")) == "sqlite:////a b/ü/mlflow.db"


def test_a_relative_sqlite_uri_is_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_uri("sqlite:///x.db", Path("/a")) == f"sqlite:///{tmp_path}/x.db"


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("ftp://host/x", "ftp://host/x"),
        ("file:///a/mlruns", "sqlite:////a/mlflow.db"),
        ("./mlruns", "sqlite:////a/mlflow.db"),
        ("", "sqlite:////a/mlflow.db"),
        ("sqlite://", "names no file"),
        ("sqlite:///:memory:", "names no file"),
        ("sqlite:////a/b%20c.db", "%"),
        ("sqlite:////a/b.db?timeout=3", "?"),
        ("http://", "names no host"),
        ("http://host:99999", "no address"),
        ("databricks", "sqlite"),
    ],
)
def test_what_cannot_be_a_store_is_refused_in_one_line(uri, said):
    with pytest.raises(BadInput) as caught:
        resolve_uri(uri, Path("/a"))
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "uri",
    [
        "http://me:s3cret@host:5000/x",
        "postgresql+psycopg2://me:s3cret@host/db",
        "postgresql://me:s3@cret/s3cret@host/db",
        "https://host/x?token=s3cret&a=1",
        "failed: ConnectionError('http://me:s3cret@host:5000')",
    ],
)
def test_secrets_of_a_uri_are_never_shown(uri):
    assert "s3cret" not in redact(uri) and "host" in redact(uri)


def test_refusals_show_no_password():
    with pytest.raises(BadInput) as caught:
        resolve_uri("ftp://me:s3cret@host/x", Path("/a"))
    assert "s3cret" not in str(caught.value)


def test_servers_and_files_are_told_apart():
    assert is_server("http://host") and is_server("https://host")
    assert not is_server("sqlite:////a.db")
    assert sqlite_path("sqlite:////a b.db") == Path("/a b.db")
    assert sqlite_path("postgresql://host/db") is None
