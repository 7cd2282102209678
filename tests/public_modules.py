"""Modules in the shape of widely copied ones, none of which knows tracklight."""

from collections.abc import Callable
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, TensorDataset, random_split
from torchmetrics import MaxMetric, MeanMetric
from torchmetrics.classification.accuracy import Accuracy

SIDE, CLASSES = 8, 4


def images(num: int, seed: int) -> TensorDataset:
    """Small noisy images, one bright quarter a class: (num, 1, 8, 8) and (num,)."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num) % CLASSES
    pixels = torch.randn(num, 1, SIDE, SIDE, generator=generator) * 0.5
    for label in range(CLASSES):
        rows, columns = slice(label // 2 * 4, label // 2 * 4 + 4), slice(label % 2 * 4, label % 2 * 4 + 4)
        pixels[labels == label, :, rows, columns] += 1
    return TensorDataset(pixels, labels)


# The shape of the template for Lightning and Hydra that most projects start from: the network, the
# optimizer and the scheduler come as objects and are saved as hyperparameters, metrics are modules.


class SimpleDenseNet(nn.Module):
    def __init__(
        self, input_size: int = SIDE * SIDE, lin1_size: int = 16, output_size: int = CLASSES
    ) -> None:
        super().__init__()
        self.model = nn.Sequential(
            nn.Linear(input_size, lin1_size),
            nn.BatchNorm1d(lin1_size),
            nn.ReLU(),
            nn.Linear(lin1_size, output_size),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.flatten(1))


class ImageDataModule(L.LightningDataModule):
    def __init__(
        self, train_val_split: tuple[int, int] = (96, 32), batch_size: int = 16, num_workers: int = 0
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.data_train: Dataset | None = None

    def setup(self, stage: str | None = None) -> None:
        if self.data_train is None:
            generator = torch.Generator().manual_seed(42)
            parts = random_split(images(128, 1), self.hparams.train_val_split, generator=generator)
            self.data_train, self.data_val = parts
            self.data_test = images(64, 2)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.data_train, self.hparams.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.data_val, self.hparams.batch_size, shuffle=False)

    def test_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.data_test, self.hparams.batch_size, shuffle=False)


class ImageLitModule(L.LightningModule):
    def __init__(
        self,
        net: nn.Module,
        optimizer: Callable[..., torch.optim.Optimizer],
        scheduler: Callable[..., Any] | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.net = net
        self.criterion = nn.CrossEntropyLoss()
        self.train_acc = Accuracy(task="multiclass", num_classes=CLASSES)
        self.val_acc = Accuracy(task="multiclass", num_classes=CLASSES)
        self.test_acc = Accuracy(task="multiclass", num_classes=CLASSES)
        self.train_loss, self.val_loss, self.test_loss = MeanMetric(), MeanMetric(), MeanMetric()
        self.val_acc_best = MaxMetric()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def on_train_start(self) -> None:
        self.val_loss.reset()
        self.val_acc.reset()
        self.val_acc_best.reset()

    def model_step(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        x, y = batch
        logits = self.forward(x)
        return self.criterion(logits, y), torch.argmax(logits, dim=1), y

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss, preds, targets = self.model_step(batch)
        self.train_loss(loss)
        self.train_acc(preds, targets)
        self.log("train/loss", self.train_loss, on_step=False, on_epoch=True, prog_bar=True)
        self.log("train/acc", self.train_acc, on_step=False, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        loss, preds, targets = self.model_step(batch)
        self.val_loss(loss)
        self.val_acc(preds, targets)
        self.log("val/loss", self.val_loss, on_step=False, on_epoch=True, prog_bar=True)
        self.log("val/acc", self.val_acc, on_step=False, on_epoch=True, prog_bar=True)

    def on_validation_epoch_end(self) -> None:
        self.val_acc_best(self.val_acc.compute())
        self.log("val/acc_best", self.val_acc_best.compute(), sync_dist=True, prog_bar=True)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        loss, preds, targets = self.model_step(batch)
        self.test_loss(loss)
        self.test_acc(preds, targets)
        self.log("test/loss", self.test_loss, on_step=False, on_epoch=True, prog_bar=True)
        self.log("test/acc", self.test_acc, on_step=False, on_epoch=True, prog_bar=True)

    def setup(self, stage: str) -> None:
        if self.hparams.compile and stage == "fit":
            self.net = torch.compile(self.net)

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = self.hparams.optimizer(params=self.trainer.model.parameters())
        if self.hparams.scheduler is not None:
            scheduler = self.hparams.scheduler(optimizer=optimizer)
            config = {"scheduler": scheduler, "monitor": "val/loss", "interval": "epoch", "frequency": 1}
            return {"optimizer": optimizer, "lr_scheduler": config}
        return {"optimizer": optimizer}


# The shape of Lightning's GAN: two optimizers stepped by hand, pictures logged by the logger's experiment.


class GAN(L.LightningModule):
    def __init__(self, latent_dim: int = 8, lr: float = 0.002, b1: float = 0.5, b2: float = 0.999) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.generator = nn.Sequential(
            nn.Linear(latent_dim, 32), nn.LeakyReLU(0.2), nn.Linear(32, SIDE * SIDE), nn.Tanh()
        )
        self.discriminator = nn.Sequential(
            nn.Flatten(), nn.Linear(SIDE * SIDE, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1), nn.Sigmoid()
        )
        self.validation_z = torch.randn(8, latent_dim)
        self.example_input_array = torch.zeros(2, latent_dim)

    def forward(self, z: Tensor) -> Tensor:
        return self.generator(z).view(-1, 1, SIDE, SIDE)

    def adversarial_loss(self, y_hat: Tensor, y: Tensor) -> Tensor:
        return functional.binary_cross_entropy(y_hat, y)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> None:
        imgs, _ = batch
        optimizer_g, optimizer_d = self.optimizers()
        z = torch.randn(imgs.shape[0], self.hparams.latent_dim).type_as(imgs)

        self.toggle_optimizer(optimizer_g)
        valid = torch.ones(imgs.size(0), 1).type_as(imgs)
        g_loss = self.adversarial_loss(self.discriminator(self(z)), valid)
        self.log("g_loss", g_loss, prog_bar=True)
        self.manual_backward(g_loss)
        optimizer_g.step()
        optimizer_g.zero_grad()
        self.untoggle_optimizer(optimizer_g)

        self.toggle_optimizer(optimizer_d)
        real_loss = self.adversarial_loss(self.discriminator(imgs), valid)
        fake = torch.zeros(imgs.size(0), 1).type_as(imgs)
        fake_loss = self.adversarial_loss(self.discriminator(self(z).detach()), fake)
        d_loss = (real_loss + fake_loss) / 2
        self.log("d_loss", d_loss, prog_bar=True)
        self.manual_backward(d_loss)
        optimizer_d.step()
        optimizer_d.zero_grad()
        self.untoggle_optimizer(optimizer_d)

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.log("val_d_real", self.discriminator(batch[0]).mean())

    def test_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.log("test_d_real", self.discriminator(batch[0]).mean())

    def configure_optimizers(self) -> tuple[list[torch.optim.Optimizer], list[Any]]:
        lr, betas = self.hparams.lr, (self.hparams.b1, self.hparams.b2)
        opt_g = torch.optim.Adam(self.generator.parameters(), lr=lr, betas=betas)
        opt_d = torch.optim.Adam(self.discriminator.parameters(), lr=lr, betas=betas)
        return [opt_g, opt_d], []

    def on_train_epoch_end(self) -> None:
        with torch.no_grad():
            sample = self(self.validation_z.type_as(self.generator[0].weight))[0, 0].cpu().numpy()
        picture = np.uint8((sample + 1) * 127)
        path = f"generated/epoch_{self.current_epoch}.png"
        self.logger.experiment.log_image(self.logger.run_id, picture, path)


# The shape of Lightning's language model: two inputs, a demo Transformer, plain SGD.


class Sequences(Dataset[tuple[Tensor, Tensor]]):
    """Counting upwards by a stride, modulo the vocabulary."""

    def __init__(self, num: int, length: int = 8, vocab_size: int = 12) -> None:
        self.num, self.length, self.vocab_size = num, length, vocab_size

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        tokens = (index + torch.arange(self.length + 1) * (1 + index % 2)) % self.vocab_size
        return tokens[:-1], tokens[1:]


class SequenceDataModule(L.LightningDataModule):
    def __init__(self, batch_size: int = 10, vocab_size: int = 12) -> None:
        super().__init__()
        self.batch_size, self.vocab_size = batch_size, vocab_size

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Sequences(80, vocab_size=self.vocab_size), self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Sequences(20, vocab_size=self.vocab_size), self.batch_size)

    def test_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Sequences(30, vocab_size=self.vocab_size), self.batch_size)


class LanguageModel(L.LightningModule):
    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.model = L.pytorch.demos.Transformer(vocab_size=vocab_size, ninp=16, nhead=2, nhid=16, nlayers=1)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = self.step(batch)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.step(batch), prog_bar=True)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("test_loss", self.step(batch), prog_bar=True)

    def step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, target = batch
        output = self.model(inputs, target)
        return functional.nll_loss(output, target.view(-1))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    @rank_zero_only
    def on_train_end(self) -> None:
        rows = {"token": list(range(3)), "norm": self.model.embedding.weight[:3].norm(dim=1).tolist()}
        self.logger.experiment.log_table(self.logger.run_id, rows, "embedding.json")
