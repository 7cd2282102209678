"""What a run prints: a bar on a terminal, one line an epoch elsewhere, a closing summary."""

import sys
import time
from collections.abc import Mapping
from typing import Any

from pytorch_lightning import Callback, Trainer
from pytorch_lightning.callbacks import EarlyStopping, RichProgressBar
from typing_extensions import override


def progress_callback(enabled: bool) -> Callback | None:
    """Return the callback that shows progress on this kind of screen."""
    if not enabled:
        return None
    return RichProgressBar(leave=True) if sys.stdout.isatty() else EpochLines()


class AfterEpoch(EarlyStopping):
    """A callback whose `on_train_epoch_end` runs after the module's own, and sees what that logs.

    Lightning calls only early stopping and checkpoints that late; the base's checks never run.
    """

    def __init__(self) -> None:
        super().__init__(monitor="", check_on_train_epoch_end=True)
        self._before: dict[str, Any] = {}

    @property
    @override
    def state_key(self) -> str:
        return type(self).__qualname__

    @override
    def state_dict(self) -> dict[str, Any]:
        return {}

    @override
    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        self._before = dict(trainer.callback_metrics)

    def measured(self, trainer: Trainer) -> dict[str, Any]:
        """Return the metrics measured in this epoch; of others, Lightning keeps the last value, as it is."""
        return {k: v for k, v in trainer.callback_metrics.items() if v is not self._before.get(k)}


class EpochLines(AfterEpoch):
    """Prints one line an epoch: its metrics and its seconds."""

    supports_blocks = True

    @override
    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        super().on_train_epoch_start(trainer)
        self.started = time.perf_counter()

    @override
    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.is_global_zero:
            seconds = time.perf_counter() - self.started
            epoch = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
            metrics = format_metrics(self.measured(trainer))
            print(f"{epoch}  {metrics}  {seconds:.2f} s", flush=True)


def format_metrics(metrics: Mapping[str, Any]) -> str:
    """Format metrics as one line, with five significant digits."""
    return "  ".join(f"{key} {float(value):.5g}" for key, value in sorted(metrics.items()))


def format_summary(
    score: Mapping[str, float],
    epoch: str,
    test: Mapping[str, float],
    seconds: tuple[float, float],
    num_examples: int,
    **lines: str,
) -> str:
    """Format the closing summary, one aligned line for each item that is not empty.

    `score` is empty if none is monitored, else that of the best or last `epoch`; `seconds` are
    those of training and in all; `num_examples`, 0 if unknown, were trained on in the former.
    """
    training_s, all_s = seconds
    speed = f", {num_examples / training_s:,.0f} examples/s" if num_examples else ""
    items = {
        "score": score and f"{format_metrics(score)} ({epoch} epoch)",
        "test": format_metrics(test),
        "time": f"{training_s:.1f} s of training, {all_s:.1f} s in all{speed}",
        **lines,
    }
    width = max(map(len, items))
    return "\n".join(f"{name:<{width}}  {text}" for name, text in items.items() if text)
