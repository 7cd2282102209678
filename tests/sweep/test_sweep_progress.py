from types import SimpleNamespace

from tracklight.config.compose import compose
from tracklight.runs.leaderboard import TrialRun, rank_trials
from tracklight.sweep.plan import format_params
from tracklight.sweep.progress import Progress
from tracklight.sweep.trial import TrialResult


def test_params_are_short_and_never_ambiguous():
    assert format_params({"optimizer.lr": "0.001234567891", "model.hidden": "[64]"}) == (
        "lr=0.0012346 hidden=[64]"
    )
    assert format_params({"a.x": "1", "b.x": "2"}) == "a.x=1 b.x=2"


def test_the_status_line_tells_the_epochs_of_runs_before_the_first_has_ended(monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    shown = Progress("val/loss", "min", 2)
    jobs = [SimpleNamespace(key=key, name=key, cfg=compose(["trainer.max_epochs=9"])) for key in "ab"]
    said = []
    shown._status = SimpleNamespace(update=said.append, stop=lambda: None)
    for job in jobs:
        shown.started(job)
    shown.epoch_ended(jobs[0], 3)
    shown.epoch_ended(jobs[1], 1)
    shown.epoch_ended(jobs[0], 1)
    shown.ended(jobs[0], TrialResult("complete", 0.5), None)
    assert said[2:5] == [f"2 running (epoch {each})" for each in ("3/9", "3/9, 1/9", "1/9")]
    assert said[-1].startswith("1 complete, 1 running (epoch 1/9)")


def test_the_time_left_is_that_of_a_mean_trial_and_nothing_is_said_once_it_has_passed(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    shown = Progress("val/loss", "min", 1)
    jobs = [SimpleNamespace(key=key, name=key) for key in "abc"]
    for job in jobs[:2]:  # trained together
        shown.started(job)
    shown.update(num_remaining=1)
    clock[0] = 20.0
    for job in jobs[:2]:
        shown.ended(job, TrialResult("complete", 0.5), None)
    shown.started(jobs[2])
    shown.update(num_remaining=0)
    clock[0] = 40.0
    shown.ended(jobs[2], TrialResult("complete", 0.5), None)
    left = [line.partition("about ")[2] for line in capsys.readouterr().out.splitlines()]
    assert left == ["0:00:20 left", "0:00:20 left", ""]


def test_the_closing_table_has_one_line_per_config(capsys):
    runs = [
        TrialRun(trial, {"model.hidden": "[256]", "optimizer.weight_decay": str(decay)}, seed, *ended)
        for trial, decay in enumerate((0.05, 0.1))
        for seed, ended in enumerate(
            [("complete", 0.9772, 4, 6.0), ("complete", 0.9802 + decay / 100, 4, 7.6)]
        )
    ]
    runs.append(TrialRun(2, {"model.hidden": "[-1]"}, 0, "failed", None, reason="no [such] width"))
    Progress("val/accuracy", "max", 1).table(rank_trials(runs, "max", 2), "val/accuracy (max)")
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    # Half of Student's interval of two values: 12.706 times half their difference.
    assert lines == [
        "val/accuracy (max)",
        "# val/accuracy ± 95 % runs trial hidden weight_decay state epochs s reason",
        "1 0.9792 ±0.025 2 1 [256] 0.1 complete 8 13.6",
        "2 0.97895 ±0.022 2 0 [256] 0.05 complete 8 13.6",
        "- - 1 2 [-1] failed 0 0.0 no [such] width",
    ]
