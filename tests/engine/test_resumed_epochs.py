"""An epoch goes the same way whether the run came to it or was resumed there."""

import random
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from fitting import Fit
from pytorch_lightning import Callback, Trainer, seed_everything
from pytorch_lightning.callbacks import EMAWeightAveraging, LearningRateMonitor
from torch import nn

from foreign_loaders import KINDS, Hiding, Loaders, Restless
from tracklight.engine import checkpoint_io
from tracklight.engine.checkpoint_io import DurableCheckpointIO, newest_resume_checkpoint
from tracklight.engine.checkpoints import ResumeCheckpoint
from tracklight.engine.seeding import EpochSeeds

IO = DurableCheckpointIO()
EPOCHS = 5


class Stop(Callback):
    """Ends the fit as a crash would, amid its fourth epoch."""

    supports_blocks = True

    def on_validation_batch_end(self, trainer, *_) -> None:
        if trainer.current_epoch == 3:
            raise RuntimeError("stopped")


@pytest.fixture
def thrice(tmp_path, monkeypatch):
    """Fit whole, stopped, and continued from the checkpoint that is left."""
    monkeypatch.setattr(checkpoint_io, "INTERVAL_S", 0.0)
    fit = Trainer.fit

    def thrice(make_module, make_data, *callbacks, resume_at=None, **arguments):
        def once(*more):
            resuming = ResumeCheckpoint(IO)
            resuming.folder = tmp_path
            seed_everything(3, verbose=False)
            first = [EpochSeeds(3), resuming, *(each() for each in callbacks), *more]
            return Fit(
                *first,
                module=make_module(),
                data=make_data(),
                plugins=[IO],
                **{"max_epochs": EPOCHS} | arguments,
            )

        whole = once()
        assert whole.error is None, whole.error
        for path in tmp_path.glob("*.ckpt"):
            IO.remove_checkpoint(path)
        stopped = once(Stop())
        assert str(stopped.error) == "stopped"
        path = newest_resume_checkpoint(tmp_path)
        begun = torch.load(path, weights_only=True)["global_step"]
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "fit", lambda self, *a, **k: fit(self, *a, ckpt_path=str(path), **k))
            continued = once()
        assert continued.error is None, continued.error
        assert continued.trainer.current_epoch == whole.trainer.current_epoch
        return whole, continued, begun

    return thrice


def tail(fit, key, begun):
    return [point for point in fit.logger.points[key] if point[0] > begun]


DEAR = ("persistent", "generator", "dictionary", "stream_of_workers")  # two processes for each epoch
RELOADS = ((1, 1), (2, 1), (3, 2))  # loaders are made anew and validation takes place every so many epochs


@pytest.mark.parametrize(
    ("kind", "period", "every"),
    [
        *(pytest.param(kind, 0, 1, marks=[pytest.mark.slow] * (kind in DEAR)) for kind in KINDS),
        *(("subsets", *each) for each in RELOADS),
    ],
)
def test_a_resumed_epoch_draws_what_it_would_have_drawn(thrice, kind, period, every):
    reload = {"reload_dataloaders_every_n_epochs": period, "check_val_every_n_epoch": every}
    told = pytest.warns(UserWarning, match="persistent_workers=True is ignored")
    with told if kind == "persistent" else nullcontext():
        make = Restless if every == 1 else partial(Restless, manual=True)  # has no ReduceLROnPlateau
        whole, continued, begun = thrice(make, partial(Loaders, kind), **reload)
    assert begun > 0
    for key in ("train_loss", "val_drawn"):
        assert tail(continued, key, begun) == tail(whole, key, begun)
    assert continued.same_bits(whole)


IN_THIS_FILE = random.Random(7)


class Noise(nn.Module):
    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(5)

    def forward(self, x):
        return x + 0.3 * torch.randn(x.shape, generator=self.generator)


class Within(Restless):
    """Draws from a generator in a layer."""

    def __init__(self):
        super().__init__()
        self.noise = nn.Sequential(Noise())

    def training_step(self, batch, batch_idx):
        return super().training_step((self.noise(batch[0]), batch[1]), batch_idx)


class Mixing(Callback):
    """Draws from a generator of its own, and from that of its file."""

    def __init__(self):
        self.options = {"rngs": [np.random.default_rng(1)]}
        IN_THIS_FILE.seed(7)  # as in a new process

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        batch[0].mul_(self.options["rngs"][0].beta(1, 1) + IN_THIS_FILE.random())


@pytest.mark.parametrize("owner", ["layer", "callback", "function"])
def test_generators_are_reseeded_wherever_they_are(thrice, owner):
    make = {"layer": Within, "function": Hiding}.get(owner, Restless)
    callbacks = [Mixing] if owner == "callback" else []
    whole, continued, begun = thrice(make, partial(Loaders, "in_process"), *callbacks)
    assert begun > 0 and tail(continued, "train_loss", begun) == tail(whole, "train_loss", begun)
    assert continued.same_bits(whole)


class Owner(Restless):
    """Brings its data loaders itself."""

    def train_dataloader(self):
        return Loaders("in_process").train_dataloader()

    def val_dataloader(self):
        return Loaders("in_process").val_dataloader()


def test_so_it_does_with_loaders_of_the_module_of_which_averaging_makes_a_copy(thrice, monkeypatch):
    monkeypatch.setattr(Trainer, "__deepcopy__", lambda *_: pytest.fail("copied"), raising=False)
    whole, continued, begun = thrice(Owner, bool, partial(EMAWeightAveraging, decay=0.9))
    assert begun > 0 and tail(continued, "train_loss", begun) == tail(whole, "train_loss", begun)
    assert continued.same_bits(whole)


@pytest.mark.parametrize("kind", [pytest.param("total", marks=pytest.mark.slow), "manual", "accumulated"])
def test_so_it_does_under_a_schedule_of_the_total_with_manual_optimization_and_accumulation(thrice, kind):
    make = Restless if kind == "accumulated" else partial(Restless, **{kind: True})
    accumulating = {"accumulate_grad_batches": 4 if kind == "accumulated" else 1}
    whole, continued, begun = thrice(
        make, partial(Loaders, "in_process"), LearningRateMonitor, **accumulating
    )
    assert begun > 0
    for key in ("train_loss", "val_drawn", "lr-Adam"):
        assert tail(continued, key, begun) == tail(whole, key, begun)
    assert continued.same_bits(whole)


def plateau(optimizer):
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=10.0, factor=0.5)
    return {"scheduler": scheduler, "interval": "epoch", "monitor": "val/loss"}


def test_under_max_steps_no_epoch_is_skipped_and_no_plateau_forgotten(thrice):
    # of 13 steps an epoch: amid the fifth
    whole, continued, begun = thrice(lambda: None, lambda: None, max_steps=57, scheduler=plateau)
    assert begun == 39
    assert [step for step, _ in continued.logger.points["train/loss"]] == [*range(40, 58)]
    assert tail(continued, "train/loss", begun) == tail(whole, "train/loss", begun)
    assert continued.same_bits(whole)
    rates = [fit.trainer.optimizers[0].param_groups[0]["lr"] for fit in (whole, continued)]
    assert rates == [0.01 * 0.5**4] * 2  # by that threshold no epoch of the four improves


class Labels(Restless):
    """Remembers the labels of each batch."""

    def training_step(self, batch, batch_idx):
        self.labels = [*getattr(self, "labels", []), torch.stack([y for _, y in batch.values()])]
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("kind", ["dictionary", "combined"])
def test_shuffled_loaders_that_are_read_together_have_orders_of_their_own(kind):
    fit = Fit(EpochSeeds(3), module=Labels(), data=Loaders(kind, batch_size=10), max_epochs=4)
    labels = torch.cat(fit.module.labels, dim=1)
    agreeing = (labels[0] == labels[1]).float().mean()
    assert 0.15 < agreeing < 0.35  # 0.25 of four classes, drawn 480 times: five standard deviations


def test_averaged_weights_extended_by_epochs_are_those_of_all_epochs_at_once(tmp_path, monkeypatch):
    def once(epochs, path=None):
        resuming = ResumeCheckpoint(IO)
        resuming.folder = tmp_path
        fit, callbacks = Trainer.fit, [resuming, EMAWeightAveraging(decay=0.9)]
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "fit", lambda self, *a, **k: fit(self, *a, ckpt_path=path, **k))
            return Fit(*callbacks, max_epochs=epochs, plugins=[IO])

    few = once(2)
    more, whole = once(4, str(newest_resume_checkpoint(tmp_path))), once(4)
    assert few.error is more.error is whole.error is None
    assert more.same_bits(whole)
