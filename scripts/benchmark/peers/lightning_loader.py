"""Lightning with a DataLoader, nothing logged. `python lightning_loader.py FOLDER_OF_MNIST_RAW EPOCHS`.

Shapes: `B` images in a minibatch, `P` pixels.
"""

import warnings

import torch
from mnist import EPOCHS, Lines, load
from pytorch_lightning import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset


class Classifier(LightningModule):
    """The network, its loss and its optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:  # (B, P), (B,)
        """Return the loss."""
        images, labels = batch
        loss = functional.cross_entropy(self.layers(images), labels)
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def test_step(self, batch: tuple[Tensor, Tensor]) -> None:
        """Log the share of right answers."""
        images, labels = batch
        self.log("accuracy", (self.layers(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Each(Callback):
    """Prints a line an epoch."""

    def __init__(self) -> None:
        self.lines = Lines()

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Print it."""
        self.lines.end_epoch(float(trainer.callback_metrics["loss"]))


warnings.simplefilter("ignore")  # its advice on loaders without workers
train, test = (TensorDataset(*map(torch.from_numpy, part)) for part in load())
seed_everything(0)
each = Each()
trainer = Trainer(
    accelerator="cpu", max_epochs=EPOCHS, callbacks=[each], logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False,
)  # fmt: skip
model = Classifier()
trainer.fit(model, DataLoader(train, batch_size=64, shuffle=True))
(found,) = trainer.test(model, DataLoader(test, batch_size=1000), verbose=False)
each.lines.end(found["accuracy"])
