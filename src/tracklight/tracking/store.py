"""The tracking store: opened safely, and the runs in it made, continued and found again."""

import functools
import getpass
import logging
import shlex
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracklight.errors import BadInput, RunFailed
from tracklight.paths import HOME, sync_folder
from tracklight.redact import redact
from tracklight.tracking import address
from tracklight.tracking import address as server
from tracklight.tracking import sqlite_file as database
from tracklight.tracking import tags as layout
from tracklight.tracking.lock import FILE_NAME, LockHeld, RunLock, read_note
from tracklight.tracking.mlflow_client import is_locked, mlflow, passes, reason, retry
from tracklight.tracking.sender import Delivery, Upload
from tracklight.tracking.wal import WriteAhead

if TYPE_CHECKING:
    from tracklight.tracking.run import Run


_PATIENCE_S = {"database": 60.0, "server": 15.0}


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
        client = retry(lambda: _open_client(full), patience_s, when=is_locked)
    except Exception as error:  # SQLAlchemy's, a driver's, MLflow's: none of them is for the user
        raise BadInput(f"cannot open tracking.uri={redact(full)}: {reason(error)}") from None
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
        root: The folder of run folders.
        patience_s: How long a call waits for a store that is busy or away.
        recovered: Ids of the runs that `recover` found left by a process that died.
    """

    def __init__(self, client: Any, uri: str, directory: Path, patience_s: float):
        self.client = client
        self.uri = uri
        self.shown_uri = redact(uri)
        self.directory = directory
        self.database = address.sqlite_path(uri)
        self.patience_s = patience_s
        self.recovered: set[str] = set()
        self.root = directory / layout.FOLDER

    @property
    def mark(self) -> str:
        """What lock files say of the store that their run is in; moves with the directory."""
        if self.database is not None and self.database.is_relative_to(self.directory):
            return str(self.database.relative_to(self.directory))
        return self.shown_uri

    def look(self, info: Any) -> str:
        """Return how a run is seen in MLflow's UI: its address, or what to type.

        Args:
            info: MLflow's, of the run.
        """
        if address.is_server(self.uri):
            page = f"experiments/{info.experiment_id}/runs/{info.run_id}"
            return f"{self.shown_uri.rstrip('/')}/#/{page}"
        if self.database == self.directory / address.DATABASE:
            if self.directory == HOME:
                return "make ui"
            return f"python scripts/ui.py --dir {shlex.quote(str(self.directory))}"
        return f"python scripts/ui.py --uri {shlex.quote(self.shown_uri)}"

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
        folder = self.root / f"{layout.NEW}{key}"
        try:
            folder.mkdir(parents=True)
            lock = RunLock(folder, {"store": self.mark})
        except OSError as error:
            raise BadInput(f"cannot write {folder.parent}: {error.strerror}") from None
        source = {"mlflow.user": _user(), "mlflow.source.name": sys.argv[0]}
        tags = source | {"mlflow.source.type": "LOCAL"} | tags | {layout.KEY_TAG: key}
        try:
            run = create_once(self, experiment_id(self, experiment), name, tags)
        except mlflow.exceptions.MlflowException as error:
            lock.close()
            raise RunFailed(f"cannot make a run at {self.shown_uri}: {reason(error)}") from None
        final = self.root / run.info.run_id
        folder.rename(final)
        sync_folder(self.root)
        lock.moved(final)
        return self._open(run, lock)

    def reopen(self, run_id: str) -> "Run":
        """Continue a run: its lock taken, what it left unsent sent, its status RUNNING again.

        Raises:
            BadInput: There is no such run, it is in progress, or its folder cannot be written.
            RunFailed: The store was there and is now away.
        """
        try:
            run = retry(lambda: self.client.get_run(run_id), self.patience_s)
        except mlflow.exceptions.MlflowException as error:
            raise BadInput(f"run {run_id!r} is not to be had: {reason(error)}") from None
        if run.info.lifecycle_stage != "active":
            raise BadInput(f"run {run_id} is deleted; try `mlflow runs restore --run-id {run_id}`")
        folder = self.root / run.info.run_id
        try:
            folder.mkdir(exist_ok=True)
            lock = retry(
                lambda: RunLock(folder, {"store": self.mark}),
                self.patience_s,
                when=lambda error: isinstance(error, LockHeld) and error.passes,
            )
        except LockHeld as held:
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

        folder = self.root / run.info.run_id
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

    def search(self, query: str, patience_s: float | None = None) -> list[Any]:
        """Runs of every experiment that MLflow's filter lets through, newest first.

        Args:
            query: The filter.
            patience_s: How long to wait for a store that is busy or away; None for the store's.
        """

        def search() -> list[Any]:
            experiments = [e.experiment_id for e in _pages(self.client.search_experiments)]
            newest = ["attributes.start_time DESC"]
            runs = functools.partial(self.client.search_runs, experiments, query, order_by=newest)
            return list(_pages(runs))

        return retry(search, self.patience_s if patience_s is None else patience_s)

    def recover(self) -> None:
        """Send what earlier processes left unsent; mark their runs that died as KILLED."""
        recover(self)


def _pages(search: Callable[..., Any]) -> Iterator[Any]:
    page = search()
    yield from page
    while page.token:
        page = search(page_token=page.token)
        yield from page


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container may know no name for its user
        return "unknown"


_PAUSE_S = 1.0


def experiment_id(store: "Store", name: str) -> str:
    """The id of the experiment of this name, made if there is none.

    Raises:
        BadInput: MLflow allows no such name, or the experiment is deleted.
    """

    def get() -> Any:
        return retry(lambda: store.client.get_experiment_by_name(name), store.patience_s)

    def make() -> None:
        location = None if address.is_server(store.uri) else store.root.as_uri()
        store.client.create_experiment(name, artifact_location=location)

    experiment = get()
    if experiment is None:
        try:
            retry(make, store.patience_s)
        except mlflow.exceptions.MlflowException as error:
            if error.error_code == "INVALID_PARAMETER_VALUE":
                raise BadInput(f"tracking.experiment={name}: {reason(error)}") from None
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # then another was faster
                raise
        experiment = get()
    if experiment is None or experiment.lifecycle_stage != "active":
        raise BadInput(f"tracking.experiment={name} is deleted; restore it, or try another name")
    return experiment.experiment_id


def create_once(store: "Store", experiment_id: str, name: str | None, tags: dict[str, str]) -> Any:
    """MLflow's run, made by one request or by the first of several; its key tag tells them apart.

    Raises:
        MlflowException: The store does not take it, or has been away for too long.
    """
    query = f"tags.`{layout.KEY_TAG}` = '{tags[layout.KEY_TAG]}'"
    start_s = time.monotonic()
    run = None
    while run is None:
        try:
            run = store.client.create_run(experiment_id, tags=tags, run_name=name)
        except mlflow.exceptions.MlflowException as error:
            if not passes(error) or time.monotonic() - start_s > store.patience_s:
                raise
            time.sleep(_PAUSE_S)
            run = next(iter(store.search(query)), None)  # was only the answer lost?
    if address.is_server(store.uri):  # MLflow's own retries send the request again, unasked
        for other in store.search(query):
            if other.info.run_id != run.info.run_id:
                store.client.delete_run(other.info.run_id)
    return run


_log = logging.getLogger(__name__)

_ENDED = ("FINISHED", "FAILED", "KILLED")
_STILL_COMING_S = 3600.0  # a server may yet create a run that it was asked for this long ago


def recover(store: "Store") -> None:
    """Look at each run folder of `store` that holds a lock file: it did not end cleanly."""
    for folder in sorted(store.root.iterdir()):
        if not (folder / FILE_NAME).exists() or read_note(folder).get("store") != store.mark:
            continue
        try:
            lock = RunLock(folder, note=None)
        except (LockHeld, FileNotFoundError):
            continue
        except OSError as error:  # its owner is another, say
            _log.warning("%s cannot be recovered: %s", folder, error.strerror)
            continue
        try:
            final: Path | None = folder
            if folder.name.startswith(layout.NEW):
                final = _recover_creation(store, folder, lock)
            if final is not None:
                _recover_run(store, final)
                store.recovered.add(final.name)
                lock.remove()
            else:
                lock.close()
        except Exception as error:
            lock.close()
            _log.warning("%s cannot be recovered now: %s", folder, reason(error))
            if passes(error):
                return  # the next one would wait as long


def _recover_creation(store: "Store", folder: Path, lock: RunLock) -> Path | None:
    """The folder of the run whose creation was not confirmed; None if it was not created."""
    key = folder.name.removeprefix(layout.NEW)
    found = store.search(f"tags.`{layout.KEY_TAG}` = '{key}'")
    if not found:
        # A database of this machine creates no run for a process that is gone.
        is_over = store.database is not None
        if is_over or time.time() - folder.stat().st_mtime > _STILL_COMING_S:
            shutil.rmtree(folder)
        return None
    for other in found[1:]:
        store.client.delete_run(other.info.run_id)
    final = folder.with_name(found[0].info.run_id)
    folder.rename(final)
    lock.moved(final)
    return final


def _recover_run(store: "Store", folder: Path) -> None:
    """Send what is left, and KILLED if the run did not come to say how it ended."""
    try:
        run = retry(lambda: store.client.get_run(folder.name), store.patience_s)
    except mlflow.exceptions.MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        run = None
    if run is None or run.info.lifecycle_stage != "active":
        _log.warning("run %s was deleted; what it left unsent stays in %s", folder.name, folder)
        return
    points = folder / layout.POINTS
    last_ms = int((points if points.exists() else folder).stat().st_mtime * 1000)
    wal = WriteAhead(points)
    if wal.last_status not in _ENDED:
        wal.add_call("status", status="KILLED", end_ms=last_ms)
    upload = Upload(store.client, folder.name, run.info.artifact_uri, folder / "artifacts")
    delivery = Delivery(store.client, folder.name, wal, upload.all, store.database)
    try:
        while delivery.pending:
            retry(delivery.step, store.patience_s)
    finally:
        delivery.close()
        wal.close()
