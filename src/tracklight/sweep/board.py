"""The sweep as an object in MLflow: a parent run that says what its children amount to."""

import csv
import io
import json
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from tracklight.errors import BadInput, RunFailed
from tracklight.sweep.leaderboard import Row, Standing, row, standings
from tracklight.sweep.parent import children
from tracklight.sweep.plots import page
from tracklight.sweep.trial import POINT_TAG, REASON_TAG
from tracklight.tracking.layout import BEST_TAG, OUTCOME_TAG, PARENT_TAG
from tracklight.tracking.patience import persist
from tracklight.tracking.quiet import mlflow
from tracklight.tracking.run import Run
from tracklight.tracking.store import Store

NEVER_BEGAN_TAG = "tracklight.never_began"  # of a failed run that holds nothing to continue
TABLE = "leaderboard.json"
SHOWN_TABLES_TAG = "mlflow.loggedArtifacts"  # which makes MLflow's UI show an artifact as a table
REFRESH_S = 2.0
PLOTS_S = 30.0
SHARE = 0.05  # of the time that refreshing may take
AWAY = (mlflow.exceptions.MlflowException, BadInput, RunFailed)  # what the store's absence becomes


class Board:
    """The parent run, open, and its children.

    Args:
        store: Holds them.
        run: The parent.
        names: What varies.
        metric: `score.metric`.
        mode: `score.mode`.
        seeds: Runs of a point.
    """

    def __init__(
        self, store: Store, run: Run, names: Sequence[str], metric: str, mode: str, seeds: int
    ):
        self.store = store
        self.run = run
        self._names = names
        self._metric = metric
        self._mode = mode
        self._seeds = seeds
        self._refreshed_s = self._plotted_s = -1e9
        self._cost_s = 0.0
        self._plot_cost_s = 0.0
        self._plotting: threading.Thread | None = None
        self._away_since_s: float | None = None
        info = store.client.get_run(run.run_id).info
        self._began_s = info.start_time / 1000
        self._experiment = store.client.get_experiment(info.experiment_id).name
        tags = store.client.get_run(run.run_id).data.tags
        self._best = tags.get(BEST_TAG)
        self._tested = [key for key in tags if key.startswith("best.test/")]
        self._logged: dict[str, float] = {}
        self._logged_at = -1

    def children(self) -> list[Any]:
        """Return the runs under the parent, newest first, deleted ones excluded."""
        return children(self.store, self.run.run_id)

    def by_point(self) -> dict[str, Any]:
        """Return the run of each point and seed, by its key."""
        return {run.data.tags.get(POINT_TAG): run for run in reversed(self.children())}

    def log_test(self, runs: Sequence[str]) -> dict[str, float]:
        """Log the winner's test metrics, the mean over its runs, on the parent; return them."""
        found = [self.store.client.get_run(run_id).data.metrics for run_id in runs]
        keys = [key for key in found[0] if key.startswith("test/")]
        means = {key: sum(each[key] for each in found) / len(found) for key in keys}
        self.run.set_tags({f"best.{key}": repr(value) for key, value in means.items()})
        return means

    def child(self, key: str) -> Any | None:
        """Return the run of a point and seed, if there is one."""
        query = f"tags.`{PARENT_TAG}` = '{self.run.run_id}' and tags.`{POINT_TAG}` = '{key}'"
        return next(iter(self.store.search(query)), None)

    def record_failure(
        self, run_id: str | None, name: str, tags: Mapping[str, str], reason: str
    ) -> None:
        """Say of a trial that it failed and why; told on the screen all the same if this cannot be.

        Args:
            run_id: Its run; None if it told of none.
            name: The trial's.
            tags: Of its run; they hold its key.
            reason: One line.
        """
        try:
            if run_id is None:
                child = self.child(tags[POINT_TAG])
                run_id = None if child is None else child.info.run_id
            if run_id is None:
                self._add_failed(name, tags, reason)
            else:
                self._mark_failed(run_id, reason)
        except AWAY:
            self._lose()

    def _mark_failed(self, run_id: str, reason: str) -> None:
        """Say it of a run, also where its process could not."""
        client = self.store.client
        run = persist(lambda: client.get_run(run_id), self.store.patience_s)
        if run.info.status != "FAILED":
            self.store.reopen(run_id).finish("FAILED")
        for key, value in {OUTCOME_TAG: "failed", REASON_TAG: reason}.items():
            client.set_tag(run_id, key, value)

    def _add_failed(self, name: str, tags: Mapping[str, str], reason: str) -> None:
        """Say it of a trial that came to have no run."""
        failed = {OUTCOME_TAG: "failed", REASON_TAG: reason, NEVER_BEGAN_TAG: "true"}
        self.store.create(self._experiment, name, {**tags, **failed}).finish("FAILED")

    def discard(self, run_id: str) -> None:
        """Delete a run that holds nothing."""
        try:
            self.store.client.delete_run(run_id)
        except AWAY:
            self._lose()

    @property
    def away_s(self) -> float:
        """For how long the store has not answered; 0 if it did when last asked."""
        return 0.0 if self._away_since_s is None else time.monotonic() - self._away_since_s

    def _lose(self) -> None:
        """Take the store for away until a refresh succeeds, the first of them soon."""
        if self._away_since_s is None:
            self._away_since_s = time.monotonic()
            self._refreshed_s = -1e9

    def _standings(self, patience_s: float | None) -> list[Standing]:
        """Rank the points by what MLflow has."""
        found = children(self.store, self.run.run_id, patience_s)
        rows: list[Row] = [row(child, self._names) for child in found]
        return standings(rows, self._mode, self._seeds)

    def refresh(self, final: bool = False) -> list[Standing] | None:
        """Write the leaderboard and the best point; None if the last time is too short ago."""
        start_s = time.monotonic()
        pause_s = REFRESH_S if self.away_s else max(REFRESH_S, self._cost_s / SHARE)
        if not final and start_s - self._refreshed_s < pause_s:
            return None
        try:
            found = self._standings(None if final else 0.0)  # meanwhile trials wait for answers
        except mlflow.exceptions.MlflowException:
            if final:
                raise
            self._lose()
            self._refreshed_s = time.monotonic()
            return None
        self._away_since_s = None
        self._write(found)
        self._plot(found, final)
        self.run.publish()
        self._refreshed_s = time.monotonic()
        self._cost_s = self._refreshed_s - start_s
        return found

    def _write(self, found: Sequence[Standing]) -> None:
        table = [each.flat() for each in found]
        columns = list(dict.fromkeys(key for each in table for key in each))
        data = [[each.get(column) for column in columns] for each in table]
        self.run.log_text(json.dumps({"columns": columns, "data": data}, indent=1), TABLE)
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(columns)
        writer.writerows(data)
        self.run.log_text(text.getvalue(), "leaderboard.csv")
        shown = [{"path": TABLE, "type": "table"}]
        tags = {SHOWN_TABLES_TAG: json.dumps(shown)}
        counts = {
            state: sum(each.state == state for each in found)
            for state in ("complete", "pruned", "failed")
        }
        metrics = {f"sweep/{state}": float(count) for state, count in counts.items()}
        best = found[0] if found and found[0].rank == 1 else None
        if best is not None and best.score is not None:
            if self._best not in (None, best.runs[0].run_id):
                tags |= {key: "" for key in self._tested}  # of the one that was best before
            self._best = best.runs[0].run_id
            tags |= {f"best.{name}": text for name, text in best.params.items()}
            tags |= {BEST_TAG: best.runs[0].run_id, "best.score": repr(best.score)}
            metrics[f"best/{self._metric}"] = best.score
            if best.std is not None and best.interval is not None:
                metrics[f"best/{self._metric}_std"] = best.std
                metrics[f"best/{self._metric}_ci95_low"] = best.interval[0]
                metrics[f"best/{self._metric}_ci95_high"] = best.interval[1]
        self.run.set_tags(tags)
        if metrics != self._logged:
            # One axis through restarts: seconds of the sweep. The end may come in the second of
            # what was logged last, and must not be lost to it.
            at = max(int(time.time() - self._began_s), self._logged_at + 1)
            self._logged, self._logged_at = metrics, at
            for key, value in metrics.items():
                self.run.log_series(key, (at,), (value,))

    def _plot(self, found: Sequence[Standing], final: bool) -> None:
        """Draw in a thread while trials run; at the end, wait for it."""
        busy = self._plotting is not None and self._plotting.is_alive()
        pause_s = max(PLOTS_S, self._plot_cost_s / SHARE)
        if not final and (busy or time.monotonic() - self._plotted_s < pause_s):
            return
        if self._plotting is not None:
            self._plotting.join()

        def draw() -> None:
            start_s = time.monotonic()
            html = page(found, self._metric, self._mode)
            if html is not None:
                self.run.log_text(html, "plots.html")
            self._plot_cost_s = time.monotonic() - start_s

        self._plotted_s = time.monotonic()
        if final:
            draw()
            return
        self._plotting = threading.Thread(target=draw, daemon=True)
        self._plotting.start()

    def finish(self, status: str) -> None:
        """Close the parent run."""
        if self._plotting is not None:
            self._plotting.join()
        self.run.publish()
        self.run.finish(status)
