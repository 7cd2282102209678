"""The Python API: `tracklight.train`, `tracklight.load` and `tracklight.runs`, for notebooks and programs."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracklight.cli import check_project, compose_run, quiet
from tracklight.config.overrides import check_overrides
from tracklight.errors import BadInput
from tracklight.paths import HOME
from tracklight.runs.reader import RunFilter, batches, open_reader
from tracklight.tracking import tags
from tracklight.tracking.address import resolve_uri

if TYPE_CHECKING:
    from pandas import DataFrame
    from pytorch_lightning import LightningDataModule, LightningModule


@dataclass(frozen=True)
class TrainedRun:
    """A finished run: its score, its metrics and its folder.

    Attributes:
        id: MLflow's run id; None for a run that was not tracked.
        score: The best value of `score.metric`.
        metrics: The last value of each metric.
        folder: Of its artifacts: config.yaml, summary.json, figures, checkpoints/best.ckpt and last.ckpt.
    """

    id: str | None
    name: str
    score: float | None
    metrics: dict[str, float]
    folder: Path | None
    stored: Any = field(default=None, repr=False)  # the store, and MLflow's run in it

    def load_model(self) -> "LightningModule":
        """Build the model with its best weights; read the data only if the run did not record their shape."""
        is_unknown = self.stored and self.stored[1].data.tags.get(tags.DATA_TAG) == "unknown"
        return self._rebuild(read=is_unknown).model

    def load_data(self) -> "LightningDataModule | None":
        """Build the data module; None for a model that brings its own data."""
        return self._rebuild(read=True).data

    def _rebuild(self, read: bool) -> Any:
        from tracklight.experiment.stored import ANY_HARDWARE, load_config, rebuild

        if self.stored is None:
            raise BadInput("this run was not tracked: nothing of it was kept")
        store, run = self.stored
        return rebuild(store, run, load_config(store, run, ANY_HARDWARE), read=read)


def train(overrides: Sequence[str] = ()) -> TrainedRun:
    """Train with these overrides, as `tracklight train` does, and return the finished run.

    Raises:
        BadInput: The config cannot be run; no run was created.
        RunFailed: The run started and failed.
    """
    quiet()
    check_project(warn=True)
    cfg = compose_run(check_overrides(overrides, multirun=False))
    from tracklight.experiment.train import run

    summary: dict[str, Any] = {}
    run(cfg, summary=summary)
    if "id" in summary:
        return load(summary["id"], resolve_uri(cfg.tracking.uri, Path(cfg.tracking.dir)), cfg.tracking.dir)
    return TrainedRun(None, "", summary["score"], summary["metrics"], None)


def load(run: str = "last", uri: str | None = None, directory: str | Path = HOME) -> TrainedRun:
    """Load a run by its id, a unique prefix of one, `last` or `best`; for a sweep, its best trial."""
    quiet()
    check_project(warn=True)
    from tracklight.experiment.stored import open_store
    from tracklight.runs.select import resolve_sweep, select_run

    store = open_store(uri or os.environ.get("MLFLOW_TRACKING_URI"), Path(directory))
    found = resolve_sweep(store, select_run(store, str(run)))
    run_id, metrics = found.info.run_id, dict(found.data.metrics)
    folder = store.folder(run_id) / tags.ARTIFACTS_FOLDER
    return TrainedRun(run_id, found.info.run_name, metrics.get(tags.SCORE), metrics, folder, (store, found))


def runs(experiment: str | None = None, uri: str | None = None, directory: str | Path = HOME) -> "DataFrame":
    """Return a row for each training run, newest first, its columns named as in `mlflow.search_runs`."""
    quiet()
    check_project(warn=True)
    from pandas import json_normalize, to_datetime

    reader = open_reader(uri or os.environ.get("MLFLOW_TRACKING_URI"), Path(directory))
    ids = [score.run_id for score in reader.search_scores(RunFilter(experiment), tags.SCORE)]
    rows = [vars(run) for batch in batches(ids) for run in reader.get_runs(batch)]
    frame = json_normalize(rows, max_level=1).rename(columns={f"metrics.{tags.SCORE}": "score"})
    for name in ("start", "end") if rows else ():
        frame[f"{name}_time"] = to_datetime(frame.pop(f"{name}_ms"), unit="ms", errors="coerce")
    return frame.set_index("run_id") if rows else frame
