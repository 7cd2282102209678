"""What a run prints: a bar on a terminal, one line an epoch elsewhere, a closing summary."""

import sys
import time
from collections.abc import Mapping
from typing import Any

from pytorch_lightning import Callback, Trainer
from pytorch_lightning.callbacks import EarlyStopping, RichProgressBar
from typing_extensions import override


def progress(enabled: bool) -> Callback | None:
    """Return what shows progress on this kind of screen."""
    if not enabled:
        return None
    return RichProgressBar(leave=True) if sys.stdout.isatty() else EpochLines()


class AfterEpoch(EarlyStopping):
    """A callback whose epochs end after the module's own `on_train_epoch_end`, and what that logs.

    Lightning grants this to early stopping and checkpoints alone; of the former only the name is
    used.
    """

    def __init__(self) -> None:
        super().__init__(monitor="")

    @property
    @override
    def state_key(self) -> str:
        return type(self).__qualname__

    @override
    def state_dict(self) -> dict[str, Any]:
        return {}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        return

    @override
    def setup(self, *_: Any, **__: Any) -> None:
        return

    @override
    def on_validation_end(self, *_: Any) -> None:
        return


class EpochLines(AfterEpoch):
    """Prints one line an epoch: its metrics and its seconds."""

    listens_by_block = True

    @override
    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        self.started = time.perf_counter()

    @override
    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        if not trainer.is_global_zero:
            return
        seconds = time.perf_counter() - self.started
        metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
        done, total = trainer.current_epoch + 1, trainer.max_epochs
        print(f"epoch {done}/{total}  {shown(metrics)}  {seconds:.2f} s", flush=True)


def shown(metrics: Mapping[str, float]) -> str:
    """Lay metrics out on a line, with five significant digits."""
    return "  ".join(f"{key} {value:.5g}" for key, value in sorted(metrics.items()))


def summary(
    score: Mapping[str, float],
    of: str,
    test: Mapping[str, float],
    seconds: tuple[float, float],
    num_examples: int,
    **named: str,
) -> str:
    """Lay out the closing summary, one aligned line for each entry that has something to say.

    Args:
        score: The monitored metric's name and value; empty where none is monitored.
        of: Which epoch's that is: best or last.
        test: Scores on the test part.
        seconds: Of training, and of everything.
        num_examples: Trained on in that time; 0 where it is not known.
        **named: Further entries.
    """
    training_s, all_s = seconds
    speed = f", {num_examples / training_s:,.0f} examples/s" if num_examples else ""
    entries = {
        "score": shown(score) and f"{shown(score)} ({of} epoch)",
        "test": shown(test),
        "time": f"{training_s:.1f} s of training, {all_s:.1f} s in all{speed}",
        **named,
    }
    width = max(map(len, entries))
    return "\n".join(f"{name:<{width}}  {text}" for name, text in entries.items() if text)
