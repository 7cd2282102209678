"""Carries a run's write-ahead file to MLflow, off the training thread, through outages."""

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from tracklight.tracking.mlflow_client import mlflow, reason
from tracklight.tracking.sqlite_file import PointTable, is_known
from tracklight.tracking.wal import Call, Points, WriteAhead, read

_log = logging.getLogger(__name__)

_MAX_POINTS = 1000  # of one log_batch; mlflow.utils.validation.MAX_METRICS_PER_BATCH
_PERIOD_S = 1.0
_POLL_S = 0.2
_MAX_BACK_OFF_S = 10.0


class Delivery:
    """Sends what lies beyond the file's confirmed offset, in order, one request a step.

    Args:
        client: Where to.
        run_id: Which run.
        wal: The run's file.
        publish: Uploads the run's artifacts; called where the file says so.
        database: MLflow's SQLite file, if that is where the client writes.
    """

    def __init__(
        self,
        client: Any,
        run_id: str,
        wal: WriteAhead,
        publish: Callable[[], None],
        database: Path | None,
    ):
        self._client = client
        self._run_id = run_id
        self._wal = wal
        self._publish = publish
        self._database = database
        self._table: PointTable | None = None

    @property
    def pending(self) -> bool:
        """Whether there is something to send."""
        return self._wal.sent < self._wal.end

    def step(self) -> None:
        """Send the next request's worth; whatever MLflow raises passes through."""
        # What MLflow holds must be in the file even after power loss, or replay would double it.
        self._wal.sync()
        points: list[Points] = []
        count = 0
        at = self._wal.sent
        for record, end in read(self._wal.path, self._wal.sent, self._wal.end):
            if isinstance(record, Call):
                if not points:
                    self._call(record)
                    at = end
                break
            if points and count + len(record.steps) > _MAX_POINTS:
                break
            points.append(record)
            count += len(record.steps)
            at = end
        if points:
            self._send(points)
        self._wal.confirm(at)

    def _send(self, points: list[Points]) -> None:
        if self._database is not None and self._table is None:
            if is_known(self._database):
                self._table = PointTable(self._database, self._run_id)
            else:
                self._database = None
        if self._table is not None:
            self._table.write(points)
            return
        metrics = [
            mlflow.entities.Metric(record.key, value, record.timestamp_ms, step)
            for record in points
            for step, value in zip(record.steps, record.values, strict=True)
        ]
        self._client.log_batch(self._run_id, metrics=metrics)

    def close(self) -> None:
        """Close what this opened."""
        if self._table is not None:
            self._table.close()

    def _call(self, call: Call) -> None:
        try:
            self._dispatch(call)
        except mlflow.exceptions.MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE" or call.name == "status":
                raise
            _log.warning("MLflow refused %s of %s: %s", call.name, self._run_id, reason(error))

    def _dispatch(self, call: Call) -> None:
        entities, client, arguments = mlflow.entities, self._client, call.arguments
        match call.name:
            case "params":
                params = [entities.Param(k, v) for k, v in arguments["values"].items()]
                client.log_batch(self._run_id, params=params)
            case "tags":
                tags = [entities.RunTag(k, v) for k, v in arguments["values"].items()]
                client.log_batch(self._run_id, tags=tags)
            case "input":
                context = entities.InputTag("mlflow.data.context", arguments["context"])
                dataset = entities.Dataset(
                    arguments["name"], arguments["digest"], "local", arguments["source"]
                )
                client.log_inputs(self._run_id, [entities.DatasetInput(dataset, [context])])
            case "publish":
                self._publish()
            case "status":
                if arguments["status"] == "RUNNING":
                    client.update_run(self._run_id, "RUNNING")
                else:
                    client.set_terminated(self._run_id, arguments["status"], arguments["end_ms"])


class Sender(threading.Thread):
    """The daemon thread that keeps a run's delivery going while training goes on.

    Args:
        delivery: What is to be sent.
        where: How MLflow's address is shown.
        spool: The file where points wait through an outage; shown.
    """

    def __init__(self, delivery: Delivery, where: str, spool: Path):
        super().__init__(name="tracklight-feeder", daemon=True)
        self._delivery = delivery
        self._where = where
        self._spool = spool
        self._wake = threading.Event()
        self._idle = threading.Event()
        self._stopped = False
        self._draining = False
        self._failing = False
        self._progress_s = time.monotonic()

    def run(self) -> None:
        """Send what is there once in a period; after a failure wait longer each time."""
        pause_s = _PERIOD_S
        while not self._stopped:
            self._wake.wait(pause_s)
            self._wake.clear()
            try:
                while self._delivery.pending and not self._stopped:
                    self._delivery.step()
                    self._succeeded()
                pause_s = _PERIOD_S
                self._idle.set()
            except Exception as error:  # whatever it is, the points stay and training goes on
                self._failed(error)
                pause_s = _PERIOD_S if self._draining else min(2 * pause_s, _MAX_BACK_OFF_S)

    def _succeeded(self) -> None:
        self._progress_s = time.monotonic()
        if self._failing:
            self._failing = False
            _log.warning("MLflow at %s answers again", self._where)

    def _failed(self, error: Exception) -> None:
        if not self._failing:
            self._failing = True
            _log.warning(
                "MLflow at %s takes nothing now (%s); training goes on, points wait in %s",
                self._where,
                reason(error),
                self._spool,
            )

    def drain(self, patience_s: float) -> bool:
        """Return whether all was sent; give up after `patience_s` without any progress."""
        self._draining = True
        start_s = time.monotonic()
        try:
            while self._delivery.pending:
                if time.monotonic() > max(start_s, self._progress_s) + patience_s:
                    return False
                self._idle.clear()
                self._wake.set()
                self._idle.wait(_POLL_S)
        finally:
            self._draining = False
        return True

    def stop(self) -> None:
        """Send nothing more; a request under way may still end."""
        self._stopped = True
        self._wake.set()
        self.join(timeout=1)
        if not self.is_alive():
            self._delivery.close()


def temporary(path: Path) -> Path:
    """Return the name under which a file is written until it is whole; it is not sent."""
    return path.with_name(f".{path.name}.tmp")


def _is_temporary(path: Path) -> bool:
    return path.name.startswith(".") and path.suffix == ".tmp"


class Upload:
    """Sends each file of `folder` once, and again when it changes.

    Args:
        client: MLflow's.
        run_id: The run.
        artifact_uri: Where the store keeps the run's artifacts.
        folder: Where they lie on this machine.
    """

    def __init__(self, client: Any, run_id: str, artifact_uri: str, folder: Path):
        self._client = client
        self._run_id = run_id
        self._folder = folder
        self._done: dict[Path, tuple[int, int]] = {}
        parts = urlsplit(artifact_uri)
        local = url2pathname(parts.path) if parts.scheme in ("", "file") else None
        self.needed = local is None or Path(local) != folder

    def all(self) -> None:
        """Send what is new; whatever MLflow raises passes through."""
        if not self.needed:
            return
        for path in sorted(self._folder.rglob("*")):
            if path.is_file() and not _is_temporary(path):
                stat = path.stat()
                mark = (stat.st_size, stat.st_mtime_ns)
                if self._done.get(path) != mark:
                    inside = path.parent.relative_to(self._folder).as_posix()
                    target = None if inside == "." else inside
                    self._client.log_artifact(self._run_id, str(path), target)
                    self._done[path] = mark
