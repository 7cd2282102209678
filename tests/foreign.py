"""Models and data that tracklight does not know, as a user might bring them; and small data."""

import logging
import time
from collections.abc import Sequence
from typing import Any

import torch
from pytorch_lightning import Callback, LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from tracklight.data.tensor_data import Split, TensorData
from tracklight.models.linear_regression import LinearRegression
from tracklight.models.mlp import MLP
from tracklight.models.supervised import Supervised

CLASSES, FEATURES = 4, 8


def blobs(num: int, seed: int) -> Split:
    """Points around one centre a class: features (num, 8), targets (num,)."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(num) % CLASSES
    centres = torch.eye(CLASSES, FEATURES) * 2
    return Split(centres[targets] + torch.randn(num, FEATURES, generator=generator), targets)


class Blobs(TensorData):
    """A small classification task, made in a moment."""

    def __init__(
        self,
        batch_size: int | None,
        seed: int,
        num_train: int = 200,
        num_val: int = 64,
    ):
        super().__init__(batch_size, seed)
        self.num_train, self.num_val = num_train, num_val
        self.name, self.source = "blobs", "made on the spot"
        self.in_features, self.out_features = FEATURES, CLASSES

    def load(self) -> dict[str, Split]:
        train, val, test = blobs(self.num_train, 1), blobs(self.num_val, 2), blobs(64, 3)
        return {"train": train} | ({"val": val} if self.num_val else {}) | {"test": test}


class NotPure(MLP):
    """Promises nothing of its steps: `pure` is not inherited."""


class Relabelled(Blobs):
    """`Blobs`, but for one label."""

    def load(self) -> dict[str, Split]:
        splits = super().load()
        splits["train"].targets[17] = (splits["train"].targets[17] + 1) % CLASSES
        return splits


class _Noisy(Dataset):
    """Draws from the global generators of the worker that reads it, as augmentation does."""

    def __init__(self, split: Split, noise: float):
        self.split, self.noise = split, noise

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x = self.split.features[index]
        return x + self.noise * torch.randn(x.shape), self.split.targets[index]


class NoisyData(LightningDataModule):
    """A shuffled, augmented data set read by worker processes."""

    in_features, out_features = FEATURES, CLASSES

    def __init__(self, batch_size: int = 20, num_workers: int = 2):
        super().__init__()
        self.batch_size, self.num_workers = batch_size, num_workers

    def train_dataloader(self) -> DataLoader:
        return DataLoader(
            _Noisy(blobs(200, 1), 0.1),
            self.batch_size,
            shuffle=True,
            num_workers=self.num_workers,
            multiprocessing_context="fork" if self.num_workers else None,
        )

    def val_dataloader(self) -> DataLoader:
        return DataLoader(_Noisy(blobs(64, 2), 0.0), 64)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(_Noisy(blobs(64, 3), 0.0), 64)


class Net(LightningModule):
    """A network with its own steps, optimizer, schedule and names of metrics."""

    def __init__(self, in_features: int, out_features: int, hidden: int = 16, lr: float = 0.01):
        super().__init__()
        self.lr = lr
        self.layers = nn.Sequential(
            *(nn.Linear(in_features, hidden), nn.Dropout(0.3), nn.ReLU()),
            nn.Linear(hidden, out_features),
        )

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layers(inputs)

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        loss = functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        self.log("val_loss", functional.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        self.log("test_loss", functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.Adam(self.parameters(), self.lr)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1, factor=0.5)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "monitor": "val_loss", "interval": "epoch"},
        }


class Diverging(Supervised):
    """Fits, but its loss turns to NaN in one given optimizer step."""

    def __init__(self, in_features: int, out_features: int, nan_at: int):
        super().__init__()
        self.save_hyperparameters()
        self.layer = nn.Linear(in_features, out_features)
        self.nan_at, self.calls = nan_at, 0

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.calls += self.training
        loss = functional.cross_entropy(outputs, targets)
        return loss * float("nan") if self.training and self.calls == self.nan_at else loss


class Greedy(Supervised):
    """Asks for more memory than there is once it has trained a little."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.layer = nn.Linear(in_features, out_features)
        self.calls = 0

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 15:
            torch.empty(1 << 60, dtype=torch.uint8)
        return functional.cross_entropy(outputs, targets)


class Listener(Callback):
    """Hears of each batch, which blocks cannot grant: forces plain Lightning."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.batches.append(len(batch[1]))


class Slow(Callback):
    """Lets each epoch take at least so long."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def on_train_epoch_start(self, *_: Any) -> None:
        time.sleep(self.seconds)


class Scripted(LinearRegression):
    """A regression that logs, of each validation in turn, what a text says, as in "nan;1;0.5"."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, told: str = ""):
        super().__init__(in_features, out_features, bias)
        self.told, self.validations = told.split(";"), 0

    def on_validation_epoch_end(self) -> None:
        value = float(self.told[min(self.validations, len(self.told) - 1)])
        self.log("val/told", value)
        self.validations += 1


class Client(Callback):
    """A callback that takes anything, logs it, and may fail with it in its message."""

    def __init__(self, fails: bool = False, **arguments: Any):
        self.fails, self.arguments = fails, arguments

    def on_train_start(self, trainer, pl_module) -> None:
        logging.getLogger("client").error("calls with %s", self.arguments)
        if self.fails:
            raise RuntimeError(f"cannot log in with {self.arguments}")
