"""The base of our models: a network, a loss and metrics, and factories for optimizer and scheduler.

Shapes: `B` minibatch size, `...` an example's own shape.
"""

from collections.abc import Callable, Iterable
from typing import Any

from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from typing_extensions import override

Factory = Callable[..., Any]


class Supervised(LightningModule):
    """Learns targets from inputs; a subclass states `forward`, `loss` and perhaps `metrics`.

    A subclass calls `save_hyperparameters()` first, with plain values only, so that its checkpoint
    reloads alone. The optimizer and scheduler come as factories, which are no hyperparameters:
    without them, plain SGD.
    """

    pure = False

    def __init__(self) -> None:
        super().__init__()
        self.optimizer_factory: Callable[[Iterable[nn.Parameter]], Optimizer] = SGD
        self.scheduler_factory: Callable[[Optimizer], dict[str, Any]] | None = None

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of one minibatch, a scalar: the mean over its examples."""
        raise NotImplementedError

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return further scores of one batch, scalars: means over its examples."""
        return {}

    @override
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch
        loss = self.loss(self(inputs), targets)
        size, several = len(targets), self.trainer.world_size > 1
        self.log("train/loss", loss, on_step=True, prog_bar=True, sync_dist=several)
        self.log(
            "train/loss_epoch",
            loss,
            on_step=False,
            on_epoch=True,
            batch_size=size,
            sync_dist=several,
        )
        return loss

    @override
    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate("val", batch)

    @override
    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate("test", batch)

    def _evaluate(self, stage: str, batch: tuple[Tensor, Tensor]) -> None:
        inputs, targets = batch
        outputs = self(inputs)
        scores = {"loss": self.loss(outputs, targets)} | self.metrics(outputs, targets)
        named = {f"{stage}/{name}": value for name, value in scores.items()}
        several = self.trainer.world_size > 1
        self.log_dict(named, batch_size=len(targets), prog_bar=True, sync_dist=several)

    @override
    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = self.optimizer_factory(self.parameters())
        if self.scheduler_factory is None:
            return {"optimizer": optimizer}
        return {"optimizer": optimizer, "lr_scheduler": self.scheduler_factory(optimizer)}
