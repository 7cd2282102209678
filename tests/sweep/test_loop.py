"""The course of a sweep whose trials say what they are told to: no process, no MLflow."""

import signal
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from tracklight.errors import RunFailed
from tracklight.sweep import loop as module
from tracklight.sweep.loop import Grid, SweepLoop
from tracklight.sweep.plan import Job
from tracklight.sweep.progress import Progress
from tracklight.sweep.samplers import Methods
from tracklight.sweep.space import read_space
from tracklight.sweep.study import OptunaStudy, open_storage
from tracklight.sweep.trial import EpochReport, TrialResult

SPACE = read_space(["lr=1,2,3"], {}, None)


def job(number, params, seed=0):
    cfg = {
        "seed": seed,
        "num_threads": 1,
        "resume": None,
        "trainer": {"enable_progress_bar": True},
        "tracking": {"run_name": None},
    }
    key = f"{params['lr']}/{seed}"
    return Job(number, dict(params), OmegaConf.create(cfg), [], key)


def complete(score):
    return TrialResult("complete", score, run_id="run")


class Scripted:
    """Executor whose trials tell what a script says, by key; each in turn."""

    blocks = False

    def __init__(self, script, size=1):
        self.script = {key: list(messages) for key, messages in script.items()}
        self.size = size
        self.running, self.began, self.answers = [], [], []
        self.on_message = lambda: None

    @property
    def has_room(self):
        return len(self.running) < self.size

    def start(self, assignment, tag):
        self.running.append(tag)
        self.began.append(tag.key)

    def messages(self, timeout_s):
        tag = self.running[0]
        message = self.script[tag.key].pop(0)
        if isinstance(message, TrialResult):
            self.running.remove(tag)
        self.on_message()
        yield tag, message

    def answer(self, tag, stop):
        self.answers.append((tag.key, stop))

    def stop(self):
        pass

    def drain(self):
        while self.running:
            yield from self.messages(0)

    def kill(self):
        self.running.clear()


class Noted:
    """A board that notes what it is told, and is away when a test says so."""

    def __init__(self, **children):
        self.children = {key.replace("_", "/"): run for key, run in children.items()}
        self.run = SimpleNamespace(run_id="parent")
        self.failed, self.away_s, self.num_refreshed = [], 0.0, 0
        self.on_refresh = lambda: None

    def by_point(self):
        return self.children

    def record_failure(self, run_id, name, tags, reason):
        self.failed.append((tags["tracklight.point"], name, reason))

    def refresh(self):
        self.num_refreshed += 1
        self.on_refresh()


def ended(status, outcome=None, **metrics):
    tags = {"tracklight.epochs": "1"} | ({"tracklight.outcome": outcome} if outcome else {})
    if status == "FAILED":
        tags["tracklight.non_finite_step"] = "7"
    return SimpleNamespace(
        info=SimpleNamespace(status=status, run_id="run"),
        data=SimpleNamespace(tags=tags, metrics=metrics),
    )


class Drawn:
    """Points as Optuna draws them, those with lr=2 no valid config."""

    def __init__(self, trials, seeds=1, refuses=False):
        self.trials, self.seeds, self.refuses = trials, seeds, refuses

    def next(self):
        asked = self.trials.ask()
        if asked is None:
            return None
        if self.refuses and asked.params["lr"] == "2":
            return module.replace(asked, refused="lr=2 is odd"), []
        return asked, [job(asked.number, asked.params, seed) for seed in range(self.seeds)]

    @property
    def left(self):
        return self.trials.waiting * self.seeds


def trials_at(path, total=None, pruner="none"):
    methods = Methods("grid", {}, pruner, {}, 0, 4)
    return OptunaStudy(open_storage(None, path), "study", "min", SPACE, methods, total)


def grid(trials, seeds=1):
    lrs = ("1", "2", "3")
    return Grid([[job(n, {"lr": lr}, s) for s in range(seeds)] for n, lr in enumerate(lrs)], trials)


def run(source, trials, slots, board=None, asks=False, stops=False):
    course = SweepLoop(
        source, trials, slots, board, Progress("loss", "min", 1), asks, stops, logs=None
    )
    course.run()
    return course


def test_a_trials_line_counts_it_in_what_is_best_and_what_is_to_go(tmp_path, capsys):
    trials = trials_at(tmp_path / "a")
    script = {"1/0": [complete(0.3)], "2/0": [complete(0.1)], "3/0": [complete(0.2)]}
    run(grid(trials), trials, Scripted(script))
    first, second, third = capsys.readouterr().out.splitlines()
    assert "2 to go, best 0.3 (trial 0 lr=1)" in first
    assert "1 to go, best 0.1 (trial 1 lr=2)" in second
    assert "to go" not in third and "best 0.1 (trial 1 lr=2)" in third


def test_a_leads_line_counts_the_siblings_that_it_lets_begin(tmp_path, capsys):
    trials = trials_at(tmp_path / "a", pruner="median")
    script = {f"{lr}/{seed}": [complete(0.1)] for lr in "123" for seed in (0, 1)}
    run(grid(trials, seeds=2), trials, Scripted(script), asks=True)
    assert "5 to go" in capsys.readouterr().out.splitlines()[0]


@pytest.mark.parametrize("lead", [ended("FINISHED", "pruned", score=0.5), ended("FAILED")])
@pytest.mark.parametrize("total", [None, 3])
def test_a_point_whose_lead_ended_early_is_not_run_again(tmp_path, lead, total):
    def source(trials):
        return grid(trials, seeds=2) if total is None else Drawn(trials, seeds=2)

    trials = trials_at(tmp_path / "a", total, "median")
    kind = "pruned" if lead.info.status == "FINISHED" else "failed"
    script = {f"{lr}/0": [TrialResult(kind, 0.5, "odd", "run")] for lr in "123"}
    slots = Scripted(script)
    run(source(trials), trials, slots, Noted(), asks=True)
    assert sorted(slots.began) == ["1/0", "2/0", "3/0"]

    board = Noted(**{"1_0": lead, "2_0": lead, "3_0": lead})
    trials, slots = trials_at(tmp_path / "a", total, "median"), Scripted({})
    course = run(source(trials), trials, slots, board, asks=True)
    assert slots.began == []
    assert len(trials._all()) == 3 and len(course.failures) == 3 * (kind == "failed")


def test_without_a_pruner_the_siblings_of_a_failed_run_are_run(tmp_path):
    trials = trials_at(tmp_path / "a")
    script = {f"{lr}/{seed}": [complete(0.1)] for lr in "123" for seed in (0, 1)}
    script["1/0"] = [TrialResult("failed", reason="odd", run_id="run")]
    run(grid(trials, 2), trials, Scripted(script), Noted())
    done = ended("FINISHED", "complete", score=0.1)
    board = Noted(**{"1_0": ended("FAILED"), "2_0": done, "2_1": done, "3_0": done, "3_1": done})
    trials, slots = trials_at(tmp_path / "a"), Scripted(script | {"1/1": [complete(0.1)]})
    run(grid(trials, 2), trials, slots, board)
    assert slots.began == ["1/1"]


def test_an_epoch_told_while_trials_are_stopped_is_judged_as_any_other(tmp_path):
    trials = trials_at(tmp_path / "a", 3, "median")
    slots = Scripted({"1/0": [EpochReport(1, 0.5), EpochReport(2, 0.4), TrialResult("stopped")]})
    slots.script |= {"2/0": slots.script["1/0"], "3/0": slots.script["1/0"]}
    course = SweepLoop(
        Drawn(trials), trials, slots, None, Progress("loss", "min", 1), True, False, None
    )
    slots.on_message = lambda: setattr(course._interrupts, "signum", signal.SIGTERM)
    course.run()
    (trial,) = trials._all()
    assert trial.intermediate_values == {1: 0.5, 2: 0.4}
    assert [stop for _, stop in slots.answers] == [False, False]


def test_a_point_that_is_no_valid_config_fails_like_any_other(tmp_path):
    script = {"1/0": [complete(0.1)], "3/0": [complete(0.2)]}
    trials, board = trials_at(tmp_path / "a", 3), Noted()
    course = run(Drawn(trials, refuses=True), trials, Scripted(script), board)
    ((number, reason),) = course.failures.items()
    assert reason == "lr=2 is odd"
    ((_, name, told),) = board.failed
    assert (name, told) == (f"{number} lr=2", reason)
    assert [row.state for row in course.rows if row.trial == number] == ["failed"]

    done = ended("FINISHED", "complete", score=0.1)
    trials, board = trials_at(tmp_path / "a", 3), Noted(**{"1_0": done, "3_0": done})
    course = run(Drawn(trials, refuses=True), trials, Scripted({}), board)
    assert course.failures == {number: reason}
    assert len(trials._all()) == 3


def test_a_point_that_is_no_valid_config_stops_a_sweep_that_is_told_so(tmp_path):
    trials = trials_at(tmp_path / "a", 3)
    slots = Scripted({"1/0": [complete(0.1)], "3/0": [complete(0.2)]})
    course = run(Drawn(trials, refuses=True), trials, slots, Noted(), stops=True)
    assert course.halted and len(slots.began) == next(iter(course.failures))


def test_nothing_begins_while_the_store_is_away(tmp_path, monkeypatch):
    trials, board = trials_at(tmp_path / "a"), Noted()
    failed = TrialResult("failed", reason="away")
    slots = Scripted({"1/0": [failed], "2/0": [complete(0.1)], "3/0": [complete(0.2)]})
    waits = []

    def fails(*args):
        board.away_s = 1.0

    def answers():  # the third time that it is asked
        board.away_s *= len(waits) < 3

    board.record_failure, board.on_refresh = fails, answers
    monkeypatch.setattr(module.time, "sleep", lambda _: waits.append(list(slots.began)))
    run(grid(trials), trials, slots, board)
    assert waits[:3] == [["1/0"]] * 3 and slots.began == ["1/0", "2/0", "3/0"]


def test_a_store_that_is_away_for_one_call_ends_no_sweep(tmp_path, monkeypatch):
    trials, board = trials_at(tmp_path / "a"), Noted()
    failed = TrialResult("failed", reason="away")
    slots = Scripted({"1/0": [failed], "2/0": [complete(0.1)], "3/0": [complete(0.2)]})
    board.record_failure = lambda *args: setattr(board, "away_s", 1.0)
    board.on_refresh = lambda: setattr(board, "away_s", 0.0)
    monkeypatch.setattr(module.time, "sleep", lambda _: None)
    run(grid(trials), trials, slots, board)
    assert slots.began == ["1/0", "2/0", "3/0"]


def test_a_store_that_stays_away_ends_the_sweep(tmp_path, monkeypatch):
    trials, board = trials_at(tmp_path / "a"), Noted()
    board.away_s = module.OUTAGE_S + 1
    slots = Scripted({})
    monkeypatch.setattr(module.time, "sleep", lambda _: pytest.fail("waits on"))
    with pytest.raises(RunFailed, match="has not answered for 300 s; the same command continues"):
        run(grid(trials), trials, slots, board)
    assert slots.began == []


def test_a_second_signal_leaves_at_once(tmp_path, monkeypatch, capsys):
    class Left(Exception):
        pass

    def leave(code):
        raise Left(code)

    trials = trials_at(tmp_path / "a")
    slots = Scripted({"1/0": [EpochReport(1, 0.5), EpochReport(2, 0.4), complete(0.3)]})
    slots.on_message = lambda: signal.raise_signal(signal.SIGINT)
    monkeypatch.setattr("tracklight.sweep.loop.os._exit", leave)
    with pytest.raises(Left, match="130"):
        run(grid(trials), trials, slots, Noted())
    assert slots.running == []
    assert "stopping 1 running; again to leave at once" in capsys.readouterr().out


def test_a_signal_ends_a_launch_that_tells_nothing_before_its_end(tmp_path):
    trials = trials_at(tmp_path / "a")
    slots = Scripted({"1/0": [complete(0.3)]})
    slots.blocks = True
    slots.on_message = lambda: signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(grid(trials), trials, slots, Noted())
    assert slots.began == ["1/0"]


def test_nobody_is_told_to_press_again_where_nobody_pressed(tmp_path, capsys):
    trials = trials_at(tmp_path / "a")
    script = {"1/0": [TrialResult("failed", reason="odd")], "2/0": [complete(0.1)]}
    run(grid(trials), trials, Scripted(script, size=2), Noted(), stops=True)
    said = capsys.readouterr().out
    assert "stopping 1 running\n" in said
