"""The checkpoint from which a run continues: taken between two epochs, apart from the best one."""

import time
from collections.abc import Mapping
from operator import mul
from pathlib import Path
from typing import Any

from lightning_utilities.core.apply_func import apply_to_collection
from pytorch_lightning import Callback, Trainer
from typing_extensions import override

from tracklight.engine.checkpoint import (
    Checksum,
    DurableCheckpointIO,
    newest_intact,
    sync_folder,
    write_checksum,
)

INTERVAL_S = 1.0  # commits of fast epochs are at least this far apart
GENERATIONS = 2
PATTERN = "step-*.ckpt"
LAST = "last.ckpt"
RATES = {"lr", "initial_lr", "max_lr", "min_lr", "base_lrs", "_last_lr"}  # in PyTorch's states


def resume_point(folder: Path) -> Path | None:
    """Return a folder's newest intact resume checkpoint; None where there never was one.

    Raises:
        RunFailed: There are some, and none is intact.
    """
    return newest_intact([*folder.glob(PATTERN), *folder.glob(LAST)])


class ResumeCheckpoint(Callback):
    """Commits a resume checkpoint once an epoch is wholly over: as the next starts, or at the end.

    `on_train_epoch_end` comes before the epoch's train metrics are logged and the schedulers
    stepped, so a run continued from there would lose both.

    Args:
        io: Removes what is superseded.
    """

    def __init__(self, io: DurableCheckpointIO):
        self.folder: Path | None = None  # set once the run's folder is known
        self.io = io
        self.committed_at = time.monotonic()
        self.stopped_early = False
        self.first_epoch = 0
        self.changed: Mapping[str, tuple[Any, Any]] = {}  # of the config, since it was taken

    @override
    def state_dict(self) -> dict[str, bool]:
        return {"stopped_early": self.stopped_early}

    @override
    def load_state_dict(self, state_dict: dict[str, bool]) -> None:
        self.stopped_early = state_dict["stopped_early"]

    @override
    def on_load_checkpoint(self, *hook_arguments: Any) -> None:
        checkpoint = hook_arguments[-1]
        adopt(self.changed, checkpoint)
        if self.folder is not None:
            rehouse(self.folder, checkpoint)

    @override
    def setup(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        self.folder = trainer.strategy.broadcast(self.folder)  # known to the first process alone

    @override
    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        progress = trainer.fit_loop.epoch_progress
        if progress.total.ready <= 1 or trainer.current_epoch == self.first_epoch:
            return
        if trainer.world_size == 1 and time.monotonic() - self.committed_at < INTERVAL_S:
            return
        ready = (
            progress.total.ready,
            progress.current.ready,
        )  # this epoch is counted already, but has not begun
        progress.total.ready, progress.current.ready = (
            progress.total.completed,
            progress.current.completed,
        )
        try:
            self._commit(trainer)
        finally:
            progress.total.ready, progress.current.ready = ready

    @override
    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        self.first_epoch = trainer.current_epoch
        trainer.should_stop |= self.stopped_early  # Lightning forgets it from one fit to the next

    @override
    def on_train_end(self, trainer: Trainer, *_: Any) -> None:
        self.stopped_early = trainer.should_stop
        self._commit(trainer)

    def _commit(self, trainer: Trainer) -> None:
        assert self.folder is not None
        path = self.folder / f"step-{trainer.global_step:09d}.ckpt"
        trainer.save_checkpoint(path)
        self.committed_at = time.monotonic()
        if trainer.is_global_zero:
            there = sorted(self.folder.glob(PATTERN))  # one of a later step was found damaged
            kept = [each for each in there if each.name <= path.name][-GENERATIONS:]
            for old in set(there) - set(kept):
                self.io.remove_checkpoint(old)


def adopt(changed: Mapping[str, tuple[Any, Any]], checkpoint: dict[str, Any]) -> None:
    """Put changed settings of optimizer and scheduler into their stored state, which would win.

    Args:
        changed: Dotted key to its value before and now.
        checkpoint: Is changed in place. A learning rate under way goes on in proportion.
    """
    groups = [each for state in checkpoint["optimizer_states"] for each in state["param_groups"]]
    schedulers = checkpoint["lr_schedulers"]
    for key, (before, now) in changed.items():
        section, _, name = key.partition(".")
        if key == "optimizer.lr":
            for state in (*groups, *schedulers):
                for rate in RATES & state.keys():
                    state[rate] = apply_to_collection(state[rate], float, mul, now / before)
        elif section in ("optimizer", "scheduler"):
            for state in groups if section == "optimizer" else schedulers:
                if name in state:
                    state[name] = now


def rehouse(folder: Path, checkpoint: dict[str, Any]) -> None:
    """Let the best checkpoint so far lie in `folder`: Lightning forgets one that has moved.

    Args:
        folder: Of the run's checkpoints, now.
        checkpoint: Is changed in place.
    """
    for state in checkpoint["callbacks"].values():
        if not isinstance(state, dict) or "best_k_models" not in state:
            continue
        before = state["dirpath"]

        def moved(path: str, before: str = before) -> str:
            inside = path and Path(path).is_relative_to(before)
            return str(folder / Path(path).relative_to(before)) if inside else path

        state["dirpath"] = str(folder)
        for key in ("best_model_path", "kth_best_model_path", "last_model_path"):
            state[key] = moved(state[key])
        state["best_k_models"] = {moved(path): v for path, v in state["best_k_models"].items()}


def keep_last(folder: Path, io: DurableCheckpointIO) -> None:
    """Leave of a finished run's resume checkpoints the newest alone, named `last.ckpt`."""
    newest = resume_point(folder)
    if newest is not None and newest.name != LAST:
        io.remove_checkpoint(folder / LAST)  # of an earlier end of this run
        write_checksum(folder / LAST, Checksum.of(newest))
        sync_folder(folder)
        newest.replace(folder / LAST)
        sync_folder(folder)
        io.remove_checkpoint(newest)  # its checksum is left
    for path in folder.glob(PATTERN):
        io.remove_checkpoint(path)
