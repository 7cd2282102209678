"""Lightning's private state is where the engine looks for it."""

from typing import Any

import pytest
import torch
from fitting import QUIET
from pytorch_lightning import Trainer, __version__
from torchmetrics import MeanMetric

from foreign import Blobs
from tracklight.data.tensor_data import Epoch
from tracklight.engine.lightning_internals import (
    batch_value,
    count_optimizer_steps,
    detects_anomaly,
    replace_train_dataloader,
)
from tracklight.models.mlp import MLP

LOOP = "fit_loop.epoch_loop"
STEPS = f"{LOOP}.automatic_optimization.optim_progress.optimizer.step"
COUNTERS = [
    *(f"{STEPS}.{which}.{name}" for which in ("total", "current") for name in ("ready", "completed")),
    *(f"{LOOP}.batch_progress.total.{n}" for n in ("ready", "started", "processed", "completed")),
    f"{LOOP}._batches_that_stepped",
]


def build_trainer(**arguments: Any) -> Trainer:
    return Trainer(**QUIET, accelerator="cpu", logger=False, enable_checkpointing=False, **arguments)


def find(owner: Any, path: str) -> Any:
    for name in path.split("."):
        if not hasattr(owner, name):
            pytest.fail(
                f"pytorch-lightning {__version__} has no Trainer.{path} ({name} is missing):"
                " adapt src/tracklight/engine/lightning_internals.py"
            )
        owner = getattr(owner, name)
    return owner


RELOADS = ["fit_loop._last_train_dl_reload_epoch", f"{LOOP}.val_loop._last_val_dl_reload_epoch"]


@pytest.mark.parametrize("path", [*COUNTERS, *RELOADS, "fit_loop._combined_loader", "_detect_anomaly"])
def test_a_trainer_has_the_private_state_that_the_engine_uses(path):
    find(build_trainer(), path)


def test_a_step_that_is_counted_is_counted_everywhere():
    trainer = build_trainer()
    before = [find(trainer, path) for path in COUNTERS]
    count_optimizer_steps(trainer, 3)
    assert [find(trainer, path) for path in COUNTERS] == [count + 3 for count in before]
    assert trainer.global_step == 3


def test_the_counters_are_those_that_lightning_counts_a_step_with():
    trainer = build_trainer(max_epochs=1, limit_val_batches=0, log_every_n_steps=1)
    trainer.fit(MLP(8, 4, hidden=[4]), datamodule=Blobs(batch_size=16, seed=0, num_val=0))
    assert {path: find(trainer, path) for path in COUNTERS} == dict.fromkeys(COUNTERS, 13)


def test_a_replaced_data_loader_is_the_one_of_this_fit():
    trainer, data = build_trainer(max_epochs=1, limit_val_batches=0), Blobs(16, 0, num_val=0)
    trainer.fit(MLP(8, 4, hidden=[4]), datamodule=data)
    assert find(trainer, "fit_loop._combined_loader") is not None
    replace_train_dataloader(trainer, Epoch(data.train_dataloader()))
    trainer.fit_loop.setup_data()
    assert trainer.num_training_batches == 1
    trainer.fit_loop.max_epochs = 2
    trainer.fit(MLP(8, 4, hidden=[4]), datamodule=data)
    assert trainer.num_training_batches == 13


@pytest.mark.parametrize("detects", [False, True])
def test_anomaly_detection_is_read_from_the_trainer(detects):
    assert detects_anomaly(build_trainer(detect_anomaly=detects)) is detects


def test_the_value_of_a_batch_is_read_from_the_metric():
    metric = MeanMetric()
    metric.update(torch.tensor(5.0))
    assert batch_value(metric) is None
    metric(torch.tensor([1.0, 3.0]))
    assert batch_value(metric) == 2.0
