"""Lightning as its users write it, with and without its own MLFlowLogger.

Shapes: `N` images, `B` in a minibatch.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.loggers import MLFlowLogger
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader
from typing_extensions import override

from benchmark.by_hand import BATCH_SIZE, LEARNING_RATE, make_model, torchvision_set
from benchmark.race import Relay

Batch = tuple[Tensor, Tensor]  # images (B, ...), labels (B,)


class Classifier(LightningModule):
    """The network of the notes."""

    def __init__(self, relay: Relay):
        super().__init__()
        self.layers = make_model()
        self.relay = relay

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels = batch
        loss = functional.cross_entropy(self.layers(images), labels)
        self.log("train/loss", loss)
        return loss

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=LEARNING_RATE)

    @override
    def on_train_end(self) -> None:
        self.relay.hand_over()


class Loader:
    """Batches for Lightning; the hand-over lies here, since a callback more would cost time."""

    def __init__(self, batches: Callable[[], Iterable[Batch]], length: int, relay: Relay):
        self.batches = batches
        self.length = length
        self.relay = relay

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Batch]:
        return self.relay.epoch(self.batches)


def resident(relay: Relay, images: Tensor, labels: Tensor, epochs: int, logger: MLFlowLogger | None) -> None:
    """Train on tensors, images (N, 28, 28) as float32."""

    def batches() -> Iterator[Batch]:
        for rows in torch.randperm(len(images)).split(BATCH_SIZE):
            yield images[rows], labels[rows]

    _fit(relay, Loader(batches, -(-len(images) // BATCH_SIZE), relay), epochs, logger)


def torchvision_loader(relay: Relay, root: Path, epochs: int, logger: MLFlowLogger) -> None:
    """Train on torchvision's data set through a DataLoader."""
    loader = DataLoader(torchvision_set(root), batch_size=BATCH_SIZE, shuffle=True)
    _fit(relay, Loader(lambda: loader, len(loader), relay), epochs, logger)


def _fit(relay: Relay, loader: Any, epochs: int, logger: MLFlowLogger | None) -> None:
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=logger or False,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(relay), loader)


def mlflow_logger(database: Path, name: str) -> MLFlowLogger:
    """Return Lightning's logger into an MLflow database that is there."""
    return MLFlowLogger(experiment_name=name, tracking_uri=f"sqlite:///{database}")
