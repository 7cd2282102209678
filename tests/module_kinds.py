"""Modules of each kind that Lightning takes, without chance: plain Lightning gives the same bits."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_lightning import Callback, LightningDataModule, LightningModule
from pytorch_lightning.callbacks import BaseFinetuning, BasePredictionWriter
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Subset, TensorDataset, random_split

from foreign import CLASSES, FEATURES, blobs

RELU = partial(nn.ReLU)


class Ordered(LightningDataModule):
    """The blobs in their order, by plain data loaders."""

    def setup(self, stage: str) -> None:
        self.parts = {"train": blobs(64, 1), "val": blobs(32, 2), "test": blobs(48, 3)}

    def _loader(self, name: str) -> DataLoader:
        part = self.parts[name]
        return DataLoader(list(zip(part.features, part.targets, strict=True)), 16)

    def train_dataloader(self) -> DataLoader:
        return self._loader("train")

    def val_dataloader(self) -> DataLoader:
        return self._loader("val")

    def test_dataloader(self) -> DataLoader:
        return self._loader("test")


class Plain(LightningModule):
    """Automatic optimization with an optimizer and names of its own."""

    def __init__(self, width: int = 6, lr: float = 0.05):
        super().__init__()
        self.save_hyperparameters("width")
        self.width, self.lr = width, lr
        self.make_layers()

    def make_layers(self) -> None:
        self.layers = nn.Sequential(
            nn.Linear(FEATURES, self.width), nn.ReLU(), nn.Linear(self.width, CLASSES)
        )

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layers(inputs)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", functional.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), self.lr)


class Scheduled(Plain):
    """A schedule on a metric, clipping of its own, and metrics at validation steps and a step of its own."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", functional.cross_entropy(self(batch[0]), batch[1]))

    def on_train_epoch_end(self) -> None:
        self.log_dict({"step": float(self.current_epoch + 1), "by_epoch": 1.0})

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.5, momentum=0.9)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "val_loss"}}


class Manual(Plain):
    """Two optimizers, stepped by hand, one of them every second batch."""

    def __init__(self, width: int = 6):
        super().__init__(width)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        first, last = self.optimizers()
        loss = functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        self.manual_backward(loss)
        last.step()
        last.zero_grad()
        if batch_idx % 2:
            first.step()
            first.zero_grad()

    def configure_optimizers(self) -> Any:
        parts = (self.layers[0].parameters(), self.layers[2].parameters())
        return [torch.optim.Adam(parameters, self.lr) for parameters in parts]


class InSetup(Plain):
    """Layers that only `setup` makes, anew each time."""

    def make_layers(self) -> None: ...

    def setup(self, stage: str) -> None:
        torch.manual_seed(7)
        super().make_layers()


class InConfigureModel(Plain):
    """Layers that only `configure_model` makes, once."""

    def make_layers(self) -> None: ...

    def configure_model(self) -> None:
        if not hasattr(self, "layers"):
            torch.manual_seed(7)
            super().make_layers()


class Adapter(Plain):
    """A frozen first layer that no checkpoint holds, which therefore do not load strictly."""

    def __init__(self, width: int = 6):
        super().__init__(width)
        self.strict_loading = False
        self.layers[0].requires_grad_(False)
        nn.init.constant_(self.layers[0].weight, 0.5)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        state = super().state_dict(*args, **kwargs)
        return {key: value for key, value in state.items() if not key.startswith("layers.0")}


class Hooked(Plain):
    """Weights that a hook stores under another name and brings back."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["mine"] = {f"{key}!": value for key, value in checkpoint["state_dict"].items()}
        checkpoint["state_dict"] = {}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = {key[:-1]: value for key, value in checkpoint["mine"].items()}


class Objects(Plain):
    """Hyperparameters that are objects beside plain ones."""

    def __init__(self, width: int = 6, net: Any = RELU, where: Any = Path("a/b")):
        super().__init__(width)
        self.save_hyperparameters()
        self.layers[1] = net()


class OddNames(Plain):
    """Metrics under names that MLflow refuses, text, and pictures."""

    def test_step(self, batch: Any, batch_idx: int) -> None:
        outputs = self(batch[0])
        self.log("test_loss", functional.cross_entropy(outputs, batch[1]))
        self.log("test_acc@1", (outputs.argmax(1) == batch[1]).float().mean())

    def on_train_epoch_end(self) -> None:
        client, run_id = self.logger.experiment, self.logger.run_id
        client.log_text(run_id, f"epoch {self.current_epoch}", f"notes/{self.current_epoch}.txt")
        self.logger.log_metrics({"mood": "good", "f1 (macro)": 0.5})


class Fluent(Plain):
    """Logs by MLflow's fluent functions."""

    def on_train_epoch_end(self) -> None:
        import mlflow

        mlflow.log_metric("fluent", float(self.current_epoch), step=self.global_step)


class Talkative(OddNames):
    """Logs in all of these ways, in each of its processes, and a name that MLflow refuses in validation."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.log("val_acc@1", (self(batch[0]).argmax(1) == batch[1]).float().mean(), sync_dist=True)

    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        Fluent.on_train_epoch_end(self)


class Autologged(Plain):
    """Switches MLflow's autologging on."""

    def __init__(self, width: int = 6):
        import mlflow

        super().__init__(width)
        mlflow.pytorch.autolog(log_models=False, checkpoint=False)


class Unseeded(Ordered):
    """Splits 96 rows as it is made and again as it is set up, by the generators as they stand."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = np.random.permutation(144)[:96].tolist()

    def name(self) -> str:
        return "a method, where our data sets have a text"

    def setup(self, stage: str) -> None:
        part = Subset(TensorDataset(*vars(blobs(144, 1)).values()), self.rows)
        self.parts = dict(zip(("train", "val", "test"), random_split(part, [48, 16, 32]), strict=True))

    def _loader(self, name: str) -> DataLoader:
        return DataLoader(self.parts[name], 16)


class Drawing(Plain):
    """Tests with noise, on rows of which it tells how many it was trained on; logs a score of its own."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen = {*getattr(self, "seen", ()), *map(tuple, batch[0].tolist())}
        self.log("score", 100.0)
        return super().training_step(batch, batch_idx)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        super().test_step([batch[0] + torch.randn_like(batch[0]), batch[1]], batch_idx)
        shared = sum(tuple(row) in getattr(self, "seen", ()) for row in batch[0].tolist())
        self.log("test_shared", float(shared), reduce_fx="sum")


class Backbone(Plain):
    """A network that is finetuned: its optimizer takes the weights that are not frozen."""

    def make_layers(self) -> None:
        self.backbone = nn.Sequential(nn.Linear(FEATURES, self.width), nn.BatchNorm1d(self.width))
        self.head = nn.Linear(self.width, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(torch.relu(self.backbone(inputs)))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([each for each in self.parameters() if each.requires_grad], self.lr)


class Gradual(BaseFinetuning):
    """Trains the backbone from the third epoch on."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.backbone)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 2:
            self.unfreeze_and_add_param_group(pl_module.backbone, optimizer)


class Writer(BasePredictionWriter):
    """Would write what `Trainer.predict` gives."""

    def write_on_batch_end(self, *_: Any) -> None:
        raise AssertionError("nothing is predicted in training")


class Shrink:
    """What a LambdaCallback calls: takes a hundredth off all weights."""

    def __call__(self, trainer: Any, module: Any) -> None:
        with torch.no_grad():
            for weight in module.parameters():
                weight.mul_(0.99)


class Stop(Callback):
    """Fails in the middle of an epoch, once."""

    def __init__(self, epoch: int, mark: str):
        self.epoch, self.mark = epoch, Path(mark)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if trainer.current_epoch == self.epoch and batch_idx == 1 and not self.mark.exists():
            self.mark.touch()
            raise RuntimeError("stopped here")


class Remembering(Callback):
    """Keeps what no checkpoint can hold."""

    def state_dict(self) -> dict[str, Any]:
        return {"mine": Stop}


KINDS = (Plain, Scheduled, Manual, InSetup, InConfigureModel, Adapter, Hooked, Objects, OddNames, Fluent)
