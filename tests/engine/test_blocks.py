"""Steps in blocks are the steps of plain Lightning: bits, schedules, counts, metrics, stops."""

import math
import signal
from functools import partial
from typing import Any

import pytest
import torch
from fitting import Fit, OneByOne
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import ModelCheckpoint, ModelPruning
from torch.optim.optimizer import register_optimizer_step_post_hook
from torchmetrics.classification import MulticlassAccuracy

from foreign import Blobs, Diverging
from tracklight.engine.blocks import NonFinite, steps_per_block
from tracklight.engine.seeding import seed_run
from tracklight.engine.signals import SafeStop, Stopped
from tracklight.engine.steps import TracedStep
from tracklight.models.mlp import MLP

SGD, AdamW = torch.optim.SGD, torch.optim.AdamW
STEPS = 13


def one_cycle(optimizer, total_steps=2 * STEPS):
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=total_steps)
    return {"scheduler": scheduler, "interval": "step"}


def plateau(optimizer):
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=10.0)
    return {"scheduler": scheduler, "interval": "epoch", "monitor": "val/loss"}


@pytest.mark.parametrize(
    ("scheduler", "batch_size"),
    [(None, 7), (None, 200), (None, None), (one_cycle, 16), (plateau, 64)],
)
def test_blocks_give_the_bits_and_points_of_single_steps(scheduler, batch_size):
    data = {"batch_size": batch_size, "seed": 3, "num_train": 200}
    blocks = Fit(data=Blobs(**data), scheduler=scheduler)
    single = Fit(OneByOne(), data=Blobs(**data), scheduler=scheduler)
    assert (blocks.error, single.error) == (None, None)
    assert (blocks.reason, single.reason is None) == (None, False)
    assert blocks.same_bits(single)
    assert blocks.trainer.global_step == single.trainer.global_step
    for key in ("train/loss", "val/loss", "val/accuracy"):
        assert blocks.logger.points[key] == single.logger.points[key], key


def test_several_blocks_an_epoch_give_the_bits_of_single_steps():
    steps = steps_per_block(2)
    data = {"batch_size": 2, "seed": 3, "num_train": 4 * steps + 9}
    blocks, single = Fit(data=Blobs(**data)), Fit(OneByOne(), data=Blobs(**data))
    assert blocks.same_bits(single)
    assert blocks.trainer.global_step == 2 * (2 * steps + 5)


@pytest.mark.parametrize("optimizer", [SGD, partial(SGD, momentum=0.9), AdamW])
@pytest.mark.parametrize("scheduler", [None, partial(one_cycle, total_steps=4000)])
@pytest.mark.parametrize("pause_s", [0.0, 10.0])
def test_steps_taken_at_once_are_the_single_steps(monkeypatch, pause_s, scheduler, optimizer):
    monkeypatch.setattr("tracklight.engine.blocks.PAUSE_S", pause_s)
    taken, take = [], TracedStep.take_block
    monkeypatch.setattr(TracedStep, "take_block", lambda *args: taken.append(take(*args)) or taken[-1])
    data = {"batch_size": 2, "seed": 3, "num_train": 4 * steps_per_block(2) + 9}
    settings = {"optimizer": partial(optimizer, lr=0.1, weight_decay=0.01), "scheduler": scheduler}
    blocks, single = (Fit(*other, data=Blobs(**data), **settings) for other in ([], [OneByOne()]))
    assert (blocks.error, single.error) == (None, None)
    assert blocks.same_bits(single)
    assert blocks.trainer.global_step == single.trainer.global_step
    assert blocks.logger.points["train/loss"] == single.logger.points["train/loss"]
    rates = [fit.trainer.optimizers[0].param_groups[0]["lr"] for fit in (blocks, single)]
    assert rates[0] == rates[1]
    lengths = {len(losses) for losses in taken}
    assert max(lengths) == (1 if pause_s == 0 else steps_per_block(2))


class ByWeights(torch.optim.lr_scheduler.LRScheduler):
    """Of a user's own: depends on the weights."""

    def get_lr(self):
        (group,) = self.optimizer.param_groups
        return [0.1 / (1.0 + group["params"][0].detach().abs().max().item())]


def by_weights_later(optimizer):
    schedulers = [torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0), ByWeights(optimizer)]
    return torch.optim.lr_scheduler.SequentialLR(optimizer, schedulers, [20])


def by_lambda(optimizer):
    weight = optimizer.param_groups[0]["params"][0]
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0 / (1.0 + weight.abs().max().item()))


@pytest.mark.filterwarnings("ignore:The epoch parameter in")
@pytest.mark.parametrize("kind", [ByWeights, by_weights_later, by_lambda])
def test_a_schedule_that_reads_the_weights_sees_those_of_each_step(kind):
    def scheduler(optimizer):
        return {"scheduler": kind(optimizer), "interval": "step"}

    settings = {"optimizer": partial(SGD, lr=0.1), "scheduler": scheduler}
    data = {"batch_size": 2, "seed": 3, "num_train": 200}
    blocks, single = (Fit(*other, data=Blobs(**data), **settings) for other in ([], [OneByOne()]))
    assert (blocks.error, blocks.reason) == (None, None)
    assert blocks.same_bits(single)


class Interrupted(MLP):
    """Is sent a signal during its fourth step."""

    def __init__(self, stop: SafeStop):
        super().__init__(8, 4, hidden=[6])
        self.stop, self.calls = stop, 0

    def loss(self, outputs, targets):
        self.calls += 1
        self.stop.received = signal.SIGTERM if self.calls == 4 else None
        return super().loss(outputs, targets)


class Watching(Callback):
    """Keeps the trainer, and what state each epoch leaves PyTorch's generator in."""

    supports_blocks = True

    def __init__(self):
        self.states = []

    def on_fit_start(self, trainer, module):
        self.trainer = trainer

    def on_train_epoch_end(self, trainer, module):
        self.states.append(torch.get_rng_state())


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_steps_taken_at_once_leave_the_generator_as_single_steps_do(dropout):
    at_once, single = Watching(), Watching()
    for callbacks in ((at_once,), (single, OneByOne())):
        data = Blobs(batch_size=2, seed=3, num_train=4 * steps_per_block(2))
        seed_run(3)
        module = MLP(8, 4, hidden=[6], dropout=dropout)
        Fit(*callbacks, module=module, data=data, optimizer=partial(SGD, lr=0.1))
    assert len(at_once.states) == 2
    assert all(map(torch.equal, at_once.states, single.states))


class Impatient(SafeStop):
    """Is sent a signal before its thirtieth check."""

    checks = 0

    def check(self, *_, **__):
        self.checks += 1
        self.received = signal.SIGTERM if self.checks == 30 else None
        super().check()

    on_train_batch_start = on_train_epoch_start = check


def test_what_a_stopped_block_has_done_is_counted_and_logged(monkeypatch):
    monkeypatch.setattr("tracklight.engine.blocks.PAUSE_S", 0.0)
    watching, data = Watching(), Blobs(batch_size=2, seed=3, num_train=2 * steps_per_block(2))
    with pytest.raises(Stopped):
        Fit(Impatient(), watching, data=data, optimizer=partial(SGD, lr=0.1))
    logged = [step for step, _ in watching.trainer.logger.points["train/loss"]]
    assert len(logged) > 20  # some of them taken at once
    assert logged == [*range(1, watching.trainer.global_step + 1)]


def test_a_signal_waits_for_a_step_and_not_for_the_block():
    stop = SafeStop()
    module = Interrupted(stop)
    with pytest.raises(Stopped):
        Fit(stop, module=module)
    assert module.calls == 4


def test_a_block_holds_what_fits_the_caches_and_a_whole_minibatch():
    assert [steps_per_block(size) for size in (1, 16, 64, 256, 512, 4096)] == [128, 128, 32, 8, 4, 1]


def test_blocks_of_doubles_give_the_bits_of_single_steps():
    blocks, single = Fit(precision="64-true"), Fit(OneByOne(), precision="64-true")
    assert (blocks.reason, blocks.weights[0].dtype) == (None, torch.float64)
    assert blocks.same_bits(single)
    assert blocks.logger.points["train/loss"] == single.logger.points["train/loss"]


def test_a_loss_reads_the_number_of_steps_taken():
    class Annealed(MLP):
        def loss(self, outputs, targets):
            return super().loss(outputs, targets) / (1 + self.trainer.global_step)

    def fit(*callbacks):
        torch.manual_seed(0)
        return Fit(*callbacks, module=Annealed(8, 4, hidden=[6]))

    blocks, single = fit(), fit(OneByOne())
    assert (blocks.error, blocks.reason) == (None, None)
    assert blocks.logger.points["train/loss"] == single.logger.points["train/loss"]


class Logging(MLP):
    """Logs in its loss."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.accuracy = MulticlassAccuracy(4)  # of torchmetrics: it is macro-averaged
        self.updated = MulticlassAccuracy(4)  # never called, so without a value of a step
        self.num_calls = 0

    def loss(self, outputs, targets):
        loss = super().loss(outputs, targets)
        if self.training:
            self.log("train/twice", 2 * loss)
            self.log("train/weight", next(self.parameters())[0, 0])  # which the step then changes
            self.log("train/one", loss.double()[None] / 3)
            self.log("train/third", 1 / 3)
            self.accuracy(outputs, targets)
            self.log("train/accuracy", self.accuracy, on_step=True, on_epoch=True)
            self.updated.update(outputs, targets)
            self.log("train/updated", self.updated, on_step=True, on_epoch=True)
            self.log_dict({"train/mean": loss}, on_step=False, on_epoch=True)
            self.log("train/both", loss, on_step=True, on_epoch=True)
            for reduction in ("min", "max", "sum"):
                self.log(f"train/{reduction}", loss, on_epoch=True, on_step=False, reduce_fx=reduction)
            self.num_calls += 1
            self.log("train/weighted", loss, on_epoch=True, on_step=False, batch_size=self.num_calls)
        return loss


def test_what_a_loss_logs_is_logged_at_each_step_and_averaged_over_examples():
    def points(*callbacks):
        torch.manual_seed(0)
        fit = Fit(*callbacks, module=Logging(8, 4, hidden=[6]))
        assert fit.error is None and (fit.reason is None) == (not callbacks)
        return fit.logger.points

    blocks, single = points(), points(OneByOne())
    assert len(blocks["train/twice"]) == 2 * STEPS
    assert blocks.keys() == single.keys()
    assert blocks["train/updated_epoch"] == single["train/updated_epoch"]
    for key in (
        "train/twice",
        "train/weight",
        "train/one",
        "train/third",
        "train/both_step",
        "train/accuracy_step",
        "train/accuracy_epoch",
        "train/min",
        "train/max",
        "train/sum",
    ):
        assert blocks[key] == single[key], key
    for key in ("train/mean", "train/both_epoch", "train/weighted"):
        for (step, ours), (same, theirs) in zip(blocks[key], single[key], strict=True):
            assert step == same and ours == pytest.approx(theirs, rel=1e-6)  # sums in float32


class Stopping(MLP):
    """Asks to stop in the loss of its second step."""

    def loss(self, outputs, targets):
        self.trainer.should_stop |= self.trainer.global_step == 1
        return super().loss(outputs, targets)


def test_a_stop_that_a_loss_asks_for_comes_after_the_epoch_or_one_by_one_after_the_step():
    def steps(*callbacks):
        fit = Fit(*callbacks, module=Stopping(8, 4, hidden=[6]))
        assert fit.error is None and (fit.reason is None) == (not callbacks)
        return fit.trainer.global_step

    assert (steps(), steps(OneByOne())) == (STEPS, 2)


class Freezing(Callback):
    """Freezes the first layer after an epoch."""

    def on_train_epoch_start(self, trainer, module) -> None:
        if trainer.current_epoch == 1:
            next(module.parameters()).requires_grad_(False)


class Counting(Callback):
    """Counts forward passes by a hook that it sets up late."""

    def __init__(self):
        self.calls = 0

    def on_train_start(self, trainer, module) -> None:
        def count(owner, *_) -> None:
            self.calls += owner.training

        module.register_forward_hook(count)


@pytest.mark.parametrize("changer", [Freezing, lambda: ModelPruning("l1_unstructured", amount=0.5)])
def test_what_a_callback_changes_between_epochs_takes_effect(changer):
    def fit(*callbacks):
        torch.manual_seed(0)
        data = Blobs(batch_size=4, seed=3, num_train=200)
        return Fit(changer(), *callbacks, module=MLP(8, 4, hidden=[6]), data=data, max_epochs=3)

    blocks, single = fit(), fit(OneByOne())
    assert (blocks.error, single.error) == (None, None)
    assert (blocks.reason, single.reason is None) == (None, False)
    assert blocks.same_bits(single)
    assert blocks.logger.points["train/loss"] == single.logger.points["train/loss"]


def test_a_hook_registered_late_is_called_at_every_step():
    counting = Counting()
    fit = Fit(counting, data=Blobs(batch_size=4, seed=3, num_train=200))
    assert (fit.error, fit.reason) == (None, None)
    assert counting.calls == 2 * 50


def test_blocks_are_used_for_a_model_that_reads_the_total_number_of_steps():
    class UsingStepCount(MLP):
        def configure_optimizers(self):
            self.total = self.trainer.estimated_stepping_batches
            return torch.optim.SGD(self.parameters(), lr=0.01)

    fit = Fit(module=UsingStepCount(8, 4, hidden=[6]))
    assert (fit.error, fit.reason, fit.module.total) == (None, None, 2 * STEPS)
    assert fit.trainer.num_training_batches == 1  # an epoch, not 13 of one step
    assert fit.module.epoch_runner is None  # it ended with the fit


def test_a_loss_is_logged_every_so_many_steps_wherever_blocks_begin():
    blocks, single = (Fit(*each, log_every_n_steps=5, max_epochs=3) for each in ((), (OneByOne(),)))
    points = blocks.logger.points["train/loss"]
    assert points == single.logger.points["train/loss"]
    assert [step for step, _ in points] == [5, 10, 15, 20, 25, 30, 35]


def test_the_cycle_of_learning_rates_moves_every_step():
    rates = []

    class Recording(torch.optim.Adam):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    class Watched(MLP):
        def configure_optimizers(self):
            optimizer = Recording(self.parameters(), lr=0.01)
            return {"optimizer": optimizer, "lr_scheduler": one_cycle(optimizer)}

    fit = Fit(module=Watched(8, 4, hidden=[6]))
    assert fit.reason is None
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))])
    cycle = one_cycle(optimizer)["scheduler"]
    wanted = []
    for _ in range(2 * STEPS):
        wanted.append(cycle.get_last_lr()[0])
        optimizer.step()
        cycle.step() if len(wanted) < 2 * STEPS else None
    assert rates == wanted


def test_the_epochs_loss_is_the_mean_over_examples():
    fit = Fit(max_epochs=3)
    losses = [value for _, value in fit.logger.points["train/loss"]]
    sizes = [16] * 12 + [8]
    means = [value for _, value in fit.logger.points["train/loss_epoch"]]
    for epoch, mean in enumerate(means):
        part = losses[epoch * STEPS : (epoch + 1) * STEPS]
        wanted = math.fsum(a * b for a, b in zip(part, sizes, strict=True)) / 200
        assert mean == pytest.approx(wanted, rel=1e-6)  # float32 sums of 13 terms
    assert [step for step, _ in fit.logger.points["train/loss_epoch"]] == [13, 26, 39]
    assert [step for step, _ in fit.logger.points["train/loss"]] == list(range(1, 40))


@pytest.mark.parametrize("step", [1, 7, 13, 14, 20])
@pytest.mark.parametrize("callbacks", [(), (OneByOne(),)], ids=["blocks", "plain"])
def test_a_loss_of_nan_stops_at_its_step_and_leaves_the_best(tmp_path, callbacks, step):
    checkpoint = ModelCheckpoint(tmp_path, filename="best", monitor="val/loss")
    fit = Fit(*callbacks, checkpoint, module=Diverging(8, 4, nan_at=step), max_epochs=3)
    assert isinstance(fit.error, NonFinite)
    assert fit.error.step == step
    assert max([s for s, _ in fit.logger.points.get("train/loss", [(0, 0)])]) <= step
    assert all(s <= step for points in fit.logger.points.values() for s, _ in points)
    saved = list(tmp_path.glob("*.ckpt"))
    assert len(saved) == (step > STEPS)
    for path in saved:
        weights = torch.load(path, weights_only=True)["state_dict"].values()
        assert all(weight.isfinite().all() for weight in weights)


class Asking(Callback):
    """Hears of each block, and asks for the loader of the data set within an epoch."""

    supports_blocks = True

    def __init__(self):
        self.heard, self.sizes = [], []

    def on_block_end(self, trainer, module, share):
        self.heard.append((trainer.global_step, share))
        inputs, targets = next(iter(trainer.datamodule.train_dataloader()))
        self.sizes.append((len(inputs), len(targets)))


def test_callbacks_hear_of_each_block_and_the_data_set_still_yields_examples():
    steps = steps_per_block(2)
    rows, per_epoch = 4 * steps + 10, 2 * steps + 5
    asking = Asking()
    fit = Fit(asking, data=Blobs(batch_size=2, seed=3, num_train=rows))
    assert (fit.error, fit.reason, fit.trainer.num_training_batches) == (None, None, 1)
    ends, shares = [steps, 2 * steps, per_epoch], [2 * steps / rows, 4 * steps / rows, 1.0]
    assert asking.heard == [*zip([*ends, *(per_epoch + end for end in ends)], 2 * shares, strict=True)]
    assert asking.sizes == 6 * [(2 * steps, 2 * steps)]


def test_a_schedule_that_ends_too_early_fails_at_its_step():
    scheduler = partial(one_cycle, total_steps=40)
    data = {"batch_size": 2, "seed": 3, "num_train": 200}
    blocks, single = (Fit(*other, data=Blobs(**data), scheduler=scheduler) for other in ([], [OneByOne()]))
    assert isinstance(blocks.error, ValueError) and isinstance(single.error, ValueError)
    *points, _ = blocks.logger.points["train/loss"]  # Lightning does not log the step that it fails after
    assert points == single.logger.points["train/loss"]
    assert blocks.same_bits(single)


def test_a_loss_of_nan_is_told_though_an_error_follows_from_it():
    class Checking(Diverging):
        def loss(self, outputs, targets):
            if not outputs.isfinite().all():
                raise ValueError("expected finite outputs")
            return super().loss(outputs, targets)

    fit = Fit(module=Checking(8, 4, nan_at=7))
    assert isinstance(fit.error, NonFinite) and fit.error.step == 7


@pytest.mark.parametrize("optimizer", [SGD, AdamW])
def test_hooks_on_the_steps_of_all_optimizers_are_called_at_each(optimizer):
    calls = []
    handle = register_optimizer_step_post_hook(lambda *_: calls.append(1))
    try:
        Fit(optimizer=partial(optimizer, lr=0.1), data=Blobs(batch_size=2, seed=3, num_train=200))
    finally:
        handle.remove()
    assert len(calls) == 200


def test_a_loader_that_is_made_anew_each_epoch_gives_the_bits_of_single_steps():
    blocks = Fit(max_epochs=3, reload_dataloaders_every_n_epochs=1)
    assert (blocks.error, blocks.reason) == (None, None)
    assert blocks.same_bits(Fit(OneByOne(), max_epochs=3))
