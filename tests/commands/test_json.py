"""For programs: with --json, stdout is one JSON value, and the rest is on stderr."""

import json
import os
import sys

import pytest

from tracklight.commands.parser import COMMANDS, main
from tracklight.tracking.store import connect


@pytest.fixture
def answer(capsys):
    def answer(command, *words):
        assert main(command, [*words, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return answer


def test_an_evaluation_is_the_metrics_of_its_split(kept, answer):
    found = answer("evaluate", kept.line, "--no-log", *kept.dir)
    loss = kept.store.client.get_run(kept.line).data.metrics["score"]
    assert (found["run"], found["split"]) == (kept.line, "train")
    assert found["score"]["train/loss"] <= loss  # of the weights a step later
    assert "logged" not in found


def test_predictions_are_rows(kept, answer, tmp_path):
    rows = tmp_path / "rows.csv"
    rows.write_text("x\n1\n2\n")
    found = answer("predict", kept.line, str(rows), *kept.dir)
    assert [(row["row"], type(row["target"])) for row in found] == [(1, float), (2, float)]


def test_a_reproduction_says_whether_it_is_identical(copied, kept, answer, spare_model):
    found = answer("reproduce", kept.line, "--dir", str(copied))
    assert (found["identical"], found["differences"], found["weights"]) == (True, [], 2)
    again = connect(None, copied).client.get_run(found["new"])
    assert again.data.tags["tracklight.reproduces"] == kept.line


def test_a_new_project_is_its_folder(answer, tmp_path):
    assert answer("init", str(tmp_path / "rings")) == {"folder": str(tmp_path / "rings"), "package": "rings"}


def test_every_command_takes_it(capsys):
    for command in COMMANDS:
        with pytest.raises(SystemExit):
            main(command, ["--help"])
        assert "--json" in capsys.readouterr().out, command


def run_train(monkeypatch, capsys, *words):
    from tracklight import cli

    monkeypatch.setattr(sys, "argv", ["train.py", *words, "--json"])
    cli.main()
    printed = capsys.readouterr()
    return json.loads(printed.out), printed.err


def test_training_prints_what_summary_json_holds(tmp_path, directory, monkeypatch, capsys, spare_model):
    words = ["trainer.max_epochs=3", f"tracking.dir={directory}", "tracking.uri=null"]
    found, rest = run_train(monkeypatch, capsys, *words)
    folder = directory / "artifacts" / found["id"] / "artifacts"
    assert found["folder"] == str(folder)
    assert json.loads((folder / "summary.json").read_text()) == found
    recorded = connect(None, directory).client.get_run(found["id"]).data.metrics
    assert found["score"] == recorded["score"]
    assert found["metrics"]["train/loss"] == recorded["train/loss"]
    assert "score " in rest


def test_with_a_test_part_the_metrics_of_training_and_validation_are_there_too(
    directory, monkeypatch, capsys, spare_model
):
    words = ["data=table", "trainer.max_epochs=2", f"tracking.dir={directory}", "tracking.uri=null"]
    found, _ = run_train(monkeypatch, capsys, *words, "tracking.figures=false")
    recorded = connect(None, directory).client.get_run(found["id"]).data.metrics
    assert {"train/loss", "val/loss", "test/loss"} <= found["metrics"].keys()
    for name, value in found["metrics"].items():
        assert value == pytest.approx(recorded[name]), name
    untracked, _ = run_train(monkeypatch, capsys, *words[:2], "tracking=none")
    assert {"train/loss", "val/loss", "test/loss"} <= untracked["metrics"].keys()


@pytest.mark.slow
def test_a_sweep_prints_its_winner(directory, monkeypatch, capsys):
    words = ["-m", "seed=1,2", "trainer.max_epochs=3", f"tracking.dir={directory}", "tracking.uri=null"]
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    found, _ = run_train(monkeypatch, capsys, *words)
    assert not os.environ.get("PYTHONSAFEPATH")  # it is for the processes of the sweep
    store = connect(None, directory)
    scores = {
        run.info.run_id: run.data.metrics["score"] for run in store.search("") if "score" in run.data.metrics
    }
    assert found["trials"] == 2
    best = min((scores[run], run) for run in scores if run != found["id"])
    assert (found["score"], found["runs"]) == (best[0], [best[1]])
    folder = store.folder(found["id"]) / "artifacts"
    assert json.loads((folder / "summary.json").read_text()) == found
