"""Sends a run's write-ahead log to MLflow, in a thread of its own and through outages."""

import logging
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from tracklight.tracking.mlflow_client import (
    get_artifact_repository,
    is_conflict,
    is_transient,
    mlflow,
    retry,
    short_reason,
)
from tracklight.tracking.sqlite_file import RunTables, has_known_columns
from tracklight.tracking.tags import ARTIFACTS_FOLDER, KEY_TAG
from tracklight.tracking.wal import Call, Points, WriteAheadLog, read_records

_log = logging.getLogger(__name__)

_MAX_POINTS = 1000  # of one log_batch; mlflow.utils.validation.MAX_METRICS_PER_BATCH
_PERIOD_S = 1.0
_DRAIN_PERIOD_S = 0.2
_POLL_S = 0.01
_CONFLICT_S = 10.0
_MAX_BACK_OFF_S = 10.0


def temporary_path(path: Path) -> Path:
    """Return the name under which a file is written until it is whole; it is not uploaded."""
    return path.with_name(f".{path.name}.tmp")


def delete_duplicates(client: Any, run: Any) -> None:
    """Delete the empty runs that a server made, late perhaps, where MLflow's client repeated the request."""
    query = f"tags.`{KEY_TAG}` = '{run.data.tags.get(KEY_TAG)}' AND attributes.status = 'RUNNING'"
    for other in client.search_runs([run.info.experiment_id], query):
        if other.info.run_id != run.info.run_id and not (other.data.metrics or other.data.params):
            try:
                client.delete_run(other.info.run_id)
            except mlflow.exceptions.MlflowException as error:
                if error.error_code != "PERMISSION_DENIED":
                    raise
                _log.warning("run %s is an empty copy, but may not be deleted", other.info.run_id)


class MlflowWriter:
    """Sends a run's log to MLflow and uploads its artifacts.

    Points are written to `database` directly, if given; to `tables`, which the caller closes, all else too.
    """

    def __init__(
        self,
        client: Any,
        run: Any,
        wal: WriteAheadLog,
        database: Path | None,
        tables: RunTables | None = None,
    ):
        self.client = client
        self.run_id: str = run.info.run_id
        self._run = run  # as it was when opened
        self.wal = wal
        self.artifacts = wal.path.parent / ARTIFACTS_FOLDER
        self._artifact_uri: str = run.info.artifact_uri
        uri = urlsplit(self._artifact_uri)
        is_local = uri.scheme in ("", "file") and Path(url2pathname(uri.path)) == self.artifacts
        self._needs_upload = not is_local
        self._uploaded: dict[Path, tuple[int, int]] = {}
        self.is_remote = database is None
        self._database, self._fills, self._tables = database, tables is not None, tables

    @property
    def pending(self) -> bool:
        """Whether anything waits to be sent."""
        return self.wal.sent < self.wal.end

    def send_next(self) -> None:
        """Send the next request; errors of MLflow propagate."""
        # What MLflow holds must be in the file even after power loss, or replay would double it.
        self.wal.sync()
        taken = list[Points | Call]()
        count, confirmed = 0, self.wal.sent
        for record, end in read_records(self.wal.path, self.wal.sent, self.wal.end):
            if isinstance(record, Points):
                count += len(record.steps)
                if taken and count > _MAX_POINTS:
                    break
            elif not (self._fills and record.fills_tables):
                if not taken:
                    self._call(record)
                    confirmed = end
                break
            taken.append(record)
            confirmed = end
        if taken:
            self._log(taken)
        self.wal.confirm(confirmed)

    def _log(self, records: list[Points | Call]) -> None:
        if self._database and not self._tables:
            if has_known_columns(self._database):
                self._tables = RunTables(self._database)
            else:
                self._database = None
        if self._tables:
            self._tables.write(self.run_id, records)
            return
        metrics = [
            mlflow.entities.Metric(record.key, value, record.timestamp_ms, step)
            for record in records
            if isinstance(record, Points)
            for step, value in zip(record.steps, record.values, strict=True)
        ]
        self.client.log_batch(self.run_id, metrics=metrics)

    def _call(self, call: Call) -> None:
        entities, client, arguments = mlflow.entities, self.client, call.arguments
        values = arguments.get("values", {}).items()
        try:
            match call.name:
                case "params":
                    client.log_batch(self.run_id, params=[entities.Param(*v) for v in values])
                case "tags":
                    client.log_batch(self.run_id, tags=[entities.RunTag(*v) for v in values])
                case "input":
                    context = entities.InputTag("mlflow.data.context", arguments.pop("context"))
                    dataset = entities.Dataset(**arguments, source_type="local")
                    inputs = [entities.DatasetInput(dataset, [context])]
                    retry(lambda: client.log_inputs(self.run_id, inputs), _CONFLICT_S, when=is_conflict)
                case "publish":
                    self.upload_artifacts()
                case "status" if arguments["status"] == "RUNNING":
                    client.update_run(self.run_id, "RUNNING")
                case "status":
                    if self.is_remote:
                        delete_duplicates(client, self._run)
                    client.set_terminated(self.run_id, arguments["status"], arguments["end_ms"])
        except mlflow.exceptions.MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE" or call.name == "status":
                raise
            _log.warning("MLflow refused %s of %s: %s", call.name, self.run_id, short_reason(error))

    def upload_artifacts(self) -> None:
        """Upload new and changed files, if the store keeps artifacts elsewhere."""
        if not self._needs_upload:
            return
        # Not by the client, which remembers the run's folder as the place once a module has logged there.
        repository = get_artifact_repository(self._artifact_uri, tracking_uri=self.client.tracking_uri)
        for path in sorted(self.artifacts.rglob("*")):
            if path.is_file() and not path.match(".*.tmp"):
                stat = path.stat()
                version = (stat.st_size, stat.st_mtime_ns)
                if self._uploaded.get(path) != version:
                    folder = "/".join(path.relative_to(self.artifacts).parts[:-1]) or None
                    repository.log_artifact(str(path), folder)
                    self._uploaded[path] = version

    def close(self) -> None:
        """Close the connection to the database, if one was opened."""
        if self._tables and not self._fills:
            self._tables.close()
            self._tables = None


class Sender(threading.Thread):
    """The daemon thread that sends a run's log while training goes on.

    A direct one sends in the caller's thread instead, when asked to: for hundreds of runs in one process.
    """

    def __init__(self, writer: MlflowWriter, display_uri: str, is_direct: bool = False):
        super().__init__(name="tracklight-sender", daemon=True)
        self.writer = writer
        self._display_uri, self._is_direct = display_uri, is_direct
        self._wake = threading.Event()
        self._stopped = False
        self._draining = False
        self._failing = False
        self._is_lasting = False  # whether waiting is no cure for the last failure
        self._progress_s = time.monotonic()

    def start(self) -> None:
        """Start the thread, unless all is sent by the caller's."""
        if not self._is_direct:
            super().start()

    def run(self) -> None:
        """Send what is there once in a period; after a failure wait longer each time."""
        pause_s = _PERIOD_S
        while not self._stopped:
            self._wake.wait(pause_s)
            self._wake.clear()
            if self._send():
                pause_s = _PERIOD_S
            else:
                pause_s = _DRAIN_PERIOD_S if self._draining else min(2 * pause_s, _MAX_BACK_OFF_S)

    def _send(self) -> bool:
        """Send what is there; return whether all of it was taken."""
        try:
            while self.writer.pending and not self._stopped:
                self.writer.send_next()
                self._progress_s = time.monotonic()
                if self._failing:
                    self._failing = False
                    _log.warning("MLflow at %s answers again", self._display_uri)
            return True
        except Exception as error:  # whatever it is, the points stay and training goes on
            self._is_lasting = not is_transient(error)
            if not self._failing:
                self._failing = True
                now = f"training goes on, points wait in {self.writer.wal.path}"
                reason = short_reason(error)
                _log.warning(f"MLflow at {self._display_uri} takes nothing now ({reason}); {now}")
            return False

    def drain(self, timeout_s: float) -> bool:
        """Return whether everything was sent; give up at a lasting error, or without progress for long."""
        self._draining, self._is_lasting = True, False
        self._wake.set()
        self._progress_s = time.monotonic()
        while (
            self.writer.pending and not self._is_lasting and time.monotonic() < self._progress_s + timeout_s
        ):
            if not (self._is_direct and self._send()):
                time.sleep(_POLL_S)
        if self._is_direct:
            self.writer.close()  # a connection each would be too many
        self._draining = False
        return not self.writer.pending

    def stop(self) -> None:
        """Send nothing more; a request under way may still end."""
        self._stopped = True
        self._wake.set()
        if self.ident is not None:
            self.join(timeout=1)
        if not self.is_alive():
            self.writer.close()
