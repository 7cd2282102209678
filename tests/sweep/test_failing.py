"""Whole sweeps, some of whose trials fail."""

import pytest

from commands import BLOBS, ODD, QUICK, Swept


def test_one_bad_trial_fails_alone_and_is_told_with_its_reason(commander, tmp_path):
    directory = tmp_path / "runs"
    command = ("+model.mood=good,raises,dies,exits,refuses", "sweep.workers=2", *ODD)
    process = commander.sweep(directory, *command)
    assert process.exit_code == 1
    assert process.stderr.startswith("error: 4 trials failed: trial 1 (")
    assert process.stderr.count("\n") == 1
    swept = Swept(directory)
    status = {child.tags["model.mood"]: child.status for child in swept.children}
    assert status == {
        **dict.fromkeys(("raises", "dies", "exits", "refuses"), "FAILED"),
        "good": "FINISHED",
    }
    reasons = {row["model.mood"]: row["reason"] for row in swept.leaderboard()}
    assert reasons["raises"] == "ArithmeticError: in a bad mood"
    assert reasons["dies"] == "killed by SIGKILL"
    assert reasons["exits"] == "its process ended with exit code 3"
    assert "refused by the constructor" in reasons["refuses"]
    assert all(reason in process.stdout for reason in reasons.values())
    assert swept.parent.status == "FAILED"


@pytest.mark.slow
def test_a_diverged_trial_is_failed_for_good_and_its_siblings_are_not(commander, tmp_path):
    directory = tmp_path / "runs"
    command = ("optimizer.lr=0.01,1e30", *QUICK)
    process = commander.sweep(directory, *command)
    assert process.exit_code == 1
    assert "trial 1 (" in process.stderr and "step" in process.stderr
    status = {run.tags["optimizer.lr"]: run.status for run in Swept(directory).children}
    assert status == {"0.01": "FINISHED", "1e+30": "FAILED"}
    process = commander.sweep(directory, *command)
    assert process.exit_code == 1 and "trial 1 (" in process.stderr
    assert len(Swept(directory).children) == 2


@pytest.mark.slow
def test_a_trial_that_failed_in_passing_goes_on_in_its_own_run(commander, tmp_path):
    directory = tmp_path / "runs"
    mark = f"+model.only_once={tmp_path / 'mark'}"
    command = ("+model.mood=good,dies", "+model.at=3", mark, *ODD)
    assert commander.sweep(directory, *command).exit_code == 1
    before = Swept(directory)
    process = commander.sweep(directory, *command)
    after = Swept(directory)
    assert process.exit_code == 0, process.stderr
    assert [run.run_id for run in after.children] == [run.run_id for run in before.children]
    assert [run.tags["tracklight.trial"] for run in after.children] == ["0", "1"]
    assert {run.status for run in after.children} == {"FINISHED"}
    for child in after.children:
        assert [step for step, _ in child.metrics["train/loss_epoch"]] == [1, 2, 3, 4, 5]


@pytest.mark.slow
def test_a_trial_that_never_logs_the_score_fails_alone_wherever_it_stands(commander, tmp_path):
    directory = tmp_path / "runs"
    command = ("+model.mood=quiet,good", *ODD[:1], "score.metric=odd/mood", "score.mode=min", *QUICK)
    process = commander.sweep(directory, *command)
    assert process.exit_code == 1
    assert process.stderr == "error: 1 trial failed: trial 0 (odd/mood was never logged)\n"
    swept = Swept(directory)
    assert [(row["state"], row["epochs"]) for row in swept.leaderboard()] == [
        ("complete", 5),
        ("failed", 5),
    ]
    assert sorted(run.status for run in swept.children) == ["FAILED", "FINISHED"]


@pytest.mark.slow
def test_a_sweep_all_of_whose_trials_fail_says_where_it_is_and_what_was_done(commander, tmp_path):
    directory = tmp_path / "runs"
    command = ("+model.mood=raises,dies", "+model.at=3", *ODD)
    process = commander.sweep(directory, *command)
    assert process.exit_code == 1
    swept = Swept(directory)
    assert f"sweep  {swept.parent.run_id}  {directory}" in process.stdout
    epochs = {row["model.mood"]: row["epochs"] for row in swept.leaderboard()}
    assert epochs == {"raises": 3, "dies": 0}  # a killed one has told nobody
    process = commander.sweep(directory, *command)
    assert "the sweep goes on: 0 runs have ended, 2 to be taken up again" in process.stdout
    assert sorted(run.tags["tracklight.trial"] for run in Swept(directory).children) == ["0", "1"]


def test_the_first_failure_stops_a_sweep_that_is_told_so(commander, tmp_path):
    directory = tmp_path / "runs"
    command = ("+model.mood=raises,good", "seed=1,2", "sweep.on_failure=stop", *ODD)
    process = commander.sweep(directory, *command)
    assert process.exit_code == 1
    assert [run.status for run in Swept(directory).children] == ["FAILED"]
    assert "sweep.on_failure=stop: runs not begun: 3; the same command goes on" in process.stdout


@pytest.mark.slow
def test_a_point_of_a_search_that_is_no_valid_config_is_a_failed_trial(commander, tmp_path):
    directory = tmp_path / "runs"
    command = ("trainer.min_epochs=1,4", "trainer.max_epochs=5,2", "sweep.sampler=grid")
    for _ in range(2):  # nor is it tried again
        process = commander.sweep(directory, *command, "sweep.trials=4", *QUICK[:2], QUICK[3])
        assert process.exit_code == 1, process.stderr
        assert "1 trial failed: trial" in process.stderr and process.stderr.count("\n") == 1
        assert "trainer.min_epochs=4 must not be above" in process.stderr
        swept = Swept(directory)
        assert swept.parent.status == "FAILED"
        assert [run.status for run in swept.children].count("FINISHED") == 3
        (failed,) = (row for row in swept.leaderboard() if row["state"] == "failed")
        assert (failed["trainer.min_epochs"], failed["trainer.max_epochs"]) == ("4", "2")
        assert failed["reason"].startswith("trainer.min_epochs=4 must not be above")
        assert len(swept.children) == 4


@pytest.mark.slow
def test_a_sweep_whose_winner_fails_its_test_has_failed(commander, tmp_path):
    directory = tmp_path / "runs"
    command = ("optimizer.lr=0.01,0.1", *BLOBS, "model._target_=odd.Untestable")
    process = commander.sweep(directory, *command)
    assert process.exit_code == 1
    assert "could not be tested: ArithmeticError: no test for me" in process.stderr
    assert process.stderr.count("\n") == 1
    assert Swept(directory).parent.status == "FAILED"


@pytest.mark.slow
def test_a_first_point_that_is_refused_does_not_refuse_the_others(commander, tmp_path):
    directory = tmp_path / "runs"
    process = commander.sweep(directory, "+model.mood=refuses,good", *ODD)
    assert process.exit_code == 1, process.stderr
    assert [row["state"] for row in Swept(directory).leaderboard()] == ["complete", "failed"]
