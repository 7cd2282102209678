import math

import pytest
import torch
from torch import nn

from tracklight.models.mlp import ACTIVATIONS, MLP


@pytest.mark.parametrize("hidden", [[], [5], [7, 3]])
@pytest.mark.parametrize("shape", [(12,), (1, 3, 4)])
def test_any_input_shape_is_flattened_to_logits(hidden, shape):
    model = MLP(in_features=12, out_features=4, hidden=hidden)
    assert model(torch.zeros(2, *shape)).shape == (2, 4)


def test_the_widths_are_those_asked_for():
    layers = [part for part in MLP(6, 2, hidden=[5, 3]).modules() if isinstance(part, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in layers] == [(6, 5), (5, 3), (3, 2)]


def test_dropout_drops_in_training_alone():
    model = MLP(in_features=4, out_features=2, hidden=[1000], dropout=0.5)
    inputs = torch.ones(1, 4)
    model.train()
    assert not torch.equal(model(inputs), model(inputs))
    model.eval()
    assert torch.equal(model(inputs), model(inputs))


def test_an_unknown_activation_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="relu") as refused:
        MLP(activation="rleu")
    assert all(name in str(refused.value) for name in ACTIVATIONS)


def test_uniform_logits_cost_the_logarithm_of_the_number_of_classes():
    model = MLP(in_features=2, out_features=10)
    loss = model.loss(torch.zeros(3, 10), torch.tensor([0, 4, 9]))
    assert loss.item() == pytest.approx(math.log(10), rel=1e-6)


def test_accuracy_is_the_share_of_largest_logits_in_place():
    outputs = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    accuracy = MLP(2, 2).metrics(outputs, torch.tensor([0, 1, 1, 0]))["accuracy"]
    assert accuracy.item() == 3 / 4


def test_a_checkpoint_of_plain_values_rebuilds_the_model():
    model = MLP(in_features=6, out_features=3, hidden=(4,), dropout=0.1, activation="tanh")
    assert MLP(**model.hparams).state_dict().keys() == model.state_dict().keys()
    assert all(type(v) in (int, float, str, list) for v in model.hparams.values())
