"""The tracking store: opens it, creates and continues runs, recovers those of dead processes."""

import itertools
import logging
import math
import os
import shlex
import shutil
import sqlite3
import sys
import tempfile
import time
import uuid
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from tracklight.errors import BadInput, RunFailed, count
from tracklight.paths import HOME, IN_CLONE, UI, uri_setting
from tracklight.redact import redact, redact_text
from tracklight.tracking import sqlite_file
from tracklight.tracking.address import DATABASE, contact, is_server, resolve_uri, sqlite_path
from tracklight.tracking.lock import LockHeld, RunLock, read_lock
from tracklight.tracking.mlflow_client import is_locked, is_transient, mlflow, retry, short_reason
from tracklight.tracking.provenance import source_tags
from tracklight.tracking.sender import MlflowWriter, Sender, delete_duplicates
from tracklight.tracking.tags import KEY_TAG, NEW_PREFIX, RUNS_FOLDER, WAL_FILE, is_run_id
from tracklight.tracking.views import experiment_tags
from tracklight.tracking.wal import WriteAheadLog

if TYPE_CHECKING:
    from tracklight.tracking.run import Run

_log = logging.getLogger(__name__)

MODELS = "models"  # beside the runs' folders: one a logged model
_TIMEOUT_S = {"database": 60.0, "server": 15.0}
_START_UP_S = 4.0  # how long a server that refuses connections may yet be starting
_LATE_CREATION_S = 3600.0  # how long a server may take to create a run for a dead process


def connect(uri: str | None, directory: Path, *, reads_only: bool = False) -> "Store":
    """Open the tracking store; a `uri` of None is the SQLite file in `directory`, created if new.

    Raises:
        BadInput: The store cannot be opened or, unless it is only read, not be written.
    """
    directory = directory.absolute()
    store = Store(None, resolve_uri(uri, directory), directory)
    store.why_read_only = _why_read_only(store, uri)
    if store.why_read_only and not reads_only:
        raise BadInput(f"{store.why_read_only}; try another")
    if store.database is not None:
        setting = "tracking.dir" if uri is None else uri_setting(uri)
        sqlite_file.ensure_database(store.database, store.runs_folder.as_uri(), setting)
        if not store.why_read_only:
            _follow_move(store.database)
    else:
        retry(lambda: contact(store.uri), _START_UP_S, when=lambda e: isinstance(e, BadInput))

    def open_client() -> Any:
        client = mlflow.MlflowClient(store.uri)
        if is_server(store.uri):
            client.search_experiments(max_results=1)  # is it MLflow, and does it let us in?
        return client

    try:
        store.client = retry(open_client, store.timeout_s, when=is_locked)
    except Exception as error:  # SQLAlchemy's, a driver's or MLflow's: none of them is for the user
        where, why = store.display_uri, short_reason(error)
        raise BadInput(f"cannot open {uri_setting(uri)}={where}: {why}") from None
    return store


def _follow_move(database: Path) -> None:
    """Put the addresses of artifacts right in a store that was renamed, copied or mounted elsewhere."""
    root = database.parent / RUNS_FOLDER
    try:
        former = sqlite_file.find_former_root(database, root)
        if former and (num := sqlite_file.relocate_artifacts(database, former, root)):
            before = unquote(former.removeprefix("file://")).removesuffix(f"/{RUNS_FOLDER}")
            what = f"the artifacts of {count(num, 'run')} are now looked for here"
            warnings.warn(f"{database.parent} was {before}: {what}", stacklevel=2)
    except sqlite3.Error:  # not a whole database, or busy: MLflow says what is the matter
        return


def _why_read_only(store: "Store", uri: str | None) -> str:
    """Return what of a store cannot be written, and why; empty if all of it can."""
    what = f"tracking.dir={store.directory}"
    try:
        store.runs_folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=store.runs_folder).close()
        if store.database is not None and store.database.exists():
            what = f"{uri_setting(uri)}={uri}" if uri else str(store.database)
            for path in (store.database, store.database.parent):  # where SQLite keeps its journal
                if not os.access(path, os.W_OK):
                    facts = path.stat()
                    whose = f"of user {facts.st_uid}, mode {facts.st_mode & 0o7777:o}"
                    return f"{what} cannot be written ({whose})"
    except OSError as error:
        return f"{what} cannot be written ({error.strerror})"
    return ""


class Store:
    """An open tracking store."""

    def __init__(self, client: Any, uri: str, directory: Path):
        self.client = client
        self.uri = uri  # in full, with secrets
        self.display_uri = redact(uri)
        # What lock files record; relative to the directory, so that they survive its move.
        self.lock_content = {"store": redact_text(uri.removeprefix(f"sqlite:///{directory}/"))}
        self.directory = directory
        self.runs_folder = directory / RUNS_FOLDER  # holds a folder for each run, named by its id
        self.database = sqlite_path(uri)  # the SQLite file, if the store is one
        # How long a call waits for a store that is busy or away.
        self.timeout_s = _TIMEOUT_S["server" if self.database is None else "database"]
        self.recovered: set[str] = set()  # ids of the runs that `recover` has ended
        self._sends_directly = False  # see `send_directly`
        self._tables: sqlite_file.RunTables | None = None  # of the database, to which all is sent then
        self.why_read_only = ""  # what of the store cannot be written; empty if all of it can

    def send_directly(self) -> None:
        """Send runs in the caller's thread, when asked to: for hundreds of them, until `close`."""
        self.close()
        self._sends_directly = True
        if self.database is not None and sqlite_file.has_known_columns(self.database, fills_all=True):
            self._tables = sqlite_file.RunTables(self.database)

    def close(self) -> None:
        """Close the connection through which runs are sent directly, if there is one."""
        if self._tables is not None:
            self._tables.close()
            self._tables = None

    def ui_hint(self, info: Any) -> str:
        """Return the address of a run (a RunInfo) in MLflow's UI, or the command for the UI."""
        if is_server(self.uri):
            page = f"experiments/{info.experiment_id}/runs/{info.run_id}"
            return f"{self.display_uri.rstrip('/')}/#/{page}"
        if self.database == HOME / DATABASE and self.directory == HOME:
            return "make ui" if IN_CLONE else UI
        if self.database == self.directory / DATABASE:
            return f"{UI} --dir {shlex.quote(str(self.directory))}"
        return f"{UI} --uri {shlex.quote(self.display_uri)}"

    def folder(self, run_id: str) -> Path:
        """Return the folder of a run, whose id a server or another user may have made up.

        Raises:
            BadInput: It is no id, and might lead anywhere.
        """
        if not is_run_id(run_id):
            raise BadInput(f"{run_id[:80]!r} in {self.display_uri} is no run id (32 hexadecimal digits)")
        return self.runs_folder / run_id

    def folders(self, run: Any) -> list[Path]:
        """Return the folders of a run and of its models, whose ids MLflow takes as anybody sends them."""
        ids = [each.model_id for each in (run.outputs.model_outputs if run.outputs else ())]
        models = (self.runs_folder / MODELS / each for each in ids if is_run_id(each.removeprefix("m-")))
        return [self.folder(run.info.run_id), *models]

    def create(self, experiment: str, name: str | None, tags: dict[str, str]) -> "Run":
        """Create a run with its tags and folder, and its experiment if there is none.

        Raises:
            BadInput: The folder cannot be written, or the experiment's name not be used.
            RunFailed: The store does not answer.
        """
        key = uuid.uuid4().hex
        # The locked folder comes first: whatever happens later, recovery finds the run by its key.
        folder = self.runs_folder / f"{NEW_PREFIX}{key}"
        try:
            folder.mkdir(parents=True)
            lock = RunLock(folder, self.lock_content)
            (folder / WAL_FILE).touch()  # all that a file system may refuse comes before the run
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise BadInput(f"cannot write {folder.parent}: {error.strerror}") from None
        try:
            tags = source_tags(sys.argv[0]) | redact(tags) | {KEY_TAG: key}
            run = self.create_once(experiment, redact(name), tags)
        except Exception as error:
            lock.close()
            if self.database is not None:  # a server may yet create the run
                shutil.rmtree(folder, ignore_errors=True)
            if not isinstance(error, mlflow.exceptions.MlflowException | sqlite3.Error):
                raise
            reason = short_reason(error)
            raise RunFailed(f"cannot make a run at {self.display_uri}: {reason}") from None
        return self._open(run, lock, is_new=True)

    def _experiment_id(self, name: str) -> str:
        """Return the id of the experiment of this name, created if there is none."""
        location = None if is_server(self.uri) else self.runs_folder.as_uri()

        def get_or_create() -> Any:
            if found := self.client.get_experiment_by_name(name):
                return found
            created = self.client.create_experiment(name, location, experiment_tags())
            return self.client.get_experiment(created)

        def may_pass(error: Exception) -> bool:
            return is_transient(error) or "ALREADY_EXISTS" in getattr(error, "error_code", "")

        try:
            experiment = retry(get_or_create, self.timeout_s, when=may_pass)
        except mlflow.exceptions.MlflowException as error:
            if error.error_code == "INVALID_PARAMETER_VALUE":
                raise BadInput(f"tracking.experiment={name}: {short_reason(error)}") from None
            raise
        if experiment.lifecycle_stage != "active":
            raise BadInput(f"tracking.experiment={name} is deleted; restore it, or try another")
        return experiment.experiment_id

    def create_once(
        self, experiment: str, name: str | None, tags: dict[str, str], start_ms: int | None = None
    ) -> Any:
        """Create one MLflow run, however often the request has to be repeated."""
        if (tables := self._tables) and name and start_ms is None:
            of_run = uuid.uuid4().hex, experiment, self.runs_folder.as_uri(), name, tags
            if run := retry(lambda: tables.create_run(*of_run), self.timeout_s):
                return run
        experiment_id = self._experiment_id(experiment)
        query = f"tags.`{KEY_TAG}` = '{tags[KEY_TAG]}'"
        attempts = itertools.count()

        def create() -> Any:
            if next(attempts) and (found := self.search(query)):  # only the answer was lost
                return found[0]
            return self.client.create_run(experiment_id, start_ms, tags, name)

        run = retry(create, self.timeout_s)
        if is_server(self.uri):  # MLflow's client repeats the request by itself, too
            delete_duplicates(self.client, run)
        return run

    def reopen(self, run_id: str) -> "Run":
        """Continue a run: lock it, send what it left unsent, set its status to RUNNING.

        Raises:
            BadInput: There is no such run, it is in progress, or its folder cannot be written.
            RunFailed: The store does not answer.
        """
        try:
            run = retry(lambda: self.client.get_run(run_id), self.timeout_s)
        except mlflow.exceptions.MlflowException as error:
            raise BadInput(f"run {run_id!r} cannot be read: {short_reason(error)}") from None
        if run.info.lifecycle_stage != "active":
            raise BadInput(f"run {run_id} is deleted; try `mlflow runs restore --run-id {run_id}`")
        folder = self.folder(run.info.run_id)
        try:
            folder.mkdir(exist_ok=True)
            lock = retry(
                lambda: RunLock(folder, self.lock_content),
                self.timeout_s,
                when=lambda error: isinstance(error, LockHeld) and error.is_transient,
            )
        except LockHeld as held:
            raise BadInput(f"run {run_id} is in progress (pid {held.pid})") from None
        except OSError as error:
            raise BadInput(f"cannot write run folder {folder}: {error.strerror}") from None
        return self._open(run, lock)

    def _open(self, run: Any, lock: RunLock, is_new: bool = False) -> "Run":
        from tracklight.tracking.run import Run  # imports Lightning: seconds that readers spare

        with ExitStack() as on_error:
            on_error.callback(lock.close)
            folder = self.folder(run.info.run_id)
            if is_new:
                lock.rename_folder(folder)
            else:
                refuse_links(folder)
            try:
                wal = WriteAheadLog(folder / WAL_FILE, run.info.start_time)
            except OSError as error:
                raise BadInput(f"cannot write run folder {folder}: {error.strerror}") from None
            if wal.damaged or wal.end == 0:  # then MLflow knows more than the file
                for key in run.data.metrics:
                    history = self.client.get_metric_history(run.info.run_id, key)
                    wal.repeats[key] = math.inf, max(metric.step for metric in history)
            if wal.end or run.info.status != "RUNNING":
                wal.add_call("status", status="RUNNING")
            writer = MlflowWriter(self.client, run, wal, self.database, self._tables)
            sender = Sender(writer, self.display_uri, self._sends_directly)
            opened = Run(run, sender, lock, self.ui_hint(run.info), self.timeout_s)
            if not opened.flush(self.timeout_s):
                opened.abandon()
                raise RunFailed(f"{self.display_uri} does not take what run {opened.run_id} left")
            on_error.pop_all()
            return opened

    def search(
        self,
        filter_string: str,
        timeout_s: float | None = None,
        *,
        experiment: str | None = None,
        deleted: bool = False,
    ) -> list[Any]:
        """Return active or deleted runs, of all experiments or one, that pass the filter, newest first."""
        views = mlflow.entities.ViewType
        view = views.DELETED_ONLY if deleted else views.ACTIVE_ONLY

        def search() -> list[Any]:
            known = _all_pages(self.client.search_experiments)
            ids = [each.experiment_id for each in known if experiment in (None, each.name)]
            newest = {"run_view_type": view, "order_by": ["attributes.start_time DESC"]}
            return _all_pages(self.client.search_runs, ids, filter_string, **newest) if ids else []

        runs = retry(search, self.timeout_s if timeout_s is None else timeout_s)
        if self.database is not None and len(runs) > 1:  # between two, the clock may have been set back
            order = sqlite_file.creation_order(self.database, [run.info.run_id for run in runs])
            runs.sort(key=lambda run: order.get(run.info.run_id, 0), reverse=True)
        return runs

    def recover(self) -> None:
        """Send what dead processes left unsent, and set the status of their runs to KILLED."""
        if self.why_read_only:
            return
        for folder in sorted(self.runs_folder.iterdir()):
            is_ours = is_run_id(folder.name.removeprefix(NEW_PREFIX))
            if not is_ours or read_lock(folder).get("store") != self.lock_content["store"]:
                continue
            try:
                lock = RunLock(folder, content=None)
            except (LockHeld, FileNotFoundError):  # in progress, or recovered meanwhile
                continue
            except OSError as error:  # of another user, say
                _log.warning("%s cannot be recovered: %s", folder, error.strerror)
                continue
            try:
                self._recover(folder, lock)
            except Exception as error:
                lock.close()
                _log.warning("%s cannot be recovered now: %s", folder, short_reason(error))
                if is_transient(error):
                    return  # the next folder would wait as long

    def _recover(self, folder: Path, lock: RunLock) -> None:
        """Send what is left of a run, and remove its lock; keep it while a server may yet create the run."""
        if folder.name.startswith(NEW_PREFIX):
            found = self.search(f"tags.`{KEY_TAG}` = '{folder.name.removeprefix(NEW_PREFIX)}'")
            if not found:
                # A database creates no run for a dead process, while a server may do so late.
                waited_s = time.time() - folder.stat().st_mtime
                if self.database is not None or waited_s > _LATE_CREATION_S:
                    shutil.rmtree(folder)
                lock.close()
                return
            for other in found[1:]:
                self.client.delete_run(other.info.run_id)
            folder = self.folder(found[0].info.run_id)
            lock.rename_folder(folder)
        found = self.search(f"attributes.run_id = '{folder.name}'")
        if found:
            self._send_rest(found[0], folder)
        else:
            _log.warning("run %s was deleted; what it left unsent stays in %s", folder.name, folder)
        self.recovered.add(folder.name)
        lock.remove()

    def _send_rest(self, run: Any, folder: Path) -> None:
        """Send the rest of a run's log, and the status KILLED if the log holds no final one."""
        refuse_links(folder)
        path = folder / WAL_FILE
        last_s = (path if path.exists() else folder).stat().st_mtime
        wal = WriteAheadLog(path, run.info.start_time)
        if wal.last_status in (None, "RUNNING"):
            end_ms = max(int(last_s * 1000), wal.last_ms)
            wal.add_call("status", status="KILLED", end_ms=end_ms)
        writer = MlflowWriter(self.client, run, wal, self.database)
        try:
            while writer.pending:
                retry(writer.send_next, self.timeout_s)
        finally:
            writer.close()
            wal.close()


def refuse_links(folder: Path) -> None:
    """Refuse a folder with a link that leads out of it, to what is not the run's: another may have put it."""
    for path in folder.rglob("*"):
        if not path.resolve().is_relative_to(folder.resolve()):
            raise BadInput(f"{path} leads out of its folder, {folder}; put a copy in the place of the link")


def _all_pages(search: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
    page = search(*args, **kwargs)
    found = [*page]
    while page.token:
        page = search(*args, **kwargs, page_token=page.token)
        found += page
    return found
