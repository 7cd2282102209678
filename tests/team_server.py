"""What scripts/server/compose.yaml starts, as processes on 127.0.0.1: MLflow on PostgreSQL and an S3."""

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import requests
import yaml

from process import free_port

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "scripts" / "server"
STARTED_S = 90.0
# Of the .env that a user writes.
SECRETS = {
    "DATABASE_PASSWORD": "Zq7database-5f1c",
    "ARTIFACTS_PASSWORD": "Zq7artifacts-83bd",
    "ADMIN_PASSWORD": "Zq7administrator-e24a",
    "SESSION_KEY": "Zq7session-90cc",
}


class PostgreSQL:
    """A PostgreSQL server of its own, in a folder of its own; skips the test where there is none."""

    def __init__(self, user: str, password: str | None = None):
        programs = max(Path("/usr/lib/postgresql").glob("*/bin"), default=None)
        if programs is None or importlib.util.find_spec("psycopg") is None:
            pytest.skip("needs PostgreSQL in /usr/lib/postgresql, and psycopg to speak with it")
        self._programs, self._folder, self.port = programs, Path(tempfile.mkdtemp()), free_port()
        self._as_user = []
        if os.getuid() == 0:  # as which it does not run
            self._as_user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
            shutil.chown(self._folder, "postgres")
        method = ["-A", "trust"]
        if password is not None:
            (self._folder / "password").write_text(f"{password}\n")
            method = ["-A", "scram-sha-256", f"--pwfile={self._folder / 'password'}"]
        self._call("initdb", *method, "-U", user, "--no-sync")
        self.url = f"postgresql+psycopg://{user}@127.0.0.1:{self.port}/postgres"
        self.start()

    def _call(self, program: str, *words: str | Path) -> None:
        command = [*self._as_user, self._programs / program, "-D", self._folder / "data", *words]
        subprocess.run(command, cwd="/", check=True, stdout=subprocess.DEVNULL)

    def start(self) -> None:
        options = f"-F -p {self.port} -k {self._folder} -c listen_addresses=127.0.0.1 -c max_connections=200"
        self._call("pg_ctl", "-w", "-l", self._folder / "log", "-o", options, "start")

    def stop(self) -> None:
        """Stop at once, as a crash would."""
        self._call("pg_ctl", "-m", "immediate", "stop")

    def close(self) -> None:
        with suppress(subprocess.CalledProcessError):
            self.stop()
        shutil.rmtree(self._folder)


class TeamServer:
    """MLflow's server with the command and the environment of compose.yaml, on a PostgreSQL and moto's S3."""

    def __init__(self, folder: Path, num_workers: int = 1):
        if any(importlib.util.find_spec(name) is None for name in ("moto", "boto3", "flask_wtf")):
            pytest.skip("needs moto, boto3 and flask-wtf")
        self.folder, self.port, self._s3_port = folder, free_port(), free_port()
        self.uri, self.s3_uri = f"http://127.0.0.1:{self.port}", f"http://127.0.0.1:{self._s3_port}"
        self.database = PostgreSQL("mlflow", SECRETS["DATABASE_PASSWORD"])
        services = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"]
        (folder / "auth.ini").write_text(self._local((FOLDER / "auth.ini").read_text()))
        self._env = {k: self._local(v) for k, v in services["server"]["environment"].items()}
        self._env["MLFLOW_AUTH_CONFIG_PATH"] = str(folder / "auth.ini")
        ours = {"host": "127.0.0.1", "port": str(self.port), "workers": str(num_workers)}
        self._command = [
            re.sub(
                r"^--(host|port|workers)=.*",
                lambda found: f"--{found[1]}={ours[found[1]]}",
                self._local(word),
            )
            for word in services["server"]["command"][1:]
        ]
        self._bucket = services["bucket"]["command"][2]
        self._processes: list[subprocess.Popen[bytes]] = []

    def _local(self, text: str) -> str:
        """Put this machine's addresses and the passwords in the place of those of compose.yaml."""
        text = text.replace("@database/mlflow", self.database.url.partition("mlflow")[2])
        text = text.replace("http://artifacts:7070", self.s3_uri)
        return re.sub(r"\$\{(\w+)(?::[-?]([^}]*))?\}", lambda v: SECRETS.get(v[1], v[2] or ""), text)

    def _start(self, name: str, *words: str) -> "subprocess.Popen[bytes]":
        # MLflow starts uvicorn by name, which an activated environment has on PATH.
        path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
        with (self.folder / f"{name}.log").open("a") as log:
            process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", *words],
                env={**os.environ, **self._env, "PATH": path, "PYTHONWARNINGS": "ignore"},
                cwd=self.folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._processes.append(process)
        return process

    def start_all(self) -> None:
        """Start the S3 and MLflow; create the bucket as compose.yaml does."""
        self._start("artifacts", "moto.server", "-H", "127.0.0.1", "-p", str(self._s3_port))
        self.start()
        wait_for(self.s3_uri)
        subprocess.run([sys.executable, "-c", self._bucket], env={**os.environ, **self._env}, check=True)

    def start(self) -> None:
        """Start MLflow, and wait until it answers."""
        self._mlflow = self._start("mlflow", "mlflow", *self._command)
        wait_for(f"{self.uri}/health")

    def kill(self) -> None:
        """Kill MLflow with all its workers."""
        os.killpg(self._mlflow.pid, signal.SIGKILL)
        self._mlflow.wait()

    def add_user(self, name: str, password: str) -> None:
        admin = ("admin", SECRETS["ADMIN_PASSWORD"])
        request = {"username": name, "password": password}
        answer = requests.post(
            f"{self.uri}/api/2.0/mlflow/users/create", json=request, auth=admin, timeout=60
        )
        answer.raise_for_status()

    def query(self, sql: str, *values: object) -> list[tuple]:
        """Ask PostgreSQL, past MLflow."""
        import psycopg

        url = self.database.url.replace("+psycopg", "")
        with psycopg.connect(url, password=SECRETS["DATABASE_PASSWORD"]) as connection:
            return connection.execute(sql, values).fetchall()  # pyright: ignore[reportArgumentType]

    def objects(self) -> dict[str, bytes]:
        """Read all of the bucket, past MLflow."""
        import boto3

        keys = {"aws_access_key_id": "mlflow", "aws_secret_access_key": SECRETS["ARTIFACTS_PASSWORD"]}
        s3 = boto3.resource("s3", endpoint_url=self.s3_uri, region_name="us-east-1", **keys)
        return {each.key: each.get()["Body"].read() for each in s3.Bucket("mlflow").objects.all()}

    def close(self) -> None:
        for process in self._processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self.database.close()


@contextmanager
def team_server(folder: Path, num_workers: int = 1) -> Iterator[TeamServer]:
    """Run all of it."""
    server = TeamServer(folder, num_workers)
    try:
        server.start_all()
        yield server
    finally:
        server.close()


def wait_for(url: str) -> None:
    end = time.monotonic() + STARTED_S
    while True:
        with suppress(OSError):
            if requests.get(url, timeout=2).ok:
                return
        assert time.monotonic() < end, f"{url} does not answer"
        time.sleep(0.1)
