"""What a run leaves: its score, figures and, unless it is a mere trial, the model."""

from contextlib import suppress

from pytorch_lightning import LightningDataModule, LightningModule

from tracklight.data.tensor_data import TensorData
from tracklight.illustrate import FOLDER, illustrate
from tracklight.tracking.choice import SCORE
from tracklight.tracking.model import log_model
from tracklight.tracking.run import Run
from tracklight.tracking.store import Store


def leave(
    store: Store,
    run: Run,
    model: LightningModule,
    data: LightningDataModule | None,
    step: int,
    score: float | None,
    tested: bool,
    figures: bool,
) -> None:
    """Log what a run leaves.

    Args:
        store: Holds the run.
        run: Open.
        model: With the best weights.
        data: What it was trained on.
        step: The optimizer step of the best weights.
        score: The best value of the monitored metric.
        tested: Whether the run was tested; trials of a sweep are not, and leave their score alone.
        figures: Whether to draw.
    """
    if score is not None:
        run.log_series(SCORE, (step,), (score,))
    if figures:
        illustrate(model, data, run.series(), run.artifacts / FOLDER, step, tested)
    if tested and isinstance(data, TensorData):
        rows = data.splits["train"].features[:2]
        log_model(store.client, run.run_id, model, data.transform(rows), step=step)


def leave_failed(run: Run, model: LightningModule) -> None:
    """Draw how far a run came that failed: its curves often show why.

    Args:
        run: Open.
        model: As it was left.
    """
    with suppress(OSError):  # what made it fail may be the disk
        series = run.series()
        if any(len(steps) > 1 for steps, _ in series.values()):
            illustrate(model, None, series, run.artifacts / FOLDER)
