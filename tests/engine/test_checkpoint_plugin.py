"""Lightning's tests of its checkpoint plugin and of restoring (2.6), asked of ours beside its own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from fitting import QUIET
from lightning_fabric.plugins import TorchCheckpointIO
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Callback, EarlyStopping, ModelCheckpoint

import module_kinds
from tracklight.engine.checkpoint_io import CHECKSUM, DurableCheckpointIO, is_intact
from tracklight.engine.seeding import seed_run

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers:UserWarning",
    "ignore:Checkpoint directory .* exists and is not empty:UserWarning",
)


class Counting(Callback):
    """A callback with a state."""

    def __init__(self) -> None:
        self.batches = 0

    def on_train_batch_end(self, *_: Any) -> None:
        self.batches += 1

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.batches = state["batches"]


class Fitted:
    """A plain Lightning training with a checkpoint plugin: no part of tracklight but that."""

    def __init__(self, io: Any, folder: Path, module: LightningModule, epochs: int, start: Any = None):
        self.saving = ModelCheckpoint(
            folder, "{epoch}-{step}", "val_loss", save_top_k=2, save_last=True, enable_version_counter=False
        )
        self.counting = Counting()
        self.module = module
        self.trainer = Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            plugins=[io],
            callbacks=[self.saving, self.counting, EarlyStopping("val_loss", patience=50)],
            logger=False,
            default_root_dir=folder,
            **QUIET,
        )
        self.trainer.fit(module, module_kinds.Ordered(), ckpt_path=start)


def fitted(io: Any, folder: Path, epochs: int, kind: type = module_kinds.Scheduled, start: Any = None):
    seed_run(1)
    return Fitted(io, folder, kind(), epochs, start)


def equal(one: Any, other: Any) -> bool:
    """Compare nested states to the bit, but for the folder that they lie in."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


PLUGINS = (DurableCheckpointIO, TorchCheckpointIO)


def test_it_saves_what_lightnings_own_saves_and_removes_what_that_removes(tmp_path):
    found = []
    for kind in PLUGINS:
        folder = tmp_path / "same"
        folder.mkdir()
        fitted(kind(), folder, epochs=4)
        names = sorted(each.name for each in folder.glob("*.ckpt"))
        found.append({name: torch.load(folder / name, weights_only=True) for name in names})
        if kind is DurableCheckpointIO:
            assert all(map(is_intact, folder.glob("*.ckpt")))
            assert sorted(folder.glob(f"*{CHECKSUM}")) == [folder / f"{name}{CHECKSUM}" for name in names]
        folder.rename(tmp_path / kind.__name__)
    assert len(found[0]) == 3 and equal(*found)


@pytest.mark.parametrize(
    "kind", [module_kinds.Scheduled, module_kinds.Manual, module_kinds.InSetup, module_kinds.Hooked]
)
def test_it_restores_epochs_steps_optimizers_schedules_and_callbacks(tmp_path, kind):
    def continued(io, folder):
        half = fitted(io, folder, 2, kind)
        return fitted(io, folder, 4, kind, start=half.saving.last_model_path)

    ours, theirs = (continued(io(), tmp_path / io.__name__) for io in PLUGINS)
    assert ours.trainer.global_step == theirs.trainer.global_step
    assert ours.trainer.current_epoch == theirs.trainer.current_epoch == 4
    assert ours.counting.batches == theirs.counting.batches == 16
    assert equal(dict(ours.module.state_dict()), dict(theirs.module.state_dict()))
    for mine, other in zip(ours.trainer.optimizers, theirs.trainer.optimizers, strict=True):
        assert equal(mine.state_dict(), other.state_dict())
    assert ours.saving.best_model_score == theirs.saving.best_model_score


def test_the_best_one_is_tested_and_loaded_as_from_lightnings_own(tmp_path):
    scores, weights = [], []
    for kind in PLUGINS:
        fit = fitted(kind(), tmp_path / kind.__name__, 3)
        scores += fit.trainer.test(datamodule=module_kinds.Ordered(), ckpt_path="best", verbose=False)
        loaded = module_kinds.Scheduled.load_from_checkpoint(fit.saving.best_model_path, weights_only=True)
        weights.append(dict(loaded.state_dict()))
    assert scores[0] == scores[1] and equal(*weights)


def test_strictness_is_the_modules_as_with_lightnings_own(tmp_path):
    fit = fitted(DurableCheckpointIO(), tmp_path, 1, module_kinds.Adapter)
    module = module_kinds.Adapter()
    fit.trainer.test(module, module_kinds.Ordered(), ckpt_path=fit.saving.last_model_path, verbose=False)
    assert torch.equal(module.layers[2].weight, fit.module.layers[2].weight)
    strict = module_kinds.Plain()
    with pytest.raises(RuntimeError, match="Missing key"):
        fit.trainer.test(strict, module_kinds.Ordered(), ckpt_path=fit.saving.last_model_path, verbose=False)


@pytest.mark.parametrize("kind", PLUGINS)
def test_options_that_it_cannot_obey_are_refused_as_by_lightnings_own(tmp_path, kind):
    with pytest.raises(TypeError, match="storage_options"):
        kind().save_checkpoint({"state_dict": {}}, tmp_path / "x.ckpt", storage_options={"key": 1})
