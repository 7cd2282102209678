import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tracklight.engine.steps import EAGER_STEPS, TracedStep, eager_step, make_step
from tracklight.models.cnn import CNN

SMALL = {"image_shape": (2, 9, 8), "out_features": 4, "channels": [3, 5], "width": 6}


def test_the_logits_are_those_of_the_operations_by_hand():
    model = CNN(**SMALL)
    w = list(model.parameters())
    x = inputs = torch.randn(7, 2, 9, 8)
    for at in (0, 2):
        x = F.max_pool2d(torch.relu(F.conv2d(x, w[at], w[at + 1], padding=1)), 2)
    assert x.shape == (7, 5, 2, 2)
    x = torch.relu(x.reshape(7, 20) @ w[4].T + w[5]) @ w[6].T + w[7]
    torch.testing.assert_close(model(inputs), x)  # float32: a matrix product may round otherwise


@pytest.mark.parametrize(("kernel_size", "channels"), [(1, [4]), (5, [2, 3]), (3, [])])
def test_an_image_keeps_its_sides_until_it_is_pooled(kernel_size, channels):
    model = CNN(image_shape=[1, 8, 8], channels=channels, kernel_size=kernel_size)
    convolutions = [each for each in model.modules() if isinstance(each, nn.Conv2d)]
    assert [each.out_channels for each in convolutions] == channels
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_more_halvings_than_pixels_are_refused():
    with pytest.raises(ValueError, match=r"model.channels=\[2, 2, 2, 2\].*\[1, 8, 28\]"):
        CNN(image_shape=(1, 8, 28), channels=[2] * 4)


def test_dropout_drops_in_training_alone():
    model, inputs = CNN(width=1000, dropout=0.5), torch.ones(1, 1, 28, 28)
    assert not torch.equal(model(inputs), model(inputs))
    model.eval()
    assert torch.equal(model(inputs), model(inputs))


def test_uniform_logits_cost_the_logarithm_of_the_number_of_classes():
    targets = torch.tensor([0, 4, 9])
    assert CNN().loss(torch.zeros(3, 10), targets).item() == pytest.approx(math.log(10), rel=1e-6)


def test_accuracy_is_the_share_of_largest_logits_in_place():
    outputs = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    assert CNN().metrics(outputs, torch.tensor([0, 1, 1, 0]))["accuracy"].item() == 3 / 4


def test_a_checkpoint_of_plain_values_rebuilds_the_model():
    model = CNN(**SMALL, dropout=0.1)
    assert CNN(**model.hparams).state_dict().keys() == model.state_dict().keys()
    assert all(type(v) in (int, float, list) for v in model.hparams.values())


def test_traced_steps_have_the_bits_of_the_loop_by_hand():
    weights = []
    for make in (make_step, eager_step):
        torch.manual_seed(0)
        model = CNN(**SMALL)
        step = make(model, torch.optim.Adam(model.parameters()))
        for _ in range(EAGER_STEPS + 5):
            step(torch.randn(8, 2, 9, 8), torch.randint(4, (8,)))
        assert not isinstance(step, TracedStep) or any(step.traces.values())
        weights.append(nn.utils.parameters_to_vector(model.parameters()))
    assert torch.equal(*weights)
