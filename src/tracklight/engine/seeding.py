"""Random numbers as a pure function of (seed, epoch) and (seed, step): reseeded, never saved.

Resuming at an epoch's boundary therefore needs no generator's state, and dropout does not depend on
how many steps are taken at a time.
"""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from pytorch_lightning import LightningDataModule, LightningModule, seed_everything
from torch.utils.data import DataLoader

MASK = (1 << 64) - 1


def mixed_seed(seed: int, stream: int, index: int) -> int:
    """Return a 64-bit seed for entry `index` of a stream of draws.

    Args:
        seed: The run's seed, in [0, 2**32).
        stream: Tells independent streams apart: steps from epochs.
        index: Global step or epoch, counted from 0.

    Source: SplitMix64's finaliser (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number
    generators").
    """
    z = (
        seed * 0x9E3779B97F4A7C15 + (stream << 56) + index * 0xD1342543DE82EF95 + 0x9E3779B97F4A7C15
    ) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


STEPS, EPOCHS = 1, 2


def seed_step(seed: int, step: int, rank: int = 0) -> None:
    """Reseed PyTorch's global generators for one optimizer step, in about a microsecond."""
    drawn = mixed_seed(seed, STEPS + 2 * rank, step)
    torch.default_generator.manual_seed(drawn)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(drawn)


def seed_epoch(seed: int, epoch: int) -> None:
    """Reseed every global generator at an epoch's start, before its first example is drawn."""
    drawn = mixed_seed(seed, EPOCHS, epoch)
    torch.manual_seed(drawn)
    np.random.seed(drawn & 0xFFFFFFFF)
    random.seed(drawn)


def seed_run(seed: int) -> None:
    """Seed every global generator before the model is built."""
    seed_everything(seed, workers=True, verbose=False)


def seed_epochs_of(owner: LightningModule | LightningDataModule, seed: int) -> None:
    """Make the order of a foreign data loader a pure function of (seed, epoch).

    A shuffling sampler draws its order, and workers their seeds, from the global generator at
    `iter()`. Lightning calls that before it tells a resumed run's first epoch to the sampler
    (upstream #21938), so the loaders themselves reseed there.
    """
    original: Callable[[], Any] = owner.train_dataloader

    def train_dataloader() -> Any:
        return apply_to_collection(
            original(), DataLoader, lambda loader: _reseeding(loader, owner, seed)
        )

    owner.train_dataloader = train_dataloader


def _reseeding(
    loader: DataLoader, owner: LightningModule | LightningDataModule, seed: int
) -> DataLoader:
    kind = type(loader)

    def reseed_and_iterate(self: DataLoader) -> Any:
        assert owner.trainer is not None
        seed_epoch(seed, owner.trainer.current_epoch)
        return kind.__iter__(self)

    loader.__class__ = type(kind.__name__, (kind,), {"__iter__": reseed_and_iterate})
    return loader
