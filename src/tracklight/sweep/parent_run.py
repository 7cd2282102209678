"""The parent run of a sweep: open or continue it, record its failed trials and its leaderboard."""

import csv
import functools
import io
import json
import math
import sys
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from tracklight.config.compose import flatten, list_targets
from tracklight.config.hardware import describe_machine
from tracklight.config.overrides import redact_command
from tracklight.engine.checkpoint_io import DurableCheckpointIO
from tracklight.errors import BadInput, RunFailed
from tracklight.paths import ROOT, UI_PORT
from tracklight.redact import redact
from tracklight.runs.leaderboard import LeaderboardRow, rank_trials, read_trial_run, short_names
from tracklight.runs.select import restore_command
from tracklight.sweep.machines import Machines
from tracklight.sweep.plan import Plan
from tracklight.sweep.progress import plot_page
from tracklight.tracking import provenance, tags, views
from tracklight.tracking.address import is_server
from tracklight.tracking.lock import LockHeld, RunLock, exclusive_lock
from tracklight.tracking.mlflow_client import mlflow, retry
from tracklight.tracking.run import Run
from tracklight.tracking.store import Store

LOCK = ".sweeps.lock"  # in the tracking directory
TABLE = "leaderboard.json"
SHOWN_TABLES_TAG = "mlflow.loggedArtifacts"  # makes MLflow's UI show an artifact as a table
NOTE_ROWS = 20
REFRESH_S = 2.0
PLOTS_S = 30.0
MAX_SHARE = 0.05  # of the sweep's time that refreshing may take
UNREACHABLE = (mlflow.exceptions.MlflowException, BadInput, RunFailed)  # errors of an outage


def open_parent(store: Store, plan: Plan, data: str | None, machines: Machines | None) -> "ParentRun":
    """Continue the sweep's parent run, with the number of threads that it began with, or create it.

    `data` is the digest of the first config's data, None if unknown. The machine that leads has the run;
    others wait until it is open.

    Raises:
        BadInput: The sweep is in progress, its parent is deleted, or its code or data have changed.
    """
    cfg, query = plan.first_cfg, f"tags.`{tags.SWEEP_TAG}` = '{plan.digest}'"
    if machines and (run_id := machines.wait_for_leader()):
        machines.announce(run_id)  # it may lead next
        _adopt(plan, store, store.client.get_run(run_id), data)
        return ParentRun(store, plan, run_id, None)
    with exclusive_lock(store.directory / LOCK):  # two first starts would create two parents
        if plan.settings["fresh"]:
            parents = []
        elif not (parents := store.search(query)):
            _check_not_deleted(store, query)
        if parents:
            _adopt(plan, store, parents[0], data)
            run = _reopen(store, parents[0].info.run_id, is_alone=machines is None)
            run.set_tags(_tags(plan))
        else:
            name = cfg.tracking.run_name or "sweep " + " ".join(plan.space.expressions())
            values = _tags(plan) | {tags.SWEEP_TAG: plan.digest}
            run = store.create(cfg.tracking.experiment, name, values)
    if machines:
        machines.announce(run.run_id)
    return ParentRun(store, plan, run.run_id, run)


def _adopt(plan: Plan, store: Store, parent: Any, data: str | None) -> None:
    """Go on with the number of threads of a parent run, if code and data are those of its trials."""
    if not plan.first_cfg.allow_changes:
        _check_unchanged(plan, store.search(_children_query(parent.info.run_id)), data)
    plan.num_threads = tags.read_count(parent.data.tags, tags.THREADS_TAG, plan.num_threads)


def _children_query(run_id: str) -> str:
    return f"tags.`{tags.PARENT_TAG}` = '{run_id}'"


def _check_not_deleted(store: Store, query: str) -> None:
    """Refuse to repeat a sweep whose parent was deleted, as its trials may still exist."""
    for run in store.search(query, deleted=True):
        deleted = (
            f"the parent run of this sweep, {run.info.run_id}, was deleted; sweep.fresh=true starts over"
        )
        raise BadInput(f"{deleted}, {restore_command(run.info.run_id, store.display_uri)} brings it back")


def _reopen(store: Store, run_id: str, is_alone: bool) -> Run:
    """Continue a parent run that is not in progress, as far as that can be known."""
    is_here = store.folder(run_id).is_dir()
    if is_alone and not is_here and store.client.get_run(run_id).info.status == "RUNNING":
        where = f"elsewhere, as run {run_id}"
        cures = "wait for it, or sweep.fresh=true; with sweep.storage=DATABASE, machines share a sweep"
        raise BadInput(f"this very sweep is RUNNING {where}; {cures}")
    try:
        return store.reopen(run_id)
    except BadInput as error:
        raise BadInput(f"this very sweep: {error}; wait for it, or sweep.fresh=true") from None


def _tags(plan: Plan) -> dict[str, str]:
    """Return tags for the search space, the settings and the provenance of a sweep."""
    keys = ("sampler", "pruner", "trials", "seeds", "folds", "workers")
    settings = {f"sweep.{key}": str(plan.settings[key]) for key in keys}
    space = {f"space.{name}": values for name, values in plan.space.expressions().items()}
    facts = provenance.collect(ROOT, redact_command(sys.argv), (), describe_machine())
    own = {"tracklight.kind": "sweep", tags.THREADS_TAG: str(plan.num_threads)}
    tracking = plan.first_cfg.tracking
    return tags.own_tags(flatten(tracking.tags), redact(tracking.note)) | facts.tags | settings | space | own


def _check_unchanged(plan: Plan, children: Iterable[Any], data: str | None) -> None:
    """Check that the code and the data of earlier runs are those of the new ones."""
    code_digest = functools.cache(provenance.code_digest)
    jobs = [job for jobs in plan.configs for job in jobs]
    codes = {code_digest(tuple(list_targets(job.cfg))) for job in jobs}
    first = _data_params(flatten(plan.first_cfg))
    for child in children:
        params = child.data.params
        targets = {v for k, v in params.items() if k.rpartition(".")[2] == "_target_"}
        codes.add(code_digest(tuple(sorted(targets))))  # the plan may not have its config
        _check_digest("code", child.data.tags.get(tags.CODE_TAG), codes)
        if data is not None and _data_params(params) == first:
            _check_digest("data", child.data.tags.get(tags.DATA_TAG), {data})


def _check_digest(what: str, before: str | None, now: set[str]) -> None:
    if before is not None and before not in {*now, "unknown"}:
        digests = f"digest {before[:12]} -> {min(now)[:12]}"
        cures = "sweep.fresh=true starts over, allow_changes=true continues all the same"
        raise BadInput(f"the {what} has changed since this sweep began ({digests}); {cures}")


def _data_params(params: Mapping[str, Any]) -> dict[str, str]:
    """Return the params that the data digest depends on."""
    data = {key: str(value) for key, value in params.items() if key.startswith("data.")}
    return {key: text for key, text in data.items() if key not in ("data.root", "data.batch_size")}


def _to_markdown(columns: Sequence[str], data: Sequence[Sequence[Any]]) -> str:
    """Write the first rows of a table as Markdown."""

    def to_text(cell: Any) -> str:
        text = "" if cell is None else f"{cell:.5g}" if isinstance(cell, float) else str(cell)
        return text.replace("|", r"\|").replace("\n", " ")[:40]

    rows = [columns, ["---"] * len(columns), *data[:NOTE_ROWS]]
    lines = [f"| {' | '.join(map(to_text, row))} |" for row in rows]
    if len(data) > NOTE_ROWS:
        lines.append(f"\n{len(data) - NOTE_ROWS} more in {TABLE}")
    return "\n".join(lines)


class ParentRun:
    """The parent run of a sweep, and its child runs in the store."""

    def __init__(self, store: Store, plan: Plan, run_id: str, run: Run | None):
        self.store = store
        self.run_id, self.folder = run_id, store.folder(run_id)
        self._run = run  # None while another machine leads, which has it open
        self._plan = plan
        self._refresh_due_s = self._plot_due_s = 0.0
        self._plots = ThreadPoolExecutor(1)
        self._outage_since_s: float | None = None
        stored = store.client.get_run(run_id)
        self.ui_hint = store.ui_hint(stored.info)
        self._start_ms: int = stored.info.start_time
        self._experiment_id: str = stored.info.experiment_id
        self._experiment = store.client.get_experiment(self._experiment_id).name
        self._best_id = stored.data.tags.get(tags.BEST_TAG)
        self._test_tags = [key for key in stored.data.tags if key.startswith("best.test/")]
        self._metrics: dict[str, float] = {}
        self._step = -1

    @property
    def run(self) -> Run:
        """The run itself; opened where the machine that had it is gone."""
        if self._run is None:
            self._run = _reopen(self.store, self.run_id, is_alone=False)
        return self._run

    def children(self, timeout_s: float | None = None) -> list[Any]:
        """Return the child runs, newest first, without deleted ones."""
        return self.store.search(_children_query(self.run_id), timeout_s)

    def children_by_key(self) -> dict[str, Any]:
        """Return the newest child run of each job key."""
        return {run.data.tags.get(tags.POINT_TAG): run for run in reversed(self.children())}

    def log_test(self, run_ids: Sequence[str]) -> dict[str, float]:
        """Log the mean test metrics of the winner's runs on the parent; return them."""
        found = [self.store.client.get_run(run_id).data.metrics for run_id in run_ids]
        keys = [key for key in found[0] if key.startswith("test/")]
        means = {key: sum(each[key] for each in found) / len(found) for key in keys}
        self.run.set_tags({f"best.{key}": repr(value) for key, value in means.items()})
        return means

    def drop_last_checkpoints(self, children: Iterable[Any], kept: Collection[str]) -> None:
        """Delete last.ckpt of the finished trials but those `kept`; their best.ckpt stays."""
        for run_id in (run.info.run_id for run in children if run.info.status == "FINISHED"):
            folder = self.store.folder(run_id)
            last = folder / tags.ARTIFACTS_FOLDER / tags.LAST
            if run_id in kept or not last.exists():
                continue
            with suppress(LockHeld, OSError):  # somebody has just resumed it, or it is another user's
                lock = RunLock(folder, self.store.lock_content)
                DurableCheckpointIO().remove_checkpoint(last)
                lock.remove()

    def record_failure(self, run_id: str | None, name: str, run_tags: Mapping[str, str], reason: str) -> None:
        """Mark a trial's run as failed; create it first if the trial has none.

        Without a `run_id`, the job's key, one of `run_tags`, finds the run.
        """
        client = self.store.client
        outcome = {tags.OUTCOME_TAG: "failed", tags.REASON_TAG: reason}
        try:
            if run_id is None:
                is_job = f"tags.`{tags.POINT_TAG}` = '{run_tags[tags.POINT_TAG]}'"
                runs = self.store.search(f"{_children_query(self.run_id)} and {is_job}")
            else:
                runs = [retry(lambda: client.get_run(run_id), self.store.timeout_s)]
            if not runs:
                run_tags = {**run_tags, **outcome, tags.NEVER_BEGAN_TAG: "true"}
                self.store.create(self._experiment, name, run_tags).finish("FAILED")
                return
            if runs[0].info.status != "FAILED":  # its process could not set it
                self.store.reopen(runs[0].info.run_id).finish("FAILED")
            for key, value in outcome.items():
                client.set_tag(runs[0].info.run_id, key, value)
        except UNREACHABLE:
            self._note_outage()

    def delete_child(self, run_id: str) -> None:
        """Delete a child run."""
        try:
            self.store.client.delete_run(run_id)
        except UNREACHABLE:
            self._note_outage()

    @property
    def outage_s(self) -> float:
        """For how long the store has not answered; 0 if its last answer came."""
        return 0.0 if self._outage_since_s is None else time.monotonic() - self._outage_since_s

    def _note_outage(self) -> None:
        """Begin an outage, which lasts until a refresh succeeds; make the next one due at once."""
        if self._outage_since_s is None:
            self._outage_since_s = time.monotonic()
            self._refresh_due_s = 0.0

    def refresh(self, final: bool = False, logs: bool = True) -> list[LeaderboardRow] | None:
        """Log the leaderboard and the best trial if that is due; return the leaderboard then.

        A `final` refresh logs in any case, and waits for the store and the plots; without `logs` it reads.
        """
        start_s = time.monotonic()
        if start_s < self._refresh_due_s and not final:
            return None
        try:
            rows = self._rank(None if final else 0.0)  # meanwhile, trials await their decisions
        except mlflow.exceptions.MlflowException:
            if final:
                raise
            self._note_outage()
            self._refresh_due_s = time.monotonic() + REFRESH_S
            return None
        self._outage_since_s = None
        if logs:
            self._log(rows, start_s, final)
        end_s = time.monotonic()
        self._refresh_due_s = end_s + max(REFRESH_S, (end_s - start_s) / MAX_SHARE)
        return rows

    def _log(self, rows: Sequence[LeaderboardRow], start_s: float, final: bool) -> None:
        self._log_table(rows)
        self._log_best(rows)
        if final or start_s >= self._plot_due_s:
            self._plot_due_s = math.inf
            plotted = self._plots.submit(self._plot, rows)  # trials run meanwhile
            if final:
                plotted.result()
        self.run.upload_artifacts()

    def save_view(self, children: Iterable[Any]) -> None:
        """Save the view of the sweep in MLflow's UI, and add its address to `ui_hint`."""
        plan, params = self._plan, dict[str, str]()
        for child in children:
            params |= child.data.params
        names = [axis.name.partition("@")[0] for axis in plan.space.axes]
        names += ["seed"] * (plan.settings["seeds"] > 1) + ["data.fold"] * (plan.num_folds > 1)
        shown = [short if (short := name.rpartition(".")[2]) in params else name for name in names]
        shown = [name for name in shown if name in params]  # a list by its short text
        metrics = dict.fromkeys((plan.metric, "train/loss"))
        where = (self.store.client, self._experiment_id)
        views.save_view(*where, shown, [*metrics], self.run_id, plan.mode)
        is_local = not is_server(self.store.uri)
        uri = f"http://127.0.0.1:{UI_PORT}" if is_local else self.store.display_uri.rstrip("/")
        if is_local:
            self.ui_hint += f"; while it runs (by default on port {UI_PORT}), the sweep is at"
        self.ui_hint += f"\nview   {uri}{views.page(self._experiment_id, views.view_name(self.run_id))}"

    def _rank(self, timeout_s: float | None) -> list[LeaderboardRow]:
        names = [axis.name for axis in self._plan.space.axes]
        runs = [read_trial_run(child, names) for child in self.children(timeout_s)]
        return rank_trials(runs, self._plan.mode, self._plan.num_runs)

    def _log_table(self, rows: Sequence[LeaderboardRow]) -> None:
        table = [row.to_dict() for row in rows]
        columns = list(dict.fromkeys(key for row in table for key in row))
        data = [[row.get(column) for column in columns] for row in table]
        # MLflow's UI takes a dot in a column's name for a path into the cell.
        names = [name.replace(".", " ") for name in short_names(columns)]
        self.run.log_text(json.dumps({"columns": names, "data": data}, indent=1), TABLE)
        text = io.StringIO()
        csv.writer(text).writerows([columns, *data])
        self.run.log_text(text.getvalue(), "leaderboard.csv")
        shown = json.dumps([{"path": TABLE, "type": "table"}])
        note = redact(self._plan.first_cfg.tracking.note)
        description = "\n\n".join(filter(None, [note, _to_markdown(names, data)]))
        self.run.set_tags({SHOWN_TABLES_TAG: shown, tags.NOTE_TAG: description})

    def _log_best(self, rows: Sequence[LeaderboardRow]) -> None:
        """Log how many trials ended how, and the best trial, as metrics and tags."""
        states = [row.state for row in rows]
        metrics = {f"sweep/{state}": float(states.count(state)) for state in ("complete", "pruned", "failed")}
        best = rows[0] if rows and rows[0].rank == 1 else None
        if best is not None and best.score is not None:
            best_id, key = best.run_ids[0], tags.SCORE  # as its trials: MLflow's charts show both in one
            values = {f"best.{name}": text for name, text in best.params.items()}
            values |= {tags.BEST_TAG: best_id, "best.score": repr(best.score)}
            if self._best_id not in (None, best_id):
                values |= dict.fromkeys(self._test_tags, "")  # of the previous best trial
            self._best_id = best_id
            self.run.set_tags(values)
            metrics[key] = best.score
            spread = {name: best.to_dict().get(name) for name in ("std", "ci95_low", "ci95_high")}
            metrics |= {f"{key}_{name}": value for name, value in spread.items() if value is not None}
        if metrics == self._metrics:
            return
        # Steps are the seconds since the sweep began, through restarts. Two refreshes within one
        # second get two steps, so that the last values are kept.
        self._step = max((self.run.now_ms() - self._start_ms) // 1000, self._step + 1)
        self._metrics = metrics
        for key, value in metrics.items():
            self.run.log_series(key, (self._step,), (value,))

    def _plot(self, rows: Sequence[LeaderboardRow]) -> None:
        start_s = time.monotonic()
        if html := plot_page(rows, self._plan.metric, self._plan.mode):
            self.run.log_text(html, "plots.html")
        end_s = time.monotonic()
        self._plot_due_s = end_s + max(PLOTS_S, (end_s - start_s) / MAX_SHARE)

    def finish(self, status: str) -> None:
        """End the parent run with this status."""
        self._plots.shutdown()
        self.run.finish(status)

    def abandon(self) -> None:
        """Leave the parent run, if this machine has it, to another."""
        self._plots.shutdown()
        if self._run is not None:
            self._run.abandon()
