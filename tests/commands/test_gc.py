"""The disk is freed of runs that nobody needs, after it was said how much they hold."""

import json

import pytest
from mlflow.entities import LoggedModelOutput
from small_runs import train

from tracklight.commands.parser import main
from tracklight.errors import BadInput
from tracklight.tracking.lock import RunLock
from tracklight.tracking.mlflow_client import hard_delete
from tracklight.tracking.store import connect
from tracklight.tracking.tags import IDENTITY_TAG


def folders(directory):
    runs = {path.name for path in (directory / "artifacts").iterdir() if path.name != "models"}
    return runs | {path.name for path in (directory / "artifacts" / "models").iterdir()}


def test_what_each_kind_holds_is_said_and_only_what_is_asked_for_is_deleted(directory, capsys):
    old, gone, orphan, other = (train(directory, "trainer.max_epochs=1", f"seed={s}") for s in (0, 1, 2, 3))
    longer = train(directory, "trainer.max_epochs=2")
    new = train(directory, "trainer.max_epochs=1")
    store = connect(None, directory)
    failed = store.create("tracklight", None, {IDENTITY_TAG: "x"})
    (failed.folder / "log").write_bytes(bytes(10_000))
    failed.finish("FAILED")
    alone = store.client.create_logged_model("1", name="theirs").model_id  # of no run
    (directory / "artifacts" / "models" / alone).mkdir()
    models = {run: store.client.get_run(run).outputs.model_outputs[0].model_id for run in (old, gone, orphan)}
    store.client.delete_run(gone)
    hard_delete(store.client, run_id=orphan)  # as `mlflow gc` does, which leaves its folder and its model
    assert main("evaluate", [old, "--dir", str(directory)]) == 0
    below = store.search("")[0].info.run_id
    before, where = folders(directory), ["--dir", str(directory)]
    capsys.readouterr()
    assert main("gc", ["--json", *where]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["bytes_freed"] == 0 and folders(directory) == before
    assert {*said["deleted"]} == {gone, orphan, models[orphan]}
    assert (said["failed"], said["superseded"]) == ([failed.run_id], [below, old])
    held = [
        directory / "artifacts" / "models" / models[old],
        *(directory / "artifacts" / each for each in (old, below)),
    ]
    files = [file for folder in held for file in folder.rglob("*") if file.is_file()]
    assert said["bytes"]["superseded"] == sum(file.stat().st_size for file in files)
    assert said["bytes"]["failed"] >= 10_000
    assert main("gc", ["--delete", "deleted", *where]) == 0
    assert "freed " in capsys.readouterr().out
    assert before - folders(directory) == {gone, orphan, models[gone], models[orphan]}
    with pytest.raises(Exception, match="not found"):
        store.client.get_logged_model(models[orphan])
    lock = RunLock(directory / "artifacts" / failed.run_id, {})
    assert main("gc", ["--json", "--delete", "failed", *where]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["bytes_freed"] == 0 and said["bytes"]["failed"] >= 10_000
    lock.close()
    assert main("gc", ["--delete", "failed", "superseded", *where]) == 0
    assert folders(directory) >= {new, other, longer, alone} and not folders(directory) & {
        old,
        below,
        models[old],
        failed.run_id,
    }
    assert {run.info.run_id for run in store.search("")} == {new, other, longer}
    assert store.search("", deleted=True) == []
    assert main("evaluate", [new, *where]) == 0
    assert main("gc", ["--json", *where]) == 0


def test_a_models_id_that_leads_out_of_the_store_deletes_nothing(directory):
    store, theirs = connect(None, directory), directory.parent / "thesis"
    (theirs / "chapter").mkdir(parents=True)
    run = store.create("tracklight", None, {})
    (directory / "artifacts" / "models").mkdir()
    for name in ("../../../thesis", str(theirs), "..", "."):  # as MLflow's server takes it from anybody
        store.client.log_outputs(run.run_id, [LoggedModelOutput(name, 0)])
    run.finish("FINISHED")
    store.client.delete_run(run.run_id)
    assert main("gc", ["--delete", "deleted", "--dir", str(directory)]) == 0
    assert (theirs / "chapter").is_dir() and (directory / "mlflow.db").is_file()
    assert not run.folder.exists()


def test_a_store_that_is_not_there_is_not_created(tmp_path):
    for more in ([], ["--delete", "failed"]):
        with pytest.raises(BadInput, match="there is no store"):
            main("gc", ["--dir", str(tmp_path / "typo"), *more])
    assert not (tmp_path / "typo").exists()
