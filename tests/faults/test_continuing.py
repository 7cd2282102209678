"""What may be continued, and how: by the same command or by id, and never otherwise unnoticed."""

import re
import shutil
import sqlite3
from contextlib import closing

import pytest
import torch
from configs import ALLOWED, BLOCK_END, CONFIGS, EACH_EPOCH, EMA, EPOCHS, MLP, QUICK, TOP_3, restless

from process import TrialResult

COMMIT = "tracklight.engine.checkpoints:ResumeCheckpoint._commit"
DIE = [["spare_model"], EACH_EPOCH, ["strike", COMMIT, 3, ["SIGKILL"], True]]
SPARE = [["spare_model"]]
CHANGED_CODE = (
    r"error: run \w+ was started otherwise \(code: digest \w{12} -> \w{12} in tracklight/models/new\.py\)"
    r"; add allow_changes=true to continue all the same, which is recorded\n"
)


@pytest.fixture
def killed(trainees, tmp_path):
    """A tracking directory with one run, of the config `plateau`, killed in its fourth epoch."""
    directory = tmp_path / "runs"
    assert trainees.train(directory, *CONFIGS["plateau"], EPOCHS, faults=DIE).exit_code == -9
    return directory


def test_a_changed_setting_or_code_is_refused_with_the_difference_unless_allowed(
    trainees, undisturbed, killed
):
    run = f"resume={TrialResult(killed).run_id}"
    for change, said in (
        ("optimizer.lr=0.5", r"optimizer\.lr: 0\.01 -> 0\.5"),
        ("seed=8", "seed: 0 -> 8"),
    ):
        process = trainees.train(killed, run, change, ALLOWED)
        assert process.exit_code == 2
        assert re.fullmatch(rf"error: run .* \(.*{said}.*\); add allow_changes=true .*\n", process.stderr)
    for command in ((run, ALLOWED), (*CONFIGS["plateau"], EPOCHS, "resume=auto")):
        process = trainees.train(killed, *command, faults=[["change_code"]])
        assert process.exit_code == 2
        assert re.fullmatch(CHANGED_CODE, process.stderr)
    assert len(TrialResult(killed).runs) == 1
    assert max(TrialResult(killed).steps("train/loss")) == 3 * 150

    process = trainees.train(
        *(killed, run, "optimizer.lr=0.5", ALLOWED, "allow_changes=true"),
        faults=SPARE,
    )
    changed = TrialResult(killed)
    assert (process.exit_code, changed.status) == (0, "FINISHED")
    assert changed.tags["tracklight.changes"] == "optimizer.lr: 0.01 -> 0.5"
    assert changed.differences(undisturbed("plateau")) != []


def test_a_run_continued_by_its_id_alone_ends_in_the_same_bits(trainees, undisturbed, killed):
    run = f"resume={TrialResult(killed).run_id[:12]}"
    process = trainees.train(killed, run, ALLOWED, faults=SPARE)
    assert process.exit_code == 0, process.stderr
    assert TrialResult(killed).differences(undisturbed("plateau")) == []


def test_a_run_moved_to_another_folder_keeps_its_best_and_ends_in_the_same_bits(
    trainees, undisturbed, killed, tmp_path
):
    moved = tmp_path / "elsewhere" / "runs"
    moved.parent.mkdir()
    killed.rename(moved)
    process = trainees.train(moved, *CONFIGS["plateau"], EPOCHS, "resume=auto", faults=SPARE)
    assert process.exit_code == 0, process.stderr
    assert TrialResult(moved).differences(undisturbed("plateau")) == []


@pytest.mark.slow
def test_a_run_begun_with_the_weights_of_another_is_continued(trainees, tmp_path):
    outcomes = []
    for name, faults in (("whole", SPARE), ("killed", DIE)):
        directory = tmp_path / name
        first = trainees.train(directory, *CONFIGS["blocks"], "trainer.max_epochs=1", faults=SPARE)
        assert first.exit_code == 0, first.stderr
        source = f"init_from={TrialResult(directory).run_id}"
        command = (*CONFIGS["plateau"], EPOCHS, source, "resume=auto")
        if faults is DIE:
            assert trainees.train(directory, *command, faults=DIE).exit_code == -9
        process = trainees.train(directory, *command, faults=SPARE)
        assert process.exit_code == 0, process.stderr
        outcomes.append(TrialResult(directory))
    assert [status for _, status in outcomes[1].runs] == ["FINISHED"] * 2
    weights = [each.checkpoint("last")["state_dict"] for each in outcomes]
    assert all((weights[0][key] == weights[1][key]).all() for key in weights[0])


@pytest.mark.parametrize("tag", ["mlflow.parentRunId", "tracklight.reproduces"])
def test_resume_auto_leaves_the_runs_of_sweeps_and_reproductions_alone(trainees, killed, tag):
    run_id = TrialResult(killed).run_id
    with closing(sqlite3.connect(killed / "mlflow.db")) as connection:
        connection.execute("INSERT INTO tags VALUES (?, 'whoever', ?)", (tag, run_id))
        connection.commit()
    process = trainees.train(killed, *CONFIGS["plateau"], EPOCHS, "resume=auto", faults=SPARE)
    assert process.exit_code == 0, process.stderr
    assert [status for _, status in TrialResult(killed).runs] == ["KILLED", "FINISHED"]


def content_of(directory):
    """All files of the runs, but how far MLflow has them, which a thread of the holder writes."""
    files = (directory / "artifacts").rglob("*")
    return {path: path.read_bytes() for path in files if path.is_file() and path.suffix != ".sent"}


def test_a_second_process_on_the_same_run_is_told_so_and_writes_nothing(
    trainees, undisturbed, killed, tmp_path
):
    mark, command = tmp_path / "mark", (*CONFIGS["plateau"], EPOCHS, "resume=auto")
    first = trainees.start(killed, command, [*SPARE, ["meet", BLOCK_END, 3, str(mark)]])
    first.wait_for(mark)
    before = content_of(killed)
    second = trainees.train(killed, *command)
    assert second.exit_code == 2
    assert second.stderr == (f"error: run {TrialResult(killed).run_id} is in progress (pid {first.pid})\n")
    assert content_of(killed) == before
    mark.unlink()
    assert first.wait() == 0
    assert TrialResult(killed).differences(undisturbed("plateau")) == []


def test_a_finished_run_asked_for_more_epochs_ends_as_if_asked_at_once(trainees, undisturbed, tmp_path):
    directory = tmp_path / "runs"
    trainees.train(directory, *CONFIGS["plateau"], "trainer.max_epochs=5", faults=SPARE)
    few = TrialResult(directory)
    assert few.status == "FINISHED"
    command = (f"resume={few.run_id}", EPOCHS, ALLOWED)
    assert trainees.train(directory, *command, faults=SPARE).exit_code == 0
    differences = TrialResult(directory).differences(undisturbed("plateau"))
    # what a finished run logs at its end, it has logged at both of its ends
    assert [each for each in differences if "test/" not in each and "score" not in each] == []


@pytest.mark.slow
def test_more_epochs_under_a_schedule_of_the_total_are_another_training(trainees, tmp_path):
    directory = tmp_path / "runs"
    trainees.train(directory, *CONFIGS["blocks"], "trainer.max_epochs=3", faults=SPARE)
    run = f"resume={TrialResult(directory).run_id}"
    refused = trainees.train(directory, run, "trainer.max_epochs=5", ALLOWED)
    assert refused.exit_code == 2
    assert "trainer.max_epochs=5: the schedule of run" in refused.stderr
    trainees.train(directory, *CONFIGS["blocks"], "trainer.max_epochs=5", "resume=auto", faults=SPARE)
    runs = TrialResult(directory).runs
    assert [status for _, status in runs] == ["FINISHED", "FINISHED"]


@pytest.mark.slow
def test_resume_auto_finds_its_run_whatever_the_number_of_threads_is_left_to(trainees, tmp_path):
    directory = tmp_path / "runs"
    command = [word for word in CONFIGS["plateau"] if "num_threads" not in word]
    command += ["trainer.max_epochs=4", "resume=auto"]
    assert trainees.train(directory, *command, faults=DIE).exit_code == -9
    assert trainees.train(directory, *command, faults=SPARE).exit_code == 0
    assert [status for _, status in TrialResult(directory).runs] == ["FINISHED"]


@pytest.mark.parametrize("change", ["truncated", "relabelled", "swapped"])
def test_data_changed_between_two_starts_are_refused(trainees, tmp_path, change):
    path, directory = tmp_path / "table.csv", tmp_path / "runs"
    rows = [f"{x},{2 * x + 1}" for x in range(40)]
    path.write_text("\n".join(["x,y", *rows]))
    command = (
        *("model=linear", "data=table", f"data.path={path}", "data.target=y", "resume=auto"),
        *("optimizer.lr=0.0001", "trainer.max_epochs=9", *QUICK),
    )
    assert trainees.train(directory, *command, faults=DIE).exit_code == -9
    changed = {
        "truncated": rows[:-1],
        "relabelled": [*rows[:7], "7,14.5", *rows[8:]],
        "swapped": [rows[1], rows[0], *rows[2:]],
    }[change]
    path.write_text("\n".join(["x,y", *changed]))
    process = trainees.train(directory, *command)
    assert process.exit_code == 2
    assert re.fullmatch(r"error: run .*data: digest \w{12} -> \w{12}.*\n", process.stderr)
    assert len(TrialResult(directory).runs) == 1
    assert max(TrialResult(directory).steps("train/loss")) == 3


BRIEF = ("tracking.figures=false", "optimizer=adam")


@pytest.fixture
def no_model(monkeypatch):
    """Log no model: it takes longer than the training of these tests."""
    monkeypatch.setattr("tracklight.experiment.record.log_model", lambda *_, **__: None)


def evaluated(weights, key="val/loss"):
    """The loss on the validation part, by hand."""
    from foreign import blobs

    split = blobs(64, 2)
    hidden = torch.relu(split.features @ weights["layers.1.weight"].T + weights["layers.1.bias"])
    outputs = hidden @ weights["layers.3.weight"].T + weights["layers.3.bias"]
    return torch.nn.functional.cross_entropy(outputs, split.targets).item()


def test_the_best_checkpoint_holds_the_averaged_weights_that_were_scored(train, no_model):
    run = train(*MLP, *BRIEF, EMA, "score.metric=val/loss", "score.mode=min", "trainer.max_epochs=3")
    assert run.score == pytest.approx(min(value for _, value in run.history("val/loss")))
    assert evaluated(run.checkpoint("best")["state_dict"]) == pytest.approx(run.score, rel=1e-5)


def test_a_second_model_checkpoint_keeps_its_best_ones_among_the_artifacts_also_when_extended(
    train, no_model
):
    command = (*MLP, *BRIEF, "optimizer.lr=0.03", TOP_3, "tracking.run_name=../../out")
    few = train(*command, "trainer.max_epochs=4")
    run = train(f"resume={few.run.info.run_id}", "overrides=['trainer.max_epochs=8']", ALLOWED)
    losses = {step: value for step, value in run.history("val/loss")}
    best = sorted(losses, key=losses.__getitem__)[:3]
    names = {f"epoch={step // 150 - 1}-step={step}.ckpt" for step in best} | {"last.ckpt"}
    folder = run.folder / "checkpoints" / "further"
    assert {path.name for path in folder.glob("*.ckpt")} == names
    assert [path.name for path in run.folder.parent.iterdir() if path.is_dir()] == ["artifacts"]


def checkpoints_in(folder):
    """The weights, by name, and the step of all checkpoints; and the names of all files."""
    paths = sorted(folder.rglob("*.ckpt"))
    loaded = {str(path.relative_to(folder)): torch.load(path, weights_only=True) for path in paths}
    kept = {name: [each["global_step"], *each["state_dict"].values()] for name, each in loaded.items()}
    return kept, sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_model_checkpoint_with_a_folder_of_its_own_leaves_what_an_undisturbed_run_does(trainees, tmp_path):
    def command(folder, seed, epochs):
        node = "+callbacks.top={_target_: pytorch_lightning.callbacks.ModelCheckpoint, save_top_k: 3"
        node += ", monitor: val/loss, save_last: true, filename: '{epoch}/{val/loss:.4f}'"
        node += f", dirpath: {folder}}}"
        return (*MLP, *BRIEF, "optimizer.lr=0.003", node, f"trainer.max_epochs={epochs}", f"seed={seed}")

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    trainees.train(tmp_path / "theirs", *command(whole, 1, 3), faults=SPARE)
    theirs, names = checkpoints_in(whole)
    assert len(theirs) == 4
    shutil.copytree(whole, killed)
    trainees.train(tmp_path / "a", *command(whole, 0, 5), faults=SPARE)
    before_third = [*DIE[:-1], ["strike", COMMIT, 3, ["SIGKILL"]]]
    assert trainees.train(tmp_path / "b", *command(killed, 0, 5), faults=before_third).exit_code == -9
    later = checkpoints_in(killed)[0].keys() - theirs.keys()
    assert any(torch.load(killed / name)["global_step"] == 450 for name in later)
    assert trainees.train(tmp_path / "b", *command(killed, 0, 5), "resume=auto", faults=SPARE).exit_code == 0
    (kept, names), (wanted, wanted_names) = checkpoints_in(killed), checkpoints_in(whole)
    assert names == wanted_names and len(wanted) == 8 and theirs.keys() < wanted.keys()
    for name in wanted:
        assert all(map(torch.equal, map(torch.as_tensor, kept[name]), map(torch.as_tensor, wanted[name])))


def test_a_model_checkpoint_that_a_module_brings_takes_no_place_but_its_own(train, no_model, capsys):
    run = train(*restless("in_process", "+model.checkpoint=true", "trainer.max_epochs=3"))
    losses = {step: value for step, value in run.history("val_loss")}
    assert run.score == pytest.approx(min(losses.values()))
    assert run.checkpoint("best")["global_step"] == min(losses, key=losses.__getitem__)
    assert len([*(run.folder / "checkpoints" / "further").glob("*.ckpt")]) == 2
    assert "best.ckpt holds the last weights" not in capsys.readouterr().out
