"""The notes' hand-written loops come out of the framework to the bit."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from tracklight.data.tensor_data import epoch_order
from tracklight.models.linear_regression import LinearRegression


def test_a_tensor_adds_and_multiplies_elementwise():
    x = torch.tensor([2.0, 3.0, 4.0])
    assert (x + 2).tolist() == [4, 5, 6]
    assert (x * 3).tolist() == [6, 9, 12]


def test_the_gradient_of_a_sum_of_squares_is_twice_its_argument():
    x = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    z = (x**2).sum()
    z.backward()
    assert z.item() == 14
    assert x.grad is not None
    assert x.grad.tolist() == [2, 4, 6]


def test_a_linear_layer_weighs_and_sums():
    model = LinearRegression(in_features=2, out_features=1)
    (w1, w2), b = model.linear.weight[0].tolist(), model.linear.bias.item()
    assert model(torch.tensor([[1.0, 2.0]])).item() == pytest.approx(w1 * 1 + w2 * 2 + b, abs=1e-6)


def test_seed_linear_is_the_loop_by_hand(train, spare_model):
    run = train("experiment=seed_linear", "seed=3")

    x = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    y = 2 * x
    torch.manual_seed(3)
    layer = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    losses = []
    for _ in range(100):
        loss = functional.mse_loss(layer(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    trained = run.checkpoint("last")["state_dict"]
    assert torch.equal(trained["linear.weight"], layer.weight)
    assert torch.equal(trained["linear.bias"], layer.bias)
    assert run.history("train/loss") == list(enumerate(losses, start=1))
    assert run.run.info.status == "FINISHED"


@pytest.mark.full_mnist
def test_seed_mlp_is_the_loop_by_hand(train, spare_model, mnist_root):
    run = train(
        "experiment=seed_mlp",
        "trainer.max_epochs=1",
        "trainer.accelerator=cpu",
        f"data.root={mnist_root}",
    )

    raw = mnist_root / "MNIST" / "raw"
    images = torch.from_numpy(np.fromfile(raw / "train-images-idx3-ubyte", np.uint8)[16:])
    images = images.reshape(60_000, 28, 28)
    labels = torch.from_numpy(np.fromfile(raw / "train-labels-idx1-ubyte", np.uint8)[8:])
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for rows in epoch_order(60_000, seed=0, epoch=0).split(64):
        pixels = (images[rows].float() / 255 - 0.1307) / 0.3081
        loss = functional.cross_entropy(model(pixels), labels[rows].long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    trained = run.checkpoint("last")["state_dict"].values()
    assert all(map(torch.equal, trained, model.state_dict().values()))
    assert run.history("train/loss") == list(enumerate(losses, start=1))
    assert len(losses) == 938
