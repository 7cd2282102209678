"""Several batches make one optimizer step: against loops in plain PyTorch."""

import copy
import math

import pytest
import torch
from fitting import Fit
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import GradientAccumulationScheduler
from torch.nn import functional

from foreign import Blobs, Net, NoisyData
from tracklight.config.compose import compose
from tracklight.data.tensor_data import epoch_order
from tracklight.engine.blocks import Blocks
from tracklight.engine.seeding import seed_run
from tracklight.errors import BadInput
from tracklight.models.mlp import MLP

BATCHES = 13  # of an epoch: 200 examples in minibatches of 16, the last of 8


class Plain(MLP):
    """Without dropout, under gradient descent, so that the order of draws does not matter."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


def in_groups(values, size: int) -> list:
    return [values[start : start + size] for start in range(0, len(values), size)]


def loop_by_hand(groups: list[int]) -> tuple[list[torch.Tensor], list[float]]:
    """Train one epoch for each group size; return the weights and the loss of each step."""
    seed_run(3)
    net = MLP(8, 4, hidden=[6])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    train = Blobs(batch_size=16, seed=3).splits["train"]
    losses = []
    for epoch, size in enumerate(groups):
        order = epoch_order(200, 3, epoch)
        for group in in_groups(order.split(16), size):
            optimizer.zero_grad()
            found = [functional.cross_entropy(net(train.features[i]), train.targets[i]) for i in group]
            loss = torch.stack(found).mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return [each.detach() for each in net.parameters()], losses


def fit(*callbacks, **arguments) -> Fit:
    seed_run(3)
    return Fit(*callbacks, module=Plain(8, 4, hidden=[6]), **arguments)


# float32: sums in another order
CLOSE = {"rtol": 1e-4, "atol": 1e-6}


@pytest.mark.parametrize("size", [1, 4, 5, 7, 13, 20])
def test_each_step_is_the_mean_of_the_batches_that_it_has(size):
    found = fit(accumulate_grad_batches=size)
    weights, losses = loop_by_hand([size, size])
    for ours, expected in zip(found.weights, weights, strict=True):
        torch.testing.assert_close(ours, expected, **CLOSE)
    points = found.logger.points["train/loss"]
    assert [step for step, _ in points] == [*range(1, 2 * math.ceil(BATCHES / size) + 1)]
    assert [value for _, value in points] == pytest.approx(losses, rel=1e-4)


def test_the_same_holds_where_the_number_of_batches_changes_by_epoch():
    found = fit(GradientAccumulationScheduler({0: 3, 1: 1, 2: 8}), max_epochs=3)
    weights, losses = loop_by_hand([3, 1, 8])
    for ours, expected in zip(found.weights, weights, strict=True):
        torch.testing.assert_close(ours, expected, **CLOSE)
    assert [value for _, value in found.logger.points["train/loss"]] == pytest.approx(losses, rel=1e-4)


def test_the_loss_of_an_epoch_stays_the_mean_over_its_examples():
    seen: list[tuple[int, float]] = []

    class Seen(Plain):
        def loss(self, outputs, targets):
            loss = super().loss(outputs, targets)
            if self.training:
                seen.append((len(targets), loss.item()))
            return loss

    found = Fit(module=Seen(8, 4, hidden=[6]), accumulate_grad_batches=4, max_epochs=1)
    expected = sum(num * loss for num, loss in seen) / sum(num for num, _ in seen)
    assert found.logger.points["train/loss_epoch"] == [(4, pytest.approx(expected, rel=1e-5))]


def test_a_foreign_module_divides_alike_and_logs_the_mean_of_its_step():
    class Logging(Net):
        seen: list = []

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("most", loss, on_step=True, on_epoch=False, reduce_fx="max")
            if batch_idx % 4 == 1:
                self.log("once", float(batch_idx))
            self.seen.append(loss.item())
            return loss

    module = Logging(8, 4)
    found = Fit(module=module, data=NoisyData(num_workers=0), accumulate_grad_batches=4, max_epochs=1)
    groups = in_groups(module.seen, 4)
    assert [len(each) for each in groups] == [4, 4, 2]
    points = found.logger.points
    assert [v for _, v in points["train_loss"]] == pytest.approx([sum(g) / len(g) for g in groups], rel=1e-5)
    assert [v for _, v in points["most"]] == pytest.approx([max(g) for g in groups], rel=1e-5)
    assert points["once"] == [(1, 1.0), (2, 5.0), (3, 9.0)]


@pytest.mark.filterwarnings("ignore:.*returned `None`")
@pytest.mark.parametrize("skipped", [1, 2])  # the second of a group, and the last
def test_a_batch_for_which_a_module_returns_no_loss_does_not_count(skipped):
    class Skipping(Net):
        def training_step(self, batch, batch_idx):
            inputs.append(batch)
            return None if batch_idx == skipped else functional.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.5)

    inputs: list = []
    seed_run(3)
    module = Skipping(8, 4)
    module.layers[1] = torch.nn.Identity()  # without dropout
    start = copy.deepcopy(module.layers)
    found = Fit(
        module=module, data=NoisyData(num_workers=0), accumulate_grad_batches=3, max_epochs=1,
        limit_train_batches=6,
    )  # fmt: skip
    optimizer = torch.optim.SGD(start.parameters(), lr=0.5)
    for first in (0, 3):
        kept = [inputs[i] for i in range(first, first + 3) if i != skipped]
        optimizer.zero_grad()
        torch.stack([functional.cross_entropy(start(x), y) for x, y in kept]).mean().backward()
        optimizer.step()
    assert found.error is None
    for ours, expected in zip(module.layers.parameters(), start.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, **CLOSE)


def test_a_loss_that_is_no_number_is_of_the_step_that_its_batch_belongs_to():
    class Diverging(Plain):
        calls = 0

        def loss(self, outputs, targets):
            self.calls += self.training
            return super().loss(outputs, targets) * (math.nan if self.calls == 6 else 1.0)

    found = Fit(module=Diverging(8, 4, hidden=[6]), accumulate_grad_batches=4)
    assert getattr(found.error, "step", None) == 2  # batches 5 to 8


def test_an_epoch_that_stops_between_two_steps_still_logs_its_mean():
    class Stopping(Callback):
        mid_step: list[bool] = []

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
            trainer.should_stop = batch_idx == 5

        def on_train_epoch_end(self, trainer, module) -> None:
            self.mid_step += [each.mid_step for each in trainer.callbacks if isinstance(each, Blocks)]

    stopping = Stopping()
    found = fit(stopping, accumulate_grad_batches=4)
    assert found.trainer.global_step == 1 and len(found.logger.points["train/loss_epoch"]) == 1
    assert stopping.mid_step == [False]  # or the run's log would not hear of it


def test_all_that_is_logged_by_step_has_one_point_a_step(train, spare_model):
    run = train(
        "data=table",
        "trainer.accumulate_grad_batches=3",
        "trainer.max_epochs=40",
        "data.batch_size=64",
        "tracking.gradients=true",
        "tracking.figures=false",
        "+callbacks.rate._target_=pytorch_lightning.callbacks.LearningRateMonitor",
        "scheduler=cosine",
    )
    num_batches = math.ceil(310 / 64)
    steps = 40 * math.ceil(num_batches / 3)
    assert [step for step, _ in run.history("train/loss")] == [*range(1, steps + 1)]
    assert [step for step, _ in run.history("lr-SGD")] == [*range(steps)]
    assert [step for step, _ in run.history("gradient/norm")] == [1, 32, 64]


def test_an_optimizer_that_evaluates_a_step_several_times_is_refused():
    words = ["trainer.accumulate_grad_batches=2", "optimizer._target_=torch.optim.LBFGS"]
    with pytest.raises(BadInput, match="accumulate_grad_batches=2: LBFGS .* data.batch_size"):
        compose(words)
    assert compose(words[1:])
