"""The callback that tells a sweep how a trial goes, and ends it when the sweep says so."""

import math
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from pytorch_lightning import Trainer
from typing_extensions import override

from tracklight.engine.progress import AfterEpoch
from tracklight.sweep.trial import EpochReport
from tracklight.tracking.tags import EPOCHS_RUN_TAG, OUTCOME_TAG, PRUNED, SECONDS_TAG


class PruningCallback(AfterEpoch):
    """Reports the score after each epoch, and marks the run with how it ended.

    With a pruner the answer is awaited before the epoch's checkpoint is taken, so that a continued
    trial never has epochs behind it that the pruner did not see.

    Args:
        metric: The score's.
        tell: Takes an epoch; says whether to stop.
        asks: Whether an answer is awaited.
        once: Whether this is a preflight, which stops after the first epoch.
    """

    listens_by_block = True

    def __init__(
        self, metric: str, tell: Callable[[EpochReport, bool], bool], asks: bool, once: bool = False
    ):
        super().__init__()
        self.metric = metric
        self.tell = tell
        self.asks = asks
        self.once = once
        self.pruned = False
        self.run_id: str | None = None
        self.metrics: set[str] = set()
        self.data: str | None = None
        self.epochs = 0
        self.before_s = 0.0
        self.began_s = math.nan

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"pruned": self.pruned, "seconds": self.seconds}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.pruned = state_dict["pruned"]
        self.before_s = state_dict["seconds"]

    @property
    def seconds(self) -> float:
        """How long the trial has trained, all its starts together."""
        now_s = 0.0 if math.isnan(self.began_s) else time.monotonic() - self.began_s
        return self.before_s + now_s

    @override
    def setup(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        self.run_id = getattr(trainer.logger, "run_id", None)
        if self.once:
            self.data = getattr(getattr(trainer, "datamodule", None), "digest", None)

    @override
    def on_fit_start(self, *_: Any) -> None:
        self.began_s = time.monotonic()

    @override
    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        self.metrics |= set(trainer.callback_metrics)
        value = trainer.callback_metrics.get(self.metric)
        if value is not None and trainer.is_global_zero:
            self.pruned = self.tell(EpochReport(trainer.current_epoch + 1, float(value)), self.asks)
        if self.pruned or self.once:
            trainer.should_stop = True

    @override
    def on_fit_end(self, trainer: Trainer, *_: Any) -> None:
        self._leave(trainer, {OUTCOME_TAG: PRUNED if self.pruned else "complete"})

    @override
    def on_exception(self, trainer: Trainer, *_: Any) -> None:
        if not math.isnan(self.began_s):
            with suppress(OSError):  # what it failed by may be the disk
                self._leave(trainer, {})

    def _leave(self, trainer: Trainer, outcome: dict[str, str]) -> None:
        self.epochs = trainer.current_epoch
        if trainer.logger is not None:
            spent = {EPOCHS_RUN_TAG: str(self.epochs), SECONDS_TAG: f"{self.seconds:.3f}"}
            trainer.logger.set_tags(spent | outcome)  # pyright: ignore[reportAttributeAccessIssue]
