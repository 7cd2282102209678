"""What sweeps of the tests are told, and what they leave in MLflow."""

import csv
import json
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import Any

QUICK = (
    *("num_threads=1", "trainer.accelerator=cpu", "trainer.max_epochs=5"),
    "allowed_targets=[tracklight.models,tracklight.data,torch.optim,pytorch_lightning.callbacks,foreign,odd]",
    "tracking.figures=false",
)
GRID = ("optimizer.lr=0.01,0.05,0.1", *QUICK)
ODD = ("model._target_=odd.Odd", "score.metric=train/loss_epoch", *QUICK)
BLOBS = (
    *("model=mlp", "model.hidden=[16]", "data._target_=foreign.Blobs", "data.batch_size=16"),
    *(
        "data.num_val=64",
        *(f"~data.{key}" for key in ("root", "download", "fallback", "shift", "fold", "num_folds")),
    ),
    *("~data.mean", "~data.std", "score.metric=val/loss", "score.mode=min", *QUICK[:2], *QUICK[3:]),
)


class Child:
    """A run, as the database has it."""

    def __init__(self, row: tuple, tags: dict[str, str], metrics: dict[str, list]):
        self.run_id, self.name, self.status, self.start = row
        self.tags, self.metrics = tags, metrics

    @property
    def score(self) -> float | None:
        points = self.metrics.get("score")
        return points[-1][1] if points else None


class Swept:
    """What a sweep left, read without MLflow."""

    def __init__(self, directory: Path):
        self.directory = directory
        with closing(sqlite3.connect(directory / "mlflow.db")) as connection:
            ask = connection.execute
            rows = ask(
                "SELECT run_uuid, name, status, start_time FROM runs"
                " WHERE lifecycle_stage = 'active' ORDER BY start_time"
            ).fetchall()
            runs = []
            for row in rows:
                tags = dict(ask("SELECT key, value FROM tags WHERE run_uuid = ?", row[:1]))
                metrics: dict[str, list] = {}
                for key, step, value in ask(
                    "SELECT key, step, value FROM metrics WHERE run_uuid = ? ORDER BY step", row[:1]
                ):
                    metrics.setdefault(key, []).append((step, value))
                runs.append(Child(row, tags, metrics))
        self.parents = [run for run in runs if "tracklight.sweep" in run.tags]
        self.parent = self.parents[-1] if self.parents else None
        ours = self.parent.run_id if self.parent else None
        self.children = [run for run in runs if run.tags.get("mlflow.parentRunId") == ours]
        self.runs = runs

    @property
    def artifacts(self) -> Path:
        assert self.parent
        return self.directory / "artifacts" / self.parent.run_id / "artifacts"

    def leaderboard(self) -> list[dict[str, Any]]:
        table = json.loads((self.artifacts / "leaderboard.json").read_text())
        columns = (self.artifacts / "leaderboard.csv").read_text().splitlines()[0].split(",")  # in full
        return [dict(zip(columns, row, strict=True)) for row in table["data"]]

    def csv(self) -> list[dict[str, str]]:
        with (self.artifacts / "leaderboard.csv").open(newline="") as file:
            return list(csv.DictReader(file))


def points(directory: Path) -> int:
    """Count the epochs that trials have logged so far."""
    count = 0
    for path in directory.glob("artifacts/*/points.wal"):
        count += path.read_bytes().count(b"train/loss_epoch")
    return count


def trials_of(directory: Path) -> list[int]:
    """Return processes, the sweep's own gone, that hold a run folder below the directory."""
    found = []
    for path in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if str(path.readlink()).startswith(f"{directory}/artifacts"):
                found.append(int(path.parts[2]))
        except OSError:
            continue
    return found


def wait_until(holds, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)
