"""Chooses the figures that suit a model and its data, and draws them."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from pytorch_lightning import LightningDataModule, LightningModule
from torch import Tensor, nn

from tracklight.data.tensor_data import EVALUATION_ROWS, Split, TensorData

_log = logging.getLogger(__name__)

FOLDER = "figures"
MAX_ROWS = 20_000  # of a split: a figure needs no more


def draw_figures(
    model: LightningModule,
    data: LightningDataModule | None,
    series: Mapping[str, tuple[Sequence[int], Sequence[float]]],  # of each metric its steps and values
    folder: Path,
    best_step: int | None = None,  # of the best checkpoint
    tested: bool = True,  # else no figure shows the test part
) -> list[Path]:
    """Draw a run's figures into `folder`; one that cannot be drawn costs a warning, never the run."""
    from tracklight.figures import plots  # imports matplotlib: only who draws waits for it

    paths = []
    for draw in (
        lambda: {"learning_curves": plots.learning_curves(series, best_step)},
        lambda: _draw_predictions(model, data, tested) if isinstance(data, TensorData) else {},
    ):
        try:
            for name, figure in draw().items():
                plots.save(figure, folder / f"{name}.png")
                paths.append(folder / f"{name}.png")
        except Exception as error:  # noqa: BLE001, an arbitrary model may give anything
            _log.warning("no figures: %s", (str(error) or type(error).__name__).splitlines()[0])
    return paths


def predict_rows(model: nn.Module, data: TensorData, features: Tensor) -> Tensor:
    """Return the model's outputs (N, ...) for raw rows (N, ...), on the CPU, in evaluation mode.

    The model computes in the precision of its weights; an output of half precision comes as float32.
    """
    like = next(model.parameters(), torch.empty(0))
    training = model.training
    model.eval()
    outputs = []
    with torch.no_grad():
        for rows in features.split(EVALUATION_ROWS):
            inputs = data.transform(rows.to(like.device))
            output = model(inputs.to(like.dtype) if inputs.is_floating_point() else inputs).cpu()
            outputs.append(output.to(torch.promote_types(output.dtype, torch.float32)))
    model.train(training)
    return torch.cat(outputs)


def _draw_predictions(model: LightningModule, data: TensorData, tested: bool) -> dict:
    splits = {
        name: Split(split.features[:MAX_ROWS].cpu(), split.targets[:MAX_ROWS].cpu())
        for name, split in data.splits.items()
        if name != "test" or tested
    }
    last = list(splits)[-1]
    outputs, targets = predict_rows(model, data, splits[last].features), splits[last].targets
    if data.class_names and outputs.ndim == 2 and not targets.is_floating_point():
        return _draw_classes(model, data.class_names, last, splits[last], outputs)
    if outputs.shape == targets.shape and targets.is_floating_point():
        return _draw_regression(model, data, {name: splits[name] for name in ("train", last)})
    return {}


def _draw_regression(model: LightningModule, data: TensorData, splits: dict[str, Split]) -> dict:
    from tracklight.figures import plots

    pairs = {
        name: (split.targets.numpy(), predict_rows(model, data, split.features).numpy())
        for name, split in splits.items()
    }
    residuals, features = plots.residuals(pairs), splits["train"].features
    if features.ndim != 2 or features.shape[1] != 1 or data.out_features != 1:
        return {"residuals": residuals, "fit": plots.predicted_against_true(pairs)}
    low, high = features.min().item(), features.max().item()
    grid = torch.linspace(low, high, 100, dtype=features.dtype)[:, None]
    x, y = grid[:, 0].numpy(), predict_rows(model, data, grid)[:, 0].numpy()
    slope = (y[-1] - y[0]) / ((high - low) or 1.0)
    bias = y[0] - slope * low
    x_name = (data.feature_names or ["x"])[0]
    is_straight = np.allclose(y, bias + slope * x, rtol=0, atol=1e-3 * float(np.ptp(y)) + 1e-6)
    equation = f"y = {slope:.4g} {x_name} {'-' if bias < 0 else '+'} {abs(bias):.4g}"
    points = {n: (s.features[:, 0].numpy(), s.targets[:, 0].numpy()) for n, s in splits.items()}
    title = equation if is_straight else "Fit"
    return {"residuals": residuals, "fit": plots.fitted_line(points, (x, y), x_name, title)}


def _draw_classes(
    model: LightningModule, names: Sequence[str], split: str, rows: Split, outputs: Tensor
) -> dict:
    from tracklight.figures import plots

    features, targets = rows.features.numpy(), rows.targets.numpy()
    probabilities = outputs.softmax(dim=1).numpy()
    counts = np.zeros((len(names), len(names)), dtype=int)
    np.add.at(counts, (targets, probabilities.argmax(axis=1)), 1)
    drawn = {"confusion": plots.confusion(counts, names, split)}
    if features.ndim == 3:
        drawn["mistakes"] = plots.mistakes(features, probabilities, targets, names, split)
        layer = next((m for m in model.modules() if isinstance(m, nn.Linear)), None)
        if layer is not None and layer.in_features == features[0].size:
            weights = layer.weight.detach().float().cpu().numpy()
            drawn["first_layer"] = plots.first_layer(weights.reshape(-1, *features.shape[1:]))
    return drawn
