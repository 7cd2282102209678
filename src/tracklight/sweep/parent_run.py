"""The parent run of a sweep: found, taken up again, described; and the runs below it."""

import csv
import io
import json
import shlex
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tracklight.config import compose as config
from tracklight.errors import BadInput, RunFailed
from tracklight.paths import ROOT
from tracklight.redact import redact
from tracklight.runs.leaderboard import Row, Standing, row, standings
from tracklight.runs.select import restoring
from tracklight.sweep.plan import Job, Plan
from tracklight.sweep.progress import page
from tracklight.tracking import provenance
from tracklight.tracking.lock import alone
from tracklight.tracking.mlflow_client import mlflow, retry
from tracklight.tracking.run import Run
from tracklight.tracking.store import Store
from tracklight.tracking.tags import (
    BEST_TAG,
    CODE_TAG,
    DATA_TAG,
    NEVER_BEGAN_TAG,
    OUTCOME_TAG,
    PARENT_TAG,
    POINT_TAG,
    REASON_TAG,
    SWEEP_TAG,
    THREADS_TAG,
)

pass

LOCK = ".sweeps.lock"  # in the tracking directory


def children(store: Store, parent_id: str, patience_s: float | None = None) -> list[Any]:
    """Return the runs under a parent, newest first, deleted ones excluded."""
    return store.search(f"tags.`{PARENT_TAG}` = '{parent_id}'", patience_s)


def open_parent(store: Store, plan: Plan, data: str | None) -> tuple[Run, int]:
    """Continue the parent run of this very sweep, or make it.

    Args:
        store: Where it is, or will be.
        plan: The sweep.
        data: Digest of the first point's data, where it is known.

    Returns:
        The run, open, and the threads of a trial, which stay those of the sweep's start.

    Raises:
        BadInput: The sweep is in progress, its parent is deleted, or its code or data have changed.
    """
    with alone(store.directory / LOCK):  # two starts at once would make two parents
        is_fresh = plan.settings["fresh"]
        found = None if is_fresh else _find(store, plan.identity)
        if found is None and not is_fresh:
            _check_not_deleted(store, plan.identity)
        cfg = plan.points[0][0].cfg
        if found is not None and not cfg.allow_changes:  # refused, it stays as it is
            jobs = [job for jobs in plan.points for job in jobs]
            check_unchanged(jobs, children(store, found.info.run_id), data)
        threads = int(found.data.tags.get(THREADS_TAG, plan.threads)) if found else plan.threads
        tags = _tags(plan) | {THREADS_TAG: str(threads)}
        if found is not None:
            return _reopen(store, found.info.run_id, tags), threads
        name = cfg.tracking.run_name or "sweep " + " ".join(plan.space.written())
        tags |= {SWEEP_TAG: plan.identity}
        return store.create(cfg.tracking.experiment, name, tags), threads


def _find(store: Store, identity: str) -> Any | None:
    """Return the newest parent run of this very sweep, as it is."""
    return next(iter(store.search(f"tags.`{SWEEP_TAG}` = '{identity}'")), None)


def _check_not_deleted(store: Store, identity: str) -> None:
    """Refuse to run again what somebody deleted, the parent's trials perhaps still being there."""
    client = store.client

    def search() -> list[Any]:
        experiments = [each.experiment_id for each in client.search_experiments()]
        query = f"tags.`{SWEEP_TAG}` = '{identity}'"
        return client.search_runs(
            experiments, query, mlflow.entities.ViewType.DELETED_ONLY, max_results=1
        )

    for run in retry(search, store.patience_s):
        raise BadInput(
            f"the parent run of this sweep, {run.info.run_id}, was deleted; sweep.fresh=true "
            f"starts over, {restoring(run.info.run_id, store.shown_uri)} brings it back"
        )


def _reopen(store: Store, run_id: str, tags: Mapping[str, str]) -> Run:
    """Continue a parent run, unless it is in progress, here or elsewhere."""
    is_here = (store.root / run_id).is_dir()
    if not is_here and store.client.get_run(run_id).info.status == "RUNNING":
        raise BadInput(
            f"this very sweep is RUNNING elsewhere, as run {run_id}; wait for it, or "
            "sweep.fresh=true"
        )
    try:
        run = store.reopen(run_id)
    except BadInput as error:
        raise BadInput(f"this very sweep: {error}; wait for it, or sweep.fresh=true") from None
    run.set_tags(tags)
    return run


def _tags(plan: Plan) -> dict[str, str]:
    """Return the tags that say what a sweep varies, how, and what made it."""
    kept = ("sampler", "pruner", "trials", "seeds", "workers")
    told = {f"sweep.{key}": str(plan.settings[key]) for key in kept}
    space = {f"space.{name}": values for name, values in plan.space.written().items()}
    command = redact(shlex.join(sys.argv))
    facts = provenance.collect(ROOT, command, provenance.code_digest())
    return facts.tags() | told | space | {"tracklight.kind": "sweep"}


def journal(run: Run) -> Path:
    """Return where Optuna's journal of a sweep lies."""
    return run.folder / "study.journal"


def check_unchanged(jobs: Sequence[Job], children: Iterable[Any], data: str | None) -> None:
    """Refuse to mix trials of this code and data with those of another.

    Args:
        jobs: What is to run.
        children: The runs that there are, as MLflow has them.
        data: Digest of the first job's data; None where it is not known.

    Raises:
        BadInput: One of the runs had other code or data.
    """
    kinds = {tuple(config.targets(job.cfg)) for job in jobs}
    digests = {kind: provenance.code_digest(kind) for kind in kinds}
    first = _settings(config.flatten(jobs[0].cfg))
    for child in children:
        tags, params = child.data.tags, child.data.params
        own = tuple(sorted({v for k, v in params.items() if k.rpartition(".")[2] == "_target_"}))
        if own not in digests:  # a point that this command does not name
            digests[own] = provenance.code_digest(own)
        _check("code", tags.get(CODE_TAG), {*digests.values()})
        if data is not None and _settings(params) == first:
            _check("data", tags.get(DATA_TAG), {data})


def _check(what: str, before: str | None, now: set[str]) -> None:
    if before is not None and before not in {*now, "unknown"}:
        raise BadInput(
            f"the {what} has changed since this sweep began (digest {before[:12]} -> "
            f"{min(now)[:12]}); sweep.fresh=true starts over, allow_changes=true continues "
            "all the same"
        )


def _settings(params: Mapping[str, Any]) -> dict[str, str]:
    """Pick what decides which data a run reads: neither their folder nor the batch size does."""
    return {
        key: str(value)
        for key, value in params.items()
        if key.startswith("data.") and key not in ("data.root", "data.batch_size")
    }


pass

TABLE = "leaderboard.json"
SHOWN_TABLES_TAG = "mlflow.loggedArtifacts"  # which makes MLflow's UI show an artifact as a table
REFRESH_S = 2.0
PLOTS_S = 30.0
SHARE = 0.05  # of the time that refreshing may take
AWAY = (mlflow.exceptions.MlflowException, BadInput, RunFailed)  # what the store's absence becomes


class ParentRun:
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
        run = retry(lambda: client.get_run(run_id), self.store.patience_s)
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
