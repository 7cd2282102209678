"""The tracking store: opened safely, and the runs in it made, continued, found and recovered."""

import getpass
import sys
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracklight.errors import BadInput
from tracklight.tracking import address, database
from tracklight.tracking.lock import Held, RunLock
from tracklight.tracking.quiet import mlflow
from tracklight.tracking.wal import WriteAhead

if TYPE_CHECKING:
    from tracklight.tracking.run import Run

KEY_TAG = "tracklight.key"
IDENTITY_TAG = "tracklight.identity"
ARTIFACTS = "artifacts"
POINTS = "points.wal"
_NEW = ".new-"


def connect(uri: str | None, directory: Path) -> "Store":
    """Open the tracking store, making it if it is the SQLite file in `directory`.

    Args:
        uri: An MLflow tracking URI; None for the SQLite file.
        directory: Where run folders lie; made if missing.

    Raises:
        BadInput: The store cannot be opened, or the folder not be written.
    """
    directory = directory.absolute()
    full = address.resolve(uri, directory)
    root = directory / ARTIFACTS
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"tracking.dir={directory}: {error.strerror}; try another") from None
    path = address.sqlite_path(full)
    if path is not None:
        database.ensure(path, root.as_uri())
    client = mlflow.MlflowClient(full)
    return Store(client, full, directory)


class Store:
    """An open tracking store.

    Attributes:
        client: MLflow's own client of it.
        uri: The full URI, with secrets.
        shown_uri: The URI as it may be printed and stored.
        directory: Absolute; run folders are `directory/artifacts/<run_id>`.
    """

    def __init__(self, client: Any, uri: str, directory: Path):
        self.client = client
        self.uri = uri
        self.shown_uri = address.redact(uri)
        self.directory = directory
        self._root = directory / ARTIFACTS
        self._patience_s = 15.0 if address.is_server(uri) else 60.0

    def create(self, experiment: str, name: str | None, tags: dict[str, str]) -> "Run":
        """Make a run, its folder and its lock; `tags` are set in the request that makes it.

        Raises:
            BadInput: The folder cannot be written, or there is no such experiment to be had.
        """
        key = uuid.uuid4().hex
        folder = self._root / f"{_NEW}{key}"
        folder.mkdir()
        lock = RunLock(folder, {"store": self.shown_uri})
        experiment_id = self._experiment(experiment)
        source = {"mlflow.user": getpass.getuser(), "mlflow.source.name": sys.argv[0]}
        run = self.client.create_run(
            experiment_id, tags=source | tags | {KEY_TAG: key}, run_name=name
        )
        final = self._root / run.info.run_id
        folder.rename(final)
        database.sync_folder(self._root)
        lock.moved(final)
        return self._open(run, lock)

    def _experiment(self, name: str) -> str:
        experiment = self.client.get_experiment_by_name(name)
        if experiment is None:
            location = None if address.is_server(self.uri) else self._root.as_uri()
            return self.client.create_experiment(name, artifact_location=location)
        return experiment.experiment_id

    def _open(self, run: Any, lock: RunLock) -> "Run":
        from tracklight.tracking.run import Run  # Lightning's import costs seconds: not for readers

        folder = self._root / run.info.run_id
        wal = WriteAhead(folder / POINTS)
        return Run(
            self.client,
            run.info,
            folder,
            lock,
            wal,
            self.shown_uri,
            self._patience_s,
            run.data.params,
        )

    def reopen(self, run_id: str) -> "Run":
        """Continue a run: its lock taken, its status RUNNING again.

        Raises:
            BadInput: It is in progress elsewhere, or its folder cannot be written.
        """
        run = self.client.get_run(run_id)
        folder = self._root / run_id
        folder.mkdir(exist_ok=True)
        try:
            lock = RunLock(folder, {"store": self.shown_uri})
        except Held as held:
            raise BadInput(f"run {run_id} is in progress (pid {held.pid})") from None
        self.client.update_run(run_id, "RUNNING")
        return self._open(run, lock)

    def find(self, identity: str) -> list[Any]:
        """Runs with this identity, newest first, deleted ones excluded."""
        experiments = [e.experiment_id for e in self.client.search_experiments()]
        return list(
            self.client.search_runs(
                experiments,
                f"tags.`{IDENTITY_TAG}` = '{identity}'",
                order_by=["attributes.start_time DESC"],
            )
        )

    def recover(self) -> None:
        """Send what earlier processes left unsent; mark their runs that died as KILLED."""
