import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tracklight.commands.parser import main
from tracklight.errors import BadInput
from tracklight.experiment import stored
from tracklight.runs import select as query
from tracklight.tracking.tags import BEST, SETTING_TAG


@pytest.mark.parametrize("command", ["evaluate", "predict", "reproduce"])
def test_every_start_sets_right_what_died_before_it(store, tmp_path, command):
    run = store.create("tracklight", "dies", {})
    run.log_series("train/loss", (1, 2), (0.5, 0.25))
    run.abandon()
    files = ["image.png"] if command == "predict" else []
    with pytest.raises(BadInput, match="there is no run"):
        main(command, ["0" * 32, *files, "--dir", str(tmp_path)])
    assert store.client.get_run(run.run_id).info.status == "KILLED"
    points = store.client.get_metric_history(run.run_id, "train/loss")
    assert sorted(point.step for point in points) == [1, 2]


FETCH = """
import sys
from pathlib import Path
from tracklight.runs import select as query
from tracklight.tracking import store, tags
uri, directory, run_id = sys.argv[1:]
there = store.connect(uri, Path(directory))
for path in ("config.yaml", tags.BEST):
    found = query.fetch(there, query.select_run(there, run_id), path)
    print(found, found.stat().st_size)
"""


@pytest.mark.slow
def test_what_was_fetched_is_gone_once_the_process_has_ended(kept, tmp_path):
    (tmp_path / "temporary").mkdir()
    command = [sys.executable, "-c", FETCH, kept.store.uri, str(tmp_path / "here"), kept.line]
    env = os.environ | {"TMPDIR": str(tmp_path / "temporary")}
    ended = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    found = [Path(line.split()[0]) for line in ended.stdout.splitlines()]
    assert len({path.relative_to(tmp_path / "temporary").parts[0] for path in found}) == 1
    assert [*(tmp_path / "temporary").iterdir()] == []
    assert ended.stderr == ""


def test_sweep_stands_for_its_best_trial(kept):
    run = query.select_run(kept.store, kept.sweep)
    assert query.resolve_sweep(kept.store, run).info.run_id == kept.line
    alone = query.select_run(kept.store, kept.mlp)
    assert query.resolve_sweep(kept.store, alone) is alone


def test_sweep_without_a_finished_trial_says_so(store):
    sweep = store.create("tracklight", "s", {"tracklight.sweep": "x"})
    sweep.finish("FINISHED")
    with pytest.raises(BadInput, match="without a finished trial"):
        query.resolve_sweep(store, query.select_run(store, sweep.run_id))


def test_deleted_run_is_refused_with_the_way_to_restore_it(kept):
    with pytest.raises(BadInput, match="restore"):
        query.select_run(kept.store, kept.deleted)


def test_unknown_run_is_refused(kept):
    with pytest.raises(BadInput, match="no run"):
        query.select_run(kept.store, "0" * 32)


def test_rebuilt_model_has_the_best_weights_and_needs_no_data(kept):
    run = query.select_run(kept.store, kept.mlp)
    weights = torch.load(query.fetch(kept.store, run, BEST), weights_only=True)["state_dict"]
    model = stored.rebuild(kept.store, run, stored.load_config(kept.store, run), read=False).model
    assert not model.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name])


def test_run_whose_files_were_deleted_is_refused_in_one_line(kept):
    run = query.select_run(kept.store, kept.bare)
    with pytest.raises(BadInput, match="has no artifact config.yaml, or it was deleted"):
        stored.load_config(kept.store, run)


def test_stored_config_with_a_target_outside_the_allow_list_is_refused(kept, monkeypatch):
    run = query.select_run(kept.store, kept.line)
    text = query.read_text(kept.store, run, "config.yaml")
    evil = text.replace("tracklight.data.line.Line", "os._exit").replace(
        "allowed_targets:", "allowed_targets:\n- os"
    )
    monkeypatch.setattr(stored, "read_text", lambda *_: evil)
    with pytest.raises(BadInput, match="os._exit"):
        stored.load_config(kept.store, run)


@pytest.mark.parametrize("text", ["", "- a list", "{broken", "42"])
def test_artifact_that_is_no_config_is_refused(kept, monkeypatch, text):
    monkeypatch.setattr(stored, "read_text", lambda *_: text)
    with pytest.raises(BadInput, match="is no config"):
        stored.load_config(kept.store, query.select_run(kept.store, kept.line))


def test_weights_that_no_longer_fit_are_told_with_the_commit_that_trained_them(kept, monkeypatch):
    run = query.select_run(kept.store, kept.line)
    cfg = stored.load_config(kept.store, run)
    run.data.tags["tracklight.code"] = "of another day"
    run.data.tags["mlflow.source.git.commit"] = "f" * 40
    cfg.model.bias = False
    with pytest.raises(BadInput, match="does not fit this code.*of commit ffffffffffff"):
        stored.rebuild(kept.store, run, cfg, read=False)


def test_what_a_model_takes_is_written_down_by_its_run(kept):
    facts = json.loads(query.read_text(kept.store, query.select_run(kept.store, kept.table), "inputs.json"))
    assert facts["feature_names"][:3] == ["age", "sex", "bmi"]
    assert facts["target_names"] == ["target"]
    assert len(facts["mean"]) == len(facts["std"]) == 10


def test_setting_is_the_config_without_its_seed(kept):
    from tracklight.config.compose import compose, digest_without_seed

    tags = query.select_run(kept.store, kept.line).data.tags
    words = ("trainer.max_epochs=5", "num_threads=1")
    assert tags[SETTING_TAG] == digest_without_seed(compose([*words, "seed=7"]))
    assert tags[SETTING_TAG] != digest_without_seed(compose([*words, "seed=2", "optimizer.lr=0.5"]))
    assert tags[SETTING_TAG] != digest_without_seed(compose(["num_threads=1", "trainer.max_epochs=6"]))
