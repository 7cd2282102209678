"""A run with a finder is the run that had its value typed."""

import pytest
import torch

from tracklight.config.compose import compose
from tracklight.errors import BadInput
from tracklight.experiment.find import find_values

TABLE = ("data=table", "num_threads=1", "tracking.figures=false", "trainer.max_epochs=2")


def test_a_found_learning_rate_is_recorded_and_gives_the_bits_of_one_that_is_typed(train, capsys):
    found = train(*TABLE, "callbacks=[lr_finder,ema]", "optimizer=adam", "scheduler=cosine")
    rate = found.run.data.params["optimizer.lr"]
    assert f"LearningRateFinder: optimizer.lr={rate}\n" in capsys.readouterr().out
    assert found.run.data.tags["tracklight.found.optimizer.lr"] == rate
    assert 1e-4 < float(rate) < 1 and float(rate) != compose(["optimizer=adam"]).optimizer.lr
    assert not [key for key in found.run.data.params if "finder" in key]
    typed = train(*TABLE, "callbacks=ema", "optimizer=adam", "scheduler=cosine", f"optimizer.lr={rate}")
    weights = [run.checkpoint("last")["state_dict"] for run in (found, typed)]
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())
    again = train(
        f"resume={found.run.info.run_id}", "overrides=['trainer.max_epochs=3']", "allow_changes=true"
    )
    assert again.run.data.params["optimizer.lr"] == rate


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
