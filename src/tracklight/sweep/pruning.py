"""The callback that reports a trial's score after each epoch and stops a pruned trial."""

import math
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from pytorch_lightning import Trainer
from typing_extensions import override

from tracklight.engine.progress import AfterEpoch
from tracklight.tracking.tags import EPOCHS_RUN_TAG, OUTCOME_TAG, PRUNED, SECONDS_TAG


class PruningCallback(AfterEpoch):
    """Reports the score after each epoch, stops a pruned trial, and tags its run.

    The report precedes the epoch's checkpoint: the pruner has seen every epoch of a checkpoint.

    Args:
        metric: `score.metric`.
        report: Takes the epoch, counted from 1, and the score; returns whether to prune the trial.
        one_epoch: Whether to stop after the first epoch, as a preflight does.
    """

    supports_blocks = True

    def __init__(self, metric: str, report: Callable[[int, float], bool], one_epoch: bool = False):
        super().__init__()
        self.metric = metric
        self.report = report
        self.one_epoch = one_epoch
        self.pruned = False
        self.run_id: str | None = None
        self.metrics: set[str] = set()
        self.data: str | None = None
        self.epochs = 0
        self.earlier_s = 0.0
        self.started_s = math.nan

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"pruned": self.pruned, "seconds": self.seconds}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.pruned = state_dict["pruned"]
        self.earlier_s = state_dict["seconds"]

    @property
    def seconds(self) -> float:
        """Training time over all starts of the trial."""
        now_s = 0.0 if math.isnan(self.started_s) else time.monotonic() - self.started_s
        return self.earlier_s + now_s

    @override
    def setup(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        self.run_id = getattr(trainer.logger, "run_id", None)
        if self.one_epoch:
            self.data = getattr(getattr(trainer, "datamodule", None), "digest", None)

    @override
    def on_fit_start(self, *_: Any) -> None:
        self.started_s = time.monotonic()

    @override
    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        self.metrics |= set(trainer.callback_metrics)
        value = trainer.callback_metrics.get(self.metric)
        if value is not None and trainer.is_global_zero:
            self.pruned = self.report(trainer.current_epoch + 1, float(value))
        if self.pruned or self.one_epoch:
            trainer.should_stop = True

    @override
    def on_fit_end(self, trainer: Trainer, *_: Any) -> None:
        self._log_end(trainer, {OUTCOME_TAG: PRUNED if self.pruned else "complete"})

    @override
    def on_exception(self, trainer: Trainer, *_: Any) -> None:
        if not math.isnan(self.started_s):
            with suppress(OSError):  # the disk itself may be what failed
                self._log_end(trainer, {})

    def _log_end(self, trainer: Trainer, outcome: dict[str, str]) -> None:
        self.epochs = trainer.current_epoch
        if trainer.logger is not None:
            spent = {EPOCHS_RUN_TAG: str(self.epochs), SECONDS_TAG: f"{self.seconds:.3f}"}
            trainer.logger.set_tags(spent | outcome)  # pyright: ignore[reportAttributeAccessIssue]
