"""Lightning's private state that the engine uses, as of pytorch-lightning 2.6.6.

`tests/engine/test_lightning_internals.py` fails if an upgrade moves any of it.
"""

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


def count_optimizer_steps(trainer: Any, number: int) -> None:
    """Count further optimizer steps and batches; Lightning itself counts an epoch as one of each.

    `global_step` and checkpoints come from these counters, which no public method changes.
    """
    loop = trainer.fit_loop.epoch_loop
    steps, batches = loop.automatic_optimization.optim_progress.optimizer.step, loop.batch_progress
    for counter in (steps.total, steps.current):
        counter.ready += number
        counter.completed += number
    loop._batches_that_stepped += number
    for name in ("ready", "started", "processed", "completed"):
        setattr(batches.total, name, getattr(batches.total, name) + number)


def set_progress(trainer: Any, epochs: int, batches: int) -> dict[str, Any]:
    """Count epochs of so many optimizer steps as done; return what a checkpoint holds of the counters."""
    loop = trainer.fit_loop.epoch_loop
    steps, current = epochs * batches, batches * bool(epochs)
    optimizer = loop.automatic_optimization.optim_progress.optimizer
    counted = [(trainer.fit_loop.epoch_progress, epochs, epochs), (loop.batch_progress, steps, current)]
    counted += [(optimizer.step, steps, current), (optimizer.zero_grad, steps, current)]
    for progress, *values in counted:
        for counter, value in zip((progress.total, progress.current), values, strict=True):
            vars(counter).update(dict.fromkeys(vars(counter), value))
    loop.batch_progress.is_last_batch, loop._batches_that_stepped = epochs > 0, steps
    return trainer._checkpoint_connector._get_loops_state_dict()


def replace_train_dataloader(trainer: Any, loader: Any) -> None:
    """Have this fit train on a loader in place of the data module's own.

    `estimated_stepping_batches` may have built that one, and the public
    `reload_dataloaders_every_n_epochs` reloads between epochs only.
    """
    trainer.fit_loop._combined_loader, trainer.fit_loop._data_source.instance = None, loader


def limit_waiting(trainer: Any, seconds: float) -> None:
    """Set how long distributed processes wait for each other, for which a strategy's name has no room."""
    if hasattr(trainer.strategy, "_timeout"):
        trainer.strategy._timeout = timedelta(seconds=seconds)


def set_root_dir(trainer: Any, folder: Path) -> None:
    """Set `default_root_dir`, for which there is no folder yet when it is asked for."""
    trainer._default_root_dir = str(folder)


def logging_step(trainer: Any) -> int:
    """Return the step at which Lightning itself logs: batches that stepped, from zero."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def evaluation_steps(trainer: Any) -> set[int]:
    """Return the steps at which Lightning logs in an evaluation: its batches, which a resume counts anew."""
    loops = (trainer.fit_loop.epoch_loop.val_loop, trainer.test_loop) if trainer.evaluating else ()
    return {seen for loop in loops for seen in loop._seen_batches_per_dataloader.values()}


def detects_anomaly(trainer: Any) -> bool:
    """Return the Trainer's argument `detect_anomaly`, which has no public attribute."""
    return trainer._detect_anomaly


def batch_value(metric: Metric) -> Tensor | None:
    """Return the last batch's value, as `LightningModule.log` does; None if only updated."""
    return metric._forward_cache


def clear_step_values(trainer: Any) -> None:
    """Forget what earlier batches logged by step, so that a value is known to be this batch's."""
    for result in trainer._results.values():
        result._forward_cache = None


def collect_step_values(trainer: Any, collected: dict[str, list[Tensor]], is_step: bool) -> None:
    """Collect what a batch logged by step; at the optimizer step put one value in place of them all.

    It is reduced as `log` was asked to by `reduce_fx`, to the mean by default. Lightning logs it next.
    """
    for key, result in trainer._results.items():
        if result.meta.on_step and result._forward_cache is not None:
            collected.setdefault(key, []).append(result._forward_cache)
    if is_step:
        for key, values in collected.items():
            trainer._results[key]._forward_cache = trainer._results[key].meta.reduce_fx(torch.stack(values))
        collected.clear()


def reload_epoch(trainer: Any, *, validates: bool) -> int:
    """Return the epoch in which an uninterrupted fit makes the loaders of the next epoch that uses them."""
    period = trainer.reload_dataloaders_every_n_epochs
    if not period:
        return 0
    every = trainer.check_val_every_n_epoch or 1 if validates else 1
    first, gap = every - 1, period + -period % every  # it is only looked at where they are used
    used = trainer.current_epoch + -(trainer.current_epoch + 1) % every
    return first + (used - first) // gap * gap


def begin_epoch_anew(trainer: Any) -> None:
    """Let a fit that is resumed between two epochs go on as one that was never interrupted.

    Lightning keeps the iterators that it made before `on_train_epoch_start`, and under `max_steps` takes the
    epoch for one that was interrupted: then it skips it, and steps no ReduceLROnPlateau after it.
    """
    loop = trainer.fit_loop
    loop.epoch_loop.restarting = False  # and so the loops within
    for each in (loop, loop.epoch_loop, loop.epoch_loop.val_loop):
        each.on_iteration_done()
    if trainer.reload_dataloaders_every_n_epochs:
        loop._last_train_dl_reload_epoch = reload_epoch(trainer, validates=False)
        loop.epoch_loop.val_loop._last_val_dl_reload_epoch = reload_epoch(trainer, validates=True)
