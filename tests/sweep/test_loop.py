"""The loop of a sweep whose trials follow a script: no process, no MLflow."""

import signal
from pathlib import Path
from types import SimpleNamespace

import pytest

from tracklight.errors import BadInput, RunFailed
from tracklight.sweep import loop as loop_module
from tracklight.sweep.loop import SweepLoop
from tracklight.sweep.plan import Job
from tracklight.sweep.progress import Progress
from tracklight.sweep.space import read_space
from tracklight.sweep.storage import open_storage
from tracklight.sweep.study import OptunaSettings, OptunaStudy
from tracklight.sweep.trial import EpochReport, TrialResult

SPACE = read_space(["lr=1,2,3"], {}, None)


def job(number, params, seed=0):
    cfg = {
        "seed": seed,
        "num_threads": 1,
        "resume": None,
        "trainer": {"enable_progress_bar": True, "max_epochs": 9},
        "tracking": {"run_name": None},
    }
    key = f"{params['lr']}/{seed}"
    return Job(number, dict(params), cfg, [], key)


def complete(score):
    return TrialResult("complete", score, run_id="run")


class FakeExecutor:
    """Executor whose trials send the messages of a script, by key; one trial at a time."""

    blocks = False

    def __init__(self, script, size=1):
        self.script = {key: list(messages) for key, messages in script.items()}
        self.size = size
        self.running, self.began, self.answers = [], [], []
        self.on_message = lambda: None

    @property
    def has_room(self):
        return len(self.running) < self.size

    def start(self, spec, job):
        self.running.append(job)
        self.began.append(job.key)

    def messages(self, timeout_s):
        job = self.running[0]
        message = self.script[job.key].pop(0)
        if isinstance(message, TrialResult):
            self.running.remove(job)
        self.on_message()
        yield job, message

    def answer(self, job, prune):
        self.answers.append((job.key, prune))

    def stop(self):
        while self.running:
            yield from self.messages(0)

    def kill(self):
        self.running.clear()


class FakeParent:
    """A parent run that keeps failures in a list, and whose store is away if a test says so."""

    def __init__(self, **children):
        self.children = {key.replace("_", "/"): run for key, run in children.items()}
        self.run_id, self.folder = "parent", Path("parent")
        self.failed, self.outage_s, self.num_refreshed = [], 0.0, 0
        self.on_refresh = lambda: None

    def children_by_key(self):
        return self.children

    def record_failure(self, run_id, name, tags, reason):
        self.failed.append((tags["tracklight.point"], name, reason))

    def refresh(self, logs):
        self.num_refreshed += 1
        self.on_refresh()


def ended(status, outcome=None, **metrics):
    tags = {"tracklight.epochs": "1"} | ({"tracklight.outcome": outcome} if outcome else {})
    if status == "FAILED":
        tags["tracklight.non_finite_step"] = "7"
    return SimpleNamespace(
        info=SimpleNamespace(status=status, run_id="run", start_time=0, end_time=1),
        data=SimpleNamespace(tags=tags, metrics=metrics, params={}),
    )


@pytest.fixture(autouse=True)
def keep_keys(monkeypatch):
    monkeypatch.setattr(loop_module, "with_num_threads", lambda job, _: job)


def plan(seeds, **attributes):
    settings = {"seeds": seeds, "on_failure": "continue", "storage": None}
    return SimpleNamespace(settings=settings, num_runs=seeds, num_threads=1, prunes=False, **attributes)


def search(seeds=1, refuses=False):
    """Return the plan of a search; if it refuses some configs, lr=2 is invalid."""

    def compose_jobs(number, params, num_seeds):
        if refuses and params["lr"] == "2":
            raise BadInput("lr=2 is odd")
        return [job(number, params, seed) for seed in range(num_seeds)]

    return plan(seeds, is_search=True, compose_jobs=compose_jobs)


def grid(seeds=1):
    configs = [[job(n, {"lr": lr}, s) for s in range(seeds)] for n, lr in enumerate("123")]
    return plan(seeds, is_search=False, configs=configs)


def trials_at(path, total=None, pruner="none"):
    methods = OptunaSettings("grid", {}, pruner, {}, 0, 4)
    return OptunaStudy(open_storage(None, path), "study", "min", SPACE, methods, total)


def make_loop(plan, study, executor, parent=None, prunes=False, on_failure="continue"):
    plan.prunes = prunes
    plan.settings["on_failure"] = on_failure
    return SweepLoop(plan, study, executor, parent, Progress("loss", "min", 1))


def run(*args, **kwargs):
    loop = make_loop(*args, **kwargs)
    loop.run()
    return loop


def test_the_line_of_an_ended_trial_counts_it_in_the_best_and_in_what_is_to_go(tmp_path, capsys):
    trials = trials_at(tmp_path / "a")
    script = {"1/0": [complete(0.3)], "2/0": [complete(0.1)], "3/0": [complete(0.2)]}
    run(grid(), trials, FakeExecutor(script))
    first, second, third = capsys.readouterr().out.splitlines()
    assert "2 to go, best 0.3 (trial 0 lr=1)" in first
    assert "1 to go, best 0.1 (trial 1 lr=2)" in second
    assert "to go" not in third and "best 0.1 (trial 1 lr=2)" in third


def test_the_line_of_a_first_seed_counts_the_other_seeds_that_it_allows(tmp_path, capsys):
    trials = trials_at(tmp_path / "a", pruner="median")
    script = {f"{lr}/{seed}": [complete(0.1)] for lr in "123" for seed in (0, 1)}
    run(grid(seeds=2), trials, FakeExecutor(script), prunes=True)
    assert "5 to go" in capsys.readouterr().out.splitlines()[0]


@pytest.mark.parametrize("first", [ended("FINISHED", "pruned", score=0.5), ended("FAILED")])
@pytest.mark.parametrize("total", [None, 3])
def test_a_trial_whose_first_seed_ended_early_is_not_run_again(tmp_path, first, total):
    def source(trials):
        return grid(seeds=2) if total is None else search(seeds=2)

    trials = trials_at(tmp_path / "a", total, "median")
    kind = "pruned" if first.info.status == "FINISHED" else "failed"
    script = {f"{lr}/0": [TrialResult(kind, 0.5, "odd", "run")] for lr in "123"}
    executor = FakeExecutor(script)
    run(source(trials), trials, executor, FakeParent(), prunes=True)
    assert sorted(executor.began) == ["1/0", "2/0", "3/0"]

    parent = FakeParent(**{"1_0": first, "2_0": first, "3_0": first})
    trials, executor = trials_at(tmp_path / "a", total, "median"), FakeExecutor({})
    loop = run(source(trials), trials, executor, parent, prunes=True)
    assert executor.began == []
    assert len(trials.get_trials()) == 3 and len(loop.failures) == 3 * (kind == "failed")


def test_without_a_pruner_the_other_seeds_of_a_failed_run_are_run(tmp_path):
    trials = trials_at(tmp_path / "a")
    script = {f"{lr}/{seed}": [complete(0.1)] for lr in "123" for seed in (0, 1)}
    script["1/0"] = [TrialResult("failed", reason="odd", run_id="run")]
    run(grid(seeds=2), trials, FakeExecutor(script), FakeParent())
    done = ended("FINISHED", "complete", score=0.1)
    parent = FakeParent(**{"1_0": ended("FAILED"), "2_0": done, "2_1": done, "3_0": done, "3_1": done})
    trials, executor = trials_at(tmp_path / "a"), FakeExecutor(script | {"1/1": [complete(0.1)]})
    run(grid(seeds=2), trials, executor, parent)
    assert executor.began == ["1/1"]


def test_an_epoch_reported_while_trials_are_stopped_is_decided_as_any_other(tmp_path):
    trials = trials_at(tmp_path / "a", 3, "median")
    executor = FakeExecutor({"1/0": [EpochReport(1, 0.5), EpochReport(2, 0.4), TrialResult("stopped")]})
    executor.script |= {"2/0": executor.script["1/0"], "3/0": executor.script["1/0"]}
    loop = make_loop(search(), trials, executor, prunes=True)
    executor.on_message = lambda: setattr(loop, "signum", signal.SIGTERM)
    loop.run()
    (trial,) = trials.get_trials()
    assert trial.intermediate_values == {1: 0.5, 2: 0.4}
    assert [prune for _, prune in executor.answers] == [False, False]


def test_a_trial_with_an_invalid_config_fails_like_any_other(tmp_path):
    script = {"1/0": [complete(0.1)], "3/0": [complete(0.2)]}
    trials, parent = trials_at(tmp_path / "a", 3), FakeParent()
    loop = run(search(refuses=True), trials, FakeExecutor(script), parent)
    ((number, reason),) = loop.failures.items()
    assert reason == "lr=2 is odd"
    ((_, name, text),) = parent.failed
    assert (name, text) == (f"{number} lr=2", reason)
    assert [row.state for row in loop.trial_runs if row.trial == number] == ["failed"]

    done = ended("FINISHED", "complete", score=0.1)
    trials, parent = trials_at(tmp_path / "a", 3), FakeParent(**{"1_0": done, "3_0": done})
    loop = run(search(refuses=True), trials, FakeExecutor({}), parent)
    assert loop.failures == {number: reason}
    assert len(trials.get_trials()) == 3


def test_a_trial_with_an_invalid_config_halts_a_sweep_with_on_failure_stop(tmp_path):
    trials = trials_at(tmp_path / "a", 3)
    executor = FakeExecutor({"1/0": [complete(0.1)], "3/0": [complete(0.2)]})
    loop = run(search(refuses=True), trials, executor, FakeParent(), on_failure="stop")
    assert loop.halted and len(executor.began) == next(iter(loop.failures))


def test_nothing_begins_while_the_store_is_away(tmp_path, monkeypatch):
    trials, parent = trials_at(tmp_path / "a"), FakeParent()
    failed = TrialResult("failed", reason="away")
    executor = FakeExecutor({"1/0": [failed], "2/0": [complete(0.1)], "3/0": [complete(0.2)]})
    waits = []

    def fails(*args):
        parent.outage_s = 1.0

    def answers():  # the third time that it is request
        parent.outage_s *= len(waits) < 3

    parent.record_failure, parent.on_refresh = fails, answers
    monkeypatch.setattr(loop_module.time, "sleep", lambda _: waits.append(list(executor.began)))
    run(grid(), trials, executor, parent)
    assert waits[:3] == [["1/0"]] * 3 and executor.began == ["1/0", "2/0", "3/0"]


def test_a_store_that_is_away_for_one_call_ends_no_sweep(tmp_path, monkeypatch):
    trials, parent = trials_at(tmp_path / "a"), FakeParent()
    failed = TrialResult("failed", reason="away")
    executor = FakeExecutor({"1/0": [failed], "2/0": [complete(0.1)], "3/0": [complete(0.2)]})
    parent.record_failure = lambda *args: setattr(parent, "outage_s", 1.0)
    parent.on_refresh = lambda: setattr(parent, "outage_s", 0.0)
    monkeypatch.setattr(loop_module.time, "sleep", lambda _: None)
    run(grid(), trials, executor, parent)
    assert executor.began == ["1/0", "2/0", "3/0"]


def test_a_store_that_stays_away_ends_the_sweep(tmp_path, monkeypatch):
    trials, parent = trials_at(tmp_path / "a"), FakeParent()
    parent.outage_s = loop_module.OUTAGE_S + 1
    executor = FakeExecutor({})
    monkeypatch.setattr(loop_module.time, "sleep", lambda _: pytest.fail("waits on"))
    with pytest.raises(RunFailed, match="has not answered for 300 s; the same command continues"):
        run(grid(), trials, executor, parent)
    assert executor.began == []


def test_a_second_signal_leaves_at_once(tmp_path, monkeypatch, capsys):
    class Left(Exception):
        pass

    def leave(code):
        raise Left(code)

    trials = trials_at(tmp_path / "a")
    executor = FakeExecutor({"1/0": [EpochReport(1, 0.5), EpochReport(2, 0.4), complete(0.3)]})
    executor.on_message = lambda: signal.raise_signal(signal.SIGINT)
    monkeypatch.setattr("tracklight.sweep.loop.os._exit", leave)
    with pytest.raises(Left, match="130"):
        run(grid(), trials, executor, FakeParent())
    assert executor.running == []
    assert "stopping 1 running; again to leave at once" in capsys.readouterr().out


def test_a_signal_ends_a_launch_whose_messages_come_only_at_its_end(tmp_path):
    trials = trials_at(tmp_path / "a")
    executor = FakeExecutor({"1/0": [complete(0.3)]})
    executor.blocks = True
    executor.on_message = lambda: signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(grid(), trials, executor, FakeParent())
    assert executor.began == ["1/0"]


def test_a_signal_while_the_storage_is_waited_for_ends_the_wait(tmp_path, monkeypatch):
    trials = trials_at(tmp_path / "a")
    monkeypatch.setattr(OptunaStudy, "is_waiting", True)
    executor = FakeExecutor({"1/0": [complete(0.3)]})
    executor.on_message = lambda: signal.raise_signal(signal.SIGTERM)
    with pytest.raises(SystemExit, match="143"):
        run(grid(), trials, executor, FakeParent())
    assert executor.running == []


def test_without_a_signal_no_second_one_is_offered(tmp_path, capsys):
    trials = trials_at(tmp_path / "a")
    script = {"1/0": [TrialResult("failed", reason="odd")], "2/0": [complete(0.1)]}
    run(grid(), trials, FakeExecutor(script, size=2), FakeParent(), on_failure="stop")
    output = capsys.readouterr().out
    assert "stopping 1 running\n" in output


def test_trials_that_are_left_after_the_leader_has_ended_its_smaller_sweep_make_this_machine_lead(tmp_path):
    class Joined(SimpleNamespace):
        @property
        def leads(self) -> bool:
            return not self.is_over  # the next in the row

    script = {f"{lr}/0": [complete(0.1)] for lr in "123"}
    loop = make_loop(grid(), trials_at(tmp_path / "a"), FakeExecutor(script))
    methods = {"is_waiting": False, "read_failure": lambda: None}
    loop.machines = Joined(is_over=True, num_ranked=0, is_lost=False, failure=None, **methods)
    loop.run()
    assert loop.machines.leads and len(loop.executor.began) == 3


@pytest.mark.parametrize(("num_ranked", "leads"), [(3, False), (1, True)])
def test_trials_that_end_while_the_leader_ends_its_smaller_sweep_make_this_machine_lead(
    tmp_path, num_ranked, leads
):
    script = {f"{lr}/0": [complete(0.1)] for lr in "123"}
    executor = FakeExecutor(script)
    loop = make_loop(grid(), trials_at(tmp_path / "a"), executor)

    class Joined(SimpleNamespace):
        @property
        def leads(self) -> bool:
            self.is_over |= len(executor.began) == 3 and not self.heard  # leaves at the end
            self.heard |= self.is_over
            return self.heard and not self.is_over

    methods = {"is_waiting": False, "read_failure": lambda: None}
    loop.machines = Joined(
        is_over=False, heard=False, num_ranked=num_ranked, is_lost=False, failure=None, **methods
    )
    loop.run()
    assert loop.machines.leads == leads
