"""One MLflow run as the Lightning logger: points go to the run's file, a thread does the rest."""

import logging
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from pytorch_lightning.loggers.logger import Logger

from tracklight.errors import BadInput, RunFailed
from tracklight.tracking.lock import RunLock
from tracklight.tracking.sender import Delivery, Sender, Upload, temporary
from tracklight.tracking.wal import Points, WriteAhead, read

if TYPE_CHECKING:
    from tracklight.tracking.store import Store


_log = logging.getLogger(__name__)

# Limits of MLflow's, see mlflow.utils.validation.
_MAX_KEY_CHARS = 250
_MAX_PARAM_CHARS = 6000
_MAX_TAG_CHARS = 8000
_MAX_DIGEST_CHARS = 36
_KEY = re.compile(r"[\w.\- :]+(/[\w.\- :]+)*")


class Run(Logger):
    """A run in progress, whose folder this process holds locked. `Store` makes these.

    Attributes:
        run_id: MLflow's id of the run.
        folder: The run's folder: checkpoints, write-ahead file, lock.
        artifacts: The run's artifacts as files, inside the folder.
        look: How to see the run in MLflow's UI: its address, or what to type.
        steps_completed: Optimizer steps completed so far; Lightning's own count starts at zero.
    """

    def __init__(self, store: "Store", run: Any, folder: Path, lock: RunLock, wal: WriteAhead):
        super().__init__()
        self.run_id: str = run.info.run_id
        self.folder = folder
        self.artifacts = folder / "artifacts"
        self.steps_completed: Callable[[], int] = lambda: 0
        self.look = store.look(run.info)
        self._name = run.info.run_name
        self._params: dict[str, str] = dict(run.data.params)
        self._store = store
        self._lock = lock
        self._wal = wal
        self._names: set[str] = set()
        self._finished = False
        self._upload = Upload(store.client, self.run_id, run.info.artifact_uri, self.artifacts)
        delivery = Delivery(store.client, self.run_id, wal, self._upload.all, store.database)
        self._feeder = Sender(delivery, store.shown_uri, wal.path)
        self._feeder.start()

    @property
    def name(self) -> str:
        """The run's name, for Lightning."""
        return self._name

    @property
    def version(self) -> str:
        """The run's id, for Lightning."""
        return self.run_id

    @property
    def described(self) -> bool:
        """Whether its params are there."""
        return bool(self._params)

    @property
    def save_dir(self) -> str:
        """The run's folder, for Lightning."""
        return str(self.folder)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log values at the number of optimizer steps completed."""
        at = self.steps_completed()
        for key, value in metrics.items():
            if key != "epoch":  # Lightning adds it to each call; the axis is steps
                self.log_series(key, (at,), (float(value),))

    def log_series(self, key: str, steps: Sequence[int], values: Sequence[float]) -> None:
        """Log a block of values of one metric; a file write is all that happens here.

        Args:
            key: The metric, such as `train/loss`.
            steps: Optimizer steps completed, one for each value.
            values: Python floats.

        Raises:
            BadInput: MLflow allows no metric of this name.
            RunFailed: The disk does not take the points.
        """
        if key not in self._names:
            check_key("metric", key)
            self._names.add(key)
        self._wal.add_points(key, steps, values)

    def series(self) -> dict[str, tuple[list[int], list[float]]]:
        """Return each metric's steps and values, as this run's file has them."""
        found: dict[str, tuple[list[int], list[float]]] = {}
        for record, _ in read(self._wal.path, 0, self._wal.end):
            if isinstance(record, Points):
                steps, values = found.setdefault(record.key, ([], []))
                steps += record.steps
                values += record.values
        return found

    def sync(self) -> None:
        """Return once all that was logged is on the disk."""
        self._wal.sync()

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: the whole config is logged, which says more than a module's arguments."""

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log the flat config.

        Raises:
            BadInput: A param has another value already, or a name that MLflow does not allow.
        """
        new = {}
        for key, value in params.items():
            check_key("param", key)
            text = _cut(str(value), _MAX_PARAM_CHARS)
            old = self._params.get(key)
            if old is None:
                new[key] = text
            elif old != text:
                raise BadInput(
                    f"param {key} of run {self.run_id} is {old} and cannot become {text}: "
                    "MLflow's params are for good; try a new run"
                )
        if new:
            self._params |= new
            self._wal.add_call("params", values=new)

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Set tags; a tag set again has its last value."""
        for key in tags:
            check_key("tag", key)
        values = {key: _cut(str(value), _MAX_TAG_CHARS) for key, value in tags.items()}
        self._wal.add_call("tags", values=values)

    def log_input(self, name: str, digest: str, source: str, context: str) -> None:
        """Log a data set that the run used.

        Args:
            name: Its true name.
            digest: Hexadecimal; MLflow keeps the first 36 characters.
            source: Where it came from.
            context: What for: `train`, `val` or `test`.
        """
        self._wal.add_call(
            "input", name=name, digest=digest[:_MAX_DIGEST_CHARS], source=source, context=context
        )

    def log_text(self, text: str, path: str) -> None:
        """Write an artifact, whole or not at all; `path` is relative to the run's artifacts."""
        target = self._inside(path)
        unfinished = temporary(target)
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(target)

    def log_file(self, path: Path, folder: str = "") -> None:
        """Copy a file into a folder of the run's artifacts."""
        shutil.copyfile(path, self._inside(f"{folder}/{path.name}".lstrip("/")))

    def _inside(self, path: str) -> Path:
        """Where this artifact lies, its folder made."""
        if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
            raise BadInput(f"artifact {path!r} of run {self.run_id} would lie outside of the run")
        target = self.artifacts / path
        target.parent.mkdir(parents=True, exist_ok=True)
        return target

    def publish(self) -> None:
        """Upload the artifacts if the store keeps them elsewhere; an outage puts it off."""
        try:
            self._upload.all()
        except Exception:
            self._wal.add_call("publish")

    def flush(self, timeout_s: float) -> bool:
        """Return whether MLflow has all that was logged, waiting while it makes progress."""
        return self._feeder.drain(timeout_s)

    def finish(self, status: str) -> None:
        """End the run: FINISHED, FAILED or KILLED. A second call does nothing.

        What MLflow does not take in bounded time stays in the run's folder, and the next start of
        anything sends it.
        """
        if self._finished:
            return
        self._finished = True
        self.publish()
        end_ms = time.time_ns() // 1_000_000
        ended = True
        try:
            self._wal.add_call("status", status=status, end_ms=end_ms)
        except RunFailed:  # a full disk here need not be one where the store is
            ended = self._feeder.drain(self._store.patience_s) and self._end_now(status, end_ms)
        if ended and self._feeder.drain(self._store.patience_s):
            self._close()
            self._lock.remove()
        else:
            self.abandon()
            _log.warning(
                "MLflow does not take the end of run %s; it waits in %s for the next start",
                self.run_id,
                self._wal.path,
            )

    def _end_now(self, status: str, end_ms: int) -> bool:
        try:
            self._store.client.set_terminated(self.run_id, status, end_ms)
        except Exception:
            return False
        return True

    def abandon(self) -> None:
        """Let go of the run as a killed process would: nothing more is sent, no status is set."""
        self._finished = True
        self._close()
        self._lock.close()

    def _close(self) -> None:
        self._feeder.stop()
        self._wal.close()


def check_key(kind: str, key: str) -> None:
    """Refuse a name that MLflow does not take.

    Args:
        kind: What is named: metric, param or tag.
        key: The name.

    Raises:
        BadInput: It is too long, or has other characters than MLflow allows.
    """
    if len(key) > _MAX_KEY_CHARS or not _KEY.fullmatch(key) or {".", ".."} & {*key.split("/")}:
        raise BadInput(
            f"{kind} {key[:80]!r}: a name is at most {_MAX_KEY_CHARS} letters, digits and any of "
            "'_-.: /', without an empty part between slashes"
        )


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."
