"""Ours: what `train.py` runs, handing over between blocks of steps."""

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from typing_extensions import override

from benchmark.race import Relay
from tracklight.config.compose import compose
from tracklight.engine.checkpoints import ResumeCheckpoint
from tracklight.experiment.train import run
from tracklight.tracking import sender
from tracklight.tracking.run import Run

FLUSH_S = 60.0
SEND_PERIOD_S = sender._PERIOD_S
LAST, BEST = ResumeCheckpoint, ModelCheckpoint


def train(
    relay: Relay,
    root: Path,
    epochs: int,
    tracking: Path | None = None,
    checkpoints: Sequence[type[Callback]] = (),
    gradients: bool = False,
    accelerator: str = "cpu",
    words: Sequence[str] = (),
) -> None:
    """Train `experiment=seed_mlp`.

    Args:
        relay: Whom to hand over to.
        root: Folder of MNIST/raw.
        epochs: How many.
        tracking: Folder of the store that takes every step's loss; None for no tracking.
        checkpoints: Those taken each epoch, of LAST and BEST.
        gradients: Whether those are tracked too.
        accelerator: Lightning's name for the device.
        words: Further overrides.
    """
    words = [*words, "experiment=seed_mlp", f"data.root={root}", f"trainer.max_epochs={epochs}"]
    words += [f"trainer.accelerator={accelerator}", "trainer.enable_progress_bar=false"]
    words += ["tracking=none" if tracking is None else f"tracking.dir={tracking}"]
    words += ["tracking.gradients=true"] if gradients else []
    sender._PERIOD_S = threading.TIMEOUT_MAX  # a gate keeps its time instead
    run(compose(words), callbacks=[Baton(relay, checkpoints)], test=False)


class Gate:
    """Lets a run's sender work only while that run trains, and by that run's clock.

    So its work is charged to nobody else: what is under way when the turn ends is waited for.
    """

    def __init__(self, tracked: Run):
        self.tracked = tracked
        self.turn = threading.Lock()
        self.since_sent_s = 0.0
        writer = tracked._sender.writer
        send_next = writer.send_next

        def send_in_turn() -> None:
            with self.turn:
                send_next()

        writer.send_next = send_in_turn

    def flush(self) -> None:
        """Return once MLflow has everything."""
        assert self.tracked.flush(FLUSH_S), "MLflow does not take the points"
        self.since_sent_s = 0.0

    def hand_over(self, relay: Relay) -> None:
        """Keep the sender still while others train."""
        self.turn.acquire()
        try:
            relay.hand_over()
        finally:
            self.turn.release()
        self.looked_at_s = time.perf_counter()

    def wake(self) -> None:
        """Wake the sender if its period is over."""
        now_s = time.perf_counter()
        self.since_sent_s += now_s - self.looked_at_s
        self.looked_at_s = now_s
        if self.since_sent_s > SEND_PERIOD_S:
            self.tracked._sender._wake.set()
            self.since_sent_s = 0.0


class Baton(Callback):
    """Hands over after every slice of whole blocks, the last time once all of the training is done.

    An epoch's last slice includes whatever is done at an epoch's end, and MLflow having it all.
    """

    supports_blocks = True

    def __init__(self, relay: Relay, checkpoints: Sequence[type[Callback]]):
        self.relay = relay
        self.checkpoints = tuple(checkpoints)
        self.gate: Gate | None = None
        self.steps = 0

    @override
    def setup(self, trainer: Any, pl_module: LightningModule, stage: str) -> None:
        skipped = tuple({LAST, BEST} - {*self.checkpoints})
        others = [c for c in trainer.callbacks if c is not self and not isinstance(c, skipped)]
        trainer.callbacks = [*others, self]

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(trainer.logger, Run):
            self.gate = Gate(trainer.logger)
            self.gate.flush()
        self._hand_over(trainer)

    def on_block_end(self, trainer: Trainer, pl_module: LightningModule, share: float) -> None:
        """Hand over, unless the epoch ends with this block."""
        if self.gate:
            self.gate.wake()
        if trainer.global_step - self.steps >= self.relay.slice and share < 1.0:
            self._hand_over(trainer)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.gate:
            self.gate.flush()
        if trainer.current_epoch + 1 != trainer.max_epochs:
            self._hand_over(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.gate:
            self.gate.flush()
        self.relay.result = [parameter.detach() for parameter in pl_module.parameters()]
        self._hand_over(trainer)

    def _hand_over(self, trainer: Trainer) -> None:
        self.relay.steps = trainer.global_step - self.steps
        self.steps = trainer.global_step
        if self.gate:
            self.gate.hand_over(self.relay)
        else:
            self.relay.hand_over()
