"""Serves the runs in MLflow's own UI, opened at the newest of them."""

import errno
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from contextlib import closing, suppress
from http import HTTPStatus
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from tracklight.errors import BadInput, RunFailed
from tracklight.paths import HOME, UI_PORT
from tracklight.runs.leaderboard import rank_runs
from tracklight.runs.reader import RunFilter, reader_of
from tracklight.runs.select import select_run
from tracklight.tracking import address, sqlite_file, tags, views
from tracklight.tracking.store import Store, connect

HOST = "127.0.0.1"
LOG = "ui.log"
NUM_COMPARED = 100  # settings, whose parameters an experiment's view compares
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 10.0


def run(args: Namespace) -> int:
    """Serve the UI until Ctrl-C, or print its address on a server; return the exit code."""
    _check_port(args.port)
    if args.dir != HOME and not args.dir.is_dir():
        raise BadInput(f"--dir {args.dir} is no folder")
    # Created if missing: the UI may be open while it fills.
    store = connect(args.uri, args.dir, reads_only=True)
    store.recover()
    page = _page(store, args.experiment)
    if address.is_server(store.uri):
        url = f"{store.display_uri.rstrip('/')}{page}"
        args.emit({"url": url})
        print(f"MLflow UI: {url} (served there)")
        return 0
    with suppress(KeyboardInterrupt), tempfile.TemporaryDirectory() as folder:  # Ctrl-C is the way to end it
        _serve(store, args, page, _uri(store, Path(folder)), Path(folder))
    return 0


def _uri(store: Store, folder: Path) -> str:
    """Return the URI to serve; that of a copy in `folder` where a store that moved may only be read."""
    if store.database is None or not store.why_read_only:
        return store.uri
    root = store.database.parent / tags.RUNS_FOLDER
    if not (former := sqlite_file.find_former_root(store.database, root)):
        return store.uri
    copy = folder / store.database.name
    shutil.copyfile(store.database, copy)
    sqlite_file.relocate_artifacts(copy, former, root)
    return f"sqlite:///{copy}"


def _check_port(port: int) -> None:
    if not 0 < port < 2**16:
        raise BadInput(f"--port {port} must be 1 to 65535; try --port {UI_PORT}")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            how = f"try --port {max(port + 1, UI_PORT)}"
            if error.errno == errno.EADDRINUSE:
                how = f"open http://{HOST}:{port}{views.page(None)} if it is this UI's, or {how}"
            raise BadInput(f"--port {port} cannot be had ({error.strerror}); {how}") from None


def _page(store: Store, experiment: str | None) -> str:
    """Return the page of an experiment's runs; by default the newest run's, by its sweep's view."""
    if experiment is not None:
        found = store.client.get_experiment_by_name(experiment)
        if found is None:
            raise BadInput(f"--experiment {experiment}: there is none in {store.display_uri}")
        return _view(store, found, views.EXPERIMENT)
    try:
        newest = select_run(store, "last")
    except BadInput:  # nothing trained yet
        return views.page(None)
    sweep = views.view_name(newest.data.tags.get(tags.PARENT_TAG, newest.info.run_id))
    return _view(store, store.client.get_experiment(newest.info.experiment_id), sweep, views.EXPERIMENT)


def _view(store: Store, experiment: Any, *names: str) -> str:
    """Return the page of an experiment by the first of these views that it has."""
    if not store.why_read_only:
        with suppress(BadInput):  # nothing trained yet
            board = rank_runs(reader_of(store), RunFilter(experiment.name), None, None, NUM_COMPARED)
            lines = dict.fromkeys((board.metric, "train/loss"))
            views.save_view(store.client, experiment.experiment_id, board.columns, [*lines])
    saved = (name for name in names if views.PREFIX + name in experiment.tags)
    return views.page(experiment.experiment_id, next(saved, None))


def _serve(store: Store, args: Namespace, page: str, uri: str, folder: Path) -> None:
    port, url = args.port, f"http://{HOST}:{args.port}{page}"
    print("MLflow's server starts; this takes some seconds", flush=True)
    options = f"--host {HOST} --port {port} --workers 1 --uvicorn-opts=--log-level=warning".split()
    options += ["--default-artifact-root", store.runs_folder.as_uri()]
    scripts = str(Path(sys.executable).parent)  # MLflow starts its server by name
    env = {
        **os.environ,
        "PATH": os.pathsep.join((scripts, os.environ.get("PATH", os.defpath))),
        "MLFLOW_BACKEND_STORE_URI": uri,  # its password would show in the command
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "PYTHONWARNINGS": "ignore",
    }
    path, command = folder / LOG, [sys.executable, "-m", "mlflow", "ui", *options]
    with path.open("w") as log:
        # An empty folder is the first from which the server imports; its children stop with its group.
        place: Any = {"cwd": folder, "env": env, "start_new_session": True}
        process = subprocess.Popen(command, **place, stdout=log, stderr=subprocess.STDOUT)
    try:
        if _wait_until_healthy(process, port):
            args.emit({"url": url})
            print(f"MLflow UI: {url} (Ctrl-C ends it)", flush=True)
            process.wait()
    finally:
        _stop(process)
    said = path.read_text(errors="replace").strip().rpartition("\n")[2]
    raise RunFailed(f"MLflow's server did not start, or ended by itself: {said[-300:]}")


def _wait_until_healthy(process: subprocess.Popen[Any], port: int) -> bool:
    end_s = time.monotonic() + START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < end_s:
        with suppress(OSError), closing(HTTPConnection(HOST, port, timeout=2)) as connection:
            connection.request("GET", "/health")
            return connection.getresponse().status == HTTPStatus.OK
        time.sleep(0.1)
    return False


def _stop(process: subprocess.Popen[Any]) -> None:
    for signum in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):  # all of them have ended
            os.killpg(process.pid, signum)
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)
            return
