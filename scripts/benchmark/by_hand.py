"""The loops one would write by hand, without a framework.

Shapes: `N` images, `B` in a minibatch.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from benchmark.race import Relay

BATCH_SIZE = 64
LEARNING_RATE = 0.01
MEAN, STD = 0.1307, 0.3081

Order = Callable[[int], Tensor]  # of an epoch -> rows (N,)


def sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Return the optimizer of the notes."""
    return torch.optim.SGD(parameters, lr=LEARNING_RATE)


def make_model(device: str = "cpu", hidden: Sequence[int] = (128,)) -> nn.Module:
    """Return the network of the notes, or a larger one; its weights are drawn from seed 0."""
    torch.manual_seed(0)
    sides = pairwise([784, *hidden])
    layers = [each for side in sides for each in (nn.Linear(*side), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(hidden[-1], 10)).to(device)


def standardised(images: Tensor) -> Tensor:
    """Turn uint8 pixels into float32 ones of mean 0 and standard deviation 1."""
    return (images.float() / 255 - MEAN) / STD


def resident(
    relay: Relay,
    images: Tensor,
    labels: Tensor,
    order: Order,
    epochs: int,
    batch_size: int = BATCH_SIZE,
    hidden: Sequence[int] = (128,),
    optimize: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] = sgd,
) -> None:
    """Train on tensors: images (N, 28, 28) as float32, or as uint8 standardised by minibatch."""
    model = make_model(str(images.device), hidden)
    optimizer = optimize(model.parameters())

    def rows_of(epoch: int) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: order(epoch).to(images.device).split(batch_size)

    for epoch in range(epochs):
        for rows in relay.epoch(rows_of(epoch)):
            inputs = images[rows]
            if inputs.dtype == torch.uint8:
                inputs = standardised(inputs)
            loss = functional.cross_entropy(model(inputs), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    relay.result = [parameter.detach() for parameter in model.parameters()]
    relay.hand_over()


def torchvision_set(root: Path) -> datasets.MNIST:
    """Return the data set as every tutorial has it."""
    steps = [transforms.ToTensor(), transforms.Normalize((MEAN,), (STD,))]
    return datasets.MNIST(str(root), train=True, transform=transforms.Compose(steps))


def torchvision_loop(relay: Relay, root: Path, epochs: int) -> None:
    """Train on torchvision's data set through a DataLoader."""
    loader = DataLoader(torchvision_set(root), batch_size=BATCH_SIZE, shuffle=True)
    model = make_model()
    optimizer = sgd(model.parameters())
    for _ in range(epochs):
        for images, labels in relay.epoch(lambda: loader):
            loss = functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    relay.hand_over()
