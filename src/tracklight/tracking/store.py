"""The tracking store: opened safely, and the runs in it made, continued and found again."""

import getpass
import sys
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracklight.errors import BadInput, RunFailed
from tracklight.tracking import address, database, layout, recovery, server
from tracklight.tracking.lock import Held, RunLock
from tracklight.tracking.patience import is_locked, passes, persist, reason
from tracklight.tracking.quiet import mlflow
from tracklight.tracking.wal import WriteAhead

if TYPE_CHECKING:
    from tracklight.tracking.run import Run

_PATIENCE_S = {"database": 60.0, "server": 15.0}
_PAUSE_S = 1.0


def connect(uri: str | None, directory: Path) -> "Store":
    """Open the tracking store; an SQLite file that is not there is made.

    Args:
        uri: An MLflow tracking URI; None for the SQLite file in `directory`.
        directory: Where run folders lie; made if missing.

    Raises:
        BadInput: The store cannot be opened, or the folder not be written.
    """
    directory = directory.absolute()
    full = address.resolve(uri, directory)
    root = directory / layout.FOLDER
    try:
        root.mkdir(parents=True, exist_ok=True)
        probe = root / f".probe-{uuid.uuid4().hex}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise BadInput(
            f"tracking.dir={directory} cannot be written ({error.strerror}); try another"
        ) from None
    path = address.sqlite_path(full)
    if path is not None:
        database.ensure(path, root.as_uri())
    else:
        server.bound_requests()
        server.await_answer(full)
    patience_s = _PATIENCE_S["database" if path is not None else "server"]
    try:
        client = persist(lambda: _open_client(full), patience_s, when=is_locked)
    except Exception as error:  # SQLAlchemy's, a driver's, MLflow's: none of them is for the user
        raise BadInput(
            f"cannot open tracking.uri={address.redact(full)}: {reason(error)}"
        ) from None
    return Store(client, full, directory, patience_s)


def _open_client(uri: str) -> Any:
    client = mlflow.MlflowClient(uri)
    if address.is_server(uri):
        client.search_experiments(max_results=1)  # is it MLflow, and does it let us in?
    return client


class Store:
    """An open tracking store.

    Attributes:
        client: MLflow's own client of it.
        uri: The full URI, with secrets.
        shown_uri: The URI as it may be printed and stored.
        directory: Absolute; run folders are `directory/artifacts/<run_id>`.
        database: The SQLite file, if the store is one.
        patience_s: How long a call waits for a store that is busy or away.
        recovered: Ids of the runs that `recover` found left by a process that died.
    """

    def __init__(self, client: Any, uri: str, directory: Path, patience_s: float):
        self.client = client
        self.uri = uri
        self.shown_uri = address.redact(uri)
        self.directory = directory
        self.database = address.sqlite_path(uri)
        self.patience_s = patience_s
        self.recovered: set[str] = set()
        self._root = directory / layout.FOLDER

    @property
    def mark(self) -> str:
        """What lock files say of the store that their run is in; moves with the directory."""
        if self.database is not None and self.database.is_relative_to(self.directory):
            return str(self.database.relative_to(self.directory))
        return self.shown_uri

    def create(self, experiment: str, name: str | None, tags: dict[str, str]) -> "Run":
        """Make a run, its folder and its lock; `tags` are set in the request that makes it.

        Args:
            experiment: Its name; made if there is none.
            name: The run's; None for one that MLflow invents.
            tags: Plain strings.

        Raises:
            BadInput: The folder cannot be written, or there is no such experiment to be had.
            RunFailed: The store was there and is now away.
        """
        key = uuid.uuid4().hex
        # The locked folder comes first: what happens after the run exists cannot orphan it.
        folder = self._root / f"{layout.NEW}{key}"
        try:
            folder.mkdir(parents=True)
            lock = RunLock(folder, {"store": self.mark})
        except OSError as error:
            raise BadInput(f"cannot write {folder.parent}: {error.strerror}") from None
        source = {"mlflow.user": _user(), "mlflow.source.name": sys.argv[0]}
        tags = source | {"mlflow.source.type": "LOCAL"} | tags | {layout.KEY_TAG: key}
        try:
            experiment_id = self._experiment(experiment)
            run = self._create_once(experiment_id, name, tags)
        except mlflow.exceptions.MlflowException as error:
            lock.close()
            raise RunFailed(f"cannot make a run at {self.shown_uri}: {reason(error)}") from None
        final = self._root / run.info.run_id
        folder.rename(final)
        database.sync_folder(self._root)
        lock.moved(final)
        return self._open(run, lock)

    def _experiment(self, name: str) -> str:
        def get() -> Any:
            return persist(lambda: self.client.get_experiment_by_name(name), self.patience_s)

        def make() -> None:
            location = None if address.is_server(self.uri) else self._root.as_uri()
            self.client.create_experiment(name, artifact_location=location)

        experiment = get()
        if experiment is None:
            try:
                persist(make, self.patience_s)
            except mlflow.exceptions.MlflowException as error:
                if error.error_code == "INVALID_PARAMETER_VALUE":
                    raise BadInput(f"tracking.experiment={name}: {reason(error)}") from None
                if error.error_code != "RESOURCE_ALREADY_EXISTS":  # then another was faster
                    raise
            experiment = get()
        if experiment is None or experiment.lifecycle_stage != "active":
            raise BadInput(
                f"tracking.experiment={name} is deleted; restore it, or try another name"
            )
        return experiment.experiment_id

    def _create_once(self, experiment_id: str, name: str | None, tags: dict[str, str]) -> Any:
        """Create one run, whatever becomes of the answers: its key tells whether it exists."""

        def with_key() -> list[Any]:
            return self.search(f"tags.`{layout.KEY_TAG}` = '{tags[layout.KEY_TAG]}'")

        start_s = time.monotonic()
        while True:
            try:
                run = self.client.create_run(experiment_id, tags=tags, run_name=name)
                break
            except mlflow.exceptions.MlflowException as error:
                if not passes(error) or time.monotonic() - start_s > self.patience_s:
                    raise
            time.sleep(_PAUSE_S)
            if found := with_key():
                run = found[0]
                break
        if address.is_server(self.uri):  # MLflow's own retries send the request again, unasked
            for other in with_key():
                if other.info.run_id != run.info.run_id:
                    self.client.delete_run(other.info.run_id)
        return run

    def reopen(self, run_id: str) -> "Run":
        """Continue a run: its lock taken, what it left unsent sent, its status RUNNING again.

        Raises:
            BadInput: There is no such run, it is in progress, or its folder cannot be written.
            RunFailed: The store was there and is now away.
        """
        try:
            run = persist(lambda: self.client.get_run(run_id), self.patience_s)
        except mlflow.exceptions.MlflowException as error:
            raise BadInput(f"run {run_id!r} is not to be had: {reason(error)}") from None
        if run.info.lifecycle_stage != "active":
            raise BadInput(f"run {run_id} is deleted; try `mlflow runs restore --run-id {run_id}`")
        folder = self._root / run.info.run_id
        try:
            folder.mkdir(exist_ok=True)
            lock = RunLock(folder, {"store": self.mark})
        except Held as held:
            raise BadInput(f"run {run_id} is in progress (pid {held.pid})") from None
        except OSError as error:
            raise BadInput(f"cannot write run folder {folder}: {error.strerror}") from None
        try:
            return self._open(run, lock)
        except BaseException:
            lock.close()
            raise

    def _open(self, run: Any, lock: RunLock) -> "Run":
        from tracklight.tracking.run import Run  # imports Lightning: seconds that readers spare

        folder = self._root / run.info.run_id
        try:
            wal = WriteAhead(folder / layout.POINTS)
        except OSError as error:
            raise BadInput(f"cannot write run folder {folder}: {error.strerror}") from None
        if wal.damaged or wal.end == 0:  # then MLflow knows more than the file
            for key in run.data.metrics:
                history = self.client.get_metric_history(run.info.run_id, key)
                wal.highest[key] = max(metric.step for metric in history)
        if wal.end or run.info.status != "RUNNING":
            wal.add_call("status", status="RUNNING")
        opened = Run(self, run, folder, lock, wal)
        if not opened.flush(self.patience_s):
            opened.abandon()
            raise RunFailed(f"{self.shown_uri} does not take what run {run.info.run_id} left")
        return opened

    def find(self, identity: str) -> list[Any]:
        """Runs with the tag `tracklight.identity`, newest first, deleted ones excluded."""
        return self.search(f"tags.`{layout.IDENTITY_TAG}` = '{identity}'")

    def search(self, query: str) -> list[Any]:
        """Runs of every experiment that MLflow's filter lets through, newest first."""

        def search() -> list[Any]:
            experiments = [e.experiment_id for e in self.client.search_experiments()]
            newest = ["attributes.start_time DESC"]
            return list(self.client.search_runs(experiments, query, order_by=newest))

        return persist(search, self.patience_s)

    def recover(self) -> None:
        """Send what earlier processes left unsent; mark their runs that died as KILLED."""
        recovery.recover(self)


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container may know no name for its user
        return "unknown"
