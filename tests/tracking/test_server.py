import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from disturbances import free_port

from tracklight.errors import BadInput
from tracklight.tracking import address, store
from tracklight.tracking.store import connect


def test_a_server_that_is_not_there_is_waited_for_15_s_at_most():
    assert store._START_UP_S + address._TIMEOUT_S <= 15


@pytest.fixture
def hurried(monkeypatch) -> None:
    """Less patience with what does not answer; one test keeps the real one."""
    monkeypatch.setattr(store, "_START_UP_S", 0.0)
    monkeypatch.setattr(address, "_TIMEOUT_S", 1.0)


def refused(uri, directory) -> str:
    with pytest.raises(BadInput) as caught:
        connect(uri, directory)
    assert "\n" not in str(caught.value) and "s3cret" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("scheme", ["http", "postgresql"])
def test_a_port_where_nobody_listens_is_told_in_one_line(tmp_path, hurried, scheme):
    port = free_port()
    said = refused(f"{scheme}://me:s3cret@127.0.0.1:{port}", tmp_path)
    assert f"127.0.0.1:{port}" in said and "refused" in said


def test_an_unknown_host_is_told_in_one_line(tmp_path, hurried):
    assert "no-such-host.invalid" in refused("http://no-such-host.invalid:5000", tmp_path)


@pytest.mark.parametrize("patience", ["less", pytest.param("as for users", marks=pytest.mark.slow)])
def test_a_server_that_accepts_and_never_answers_is_given_up(tmp_path, request, patience):
    if patience == "less":
        request.getfixturevalue("hurried")
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        assert "timed out" in refused(f"http://127.0.0.1:{mute.getsockname()[1]}", tmp_path)


@pytest.mark.parametrize("status", [404, 401, 200])
def test_a_server_that_is_not_mlflow_or_lets_nobody_in_is_told_in_one_line(tmp_path, status):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(b"<html>")

        do_POST = do_GET

        def log_message(self, format, *args) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as stranger:
        threading.Thread(target=stranger.serve_forever, daemon=True).start()
        said = refused(f"http://me:s3cret@127.0.0.1:{stranger.server_address[1]}", tmp_path)
        stranger.shutdown()
    assert "cannot open tracking.uri" in said
    assert ("set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD" in said) == (status == 401)
