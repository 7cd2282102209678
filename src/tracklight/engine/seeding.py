"""Random numbers as a pure function of (seed, epoch) and (seed, step): reseeded, never saved.

Resuming at an epoch's boundary therefore needs no generator state, and dropout does not depend on
how many steps are taken at a time.
"""

import random

import numpy as np
import torch
from pytorch_lightning import LightningDataModule, LightningModule, seed_everything

from tracklight.engine.lightning_internals import call_before_iteration

MASK = (1 << 64) - 1
STEPS, EPOCHS = 1, 2  # streams


def derive_seed(seed: int, stream: int, index: int) -> int:
    """Return the 64-bit seed at `index`, from 0, of an independent stream of a run's seed.

    Source: SplitMix64's finaliser (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number
    generators").
    """
    z = ((seed + 1) * 0x9E3779B97F4A7C15 + (stream << 56) + index * 0xD1342543DE82EF95) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def seed_step(seed: int, step: int, rank: int = 0) -> None:
    """Reseed PyTorch's global generators for one optimizer step, in about a microsecond."""
    derived = derive_seed(seed, STEPS + 2 * rank, step)
    torch.default_generator.manual_seed(derived)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(derived)


def seed_epoch(seed: int, epoch: int) -> None:
    """Reseed every global generator at an epoch's start, before its first example is drawn."""
    derived = derive_seed(seed, EPOCHS, epoch)
    torch.manual_seed(derived)
    np.random.seed(derived & 0xFFFFFFFF)
    random.seed(derived)


def seed_run(seed: int) -> None:
    """Seed every global generator before the model is built."""
    seed_everything(seed, workers=True, verbose=False)


def reseed_epochs(owner: LightningModule | LightningDataModule, seed: int) -> None:
    """Make the order of foreign training data a pure function of (seed, epoch).

    Samplers and workers draw from the global generators when a data loader is iterated.
    """

    def reseed() -> None:
        assert owner.trainer is not None
        seed_epoch(seed, owner.trainer.current_epoch)

    call_before_iteration(owner, reseed)
