"""What a run prints: one line for all of it on a terminal, one line an epoch elsewhere, a closing summary."""

import math
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import psutil
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.callbacks import EarlyStopping
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from typing_extensions import override

REDRAW_S = 0.1
MAX_LINES = 100  # of epochs, about


def progress_callback(metric: str | None) -> Callback:
    """Return the callback that shows progress on this kind of screen; `metric` is the score."""
    return RunLine(metric) if sys.stdout.isatty() else EpochLines()


class AfterEpoch(EarlyStopping):
    """A callback whose `on_train_epoch_end` runs after the module's own, and sees what that logs.

    Lightning calls only early stopping and checkpoints that late; the base's checks never run.
    """

    supports_blocks = True

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
    """Prints one line an epoch, its metrics and its seconds; of a longer run only every so many epochs."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds, self.last = 0.0, 0  # of the newest epoch; the newest that is printed

    @override
    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        super().on_train_epoch_start(trainer)
        self.started = time.perf_counter()

    @override
    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        self.seconds = time.perf_counter() - self.started
        number, total = trainer.current_epoch + 1, trainer.max_epochs or -1
        interval = math.ceil(total / MAX_LINES) if total > 0 else 10 ** max(len(str(number)) - 2, 0)
        if number in (1, total) or number % interval == 0:
            self._print(trainer, number)

    @override
    def on_train_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.current_epoch > self.last:  # stopped early
            self._print(trainer, trainer.current_epoch)

    def _print(self, trainer: Trainer, number: int) -> None:
        self.last = number
        if trainer.is_global_zero:
            epoch, metrics = f"epoch {number}/{trainer.max_epochs}", format_metrics(self.measured(trainer))
            print(f"{epoch}  {metrics}  {self.seconds:.2f} s", flush=True)


class RunLine(AfterEpoch):
    """Shows one line for the whole run: its epoch, optimizer steps, score, and the time left for all."""

    def __init__(self, metric: str | None) -> None:
        super().__init__()
        self.metric = metric
        self.score = ""
        self.line: Progress | None = None  # only of the process that prints

    @override
    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        if not trainer.is_global_zero:
            return
        self.started_s = self.drawn_s = time.perf_counter()
        self.done_before = self._share_done(trainer, 0.0)
        columns = TextColumn("{task.description}"), BarColumn(16), TextColumn("{task.fields[rest]}")
        # No thread redraws it: whoever forks a process meanwhile would copy a held lock.
        self.line = Progress(*columns, auto_refresh=False, redirect_stderr=sys.stderr.isatty())
        self.line.start()
        self.line.console.show_cursor()  # a process that is killed could not bring it back
        self.line.add_task("", total=1.0, rest="")

    @override
    def on_train_batch_end(
        self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._draw(trainer, (batch_idx + 1) / trainer.num_training_batches)  # 0 of infinitely many

    def on_block_end(self, trainer: Trainer, module: Any, share: float) -> None:
        """Redraw the line, for a share of the epoch."""
        self._draw(trainer, share)

    @override
    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        if self.line and (value := self.measured(trainer).get(self.metric or "")) is not None:
            self.score = format_metrics({str(self.metric): value})
        self._draw(trainer, 1.0)

    def _share_done(self, trainer: Trainer, of_epoch: float) -> float:
        """Return the share of the run that is done after a share of the current epoch."""
        by_epochs = (trainer.current_epoch + of_epoch) / (trainer.max_epochs or 1)
        return max(by_epochs, trainer.global_step / trainer.max_steps)  # -1 is no limit

    def _draw(self, trainer: Trainer, of_epoch: float) -> None:
        if self.line is None:
            return
        now_s, done, rest = time.perf_counter(), self._share_done(trainer, of_epoch), self.score
        if (trained := done - self.done_before) > 0:
            left_s = (now_s - self.started_s) / trained * (1 - done)
            rest = f"{rest}  {timedelta(seconds=round(left_s))} left".strip()
        epoch = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}  step {trainer.global_step:,}"
        is_due = now_s - self.drawn_s > REDRAW_S
        self.drawn_s = now_s if is_due else self.drawn_s
        self.line.update(TaskID(0), completed=done, description=epoch, rest=rest, refresh=is_due)

    @override
    def on_train_end(self, *_: Any, **__: Any) -> None:
        if self.line is not None:
            lasted = timedelta(seconds=round(time.perf_counter() - self.started_s))
            self.line.update(TaskID(0), rest=f"{self.score}  {lasted}".strip())
            self.line.stop()
            self.line = None

    on_exception = on_train_end


def format_metrics(metrics: Mapping[str, Any]) -> str:
    """Format metrics as one line, with five significant digits."""
    return "  ".join(f"{key} {float(value):.5g}" for key, value in sorted(metrics.items()))


def format_time(training_s: float, num_examples: int) -> str:
    """Format how long the run took; `num_examples`, 0 if unknown, were trained on in `training_s`."""
    all_s = time.time() - psutil.Process().create_time()
    speed = f", {num_examples / training_s:,.0f} examples/s" if num_examples else ""
    return f"{training_s:.1f} s of training, {all_s:.1f} s since the process began{speed}"


def align_lines(items: Mapping[str, str]) -> str:
    """Format named texts, one aligned line for each that is not empty."""
    width = max(map(len, items))
    return "\n".join(f"{name:<{width}}  {text}" for name, text in items.items() if text)
