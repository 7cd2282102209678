"""Shows the runs in MLflow's own UI, opened where the newest of them is."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from http import HTTPStatus
from http.client import HTTPConnection
from pathlib import Path
from typing import TYPE_CHECKING

from tracklight.commands.parser import Parser
from tracklight.errors import BadInput, RunFailed

if TYPE_CHECKING:
    from tracklight.tracking.store import Store


HOST = "127.0.0.1"
PORT = 5001
LOG = "ui.log"  # in the folder of the runs
WORKFLOW = "workflowType=machine_learning"
PORTS = range(1, 2**16)
STARTED_S = 60.0
STOPPED_S = 10.0
EPILOG = """\
It listens on this machine alone, until Ctrl-C, and keeps a log in ui.log beside the runs.
Exit codes: 0 done, 1 failed, 2 bad input."""


def main(argv: Sequence[str]) -> int:
    """Serve the UI as the command line says; return the exit code."""
    parser = Parser("Show the runs in MLflow's UI.", EPILOG)
    parser.add_argument("--port", type=int, default=PORT, help=f"default: {PORT}")
    asked = parser.parse_args(argv)

    from tracklight.tracking import address
    from tracklight.tracking.store import connect

    _check_port(asked.port)
    if not asked.dir.is_dir():
        raise BadInput(f"--dir {asked.dir} is no folder")
    store = connect(asked.uri, asked.dir)  # made where there is none: one may look while it fills
    store.recover()
    page = _page(store, asked.experiment)
    if address.is_server(store.uri):
        print(f"MLflow UI: {store.shown_uri.rstrip('/')}{page} (served there)")
        return 0
    with suppress(KeyboardInterrupt):  # the way to end it
        _serve(store, asked.port, page)
    return 0


def _check_port(port: int) -> None:
    if port not in PORTS:
        raise BadInput(f"--port {port} must be {PORTS[0]} to {PORTS[-1]}; try --port {PORT}")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise BadInput(
                f"--port {port} cannot be had ({error.strerror}); try make ui PORT={port + 1}, "
                f"or --port {port + 1}"
            ) from None


def _page(store: "Store", experiment: str | None) -> str:
    """The page of an experiment's runs; of the newest run's where none is named.

    MLflow's first page is made for traces of language models: no run is in sight there, and the
    experiments it leads to open on empty charts.
    """
    from tracklight.runs import select as query

    if experiment is not None:
        found = store.client.get_experiment_by_name(experiment)
        if found is None:
            raise BadInput(f"--experiment {experiment}: there is none in {store.shown_uri}")
        experiment_id = found.experiment_id
    else:
        try:
            experiment_id = query.choose(store, "last").info.experiment_id
        except BadInput:  # nothing trained yet
            return f"/#/experiments?{WORKFLOW}"
    return f"/#/experiments/{experiment_id}/runs?{WORKFLOW}"


def _serve(store: "Store", port: int, page: str) -> None:
    """Run MLflow's server until it ends or we are told to.

    Raises:
        RunFailed: It ended by itself.
    """
    print("MLflow's server starts; this takes some seconds", flush=True)
    words = [*("--host", HOST), *("--port", str(port)), *("--workers", "1")]
    words += ["--default-artifact-root", store.root.as_uri(), "--uvicorn-opts=--log-level=warning"]
    path = store.directory / LOG
    with path.open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "ui", *words],
            env=_environment(store, os.environ),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # it has children, and ends only if all of them are told
        )
    try:
        if _answers(process, port):
            print(f"MLflow UI: http://{HOST}:{port}{page} (Ctrl-C ends it)", flush=True)
            process.wait()
    finally:
        _stop(process)
    raise RunFailed(f"MLflow's server did not start, or ended by itself; {path} says more")


def _environment(store: "Store", environ: Mapping[str, str]) -> dict[str, str]:
    folder = str(Path(sys.executable).parent)  # MLflow starts its server by name
    return {
        **environ,
        "PATH": os.pathsep.join((folder, environ.get("PATH", os.defpath))),
        "MLFLOW_BACKEND_STORE_URI": store.uri,  # its password would show in the command
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "PYTHONWARNINGS": "ignore",
    }


def _answers(process: "subprocess.Popen[bytes]", port: int) -> bool:
    end = time.monotonic() + STARTED_S
    while process.poll() is None and time.monotonic() < end:
        with suppress(OSError), closing(HTTPConnection(HOST, port, timeout=2)) as connection:
            connection.request("GET", "/health")
            return connection.getresponse().status == HTTPStatus.OK
        time.sleep(0.1)  # nobody there yet
    return False


def _stop(process: "subprocess.Popen[bytes]") -> None:
    for signum in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):  # all of them have ended
            os.killpg(process.pid, signum)
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOPPED_S)
            return
