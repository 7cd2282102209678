"""The base of our models: a network, a loss and metrics, and factories for optimizer and scheduler.

Shapes: `B` minibatch size, `...` an example's own shape.
"""

from collections.abc import Callable, Iterable
from typing import Any

from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from typing_extensions import override


class Supervised(LightningModule):
    """Learns targets from inputs; a subclass defines `forward`, `loss` and optionally `metrics`.

    A subclass calls `save_hyperparameters()` first, with plain values only, so that its checkpoint
    can be loaded by itself. Optimizer and scheduler are given as factories, which are not
    hyperparameters; the default is plain SGD.

    With an `epoch_runner`, each batch is an epoch of blocks of minibatches. The runner takes all its
    optimizer steps; Lightning's automatic optimization only calls `training_step`.
    """

    pure = False
    epoch_runner: Callable[[Any], tuple[Tensor, Tensor, int]] | None = None
    log_recorder: Callable[..., None] | None = None  # replaces `log` during a block
    last_metric: Any = None  # that a scheduler has stepped on

    def __init__(self) -> None:
        super().__init__()
        self.optimizer_factory: Callable[[Iterable[nn.Parameter]], Optimizer] = SGD
        self.scheduler_factory: Callable[[Optimizer], dict[str, Any]] | None = None

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of one minibatch, a scalar: the mean over its examples."""
        raise NotImplementedError

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return further metrics of one batch, scalars: means over its examples."""
        return {}

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.epoch_runner is None:
            inputs, targets = batch
            loss = mean = self.loss(self(inputs), targets)
            size = len(targets)
        else:  # the last loss, and the mean over all examples
            loss, mean, size = self.epoch_runner(batch)
        logger = None if self.epoch_runner is None else False  # the runner logs each of its steps
        sync = self.trainer.world_size > 1
        self.log("train/loss", loss, prog_bar=True, logger=logger, on_step=True, sync_dist=sync)
        self.log("train/loss_epoch", mean, on_step=False, on_epoch=True, batch_size=size, sync_dist=sync)
        return loss

    @override
    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        (self.log_recorder or super().log)(name, value, *args, **kwargs)

    @override
    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        if self.epoch_runner is None:
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    @override
    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if self.epoch_runner is None:
            super().backward(loss, *args, **kwargs)

    @override
    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        if self.epoch_runner is None:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        else:
            optimizer_closure()

    @override
    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate("val", batch)

    @override
    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate("test", batch)

    def _evaluate(self, stage: str, batch: tuple[Tensor, Tensor]) -> None:
        inputs, targets = batch
        outputs = self(inputs)
        values = {"loss": self.loss(outputs, targets)} | self.metrics(outputs, targets)
        values = {f"{stage}/{name}": value for name, value in values.items()}
        sync = self.trainer.world_size > 1
        self.log_dict(values, batch_size=len(targets), prog_bar=True, sync_dist=sync)

    @override
    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Step a scheduler; one that follows a metric only on a new value, which is a new object."""
        if metric is None:
            scheduler.step()
        elif metric is not getattr(self, "last_metric", None):
            self.last_metric = metric
            scheduler.step(metric)

    @override
    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = self.optimizer_factory(self.parameters())
        if self.scheduler_factory is None:
            return {"optimizer": optimizer}
        return {"optimizer": optimizer, "lr_scheduler": self.scheduler_factory(optimizer)}
