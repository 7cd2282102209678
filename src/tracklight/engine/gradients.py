"""How large the gradients are, told every so many steps without a step of its own."""

import math
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from tracklight.engine.blocks import SeriesLog

STEPS_APART = 32
TINY = 1e-30  # keeps the ratio of a weight that is all zeros finite


class Gradients(Callback):
    """Logs the gradient that the last optimizer step used: of the whole model and of each layer.

    It reads what the step left, so nothing of the walk over a block changes. Of every stretch of
    `STEPS_APART` steps the last step that Lightning sees is told: a function of the steps alone,
    whatever was interrupted. Where gradients are clipped it is the clipped ones.

    Metrics: `gradient/norm`; of each parameter `gradient/NAME_norm`, `gradient/NAME_max`, the
    largest absolute value, and `gradient/NAME_ratio`, the norm over that of the weights.
    """

    listens_by_block = True

    @override
    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        self.before = trainer.global_step

    @override
    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        step, logger = trainer.global_step, trainer.logger
        if step // STEPS_APART == self.before // STEPS_APART and self.before:
            return
        if logger is None or not hasattr(logger, "log_series"):
            return
        log: SeriesLog = logger  # pyright: ignore[reportAssignmentType]
        for key, value in statistics(module).items():
            log.log_series(f"gradient/{key}", (step,), (value,))


def statistics(module: torch.nn.Module) -> dict[str, float]:
    """Return norm, maximum and ratio of each parameter's gradient, and the norm of all."""
    named = [(name, p) for name, p in module.named_parameters() if p.grad is not None]
    if not named:
        return {}
    weights = [p.detach() for _, p in named]
    gradients: list[Tensor] = [p.grad for _, p in named if p.grad is not None]
    norms, largest = _norms(gradients), _norms(gradients, math.inf)
    ratios = norms / _norms(weights).clamp(min=TINY)
    rows = torch.stack([norms, largest, ratios]).tolist()  # the one synchronisation
    found = {"norm": sum(value * value for value in rows[0]) ** 0.5}
    for at, (name, _) in enumerate(named):
        for what, row in zip(("norm", "max", "ratio"), rows, strict=True):
            found[f"{name}_{what}"] = row[at]
    return found


def _norms(tensors: list[Tensor], order: float = 2.0) -> Tensor:  # -> (len(tensors),)
    return torch.stack([torch.linalg.vector_norm(tensor, order).float() for tensor in tensors])
