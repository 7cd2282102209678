"""What the next start of anything does for runs whose process is gone."""

import logging
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tracklight.tracking import layout
from tracklight.tracking.feeder import Delivery
from tracklight.tracking.lock import FILE_NAME, Held, RunLock, read_note
from tracklight.tracking.patience import passes, persist, reason
from tracklight.tracking.quiet import mlflow
from tracklight.tracking.upload import Upload
from tracklight.tracking.wal import WriteAhead

if TYPE_CHECKING:
    from tracklight.tracking.store import Store

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
        except (Held, FileNotFoundError):
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
        run = persist(lambda: store.client.get_run(folder.name), store.patience_s)
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
            persist(delivery.step, store.patience_s)
    finally:
        delivery.close()
        wal.close()
