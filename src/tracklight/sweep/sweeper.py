"""Run a sweep: check it by a preflight, run its trials, test the winner.

What takes seconds to import is imported inside functions: bad input is refused before that, and
the preflight runs meanwhile.
"""

import json
import os
import signal
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext
from omegaconf import DictConfig

from tracklight.config.hardware import choose_temporary_folder, num_devices
from tracklight.errors import BadInput, RunFailed, count
from tracklight.runs.leaderboard import LeaderboardRow, rank_trials
from tracklight.runs.select import WORDS, select_run
from tracklight.sweep.executors import Executor, LauncherExecutor, ProcessExecutor
from tracklight.sweep.plan import Job, Plan, format_params, make_trial_spec, with_num_threads
from tracklight.sweep.populations import PopulationExecutor, group_jobs
from tracklight.sweep.trial import TrialResult
from tracklight.tracking.address import call_in_thread, is_server
from tracklight.tracking.tags import PARENT_TAG, POINT_TAG, SUMMARY, TESTED_TAG

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

    from tracklight.sweep.loop import SweepLoop
    from tracklight.sweep.machines import Machines
    from tracklight.sweep.parent_run import ParentRun
    from tracklight.sweep.progress import Progress
    from tracklight.tracking.store import Store

GIVEN_UP = (
    "this machine was not heard of for half a minute, and others run its trials; the same command joins them"
)

summary: dict[str, Any] = {}  # what the sweep of this process came to, for --json
MAX_FAILURES = 3  # named in the error message
MAX_REASON_CHARS = 80  # of each of them; the table has the whole reason


def sweep(overrides: list[str], master: DictConfig, context: HydraContext) -> float | None:
    """Run the sweep that the overrides of `-m` describe, and return the best score.

    Raises:
        BadInput: The sweep cannot run; no trial was started.
        RunFailed: A trial, the winner's test or a store failed.
    """
    plan = Plan(overrides, master, context)
    if plan.settings["dry_run"]:
        print(plan.describe())
        if plan.population and not plan.is_search:
            jobs = [with_num_threads(job, plan.num_threads) for jobs in plan.configs for job in jobs]
            print(group_jobs(jobs)[1])
        return None
    _check_launcher(plan.launcher)
    choose_temporary_folder(Path(plan.first_cfg.tracking.dir))
    before = os.environ.get("PYTHONSAFEPATH", "")
    os.environ["PYTHONSAFEPATH"] = "1"  # no process of a sweep imports the current folder's logging.py
    executor = ProcessExecutor(plan.settings["workers"], plan.num_gpus)
    machines: Machines | None = None
    try:
        preflighted = call_in_thread(lambda: preflight(plan, executor))
        store, storage = _open_stores(plan)
        from tracklight.sweep.parent_run import open_parent  # slow, so while the preflight runs

        data = preflighted.result()
        with _explaining_outages():
            machines = _join(plan, store, storage)
            parent = open_parent(store, plan, data, machines) if store else None
        return _run(plan, executor, parent, storage, machines)
    finally:
        executor.kill()
        if machines:
            machines.leave()
        os.environ["PYTHONSAFEPATH"] = before  # empty, it is as if it were not set


def _check_launcher(target: str | None) -> None:
    if target is None:
        return
    if target not in {f"{each.__module__}.{each.__name__}" for each in Plugins.instance().discover(Launcher)}:
        cure = "pip install 'tracklight[ray]'" if ".hydra_ray_launcher." in target else "install its package"
        raise BadInput(f"{target} is not among the installed plugins of Hydra; {cure}")


def _open_stores(plan: Plan) -> "tuple[Store | None, BaseStorage | None]":
    """Open MLflow's store and Optuna's storage; None if it is the journal of the parent run."""
    from tracklight.sweep.storage import open_storage
    from tracklight.tracking.run import Run  # noqa: F401, imported now: the preflight takes as long
    from tracklight.tracking.store import connect

    tracking, url = plan.first_cfg.tracking, plan.settings["storage"]
    init_from = {job.cfg["init_from"] for jobs in plan.configs for job in jobs} - {None}
    if not tracking.enabled:
        for run_id in init_from:
            raise BadInput(f"init_from={run_id} needs tracking=mlflow, where that run is")
        return None, open_storage(url, None)
    storage = open_storage(url, None) if url else None
    store = connect(tracking.uri, Path(tracking.dir))
    store.recover()
    for word in init_from:
        run_id = select_run(store, word).info.run_id
        if word in WORDS:
            raise BadInput(f"init_from={word} changes with each run of a sweep; take init_from={run_id}")
    return store, storage


def _join(plan: Plan, store: "Store | None", storage: "BaseStorage | None") -> "Machines | None":
    """Join the machines that run the sweep, if others could: they share its storage and its store."""
    if store is None or storage is None or not is_server(store.uri):
        return None
    from tracklight.sweep.machines import Machines

    return Machines(storage, plan.digest[:16], store.directory)


def _run(
    plan: Plan,
    executor: ProcessExecutor,
    parent: "ParentRun | None",
    storage: "BaseStorage | None",
    machines: "Machines | None",
) -> float | None:
    """Run the remaining trials, test the winner, and end the parent run with its status."""
    from tracklight.sweep.progress import Progress

    progress = Progress(plan.metric, plan.mode, plan.settings["workers"])
    status = "FAILED"
    try:
        with _explaining_outages():
            loop = _build_loop(plan, executor, parent, storage, machines, progress)
            loop.run()
            if loop.signum is not None:
                status = "KILLED"
            score = _conclude(loop)
            if machines and machines.leads and loop.signum is None and not loop.halted:
                machines.has_ended = True
        if loop.signum is None and not loop.failures:
            status = "FINISHED"
    except (KeyboardInterrupt, SystemExit):
        status = "KILLED"
        raise
    finally:
        progress.close()
        if parent:
            hint = "; the same command continues it" if status == "KILLED" else ""
            if status == "KILLED":
                parent.store.recover()  # ends the runs of trials that were stopped before they could do so
            progress.note(f"sweep  {parent.run_id}  {parent.folder}{hint}\nlook   {parent.ui_hint}")
            if machines and (machines.is_lost or not machines.leads):
                parent.abandon()
            else:
                parent.finish(status)
    _raise_outcome(loop)
    return score


@contextmanager
def _explaining_outages() -> Iterator[None]:
    """Raise RunFailed for what a store or a storage raises that has been away for too long."""
    from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError

    from tracklight.tracking.mlflow_client import mlflow, short_reason

    try:
        yield
    except (mlflow.exceptions.MlflowException, StorageInternalError) as error:
        what, cause = "the tracking store", error
        if isinstance(error, StorageInternalError):
            what, cause = "sweep.storage", error.__cause__ or error
        reason = f"{what} fails ({short_reason(cause)})"
        raise RunFailed(f"{reason}; the same command continues the sweep") from None
    except UpdateFinishedTrialError:
        raise RunFailed(GIVEN_UP) from None


def _build_loop(
    plan: Plan,
    executor: Executor,
    parent: "ParentRun | None",
    storage: "BaseStorage | None",
    machines: "Machines | None",
    progress: "Progress",
) -> "SweepLoop":
    from tracklight.sweep.loop import SweepLoop
    from tracklight.sweep.storage import open_storage
    from tracklight.sweep.study import OptunaStudy

    name = plan.digest[:16]
    if parent:
        (parent.folder / "logs").mkdir(parents=True, exist_ok=True)
        name += "" if storage is None else f"-{parent.run_id}"
        storage = storage or open_storage(None, parent.folder / "study.journal")
    assert storage is not None
    settings = plan.optuna_settings, plan.num_trials, machines and machines.id
    study = OptunaStudy(storage, name, plan.mode, plan.space, *settings)
    if machines:
        machines.trials = study
        if not machines.leads:
            progress.note("this machine joins a sweep that another one leads")
    if plan.launcher:
        takes_all = not plan.is_search and plan.settings["on_failure"] != "stop"
        batch_size = None if takes_all else plan.settings["workers"]
        executor = LauncherExecutor(plan.context, plan.master, batch_size)
    if plan.population:
        size = plan.settings["workers"], plan.num_gpus
        executor = PopulationExecutor(*size, plan.population, plan.is_search, progress.note)
    for note in plan.notes:
        progress.note(note)
    return SweepLoop(plan, study, executor, parent, progress, machines)


def _conclude(loop: "SweepLoop") -> float | None:
    """Print the closing table and return the best score; of a completed sweep, test the winner."""
    plan, parent, progress = loop.plan, loop.parent, loop.progress
    if loop.machines and loop.machines.is_lost:
        raise RunFailed(GIVEN_UP)
    leads = loop.machines is None or loop.machines.leads
    num = len(loop.study.finished_trials())
    if loop.machines and leads:
        loop.machines.num_ranked = num  # a trial that ends on another machine from now on is not among them
    if parent is None:
        rows = rank_trials(loop.trial_runs, plan.mode, plan.num_runs)
    else:
        rows = parent.refresh(final=True, logs=leads) or []
    num = max(len(rows), num)
    different = f", {len(rows)} of them different" if num > len(rows) else ""
    progress.table(rows, f"{plan.metric} ({plan.mode}), {count(num, 'trial')}{different}")
    if loop.halted and loop.num_remaining:
        left = f"runs not begun: {loop.num_remaining}; the same command goes on with them"
        progress.note(f"sweep.on_failure=stop: {left}")
    winner = rows[0] if rows and rows[0].rank == 1 else None
    if not leads:
        if loop.machines and loop.machines.is_over:
            progress.note("the machine that leads has tested the best trial and ended the sweep")
        return winner.score if winner else None
    children = parent.children() if parent and rows else []
    if parent and winner and loop.signum is None and not loop.halted:
        progress.note(test_winner(loop, parent, winner, children))
        if plan.first_cfg.tracking.keep == "best":
            parent.drop_last_checkpoints(children, winner.run_ids)
    if parent and rows:
        parent.save_view(children)
    if parent and winner:
        ended = {"id": parent.run_id, "metric": plan.metric, "mode": plan.mode, "score": winner.score}
        summary.update(ended, trials=num, params=winner.params, runs=winner.run_ids)
        parent.run.log_text(json.dumps(summary, indent=1) + "\n", SUMMARY)
    return winner.score if winner else None


def _raise_outcome(loop: "SweepLoop") -> None:
    """Raise what the exit code of the sweep follows from, unless it succeeded."""
    if loop.signum == signal.SIGINT:
        raise KeyboardInterrupt
    if loop.signum is not None:
        sys.exit(128 + loop.signum)
    if loop.failures:
        failed = [
            f"trial {number} ({textwrap.shorten(reason, MAX_REASON_CHARS, placeholder='...')})"
            for number, reason in loop.failures.items()
        ][:MAX_FAILURES]
        more = ", ..." if len(loop.failures) > MAX_FAILURES else ""
        num = len(loop.failures)
        raise RunFailed(f"{count(num, 'trial')} failed: {', '.join(failed)}{more}")


def test_winner(
    loop: "SweepLoop", parent: "ParentRun", winner: LeaderboardRow, children: Sequence[Any]
) -> str:
    """Test those runs of the best trial that are not tested yet; return a line with the results."""
    by_id = {child.info.run_id: child for child in children}
    runs = [by_id[run_id] for run_id in winner.run_ids]
    untested = {run.data.tags[POINT_TAG]: run for run in runs if TESTED_TAG not in run.data.tags}
    try:
        if untested:
            _run_tests(loop, parent, winner, untested)
    except (KeyboardInterrupt, SystemExit):
        for _ in loop.executor.stop():  # each run is closed, and the same command continues it
            pass
        raise
    metrics = parent.log_test(winner.run_ids)
    results = "  ".join(f"{key} {value:.5g}" for key, value in sorted(metrics.items()))
    score = f"{loop.plan.metric} {winner.score:.5g}"
    return f"best  trial {winner.trial} {format_params(winner.params)}  {score}  {results}".rstrip()


def _run_tests(
    loop: "SweepLoop", parent: "ParentRun", winner: LeaderboardRow, untested: Mapping[str, Any]
) -> None:
    """Test runs of the winner, given by job key."""
    plan, executor = loop.plan, loop.executor
    jobs = plan.compose_jobs(winner.trial, winner.params, max(plan.num_runs, len(winner.run_ids)))
    waiting = [job for job in jobs if job.key in untested]
    for key in untested.keys() - {job.key for job in waiting}:
        config = f"by another config than {format_params(winner.params)} stands for now"
        winner_run = f"the winner, run {untested[key].info.run_id}, was trained {config}"
        raise RunFailed(f"{winner_run}, and is not tested; sweep.fresh=true starts over")
    tags = {PARENT_TAG: parent.run_id}
    log = parent.folder / "logs" / f"{winner.trial:04d}.log"
    while waiting or executor.running:
        while waiting and executor.has_room:
            job = waiting.pop()
            run_id = untested[job.key].info.run_id
            spec = make_trial_spec(job, tags=tags, run_id=run_id, test=True, log=log)
            executor.start(spec, job)
        for job, message in executor.messages(1.0):
            run_id = untested[job.key].info.run_id
            if not isinstance(message, TrialResult):
                continue
            if message.kind not in ("complete", "pruned"):
                reason = message.reason or message.kind
                raise RunFailed(f"the winner, run {run_id}, could not be tested: {reason}")
            parent.store.client.set_tag(run_id, TESTED_TAG, "true")


def preflight(plan: Plan, executor: ProcessExecutor) -> str | None:
    """Train one batch of the first config, and of the next ones while they are refused.

    A refusal concerns the sweep as a whole if two configs share it, or if all are refused. Trials
    of a launcher or of several devices run on this machine's CPU here, where a failure proves
    nothing: then only the names of the metrics are checked. Returns the digest of the first config's data.

    Raises:
        BadInput: The data or the model refuse the config, `score.metric` is never logged, or a key
            that varies is not used.
    """
    jobs = [jobs[0] for jobs in plan.configs]
    on_cpu = plan.launcher is not None or num_devices(jobs[0].cfg["trainer"]["devices"]) != 1
    refusals: list[str] = []
    for job in jobs:
        result = _run_preflight(executor, job, on_cpu)
        refusal = _refusal(result, plan.metric, on_cpu)
        if not refusal:
            for text in result.warnings:
                named = [axis.name for axis in plan.space.axes if f" {axis.name}=" in text]
                if varied := named if "ignored" in text else []:
                    raise BadInput(f"{', '.join(varied)} cannot vary: {text}")
                print(f"warning: {text}", file=sys.stderr)
            return None if refusals else result.data
        if refusal in refusals:
            break
        refusals.append(refusal)
    raise BadInput(refusals[-1])


def _run_preflight(executor: ProcessExecutor, job: Job, on_cpu: bool) -> TrialResult:
    spec = make_trial_spec(job, preflight=True)
    if on_cpu:
        spec.cfg["trainer"]["accelerator"] = "cpu"
    executor.start(spec, job)
    while True:
        for _, message in executor.messages(1.0):
            if isinstance(message, TrialResult):
                return message


def _refusal(result: TrialResult, metric: str, on_cpu: bool) -> str:
    """Return why the result of a preflight refuses the config; empty if it does not."""
    if result.kind == "failed":
        told = result.is_input and (not on_cpu or " is never logged; " in result.reason)
        return result.reason if told else ""
    from tracklight.experiment.build import never_logged

    problem = f"score.metric={metric} is {never_logged(metric, result.metrics)}"
    return "" if metric in result.metrics else problem
