"""Which figures suit a model and its data, drawn from the weights that were scored."""

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
MAX_ROWS = 20_000  # of a split without a scored evaluation: a figure needs no more


def illustrate(
    model: LightningModule,
    data: LightningDataModule | None,
    series: Mapping[str, tuple[Sequence[int], Sequence[float]]],
    folder: Path,
    best_step: int | None = None,
    tested: bool = True,
) -> list[Path]:
    """Draw a run's figures into `folder`; one that cannot be drawn costs a warning, never the run.

    Args:
        model: With the weights that were scored.
        data: What it was trained on.
        series: Metric to its steps and values.
        folder: Where the PNG files go.
        best_step: The optimizer step of the best checkpoint.
        tested: Whether the test part was evaluated; if not, it is not looked at here either.

    Returns:
        The files.
    """
    from tracklight.figures import (
        plots as figures,  # imports matplotlib: only who draws waits for it
    )

    paths = []
    for draw in (
        lambda: {"learning_curves": figures.learning_curves(series, best_step)},
        lambda: _of_fit(model, data, tested) if isinstance(data, TensorData) else {},
    ):
        try:
            for name, figure in draw().items():
                figures.save(figure, folder / f"{name}.png")
                paths.append(folder / f"{name}.png")
        except Exception as error:  # noqa: BLE001, an arbitrary model may give anything
            _log.warning("no figures: %s", (str(error) or type(error).__name__).splitlines()[0])
    return paths


def outputs_of(model: nn.Module, data: TensorData, features: Tensor) -> Tensor:
    """Return the model's outputs (N, ...) for raw rows (N, ...), on the CPU, in evaluation mode."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    training = model.training
    model.eval()
    with torch.no_grad():
        outputs = [
            model(data.transform(rows.to(device))).cpu() for rows in features.split(EVALUATION_ROWS)
        ]
    model.train(training)
    return torch.cat(outputs)


def _of_fit(model: LightningModule, data: TensorData, tested: bool) -> dict:
    splits = {
        name: Split(split.features[:MAX_ROWS].cpu(), split.targets[:MAX_ROWS].cpu())
        for name, split in data.splits.items()
        if name != "test" or tested
    }
    last = list(splits)[-1]
    outputs = outputs_of(model, data, splits[last].features)
    targets = splits[last].targets
    if data.class_names and outputs.ndim == 2 and not targets.is_floating_point():
        return _of_classes(model, data, last, splits[last], outputs)
    if outputs.shape == targets.shape and targets.is_floating_point():
        shown = {name: splits[name] for name in dict.fromkeys(("train", last))}
        fitted = {
            name: outputs_of(model, data, split.features).numpy() for name, split in shown.items()
        }
        return _of_regression(model, data, shown, fitted)
    return {}


def _of_regression(
    model: LightningModule, data: TensorData, splits: dict[str, Split], fitted: dict
) -> dict:
    from tracklight.figures import plots as figures

    pairs = {name: (split.targets.numpy(), fitted[name]) for name, split in splits.items()}
    drawn = {"residuals": figures.residuals(pairs)}
    features = splits["train"].features
    if features.ndim == 2 and features.shape[1] == 1 and data.out_features == 1:
        points = {n: (s.features[:, 0].numpy(), s.targets[:, 0].numpy()) for n, s in splits.items()}
        low, high = (float(edge) for edge in (features.min(), features.max()))
        grid = torch.linspace(low, high, 100, dtype=features.dtype)[:, None]
        line = outputs_of(model, data, grid)[:, 0].numpy()
        slope = (line[-1] - line[0]) / ((high - low) or 1.0)
        name = (data.feature_names or ["x"])[0]
        start = line[0] - slope * low
        straight = start + slope * grid[:, 0].numpy()
        is_straight = np.allclose(line, straight, rtol=0, atol=1e-3 * float(np.ptp(line)) + 1e-6)
        sign = "-" if start < 0 else "+"
        equation = f"y = {slope:.4g} {name} {sign} {abs(start):.4g}" if is_straight else "Fit"
        drawn["fit"] = figures.fitted_line(points, (grid[:, 0].numpy(), line), name, equation)
    else:
        drawn["fit"] = figures.predicted_against_true(pairs)
    return drawn


def _of_classes(
    model: LightningModule, data: TensorData, name: str, split: Split, outputs: Tensor
) -> dict:
    from tracklight.figures import plots as class_figures

    names = list(data.class_names or [])
    targets = split.targets.numpy()
    probabilities = outputs.softmax(dim=1).numpy()
    counts = np.zeros((len(names), len(names)), dtype=int)
    np.add.at(counts, (targets, probabilities.argmax(axis=1)), 1)
    drawn = {"confusion": class_figures.confusion(counts, names, name)}
    if split.features.ndim != 3:
        return drawn
    images = split.features.numpy()
    drawn["mistakes"] = class_figures.mistakes(images, probabilities, targets, names, name)
    shape = images.shape[1:]
    first = next((m for m in model.modules() if isinstance(m, nn.Linear)), None)
    if first is not None and first.in_features == shape[0] * shape[1]:
        weights = first.weight.detach().float().cpu().numpy().reshape(-1, *shape)
        drawn["first_layer"] = class_figures.first_layer(weights)
    return drawn
