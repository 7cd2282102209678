"""Random numbers as a pure function of (seed, epoch) and (seed, step): reseeded, never saved.

Resuming at an epoch's boundary therefore needs no generator state, and dropout does not depend on
how many steps are taken at a time.
"""

import pickle
import random
import sys
import warnings
import zlib
from collections.abc import Callable
from functools import cache, partial, wraps
from itertools import islice
from types import BuiltinMethodType, CellType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from pytorch_lightning import Callback, LightningModule, Trainer, seed_everything
from pytorch_lightning.utilities.model_helpers import is_overridden
from pytorch_lightning.utilities.seed import isolate_rng
from torch.utils.data import DataLoader
from typing_extensions import override

from tracklight.engine.lightning_internals import reload_epoch
from tracklight.engine.torch_internals import restart_workers

MASK = (1 << 64) - 1
STEPS, EPOCHS, STARTS = 1, 2, 4  # streams; those of the steps of further ranks are odd
SETUPS = 10  # of a fit or a test: a data module may split its rows then, and each time alike
GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
GLOBAL = (torch.default_generator, np.random.rand.__self__, random.seed.__self__)
CLOSED = (torch.Tensor, np.ndarray, str, bytes, int, float, type, ModuleType, Trainer, type(None))
LOADERS = {"train_dataloader": 6, "val_dataloader": 8}


def derive_seed(seed: int, stream: int, index: int) -> int:
    """Return the 64-bit seed at `index`, from 0, of an independent stream of a run's seed.

    Source: SplitMix64's finaliser (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number
    generators").
    """
    z = ((seed + 1) * 0x9E3779B97F4A7C15 + (stream << 56) + index * 0xD1342543DE82EF95) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """Return the 64-bit seed of PyTorch's generators for one optimizer step, from 0."""
    return derive_seed(seed, STEPS + 2 * rank, step)


def seed_step(seed: int, step: int, rank: int = 0) -> None:
    """Reseed PyTorch's global generators for one optimizer step, in about a microsecond."""
    derived = step_seed(seed, step, rank)
    torch.default_generator.manual_seed(derived)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(derived)


def seed_all(seed: int, stream: int, index: int) -> None:
    """Reseed every library's global generators."""
    derived = derive_seed(seed, stream, index)
    if _has_accelerator():
        torch.manual_seed(derived)
    else:  # in a microsecond: `manual_seed` formats three stacks for the case that there will be one
        torch.default_generator.manual_seed(derived)
    np.random.seed(derived & 0xFFFFFFFF)
    random.seed(derived)


@cache  # each time it loads NVIDIA's library anew: half a millisecond, in each epoch
def _has_accelerator() -> bool:
    return torch.accelerator.is_available()


def seed_run(seed: int) -> None:
    """Seed every global generator before the model is built."""
    seed_everything(seed, workers=True, verbose=False)


class EpochSeeds(Callback):
    """Seeds all generators wherever a fit or an epoch begins and before data loaders are built.

    Orders, subsets and augmentation are then pure functions of (seed, epoch). As the first callback it
    precedes what others draw in the same hooks.
    """

    supports_blocks = True

    def __init__(self, seed: int):
        self.seed = seed
        self._own: dict[Any, int] = {}  # generators of foreign objects: their first seeds

    @override
    def setup(self, trainer: Any, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._renew([pl_module, trainer.datamodule, *trainer.callbacks], 0)  # whatever a sanity check draws
        for owner in (pl_module, trainer.datamodule):
            for hook, stream in LOADERS.items():
                if owner and is_overridden(hook, owner):
                    load = getattr(owner, hook)
                    # Lightning sees whose hook it is; copies of a module share a function, and no more.
                    seeded = wraps(load)(lambda load=load, i=stream: self._load(trainer, load, i))
                    setattr(owner, hook, seeded)

    def _load(self, trainer: Any, load: Callable[[], Any], stream: int) -> Any:
        """Load data as in the epoch in which an uninterrupted run does so; what follows draws as ever."""
        progress = trainer.fit_loop.epoch_progress.current
        epoch = progress.completed
        progress.completed = reload_epoch(trainer, validates=stream == LOADERS["val_dataloader"])
        try:
            with isolate_rng(include_cuda=torch.cuda.is_initialized()):
                seed_all(self.seed, stream, progress.completed)
                loaders = load()
        finally:
            progress.completed = epoch
        self._renew([loaders], epoch)
        return loaders

    @override
    def on_fit_start(self, *_: Any, **__: Any) -> None:
        seed_all(self.seed, STARTS, 0)

    on_train_start = on_fit_start  # a resumed fit comes here in another epoch

    @override
    def on_train_epoch_start(self, trainer: Any, pl_module: LightningModule) -> None:
        epoch = trainer.current_epoch
        seed_all(self.seed, EPOCHS, epoch)
        loaders = trainer.train_dataloader, trainer.val_dataloaders
        self._renew([*loaders, pl_module, trainer.datamodule, *trainer.callbacks], epoch)

    def _renew(self, roots: list[Any], epoch: int) -> None:
        """Reseed the generators that other people's objects hold and end persistent workers."""
        theirs = [each for each in roots if not _is_ours(each)]
        for each in find_objects(theirs, (DataLoader, *GENERATORS)):
            if not isinstance(each, DataLoader):
                self._reseed(each, epoch)
            elif each.persistent_workers:
                reason = "workers that outlive an epoch cannot be reseeded"
                warnings.warn(f"persistent_workers=True is ignored: {reason}", stacklevel=2)
                restart_workers(each)

    def _reseed(self, generator: Any, epoch: int) -> None:
        is_torch = isinstance(generator, torch.Generator)
        if generator not in self._own:
            own = generator.initial_seed() if is_torch else zlib.crc32(pickle.dumps(generator))
            self._own[generator] = own
        derived = derive_seed(self._own[generator], EPOCHS, epoch)
        if is_torch:
            generator.manual_seed(derived)
        elif isinstance(generator, np.random.Generator):
            generator.bit_generator.state = type(generator.bit_generator)(derived).state
        else:
            generator.seed(derived & 0xFFFFFFFF)


def _is_ours(value: Any) -> bool:
    return type(value).__module__.startswith("tracklight.")


def find_objects(roots: list[Any], kinds: tuple[type, ...], most: int = 10_000) -> list[Any]:
    """Return the objects of some kinds that others hold, however deep, or the files of their classes.

    A function holds what it closes over and its defaults, a partial its arguments, a bound method its object.
    """
    seen, todo, files = dict[int, Any](), [*roots], set[str]()
    for each in todo:  # which grows: the nearest come first
        if isinstance(each, CLOSED) or id(each) in seen or len(seen) > 10 * most:
            continue
        seen[id(each)] = each
        held = each if isinstance(each, dict) else getattr(each, "__dict__", {})
        todo += islice(each if isinstance(each, list | tuple) else held.values(), most)
        if isinstance(each, FunctionType):
            todo += [cell.cell_contents for cell in each.__closure__ or () if cell != CellType()]
            todo += [each.__defaults__, each.__kwdefaults__]
        elif isinstance(each, partial):
            todo += [each.func, each.args, each.keywords]
        elif isinstance(each, MethodType | BuiltinMethodType):
            # Lightning gives each callback the `log` of the model: of one of ours, a way to all of the run.
            todo += [] if _is_ours(each.__self__) else [each.__self__]
        name = str(getattr(each, "__module__", ""))
        if name not in files:
            files.add(name)
            file = sys.modules.get(name)
            if "-packages" not in (getattr(file, "__file__", None) or "-packages"):
                todo += [value for value in vars(file).values() if isinstance(value, kinds)]
    return [each for each in seen.values() if isinstance(each, kinds) and each not in GLOBAL]
