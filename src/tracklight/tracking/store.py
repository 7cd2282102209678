"""The tracking store: opened safely, and the runs in it made, continued and found again."""

import functools
import getpass
import shlex
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracklight.errors import BadInput, RunFailed
from tracklight.tracking import address, creation, database, layout, recovery, server
from tracklight.tracking.lock import Held, RunLock
from tracklight.tracking.patience import is_locked, persist, reason
from tracklight.tracking.quiet import mlflow
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
        root: The folder of run folders.
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
            if self.directory == layout.HOME:
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
            run = creation.create_once(self, creation.experiment_id(self, experiment), name, tags)
        except mlflow.exceptions.MlflowException as error:
            lock.close()
            raise RunFailed(f"cannot make a run at {self.shown_uri}: {reason(error)}") from None
        final = self.root / run.info.run_id
        folder.rename(final)
        database.sync_folder(self.root)
        lock.moved(final)
        return self._open(run, lock)

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
        folder = self.root / run.info.run_id
        try:
            folder.mkdir(exist_ok=True)
            lock = persist(
                lambda: RunLock(folder, {"store": self.mark}),
                self.patience_s,
                when=lambda error: isinstance(error, Held) and error.passes,
            )
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

        return persist(search, self.patience_s if patience_s is None else patience_s)

    def recover(self) -> None:
        """Send what earlier processes left unsent; mark their runs that died as KILLED."""
        recovery.recover(self)


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
