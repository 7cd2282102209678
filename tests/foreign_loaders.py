"""Data loaders of every kind that a user may bring, and a module that draws wherever it can."""

import random
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from pytorch_lightning import LightningDataModule
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from foreign import CLASSES, FEATURES, Net, blobs

ROWS = 120
KINDS = (
    *("in_process", "workers", "persistent", "generator", "weighted", "numpy", "python", "nested"),
    *("own_class", "combined", "dictionary", "subsets", "stream", "stream_of_workers"),
)


class Noisy(Dataset):
    """Augments with every library's global generator, or with one of its own."""

    def __init__(self, seed: int = 1, rng: Any = None):
        self.features, self.targets = (part for part in vars(blobs(ROWS, seed)).values())
        self.rng = rng

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        drawn = torch.randn(FEATURES) + np.random.normal() + random.gauss()
        if self.rng is not None:
            drawn = drawn + (self.rng.gauss() if isinstance(self.rng, random.Random) else self.rng.normal())
        return (self.features[index] + 0.1 * drawn).float(), self.targets[index]


class Stream(IterableDataset):
    """A stream without length, in an order that is drawn anew each time."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        data = Noisy()
        for index in np.random.permutation(ROWS):
            yield data[index]


class Batches:
    """No DataLoader at all."""

    def __len__(self) -> int:
        return ROWS // 20

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        data = Noisy()
        for rows in np.random.permutation(ROWS).reshape(-1, 20):
            x, y = zip(*(data[row] for row in rows), strict=True)
            yield torch.stack(x), torch.stack(y)


class Loaders(LightningDataModule):
    """Trains on loaders of one of the `KINDS`; validates on the same kind of dataset."""

    in_features, out_features = FEATURES, CLASSES

    def __init__(self, kind: str, batch_size: int = 20):
        super().__init__()
        self.kind, self.batch_size = kind, batch_size
        self.generator = torch.Generator().manual_seed(42)
        self.orders: list[Any] = []

    def loader(self, data: Dataset, **arguments: Any) -> DataLoader:
        if arguments.get("num_workers"):
            arguments["multiprocessing_context"] = "fork"
        return DataLoader(data, self.batch_size, **arguments)

    def train_dataloader(self) -> Any:
        workers: dict[str, Any] = {"num_workers": 2, "shuffle": True}
        match self.kind:
            case "in_process":
                return self.loader(Noisy(), shuffle=True)
            case "workers":
                return self.loader(Noisy(), **workers)
            case "persistent":
                return self.loader(Noisy(), persistent_workers=True, **workers)
            case "generator":
                return self.loader(Noisy(), generator=self.generator, **workers)
            case "weighted":
                sampler = WeightedRandomSampler(
                    [1.0] * ROWS, ROWS, generator=torch.Generator().manual_seed(7)
                )
                return self.loader(Noisy(), sampler=sampler)
            case "numpy":
                return self.loader(Noisy(rng=np.random.default_rng(3)), shuffle=True)
            case "python":
                return self.loader(Noisy(rng=random.Random(3)), shuffle=True)
            case "nested":
                whole = Noisy(rng=np.random.default_rng(3))
                parts = ConcatDataset([Subset(whole, range(50)), Subset(whole, range(50, ROWS))])
                return self.loader(parts, shuffle=True)
            case "own_class":
                return Batches()
            case "combined":
                short = Subset(Noisy(2), range(50))
                parts = {"a": self.loader(Noisy(), shuffle=True), "b": self.loader(short, shuffle=True)}
                return CombinedLoader(parts, "max_size_cycle")
            case "dictionary":
                return {"a": self.loader(Noisy(), **workers), "b": self.loader(Noisy(2), **workers)}
            case "subsets":  # drawn by each library
                rows = [*torch.randperm(ROWS)[:30], *np.random.permutation(ROWS)[:30]]
                rows += random.sample(range(ROWS), 20 + self.trainer.current_epoch)
                return self.loader(Subset(Noisy(), list(map(int, rows))), shuffle=True)
            case "stream":
                return self.loader(Stream())
            case "stream_of_workers":
                return self.loader(Stream(), num_workers=2)
        raise ValueError(self.kind)

    def val_dataloader(self) -> DataLoader:
        subset = Subset(Noisy(3), torch.randperm(ROWS)[:60].tolist())
        if self.kind == "persistent":
            return self.loader(subset, num_workers=1, persistent_workers=True)
        rng = torch.Generator().manual_seed(5)
        return self.loader(subset, sampler=SubsetRandomSampler(range(60), generator=rng))


class Restless(Net):
    """Draws in every hook, logs several values a step, and asks for the run's length if told to."""

    def __init__(
        self,
        in_features: int = FEATURES,
        out_features: int = CLASSES,
        total: bool = False,
        manual: bool = False,
        checkpoint: bool = False,
    ):
        super().__init__(in_features, out_features)
        self.checkpoint = checkpoint
        self.total, self.automatic_optimization = total, not manual
        self.scale, self.shift = 0.0, 0.0
        self.generator = torch.Generator().manual_seed(11)

    def draw(self) -> float:
        own = torch.rand(1, generator=self.generator).item()
        return torch.rand(1).item() + np.random.rand() + random.random() + own

    def configure_callbacks(self) -> list[ModelCheckpoint]:
        return [ModelCheckpoint(monitor="val_loss", save_top_k=2)] if self.checkpoint else []

    def on_fit_start(self) -> None:
        self.scale = 1 + self.draw()

    def on_train_start(self) -> None:
        self.scale += self.draw()

    def on_train_epoch_start(self) -> None:
        self.shift = self.draw()

    def on_train_epoch_end(self) -> None:
        self.draw()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        parts = list(batch.values()) if isinstance(batch, dict) else [batch]
        noise = 0.01 * self.draw()
        loss = sum(
            super(Restless, self).training_step([x * self.scale + self.shift + noise, y], 0) for x, y in parts
        )
        if self.automatic_optimization:
            return loss
        self.manual_backward(loss)
        if batch_idx % 4 == 3:
            optimizer = self.optimizers()
            optimizer.step()
            optimizer.zero_grad()
        return None

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.log("val_drawn", batch[0].mean() + self.draw(), on_step=True, on_epoch=False)

    def configure_optimizers(self) -> Any:
        if not self.automatic_optimization:
            return torch.optim.Adam(self.parameters(), 0.01)
        if not self.total:
            return super().configure_optimizers()
        optimizer = torch.optim.Adam(self.parameters(), 0.01)
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=int(steps))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Hiding(Restless):
    """Draws from generators that only a closure, a default, a partial or a bound method holds."""

    def __init__(self, in_features: int = FEATURES, out_features: int = CLASSES):
        super().__init__(in_features, out_features)
        closed, default = torch.Generator().manual_seed(13), np.random.RandomState(14)
        draws = (
            lambda: torch.rand(1, generator=closed).item(),
            lambda rng=default: rng.rand(),
            partial(np.random.Generator.random, np.random.default_rng(15)),
            random.Random(16).random,
        )
        self.draws = lambda: sum(draw() for draw in draws)

    def draw(self) -> float:
        return super().draw() + self.draws()
