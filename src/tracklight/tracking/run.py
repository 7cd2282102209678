"""One MLflow run as Lightning's logger: points go to the run's file, a thread sends them."""

import functools
import logging
import re
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import PurePosixPath
from typing import Any

from pytorch_lightning.loggers import MLFlowLogger

from tracklight.errors import BadInput, RunFailed
from tracklight.redact import redact
from tracklight.tracking.lock import RunLock
from tracklight.tracking.mlflow_api import RunStore
from tracklight.tracking.mlflow_client import mlflow
from tracklight.tracking.sender import Sender, temporary_path
from tracklight.tracking.tags import MAX_PARAM_CHARS, SCORE, shorten
from tracklight.tracking.wal import Points, read_records

_log = logging.getLogger(__name__)

# MLflow's limits, see mlflow.utils.validation.
_MAX_KEY_CHARS = 250
_MAX_TAG_CHARS = 8000
_MAX_DIGEST_CHARS = 36
_MAX_HYPERPARAMETER_CHARS = 250  # Lightning's
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # in the text of an object; another one in each process


class Run(MLFlowLogger):
    """A run in progress, opened by `Store`; an MLFlowLogger for whoever looks for one."""

    # Attributes, in place of properties that would create a run.
    run_id: str = ""  # pyright: ignore[reportIncompatibleVariableOverride]
    experiment_id: str = ""  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, run: Any, sender: Sender, lock: RunLock, ui_hint: str, timeout_s: float):
        self.run_id, self.experiment_id = run.info.run_id, run.info.experiment_id
        self.folder = sender.writer.wal.path.parent
        self.artifacts = sender.writer.artifacts
        self.steps_completed: Callable[[], int] = lambda: 0  # optimizer steps so far
        self.mid_step: Callable[[], bool] = lambda: False  # whether gradients are being accumulated
        self.lightning_step: Callable[[], int | None] = lambda: None  # Lightning's own count, from 0
        self.evaluation_steps: Callable[[], set[int]] = set  # that it gives while it evaluates
        self.ui_hint = ui_hint  # the run's address in MLflow's UI, or the command for the UI
        self.timeout_s = timeout_s  # for MLflow to make any progress at the run's end
        self._name: str = run.info.run_name
        self._info = {**dict(run.info), "status": "RUNNING", "artifact_uri": self.artifacts.as_uri()}
        self.params: dict[str, str] = dict(run.data.params)
        self._tags: dict[str, str] = dict(run.data.tags)
        self._said: set[str] = set()
        self._writer = sender.writer
        self.wal = sender.writer.wal
        self.now_ms = self.wal.now_ms
        self._lock = lock
        self._finished = False
        self._sender = sender
        self.store = RunStore(self, sender.writer.client)
        super().__init__(tracking_uri=self.store.uri, run_id=run.info.run_id)
        sender.start()

    @property
    def name(self) -> str:
        """The run's name, for Lightning."""
        return self._name

    @property
    def save_dir(self) -> str:
        """The run's folder, for Lightning."""
        return str(self.folder)

    @property
    def experiment(self) -> Any:
        """An MlflowClient, as Lightning's own MLflow logger has, whose calls for this run go through it."""
        return mlflow.MlflowClient(self.store.uri, self.store.real_uri)

    def entity(self) -> Any:
        """Return the run as MLflow's entity, with all that was logged so far."""
        of, logged = mlflow.entities, self.logged_metrics()
        metrics = [of.Metric(key, values[-1], 0, steps[-1]) for key, (steps, values) in logged.items()]
        params = [of.Param(*each) for each in self.params.items()]
        tags = [of.RunTag(*each) for each in self._tags.items()]
        return of.Run(of.RunInfo(**self._info), of.RunData(metrics, params, tags))

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log values at `step`; those that Lightning logs, with the epoch, at the optimizer steps completed.

        Callbacks log at each batch; of those that make one step, only the first is heard.
        """
        step = None if step in self.evaluation_steps() else step
        is_now = step in (None, self.lightning_step())
        if is_now and self.mid_step():
            return
        if step is None or (is_now and "epoch" in metrics):
            step = self.steps_completed()
        for key, value in metrics.items():
            if key != "epoch":
                self.log_value(key, int(step), value)

    def log_value(self, key: str, step: int, value: Any) -> None:
        """Log one value of somebody else's; say what is no number, and leave it out."""
        if key == SCORE:
            key = f"model/{key}"
            self._say_once(f"metric {SCORE} is logged as {key}: {SCORE} is the best value of score.metric")
        try:
            self.log_series(key, (step,), (float(value),))
        except (TypeError, ValueError):
            self._say_once(f"metric {key} is no number but a {type(value).__name__}: it is not logged")

    def log_series(self, key: str, steps: Sequence[int], values: Sequence[float]) -> None:
        """Log values of one metric, each at its step, by one file write; say if its name has to change."""
        if (name := to_key(key)) != key:
            self._say_once(f"metric {key!r} is logged as {name!r}: MLflow does not allow its name")
        self.wal.add_points(name, steps, values)

    def _say_once(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            _log.warning(message)

    def logged_metrics(self) -> dict[str, tuple[list[int], list[float]]]:
        """Return the steps and values of each metric in this run's log."""
        metrics: dict[str, tuple[list[int], list[float]]] = {}
        for record, _ in read_records(self.wal.path, 0, self.wal.end):
            if isinstance(record, Points):
                steps, values = metrics.setdefault(record.key, ([], []))
                steps += record.steps
                values += record.values
        return metrics

    def sync(self) -> None:
        """Return once everything logged is on the disk."""
        self.wal.sync()

    def log_hyperparams(self, params: Any) -> None:
        """Log hyperparameters as Lightning does, which cuts long ones: different ones stay different."""
        super().log_hyperparams(_cut_texts(params or {}))

    def log_new_params(self, params: Mapping[str, Any]) -> None:
        """Log params of a module's, such as its hyperparameters; one that is there keeps its value."""
        texts = {to_key(key): _ADDRESS.sub("", str(value)) for key, value in params.items()}
        texts = _to_text("param", texts, MAX_PARAM_CHARS)
        for key, text in texts.items():
            if (old := self.params.get(key, text)) != text:
                self._say_once(f"param {key} of this run is {old[:80]} and stays so, not {text[:80]}")
        self.log_params({key: text for key, text in texts.items() if key not in self.params})

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log the flat config; raise BadInput for a name that MLflow does not allow."""
        if new := _to_text("param", params, MAX_PARAM_CHARS):
            self.params |= new
            self.wal.add_call("params", values=new)

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Set tags; the last value of a tag counts."""
        if texts := _to_text("tag", tags, _MAX_TAG_CHARS):
            self._tags |= texts
            self.wal.add_call("tags", values=texts)

    def log_input(self, name: str, digest: str, source: str, context: str) -> None:
        """Log a data set and its use (`context`, such as `train`); the digest is cut."""
        digest = digest[:_MAX_DIGEST_CHARS]
        name, source = redact(name), redact(source)
        self.wal.add_call("input", name=name, digest=digest, source=source, context=context)

    def log_text(self, text: str, path: str) -> None:
        """Write an artifact, whole or not at all; `path` is relative to the run's artifacts."""
        if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
            raise BadInput(f"artifact {path!r} of run {self.run_id} would lie outside of the run")
        target = self.artifacts / path
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = temporary_path(target)
        try:
            unfinished.write_text(text, encoding="utf-8")
            unfinished.replace(target)
        finally:
            unfinished.unlink(missing_ok=True)

    def upload_artifacts(self) -> None:
        """Upload the artifacts if the store keeps them elsewhere; an outage puts it off."""
        try:
            self._writer.upload_artifacts()
        except Exception:
            self.wal.add_call("publish")

    def flush(self, timeout_s: float) -> bool:
        """Return whether MLflow has everything logged, waiting while it makes progress."""
        return self._sender.drain(timeout_s)

    def finish(self, status: str) -> None:
        """End the run: FINISHED, FAILED or KILLED. A second call does nothing.

        What MLflow does not take in time stays in the run's folder for `Store.recover`.

        Raises:
            RunFailed: The run is FINISHED, and that is not on record: neither in a database nor, while a
                server is away, in the run's log.
        """
        if self._finished:
            return
        self._finished = True
        if self._send_status(status):
            self._sender.stop()
            self.wal.close()
            self._lock.remove()
            return
        waits = self.wal.last_status == status
        self.abandon()
        fate = f"waits in {self.wal.path} for the next start" if waits else "is lost, as of a killed run"
        message = f"MLflow does not take the end of run {self.run_id}; it {fate}"
        # A server comes back; what ails a database beside the log may take the log, too.
        if status == "FINISHED" and not (waits and self._writer.is_remote):
            raise RunFailed(message)
        _log.warning(message)

    def _send_status(self, status: str) -> bool:
        end_ms = self.now_ms()
        try:
            self.upload_artifacts()
            self.wal.add_call("status", status=status, end_ms=end_ms)
        except RunFailed:  # a full disk here need not be one where the store is
            if not self.flush(self.timeout_s):
                return False
            try:
                self._writer.client.set_terminated(self.run_id, status, end_ms)
            except Exception:
                return False
        return self.flush(self.timeout_s)

    def abandon(self) -> None:
        """Release the run as a killed process would: send nothing more, set no status."""
        self._finished = True
        self._sender.stop()
        self.wal.close()
        self._lock.close()


@functools.lru_cache(4096)  # a run has more than a hundred names
def to_key(name: str) -> str:
    """Return a name as MLflow takes it: without other characters, and without empty parts between slashes."""
    parts = [re.sub(r"[^\w.\- :]+", "", part) for part in str(name).split("/")]
    return "/".join(part for part in parts if part not in ("", ".", ".."))[:_MAX_KEY_CHARS] or "unnamed"


def _cut_texts(value: Any) -> Any:
    """Shorten the long texts in hyperparameters, which Lightning flattens."""
    if isinstance(value, Namespace) or (is_dataclass(value) and not isinstance(value, type)):
        value = vars(value) if isinstance(value, Namespace) else asdict(value)
    if isinstance(value, Mapping):
        return {key: _cut_texts(each) for key, each in value.items()}
    if isinstance(value, list) and all(isinstance(each, Mapping) for each in value):
        return [*map(_cut_texts, value)]
    text = _ADDRESS.sub("", redact(str(value)))
    return shorten(text, _MAX_HYPERPARAMETER_CHARS) if len(text) > _MAX_HYPERPARAMETER_CHARS else value


def _to_text(kind: str, values: Mapping[str, Any], limit: int) -> dict[str, str]:
    """Return params or tags as MLflow takes them: names checked, secrets redacted, long values cut."""
    for key in values:
        if key != to_key(key):
            allowed = f"at most {_MAX_KEY_CHARS} letters, digits and any of '_-.: /'"
            raise BadInput(f"{kind} {key[:80]!r}: a name is {allowed}, without an empty part between slashes")
    texts = {key: str(value) for key, value in redact(values).items()}
    return {key: shorten(text, limit) for key, text in texts.items()}
