"""What a run computes in is what it was asked for, what it records, and what it reads its data in."""

import logging
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from mlflow import pyfunc

from tracklight.config.compose import compose
from tracklight.errors import BadInput
from tracklight.experiment.build import build_data

# NIST's Statistical Reference Datasets, and the certified intercept and slope.
NORRIS = Path(__file__).parents[2] / "docs/nist/norris.csv"
CERTIFIED = (-0.262323073774029, 1.00211681802045)


@pytest.fixture
def norris() -> list[str]:
    """The overrides that train on all of its rows at once."""
    data = ["data=table", f"data.path={NORRIS}", "data.target=y", "data.num_val=0", "data.num_test=0"]
    score = ["score.metric=train/loss_epoch", "score.mode=min", "data.batch_size=null"]
    return [*data, *score, "trainer.precision=64-true"]


def digits(found: float, certified: float) -> float:
    """How many digits agree: NIST's log relative error."""
    return -math.log10(abs(found - certified) / abs(certified) + 1e-17)


def test_a_table_in_double_precision_has_norris_certified_digits_wherever_it_is_used(norris, train, caplog):
    # Half the inverse curvature of a standardised feature: one step arrives, the others polish.
    run = train(*norris, "optimizer.lr=0.5", "trainer.max_epochs=20")
    weights = run.checkpoint("best")["state_dict"]
    x = np.loadtxt(NORRIS, delimiter=",", skiprows=1)[:, 1]
    slope = weights["linear.weight"].item() / x.std()
    intercept = weights["linear.bias"].item() - slope * x.mean()
    assert min(map(digits, (intercept, slope), CERTIFIED)) > 10
    ((_, gap),) = run.history("ols/gap")
    assert gap < 1e-13
    (logged,) = run.client.search_logged_models([run.run.info.experiment_id])
    model = pyfunc.load_model(logged.artifact_location)
    answer = model.predict(pd.DataFrame({"x": [(500.0 - x.mean()) / x.std()]}))["y"][0]
    assert digits(answer, CERTIFIED[0] + 500 * CERTIFIED[1]) > 12
    assert {path.stem for path in (run.folder / "figures").iterdir()} >= {
        "fit",
        "residuals",
        "learning_curves",
    }
    assert [each for each in caplog.records if each.levelno >= logging.WARNING] == []


def test_a_run_in_double_precision_continues_in_it(norris, train, spare_model):
    base = [*norris, "optimizer.lr=0.01", "tracking.figures=false", "trainer.max_epochs="]
    whole = train(*base[:-1], base[-1] + "6")
    half = train(*base[:-1], base[-1] + "3")
    words = [f"resume={half.run.info.run_id}", "trainer.max_epochs=6", 'overrides=["trainer.max_epochs=6"]']
    continued = train(*words)
    for name in ("best", "last"):
        states = [each.checkpoint(name)["state_dict"] for each in (whole, continued)]
        for a, b in zip(*(each.values() for each in states), strict=True):
            assert a.dtype == torch.float64 and torch.equal(a, b)
    assert continued.history("train/loss") == whole.history("train/loss")


def test_a_run_in_half_precision_is_drawn_and_exported(train, caplog):
    run = train("data=table", "trainer.precision=bf16-true", "trainer.max_epochs=2")
    weights = run.checkpoint("best")["state_dict"]
    assert {each.dtype for each in weights.values()} == {torch.bfloat16}
    (logged,) = run.client.search_logged_models([run.run.info.experiment_id])
    model = pyfunc.load_model(logged.artifact_location)
    names = model.metadata.get_input_schema().input_names()
    answer = model.predict(pd.DataFrame(np.zeros((1, len(names))), columns=names))
    assert answer.iloc[0, 0] == weights["linear.bias"].float().item()
    assert "fit" in {path.stem for path in (run.folder / "figures").iterdir()}
    assert [each for each in caplog.records if each.levelno >= logging.WARNING] == []


def test_float16_on_a_cpu_is_recorded_as_what_lightning_makes_of_it(train, spare_model):
    with pytest.warns(UserWarning, match="trainer.precision=16-mixed: a CPU trains in bf16-mixed"):
        run = train("trainer.precision=16-mixed", "trainer.accelerator=cpu", "trainer.max_epochs=1")
    assert run.run.data.params["trainer.precision"] == "bf16-mixed"


@pytest.mark.parametrize(("typed", "meant"), [("64", "64-true"), ("bf16", "bf16-mixed"), ("null", "32-true")])
def test_a_precision_has_one_name(typed, meant):
    assert compose([f"trainer.precision={typed}"]).trainer.precision == meant


def test_a_fused_optimizer_that_lightning_would_not_clip_is_refused():
    words = ["optimizer.fused=true", "trainer.gradient_clip_val=1.0"]
    with pytest.raises(BadInput, match="optimizer.fused=null"):
        compose([*words, "trainer.precision=bf16-mixed"])
    assert compose(words).optimizer.fused


@pytest.mark.parametrize(
    ("precision", "half"),
    [("bf16-true", torch.bfloat16), ("bf16-mixed", torch.bfloat16), ("32-true", None), ("64-true", None)],
)
def test_data_know_the_half_precision_in_which_the_model_computes(precision, half):
    data = build_data(compose([f"trainer.precision={precision}", "trainer.accelerator=cpu"]))
    assert data.half is half and data.dtype is (torch.float64 if precision == "64-true" else torch.float32)
