"""Several optimizer steps for one turn of Lightning's loop.

Lightning's hooks and bookkeeping around a batch cost several times the step of a small model. Where
nobody listens to them, the engine hands Lightning a block of minibatches as one batch and takes the
steps itself: the same arithmetic in the same order as the loop by hand.

Shapes: `S` steps in a block, `B` minibatch size, `...` an example's own shape.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.loops.optimization.automatic import Closure, ClosureResult
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from tracklight.data.tensor_data import TensorData
from tracklight.engine.eligibility import obstacle
from tracklight.engine.seeding import seed_step
from tracklight.engine.steps import make_step, standing
from tracklight.errors import RunFailed
from tracklight.models.supervised import Supervised

STEPS_PER_BLOCK = 32


class NonFiniteLoss(RunFailed):
    """The loss of optimizer step `step`, counted from 1, is NaN or infinite."""

    def __init__(self, step: int, value: float):
        super().__init__(
            f"train/loss is {value} at step {step}: stopped there; the best checkpoint is older."
            " Try a smaller optimizer.lr, or trainer.gradient_clip_val=1.0"
        )
        self.step = step


class SeriesLog(Protocol):
    """Takes a block's values of one metric at once."""

    def log_series(self, key: str, steps: Sequence[int], values: Sequence[float]) -> None:
        """Record `values[i]` at `steps[i]`."""


class LogRecorder:
    """What a model logs during a block, which Lightning would take for one step's.

    Args:
        losses: Of the steps taken so far; their number is the step under way.
    """

    def __init__(self, losses: Sequence[Tensor]):
        self.losses = losses
        self.notes: dict[str, tuple[list[int], list[Tensor], dict[str, Any]]] = {}

    def note(self, name: str, value: Any, prog_bar: bool = False, **how: Any) -> None:
        """Take the arguments of `LightningModule.log`."""
        how |= {"prog_bar": prog_bar}
        if isinstance(value, Metric):  # which keeps its own account of the epoch
            how["metric"], value = value, value._forward_cache
        indices, values, _ = self.notes.setdefault(name, ([], [], how))
        if value is None:  # it was updated only: there is nothing to say of the step
            return
        indices.append(len(self.losses))
        is_tensor = isinstance(value, Tensor)  # copied: the step may change it
        value = value.detach().clone() if is_tensor else torch.tensor(float(value))
        values.append(value.squeeze())


class Blocks(Callback):
    """Takes the optimizer steps of a block in place of Lightning, and tells Lightning so.

    Where blocks may not be used, it only reseeds before each batch and checks each loss.

    Args:
        seed: The run's seed, for the random numbers of each step.
        tell: Takes the one line that says why blocks are not used.
    """

    listens_by_block = True

    def __init__(self, seed: int, tell: Callable[[str], None] = print):
        self.seed = seed
        self.tell = tell
        self.track: SeriesLog | None = None  # takes each step's loss; None where nothing is tracked
        self.walking = False

    @override
    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.trainer: Any = trainer
        data = self.trainer.datamodule
        reason = obstacle(trainer, module, data)
        self.walking = reason is None
        if isinstance(data, TensorData):
            data.steps_per_block = 1
        if isinstance(module, Supervised) and isinstance(data, TensorData) and self.walking:
            self.module, self.data = module, data
            data.steps_per_block = STEPS_PER_BLOCK
            trainer.fit_loop._combined_loader = None  # who asked for the number of steps, made one
            module.__dict__["optimizer_step"] = self._optimizer_step
            self.standing: Any = None
            # Lightning takes blocks for batches, and finds them too few to be logged.
            warnings.filterwarnings("ignore", "The number of training batches", UserWarning)
        elif trainer.is_global_zero:
            self.tell(f"Steps are taken one by one (plain Lightning): {reason}")

    @override
    def on_fit_end(self, trainer: Trainer, module: LightningModule) -> None:
        if self.walking:
            del module.optimizer_step
            self.data.steps_per_block = 1

    @override
    def on_train_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.walking:
            self.block = batch
            if batch_idx == 0 and (found := standing(self.module)) != self.standing:
                self.standing = found
                self.step = make_step(self.module, trainer.optimizers[0])
        else:
            step = trainer.fit_loop.epoch_loop.batch_progress.total.ready - 1
            seed_step(self.seed, step, trainer.global_rank)

    def _optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Closure) -> None:
        with self.trainer.precision_plugin.train_step_context():
            self.losses = self._walk(*self.block)
        closure._result = ClosureResult(
            closure_loss=None
        )  # Lightning asks the closure for what the steps gave

    def _walk(self, inputs: Tensor, targets: Tensor) -> Tensor:  # (S * B, ...) -> losses (S,)
        schedulers: list[Any] = [
            config.scheduler
            for config in self.trainer.lr_scheduler_configs
            if config.interval == "step"
        ]
        first = self.trainer.global_step
        size = self.data.batch_size or len(targets)
        losses: list[Tensor] = []
        self.heard = LogRecorder(losses)
        self.module.__dict__["log"] = self.heard.note
        try:
            for x, y in zip(inputs.split(size), targets.split(size), strict=True):
                if losses:  # Lightning itself steps the schedulers after the block's last step
                    for scheduler in schedulers:
                        scheduler.step()
                    self._count()
                seed_step(self.seed, first + len(losses))
                losses.append(self.step(x, y))
        finally:
            del self.module.log
        return torch.stack(losses)

    def _count(self) -> None:
        """Count a step that Lightning does not know of; it counts the block as one."""
        loop = self.trainer.fit_loop.epoch_loop
        progress = loop.automatic_optimization.optim_progress.optimizer.step
        for counter in (progress.total, progress.current):
            counter.ready += 1
            counter.completed += 1
        loop._batches_that_stepped += 1
        total = loop.batch_progress.total
        for name in ("ready", "started", "processed", "completed"):
            setattr(total, name, getattr(total, name) + 1)

    @override
    def on_train_batch_end(
        self,
        trainer: Trainer,
        module: LightningModule,
        outputs: Any,
        batch: tuple[Tensor, Tensor],
        batch_idx: int,
    ) -> None:
        if not self.walking:
            self._check_loss(outputs)
            return
        losses, num_examples = self.losses, len(batch[1])
        steps = range(trainer.global_step - len(losses) + 1, trainer.global_step + 1)
        values = losses.tolist()  # the block's one synchronisation
        bad = next((i for i, value in enumerate(values) if not math.isfinite(value)), None)
        self._log_steps("train/loss", steps[: None if bad is None else bad + 1], values)
        if bad is not None:
            raise NonFiniteLoss(steps[bad], values[bad])
        sizes = losses.new_full((len(losses),), self.data.batch_size or num_examples)
        sizes[-1] += num_examples - sizes.sum()
        mean = (losses * sizes).sum() / num_examples
        module.log(
            "train/loss", losses[-1], on_step=True, on_epoch=False, prog_bar=True, logger=False
        )
        module.log("train/loss_epoch", mean, on_step=False, on_epoch=True, batch_size=num_examples)
        self._pass_on(steps, sizes)

    def _pass_on(self, steps: Sequence[int], sizes: Tensor) -> None:
        """Log what the model logged in forward pass or loss, step by step as Lightning would."""
        for name, (indices, values, how) in self.heard.notes.items():
            on_step, on_epoch = how.pop("on_step", None), how.pop("on_epoch", None) or False
            metric = how.pop("metric", None)
            found = torch.stack(values) if values else sizes.new_empty(0)
            if values and (on_step is None or on_step):
                key = f"{name}_step" if on_epoch else name
                if how.get("logger") is not False:
                    self._log_steps(key, [steps[index] for index in indices], found.tolist())
                self.module.log(key, found[-1], **{**how, "logger": False})
            if on_epoch:
                key = name if on_step is False else f"{name}_epoch"
                weights = sizes[indices]
                mean, total = (found * weights).sum() / weights.sum(), int(weights.sum())
                how |= {"batch_size": total, "on_step": False, "on_epoch": True}
                self.module.log(key, mean if metric is None else metric, **how)

    def _log_steps(self, key: str, steps: Sequence[int], values: Sequence[float]) -> None:
        if self.track is None or not self.trainer.log_every_n_steps:
            return
        chosen = [i for i, step in enumerate(steps) if step % self.trainer.log_every_n_steps == 0]
        self.track.log_series(key, [steps[i] for i in chosen], [values[i] for i in chosen])

    def _check_loss(self, outputs: Any) -> None:
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor) and not math.isfinite(value := loss.item()):
            raise NonFiniteLoss(self.trainer.global_step, value)
