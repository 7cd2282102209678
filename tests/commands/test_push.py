"""Runs copied to another store: whole, once, and linked to the first."""

import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_runs import QUICK, train

from made_runs import add_run
from process import Trainees, free_port
from tracklight.commands.parser import main
from tracklight.config.compose import compose
from tracklight.errors import BadInput
from tracklight.experiment.train import run as run_experiment
from tracklight.paths import ROOT
from tracklight.tracking.store import Store, connect
from tracklight.tracking.tags import (
    BEST_TAG,
    COPIED_TAG,
    EPOCHS_TAG,
    KEY_TAG,
    PARENT_TAG,
    PUSHED_TAG,
    SUMMARY,
)

PUSH = "import sys; from tracklight.cli import enter; enter('push', sys.argv[1:])"


def contents(store: Store, scratch: Path) -> dict[str, dict]:
    """All of a store by the runs' keys, ids of runs replaced by keys."""
    runs = store.search("")
    keys = {run.info.run_id: run.data.tags.get(KEY_TAG, run.info.run_id) for run in runs}
    found = {}
    for run in runs:
        run_id = run.info.run_id
        (scratch / run_id).mkdir(parents=True)
        files = Path(store.client.download_artifacts(run_id, "", str(scratch / run_id)))
        tags = {k: keys.get(v, v) for k, v in run.data.tags.items() if k not in (PUSHED_TAG, COPIED_TAG)}
        points = {key: store.client.get_metric_history(run_id, key) for key in run.data.metrics}
        models = run.outputs.model_outputs if run.outputs else []
        there = {each.model_id: each for each in store.client.search_logged_models([run.info.experiment_id])}
        if (summary := files / "summary.json").exists():
            found_in = json.loads(summary.read_text())
            assert found_in["id"] == run_id
            if "folder" in found_in and store.database:
                assert Path(found_in.pop("folder")) == store.folder(run_id) / "artifacts"
            found_in.pop("folder", None)
            summary.write_text(re.sub("[0-9a-f]{32}", lambda each: keys.get(each[0], each[0]), str(found_in)))
        found[keys[run_id]] = {
            "about": (run.info.run_name, run.info.status, run.info.start_time, run.info.end_time),
            "params": run.data.params,
            "tags": tags | {KEY_TAG: ""},
            "points": {k: sorted((p.step, p.value, p.timestamp) for p in v) for k, v in points.items()},
            "data": [(each.dataset.name, each.dataset.digest) for each in run.inputs.dataset_inputs],
            "files": {
                str(path.relative_to(files)): hashlib.sha256(path.read_bytes()).hexdigest()
                for path in files.rglob("*")
                if path.is_file()
            },
            "models": [(each.step, there[each.model_id].name) for each in models if each.model_id in there],
        }
    return found


def test_what_is_pushed_is_the_same_and_pushed_again_is_left(kept, tmp_path, capsys):
    target = tmp_path / "there"
    assert main("push", [str(target), kept.line, *kept.dir]) == 0
    assert f" copied to sqlite:///{target}/mlflow.db" in capsys.readouterr().out.splitlines()[-1]
    assert main("push", [str(target), kept.table, kept.line, *kept.dir]) == 0
    assert capsys.readouterr().out
    copy = connect(None, target)
    before, after = contents(kept.store, tmp_path / "a"), contents(copy, tmp_path / "b")
    assert len(after) >= 3 and {key: before[key] for key in after} == after  # others may have evaluated them
    by_source = {run.data.tags[PUSHED_TAG]: run for run in copy.search("")}
    assert {*by_source} >= {kept.sweep, kept.line, kept.table}
    sweep, line = by_source[kept.sweep], by_source[kept.line]
    assert line.data.tags[PARENT_TAG] == sweep.info.run_id != kept.sweep
    assert sweep.data.tags["best.run"] == line.info.run_id
    assert main("evaluate", [by_source[kept.table].info.run_id, "--dir", str(target)]) == 0
    assert "the same to the bit" in capsys.readouterr().out
    assert main("push", [str(target), kept.table, kept.line, *kept.dir]) == 0
    said = capsys.readouterr().out
    assert said == f"0 copied to sqlite:///{target}/mlflow.db, {len(after)} there already\n"


def test_two_stores_are_merged_and_what_came_from_there_does_not_come_back(directory, tmp_path, capsys):
    here, there = connect(None, tmp_path / "here"), connect(None, tmp_path / "there")
    add_run(here, 0.5)
    add_run(there, 0.25)
    running = here.create("mine", None, {})
    assert main("push", [str(there.directory), "--dir", str(here.directory)]) == 0
    assert "1 in progress, left out" in capsys.readouterr().out
    running.finish("FINISHED")
    for source, target in ((here, there), (there, here), (here, there)):
        assert main("push", [str(target.directory), "--dir", str(source.directory)]) == 0
    assert "0 copied" in capsys.readouterr().out.splitlines()[-1]
    assert contents(here, tmp_path / "a") == contents(there, tmp_path / "b") and len(here.search("")) == 3


def test_a_store_is_not_pushed_to_itself_and_no_unknown_run(store, tmp_path):
    (tmp_path / "link").symlink_to(store.directory)
    for name in (store.directory, tmp_path / "link", f"sqlite:///{store.database}"):
        with pytest.raises(BadInput, match="is the store that the runs are in"):
            main("push", [str(name), "--dir", str(store.directory)])
    with pytest.raises(BadInput, match="no run begins with abcd"):
        main("push", [str(tmp_path / "there"), "abcd", "--dir", str(store.directory)])


def test_a_link_that_leads_out_of_the_store_is_not_followed(directory, tmp_path):
    store = connect(None, directory)
    (tmp_path / "id_rsa").write_text("mine, not the run's")
    run_id = add_run(store, 0.5)
    link = store.folder(run_id) / "artifacts" / "notes"
    link.parent.mkdir(parents=True)
    link.symlink_to(tmp_path / "id_rsa")
    with pytest.raises(BadInput, match="notes leads out of its folder"):
        main("push", [str(tmp_path / "there"), "--dir", str(directory)])
    assert not [p for p in (tmp_path / "there").rglob("*") if p.is_file() and b"mine" in p.read_bytes()]


@pytest.fixture
def target(template, tmp_path) -> Store:
    (tmp_path / "there").mkdir()
    shutil.copy(template, tmp_path / "there" / "mlflow.db")
    return connect(None, tmp_path / "there")


def extend(directory: Path, run_id: str, num_epochs: int) -> None:
    cfg = compose([f"resume={run_id}", *QUICK, f"tracking.dir={directory}", "tracking.uri=null"])
    cfg.overrides = [f"trainer.max_epochs={num_epochs}"]
    run_experiment(cfg)


def test_a_run_that_went_on_is_copied_again_and_never_over_newer_work(directory, target, tmp_path, capsys):
    source = connect(None, directory)
    push = [str(target.directory), "--dir", str(directory)]
    first = train(directory, "trainer.max_epochs=2")
    extend(directory, first, 3)  # replaces the model
    assert main("push", push) == 0
    extend(directory, first, 4)
    other = add_run(source, 0.5)
    for said in ("2 copied", "0 copied"):
        assert main("push", push) == 0
        assert capsys.readouterr().out.splitlines()[-1].startswith(said)
        assert contents(source, tmp_path / f"a {said}") == contents(target, tmp_path / f"b {said}")
    copies = {each.data.tags[PUSHED_TAG]: each for each in target.search("")}
    assert {*copies} == {first, other}
    copy = copies[first].info.run_id
    assert copies[first].data.tags[EPOCHS_TAG] == "4"

    extend(target.directory, copy, 6)
    before = contents(target, tmp_path / "c")
    assert main("push", push) == 0
    assert "0 copied" in capsys.readouterr().out.splitlines()[-1]
    extend(directory, first, 7)
    assert main("push", push) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith(f"1 there already, 1 left, as they and their copies both went on: {first}")
    assert contents(target, tmp_path / "d") == before


def test_a_copy_that_went_on_is_brought_back(directory, target, tmp_path):
    source = connect(None, directory)
    first = train(directory, "trainer.max_epochs=1")
    assert main("push", [str(target.directory), "--dir", str(directory)]) == 0
    copy = target.search("")[0].info.run_id
    extend(target.directory, copy, 2)
    for here, there in ((source, target), (target, source)):
        assert main("push", [str(there.directory), "--dir", str(here.directory)]) == 0
    assert source.client.get_run(first).data.tags[EPOCHS_TAG] == "2"
    assert contents(source, tmp_path / "a") == contents(target, tmp_path / "b")


def test_trials_pushed_before_their_sweep_ended_get_their_parent_and_the_best_its_place(
    store, target, tmp_path, capsys
):
    push = [str(target.directory), "--dir", str(store.directory)]
    sweep = store.create("tracklight", "a sweep", {"tracklight.sweep": "x"})
    trials = [add_run(store, score, tags={PARENT_TAG: sweep.run_id}) for score in (0.5, 0.75)]
    assert main("push", [*push[:1], trials[0], *push[1:]]) == 0
    assert "2 in progress, left out" in capsys.readouterr().out
    assert target.search("") == []
    sweep.set_tags({BEST_TAG: trials[1]})
    sweep.log_text(json.dumps({"id": sweep.run_id, "runs": trials[1:]}), SUMMARY)
    sweep.finish("FINISHED")
    assert main("push", [*push[:1], trials[0], *push[1:]]) == 0
    copies = {each.data.tags[PUSHED_TAG]: each for each in target.search("")}
    assert {*copies} == {trials[0], sweep.run_id} and copies[sweep.run_id].data.tags[BEST_TAG] == trials[1]
    assert main("push", push) == 0
    assert contents(store, tmp_path / "a") == contents(target, tmp_path / "b")
    tags = {each.data.tags[PUSHED_TAG]: each.data.tags for each in target.search("")}
    ids = {each.data.tags[PUSHED_TAG]: each.info.run_id for each in target.search("")}
    assert tags[sweep.run_id][BEST_TAG] == ids[trials[1]]
    assert {tags[each][PARENT_TAG] for each in trials} == {ids[sweep.run_id]}


def test_what_is_killed_before_it_says_that_it_is_whole_is_copied_again_later(
    directory, target, tmp_path, capsys
):
    source = connect(None, directory)
    push = [str(target.directory), "--dir", str(directory)]
    first = train(directory, "trainer.max_epochs=1")
    assert main("push", push) == 0
    copy = target.search("")[0].info.run_id
    target.client.delete_tag(copy, COPIED_TAG)
    assert main("push", push) == 0 and main("push", push) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("0 copied")
    extend(directory, first, 2)
    assert main("push", push) == 0
    assert contents(source, tmp_path / "a") == contents(target, tmp_path / "b")


def test_a_source_that_is_not_there_is_not_created_and_a_bad_target_is_called_so(store, tmp_path):
    for where in (
        ["--dir", str(tmp_path / "typo")],
        ["--uri", f"sqlite:///{tmp_path / 'typo' / 'mlflow.db'}"],
    ):
        with pytest.raises(BadInput, match="there is no store"):
            main("push", [str(tmp_path / "there"), *where])
    assert not (tmp_path / "typo").exists() and not (tmp_path / "there").exists()
    with pytest.raises(BadInput, match="^TARGET ftp://there: no tracking store of this kind"):
        main("push", ["ftp://there", "--dir", str(store.directory)])
    with pytest.raises(BadInput, match="required: TARGET;"):
        main("push", [])


@pytest.mark.slow
@pytest.mark.server
def test_a_sweep_pushed_to_a_server_and_killed_five_times_arrives_once(tmp_path, template):
    directory = tmp_path / "runs"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
    environment |= {"PYTHONPATH": str(ROOT / "src")}
    words = ("-m", "seed=range(0,20)", "trainer.max_epochs=100")
    train = [
        sys.executable,
        str(ROOT / "train.py"),
        *words,
        f"tracking.dir={directory}",
        "tracking.figures=false",
    ]
    subprocess.run(train, env=environment, check=True, capture_output=True)
    trainees, port = Trainees(template), free_port()
    server = trainees.serve(tmp_path / "server", port)
    try:
        uri, chance = f"http://127.0.0.1:{port}", random.Random(0)
        push = [sys.executable, "-c", PUSH, uri, "--dir", str(directory)]
        for _ in range(5):
            process = subprocess.Popen(push, env=environment, stdout=subprocess.PIPE, text=True)
            assert process.stdout is not None
            process.stdout.readline()  # it copies
            time.sleep(chance.uniform(0, 1.5))
            process.send_signal(signal.SIGKILL)
            process.communicate()
        done = subprocess.run(push, env=environment, check=True, capture_output=True, text=True)
        assert not done.stderr
        again = subprocess.run(push, env=environment, check=True, capture_output=True, text=True).stdout
        assert again == f"0 copied to {uri}, 21 there already\n"
        copy = contents(connect(uri, tmp_path / "nothing"), tmp_path / "b")
        assert copy == contents(connect(None, directory), tmp_path / "a") and len(copy) == 21
    finally:
        server.send(signal.SIGKILL, group=True)
        trainees.close()
