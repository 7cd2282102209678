"""One training in this process, untracked but for a logger in memory, with and without blocks."""

import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from functools import partial
from typing import Any

import torch
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers.logger import Logger

from foreign import Blobs
from tracklight.engine.blocks import Blocks
from tracklight.engine.seeding import seed_run
from tracklight.models.mlp import MLP

QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}


class Recorder(Logger):
    """Keeps what is logged, by key: steps and values."""

    def __init__(self) -> None:
        super().__init__()
        self.points: dict[str, list[tuple[int, float]]] = {}
        self.trainer: Any = None

    name = version = "recorder"

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        for key, value in metrics.items():
            self.log_series(key, [self.trainer.global_step], [value])

    def log_series(self, key: str, steps: Sequence[int], values: Sequence[float]) -> None:
        self.points.setdefault(key, []).extend(zip(steps, values, strict=True))


class OneByOne(Callback):
    """Hears of each batch, and so forces plain Lightning."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        pass


class Fit:
    """A training that has ended: trainer, module, points, and the reason why blocks were not used.

    Args:
        *callbacks: Further callbacks.
        module: What to train; None for an MLP with dropout under Adam.
        data: What on; None for 13 minibatches an epoch, the last one smaller; False for the module's own.
        optimizer: Makes the optimizer of the parameters; None for Adam.
        scheduler: Makes the optimizer's scheduler and its Lightning settings.
        **arguments: The Trainer's.
    """

    def __init__(
        self,
        *callbacks: Callback,
        module: Any = None,
        data: Any = None,
        optimizer: Any = None,
        scheduler: Any = None,
        **arguments: Any,
    ):
        torch.set_num_threads(1)
        seed_run(3)
        self.module = module or MLP(8, 4, hidden=[6], dropout=0.4)
        if hasattr(self.module, "optimizer_factory"):
            self.module.optimizer_factory = optimizer or partial(torch.optim.Adam, lr=0.01)
            self.module.scheduler_factory = scheduler
        self.data = Blobs(batch_size=16, seed=3, num_train=200) if data is None else data
        self.logger, said = Recorder(), io.StringIO()
        self.trainer = Trainer(
            **QUIET | {"accelerator": "cpu", "max_epochs": 2, "log_every_n_steps": 1} | arguments,
            callbacks=[Blocks(3), *callbacks],
            logger=self.logger,
            enable_checkpointing=any(isinstance(each, ModelCheckpoint) for each in callbacks),
        )
        self.logger.trainer = self.trainer
        for callback in self.trainer.callbacks:
            if isinstance(callback, Blocks):
                callback.logger = self.logger
        self.error: BaseException | None = None
        try:
            with redirect_stdout(said):
                self.trainer.fit(self.module, datamodule=self.data or None)
        except Exception as error:
            self.error = error
        printed = said.getvalue().splitlines(keepends=True)
        reasons = [line.strip() for line in printed if line.startswith("Steps are taken")]
        print(*(line for line in printed if line.strip() not in reasons), sep="", end="")
        self.reason = reasons[0].partition(": ")[2] if reasons else None

    @property
    def weights(self) -> list[torch.Tensor]:
        return [each.detach().clone() for each in self.module.parameters()]

    def same_bits(self, other: "Fit") -> bool:
        return all(map(torch.equal, self.weights, other.weights))
