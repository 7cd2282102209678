"""All optimizer steps of an epoch for one batch of Lightning's loop.

Lightning's bookkeeping for a batch costs several times the step of a small model. Where nothing
depends on it, Lightning gets an epoch as one batch, and the engine takes its steps: the same
arithmetic in the same order as the loop by hand. It gathers and logs a block of them at a time.

Shapes: `S` steps in a block, `B` minibatch size, `...` an example's own shape.
"""

import math
import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from tracklight.data.tensor_data import Epoch, Loader, TensorData
from tracklight.engine import lightning_internals, torch_internals
from tracklight.engine.eligibility import why_no_blocks
from tracklight.engine.seeding import seed_step, step_seed
from tracklight.engine.signals import SafeStop
from tracklight.engine.steps import TracedStep, make_step, signature
from tracklight.errors import RunFailed
from tracklight.models.supervised import Supervised

# Each block costs about a step; its rows should stay in a CPU's caches, and a GPU is waited for once a block.
ROWS_PER_BLOCK = {"cpu": 2048, "cuda": 8192}
STEPS_PER_BLOCK = 128
PAUSE_S = 0.1  # that a signal may wait for steps that are taken at once


def steps_per_block(batch_size: int, rows: int = ROWS_PER_BLOCK["cpu"]) -> int:
    """Return the number of optimizer steps in a block of at most so many rows, or of one minibatch."""
    return min(max(rows // batch_size, 1), STEPS_PER_BLOCK)


class NonFinite(RunFailed):
    """The loss or the score is NaN or infinite at optimizer step `step`, counted from 1."""

    def __init__(self, step: int, told: str):
        super().__init__(f"{told}. Try a smaller optimizer.lr, or trainer.gradient_clip_val=1.0")
        self.step = step


def check_loss(step: int, value: float) -> None:
    """Raise NonFinite for the loss of an optimizer step that is NaN or infinite."""
    if not math.isfinite(value):
        told = f"train/loss is {value} at step {step}: stopped there; the best checkpoint is older"
        raise NonFinite(step, told)


class Blocks(Callback):
    """Takes the optimizer steps of an epoch in place of Lightning's automatic optimization.

    After each block of them it calls `on_block_end(trainer, module, share)` of callbacks that have it, with
    the share of the epoch that is done: no turn of Lightning's loop tells them so.

    Where blocks cannot be used, it prints a line that says why, and only reseeds before each batch,
    checks each loss and completes what Lightning leaves of accumulated batches: it divides an epoch's last,
    smaller group by the full number, and logs a step's last batch as the step.
    """

    supports_blocks = True

    def __init__(self, seed: int):
        self.seed = seed
        self.logger: Any = None  # its `log_series` logs the values of each step
        self.uses_blocks = False
        self.steps_at_once = 1
        self.accumulated = 0  # batches whose optimizer step is still to come
        self.has_loss: bool | None = None  # whether any batch had one; None before the first batch
        self.step_values: dict[str, list[Tensor]] = {}  # what those batches logged
        self.num_examples = 0  # of a `TensorData`, trained on since the start of this process
        self.example: Tensor | None = None  # inputs of the first batch taken one by one: (2, ...), CPU

    @property
    def mid_step(self) -> bool:
        """Whether gradients are being accumulated."""
        return self.accumulated > 0 and self.trainer.training

    @override
    def on_fit_start(self, trainer: Any, module: LightningModule) -> None:
        self.trainer, data = trainer, trainer.datamodule
        self.module: Any = module
        self.stops = [each for each in trainer.callbacks if isinstance(each, SafeStop)]
        self.watchers = [each for each in trainer.callbacks if hasattr(each, "on_block_end")]
        reason = why_no_blocks(trainer, module, data)
        self.uses_blocks = reason is None
        if isinstance(module, Supervised):
            module.epoch_runner = self._run_epoch if self.uses_blocks else None
            if type(module).optimizer_step is Supervised.optimizer_step:  # overridden for blocks only
                warnings.filterwarnings("ignore", "When using `Trainer.accumulate_grad", UserWarning)
        if isinstance(data, TensorData):
            self.data = data
            rows = ROWS_PER_BLOCK.get(trainer.strategy.root_device.type, ROWS_PER_BLOCK["cuda"])
            most = steps_per_block(data.batch_size or rows, rows)
            limits = [getattr(each, "max_steps_per_block", most) for each in trainer.callbacks]
            data.steps_per_block = min([most, *limits]) if self.uses_blocks else 1
        if self.uses_blocks:
            lightning_internals.replace_train_dataloader(trainer, Epoch(self.data.train_dataloader()))
            self.signature: Any = None
            # Lightning takes an epoch for a batch, and finds too few of them for its logging.
            warnings.filterwarnings("ignore", "The number of training batches", UserWarning)
        elif trainer.is_global_zero:
            print(f"Steps are taken one by one (plain Lightning): {reason}")

    @override
    def on_fit_end(self, trainer: Trainer, module: Any) -> None:
        if self.uses_blocks:
            module.epoch_runner = None
            self.data.steps_per_block = 1

    @override
    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if isinstance(trainer.datamodule, TensorData) and isinstance(batch, tuple | list):
            self.num_examples += len(batch[1]) * trainer.world_size
        if self.has_loss is None:
            self.has_loss = self.uses_blocks or not module.automatic_optimization
        if not self.uses_blocks:
            step = trainer.fit_loop.epoch_loop.batch_progress.total.ready - 1
            seed_step(self.seed, step, trainer.global_rank)
            if trainer.accumulate_grad_batches > 1:
                lightning_internals.clear_step_values(trainer)
            first = batch[0] if isinstance(batch, list | tuple) and batch else batch
            if self.example is None and isinstance(first, Tensor):
                self.example = first[:2].detach().cpu().clone()
        elif batch_idx == 0 and (found := signature(module)) != self.signature:
            self.signature = found
            self.step = make_step(module, trainer.optimizers[0])

    @override
    def on_after_backward(self, trainer: Any, module: Any) -> None:
        self.has_loss = True
        self.accumulated += trainer.accumulate_grad_batches > 1 and module.automatic_optimization

    @override
    def on_before_optimizer_step(self, trainer: Any, module: Any, *_: Any) -> None:
        wanted = trainer.accumulate_grad_batches
        if 0 < self.accumulated < wanted:  # the end of an epoch, or a batch without a loss
            for gradient in (each.grad for each in module.parameters() if each.grad is not None):
                gradient *= wanted / self.accumulated  # each loss was divided by `wanted`
        self.accumulated = 0

    @override
    def on_train_epoch_end(self, *_: Any) -> None:
        self.accumulated = 0  # what stops an epoch early leaves batches without their step
        self.step_values.clear()

    def _run_epoch(self, blocks: Loader) -> tuple[Tensor, Tensor, int]:
        """Take an epoch's steps; return the last loss, the mean over all examples, and their number."""
        configs = self.trainer.lr_scheduler_configs
        self.schedulers = [config.scheduler for config in configs if config.interval == "step"]
        self.scheduled = self.trainer.global_step
        self.looks_ahead = all(map(torch_internals.counts_steps_only, self.schedulers))
        total, num_rows = torch.zeros(()), 0
        for block in blocks:
            inputs, targets = self.trainer.precision_plugin.convert_input(block)
            total = total + self._run_block(inputs, targets)
            num_rows += len(targets)
            for watcher in self.watchers:
                watcher.on_block_end(self.trainer, self.module, num_rows / blocks.num_rows)
        lightning_internals.count_optimizer_steps(self.trainer, -1)  # which Lightning counts
        return self.losses[-1], total / num_rows, num_rows

    def _run_block(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Take and log a block's steps; return the sum of the losses of its S * B examples."""
        size, first = self.data.batch_size or len(targets), self.trainer.global_step
        self.step_losses = losses = list[Tensor]()
        self.logged: dict[str, tuple[list[int], list[Tensor], list[int | None], dict[str, Any]]] = {}
        self.module.log_recorder = self._record
        try:
            while (start := len(losses) * size) < len(targets):
                self._schedule(step := first + len(losses))
                for callback in self.stops:
                    callback.check()
                if not (taken := self._take_known(inputs[start:], targets[start:], step)):
                    seed_step(self.seed, step)
                    taken = [self.step(inputs[start : start + size], targets[start : start + size])]
                losses += taken
                lightning_internals.count_optimizer_steps(self.trainer, len(taken))
        finally:  # a stop too leaves steps that are taken
            self.module.log_recorder = None
            self.num_examples += min(len(losses) * size, len(targets))
            if losses:
                self.losses = torch.stack(losses)  # (S,)
                self._log_losses(range(first + 1, first + len(losses) + 1))
        sizes = self.losses.new_full((len(losses),), size)
        sizes[-1] = len(targets) - size * (len(losses) - 1)
        self._log_recorded(range(first + 1, first + len(losses) + 1), sizes)
        return (self.losses * sizes).sum()

    def _schedule(self, step: int) -> None:
        """Step the schedulers up to a step, from 0; Lightning itself does so once, after an epoch's end."""
        for _ in range(self.scheduled, step):
            for scheduler in self.schedulers:
                scheduler.step()
        self.scheduled = step

    def _take_known(self, inputs: Tensor, targets: Tensor, first: int) -> list[Tensor]:
        """Take the next steps at once where that is possible, as many as a signal can wait for."""
        if not (isinstance(self.step, TracedStep) and self.step.knows_update and self.looks_ahead):
            return []
        start_s = time.perf_counter()
        size = min(self.data.batch_size or len(targets), len(targets))
        number = min(self.steps_at_once, len(targets) // size)
        # As the last of them leaves it; those that draw are given their seeds.
        seed_step(self.seed, first + number - 1)
        rows = number * size
        losses = self.step.take_block(
            *(inputs[:rows], targets[:rows], size),
            lambda index: step_seed(self.seed, first + index),
            (lambda index: self._schedule(first + index)) if self.schedulers else None,
        )
        if taken := [*losses]:
            step_s = (time.perf_counter() - start_s) / len(taken)
            self.steps_at_once = max(1, int(PAUSE_S / step_s))
        return taken

    def _record(self, name: str, value: Any, prog_bar: bool = False, **options: Any) -> None:
        """Record a call of the model's `log`: Lightning would take the epoch for a single step."""
        options["prog_bar"] = prog_bar
        if isinstance(value, Metric):  # computes its mean over the epoch itself
            options["metric"], value = value, lightning_internals.batch_value(value)
        batch_size = options.pop("batch_size", None)
        indices, values, batch_sizes, _ = self.logged.setdefault(name, ([], [], [], options))
        if value is not None:  # None: the metric was updated only
            indices.append(len(self.step_losses))
            batch_sizes.append(batch_size)
            is_tensor = isinstance(value, Tensor)  # copied: the step may change it
            value = value.detach().clone() if is_tensor else torch.tensor(float(value))
            values.append(value.squeeze())

    @override
    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
        if not self.uses_blocks:
            loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
            if isinstance(loss, Tensor):
                check_loss(trainer.global_step + self.mid_step, loss.item())
            if trainer.accumulate_grad_batches > 1:
                lightning_internals.collect_step_values(trainer, self.step_values, not self.mid_step)

    def _log_losses(self, steps: Sequence[int]) -> None:
        """Log the losses; raise NonFinite at the first that is not finite, whatever followed from it."""
        values = self.losses.tolist()  # the block's one synchronisation
        bad = next((i for i, value in enumerate(values) if not math.isfinite(value)), None)
        self._log_series("train/loss", steps[: None if bad is None else bad + 1], values)
        if bad is not None:
            check_loss(steps[bad], values[bad])

    def _log_recorded(self, steps: Sequence[int], sizes: Tensor) -> None:
        """Log what the model logged in its forward pass or loss, as Lightning would by step."""
        for name, (indices, values, batch_sizes, options) in self.logged.items():
            on_step, on_epoch = options.pop("on_step", None), options.pop("on_epoch", None)
            metric = options.pop("metric", None)
            recorded = torch.stack(values) if values else sizes.new_empty(0)
            if values and on_step is not False:
                key = f"{name}_step" if on_epoch else name
                if options.get("logger") is not False:
                    self._log_series(key, [steps[index] for index in indices], recorded.tolist())
                self.module.log(key, recorded[-1], **{**options, "logger": False})
            if on_epoch:
                key = name if on_step is False else f"{name}_epoch"
                options |= {"on_step": False, "on_epoch": True}
                if metric is not None:
                    self.module.log(key, metric, **options)
                elif options.get("reduce_fx", "mean") in ("mean", "avg", torch.mean):  # in one call
                    weights = sizes[indices] if None in batch_sizes else sizes.new_tensor(batch_sizes)
                    mean = (recorded * weights).sum() / weights.sum()
                    self.module.log(key, mean, batch_size=int(weights.sum()), **options)
                else:
                    for value in recorded:
                        self.module.log(key, value, **options)

    def _log_series(self, key: str, steps: Sequence[int], values: Sequence[float]) -> None:
        interval = self.trainer.log_every_n_steps
        if self.logger is not None and interval:
            kept = [i for i, step in enumerate(steps) if step % interval == 0]
            self.logger.log_series(key, [steps[i] for i in kept], [values[i] for i in kept])
