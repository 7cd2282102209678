"""A run with a finder is the run that had its value typed."""

import pytest
import torch
from omegaconf import OmegaConf

from tracklight.config.compose import compose
from tracklight.errors import BadInput
from tracklight.experiment.find import find_values

TABLE = ("data=table", "num_threads=1", "tracking.figures=false", "trainer.max_epochs=2")


@pytest.mark.parametrize(
    ("finder", "key", "least", "most"),
    [
        pytest.param("LearningRateFinder", "optimizer.lr", 1e-4, 1, id="rate"),
        pytest.param("BatchSizeFinder", "data.batch_size", 64, 310, id="size", marks=pytest.mark.slow),
    ],
)
def test_a_found_value_is_recorded_gives_the_bits_of_one_that_is_typed_and_is_not_sought_again(
    train, spare_model, capsys, finder, key, least, most
):
    words = (*TABLE, "optimizer=adam", "scheduler=exponential")
    choice = {"optimizer.lr": "lr_finder", "data.batch_size": "batch_size_finder"}[key]
    found = train(*words, f"callbacks=[{choice},ema]")
    value = found.run.data.params[key]
    assert f"{finder}: {key}={value}\n" in capsys.readouterr().out
    assert found.run.data.tags[f"tracklight.found.{key}"] == value
    assert least <= float(value) <= most and float(value) != OmegaConf.select(compose(words), key)
    assert not [each for each in found.run.data.params if "finder" in each]
    train(f"resume={found.run.info.run_id}", "overrides=['trainer.max_epochs=3']")
    assert "Finder" not in capsys.readouterr().out
    typed = train(*words, "callbacks=ema", f"{key}={value}", "trainer.max_epochs=3")
    assert typed.run.info.run_id != found.run.info.run_id
    weights = [run.checkpoint("last")["state_dict"] for run in (found, typed)]
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())


def test_a_found_batch_size_is_as_large_as_memory_or_the_data_allow():
    words = [*TABLE, "callbacks=batch_size_finder"]
    assert find_values(compose(words)) == {"data.batch_size": 310}  # rows in the training part
    cfg = compose([*words, "callbacks.batch_size_finder.max_val=128"])
    assert find_values(cfg) == {"data.batch_size": 128}
    assert (cfg.data.batch_size, cfg.callbacks) == (128, {})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["resume=auto"], "finds another optimizer.lr each time; leave out resume=auto"),
        (["trainer.devices=2", "trainer.accelerator=cpu"], "trainer.devices=1; leave it out"),
        (["callbacks.lr_finder.mode=fast"], "callbacks.lr_finder: .*mode"),
    ],
)
def test_a_finder_that_would_find_something_else_is_refused(words, message):
    with pytest.raises(BadInput, match=message):
        find_values(compose([*TABLE, "callbacks=lr_finder", *words]))
