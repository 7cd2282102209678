"""The checkpoints of a run: the best weights, and the state from which it continues."""

import time
from collections.abc import Mapping, Sequence
from operator import mul
from pathlib import Path
from typing import Any

from lightning_utilities.core.apply_func import apply_to_collection
from pytorch_lightning import Callback, LightningDataModule, Trainer
from pytorch_lightning.callbacks import BaseFinetuning, EarlyStopping, ModelCheckpoint, ModelPruning
from pytorch_lightning.utilities.model_helpers import is_overridden
from torch import Tensor
from typing_extensions import override

from tracklight.engine import checkpoint_io
from tracklight.engine.checkpoint_io import (
    LAST,
    PATTERN,
    Checksum,
    DurableCheckpointIO,
    load_plain,
    newest_resume_checkpoint,
    rename_checkpoint,
)
from tracklight.engine.lightning_internals import begin_epoch_anew
from tracklight.errors import BadInput

NUM_KEPT = 2
UNNAMED = ".end.tmp"  # the last resume checkpoint, until all hooks of the training's end were called
FURTHER = "further"  # the folder of ModelCheckpoints that name none
RATES = {"lr", "initial_lr", "max_lr", "min_lr", "base_lrs", "_last_lr"}  # in PyTorch's states


def keep_last(folder: Path, io: DurableCheckpointIO) -> None:
    """Rename a finished run's newest resume checkpoint to `last.ckpt` and remove the others."""
    newest = newest_resume_checkpoint(folder)
    if newest is not None and newest.name != LAST:
        io.remove_checkpoint(folder / LAST)  # of an earlier end of this run
        rename_checkpoint(newest, folder / LAST)
    for path in folder.glob(PATTERN):
        io.remove_checkpoint(path)


class BestCheckpoint(ModelCheckpoint):
    """Saves the weights with the best score so far, of the epochs that measured it and found a number.

    Lightning keeps the value of an earlier epoch, and would take NaN for the worst number there is. It lets
    a ModelCheckpoint of a module's `configure_callbacks` replace those of its very class.
    """

    supports_blocks = True

    def __init__(self, metric: str | None, mode: str, within_epochs: bool):
        """Create it; `within_epochs` says that validation does not end with its epoch."""
        at_end = True if not within_epochs or str(metric).startswith("train") else None
        options: dict[str, Any] = {"enable_version_counter": False, "save_on_train_epoch_end": at_end}
        super().__init__(filename="best", monitor=metric, mode=mode, **options)
        self.metric, self._before = metric or "", None
        self._io: DurableCheckpointIO | None = None  # where it may keep weights in memory

    @override
    def setup(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
        super().setup(trainer, *args, **kwargs)
        # A callback may save other weights than the module's, as averaging does: those were scored.
        # Lightning asks it only for whole checkpoints.
        self.save_weights_only = not any(
            is_overridden("on_save_checkpoint", each, Callback) for each in trainer.callbacks
        )
        module, data, io = trainer.lightning_module, trainer.datamodule, trainer.strategy.checkpoint_io
        is_plain = self.save_weights_only and trainer.world_size == 1
        is_plain &= not is_overridden("on_save_checkpoint", module)
        is_plain &= data is None or not is_overridden("state_dict", data, LightningDataModule)
        self._io = io if is_plain and isinstance(io, DurableCheckpointIO) else None

    @override
    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        self._before = trainer.callback_metrics.get(self.metric)

    @override
    def check_monitor_top_k(self, trainer: Trainer, current: Tensor | None = None) -> bool:
        if current is None or trainer.callback_metrics.get(self.metric) is self._before:
            return False
        is_finite = trainer.strategy.reduce_boolean_decision(bool(current.isfinite().all()))
        is_best = is_finite and super().check_monitor_top_k(trainer, current)
        if not (is_best and self._io and self.best_model_path):
            return is_best
        now: dict[str, Any] = {"epoch": trainer.current_epoch, "global_step": trainer.global_step}
        now["state_dict"] = trainer.strategy.lightning_module_state_dict()
        if not self._io.keep_best(Path(self.best_model_path), now):
            return True
        # Lightning would copy the state of all its loops before it learns that the weights can wait.
        self.current_score = self.best_model_score = self.kth_value = current
        self.best_k_models[self.best_model_path] = current
        return False


class ResumeCheckpoint(Callback):
    """Saves a resume checkpoint once an epoch is wholly over: as the next starts, or at the end.

    `on_train_epoch_end` comes before the epoch's train metrics are logged and the schedulers
    stepped, so a run continued from there would lose both. Among the first callbacks it saves the state
    before the hooks of others change it, which a resumed run calls again: as an epoch starts, or for
    good as training ends, where averaging replaces the weights.
    A run that `stops`, the settings that may end it early, have ended stays ended until they change.
    """

    def __init__(self, io: DurableCheckpointIO, stops: str = ""):
        self.folder: Any = None  # a Path, once the run's folder is known
        self.wal: Any = None  # in rank zero the run's; a checkpoint remembers how far it had come
        self.io = io
        self.saved_at = time.monotonic()
        self.stops = self.stops_before = stops
        self.stopped_early = self.is_partial = False
        self.first_epoch = 0
        self.changed: Mapping[str, tuple[Any, Any]] = {}  # config keys, since the checkpoint

    @override
    def state_dict(self) -> dict[str, Any]:
        state = {"stopped_early": self.stopped_early, "is_partial": self.is_partial, "stops": self.stops}
        return state | {"position": self.wal and self.wal.position}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.stopped_early = bool(state_dict["stopped_early"])
        self.is_partial = state_dict.get("is_partial", False)
        self.stops_before = state_dict.get("stops", self.stops)
        if self.wal and (position := state_dict.get("position")):  # older checkpoints have none
            self.wal.replay_from(position)

    def check(self, checkpoint: Path | None, callbacks: Sequence[Callback]) -> None:
        """Refuse a checkpoint of the middle of an epoch whose end no longer holds, or of a lossy callback."""
        lossy = [type(c).__name__ for c in callbacks if isinstance(c, BaseFinetuning | ModelPruning)]
        if checkpoint and lossy:
            why = "Lightning saves nowhere what is frozen or pruned; start it anew, without resume="
            raise BadInput(f"a run with {lossy[0]} cannot be continued: {why}")
        states = {} if checkpoint is None else load_plain(checkpoint).get("callbacks", {})
        state = found if isinstance(found := states.get(self.state_key), dict) else {}
        if state.get("is_partial") and state.get("stops", self.stops) != self.stops:
            raise BadInput(
                "trainer.max_steps or max_time ended this run in the middle of an epoch, whose rest cannot be"
                " taken up; start a new run with the new settings, or from its weights: init_from=RUN_ID"
            )

    @override
    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        apply_changes(self.changed, checkpoint)
        relocate(self.folder, checkpoint)
        for each in trainer.callbacks:  # Lightning would restore this argument with the counts
            if isinstance(each, EarlyStopping) and (state := checkpoint["callbacks"].get(each.state_key)):
                state["patience"] = each.patience

    @override
    def setup(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        self.folder = trainer.strategy.broadcast(self.folder)  # known to rank zero alone
        for each in trainer.checkpoint_callbacks:
            if isinstance(each, ModelCheckpoint) and each.dirpath is None:
                each.dirpath = str(self.folder / FURTHER)  # else beside the artifacts, under the run's name

    def _remove_later(self, trainer: Trainer) -> None:
        """Remove what this run wrote after its checkpoint: Lightning would name the new files otherwise."""
        savers = [each for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint)]
        known = {p for c in savers for p in (*c.best_k_models, c.best_model_path, c.last_model_path)}
        for each in savers if trainer.is_global_zero else ():
            for depth in range(str(each.filename).count("/") + 1):  # a metric's name may hold one
                for path in Path(each.dirpath or "").glob("*/" * depth + f"*{each.FILE_EXTENSION}"):
                    _, step, run_id = Checksum.of(path)
                    is_later = run_id == self.io.run_id != "" and step > trainer.global_step
                    if is_later and str(path) not in known:
                        self.io.remove_checkpoint(path)

    @override
    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        progress = trainer.fit_loop.epoch_progress
        total, current = progress.total, progress.current
        first = total.ready <= 1 or trainer.current_epoch == self.first_epoch
        recent = trainer.world_size == 1 and time.monotonic() - self.saved_at < checkpoint_io.INTERVAL_S
        if first or recent:
            return
        ready = total.ready, current.ready
        # Lightning has counted the new epoch, which has not begun.
        total.ready, current.ready = total.completed, current.completed
        try:
            self._commit(trainer)
        finally:
            total.ready, current.ready = ready

    @override
    def on_train_start(self, trainer: Any, *_: Any) -> None:
        begin_epoch_anew(trainer)
        self.first_epoch = trainer.current_epoch
        # Lightning forgets it from one fit to the next.
        stopping = (each for each in trainer.callbacks if isinstance(each, EarlyStopping))
        holds = self.stops == self.stops_before or any(s.wait_count >= s.patience for s in stopping)
        self.stopped_early &= holds
        trainer.should_stop |= self.stopped_early
        self._remove_later(trainer)

    @override
    def on_exception(self, *_: Any) -> None:
        self.io.write_pending()

    @override
    def on_train_end(self, trainer: Trainer, *_: Any) -> None:
        self.stopped_early = trainer.should_stop
        self.is_partial = not trainer.is_last_batch
        trainer.save_checkpoint(self.folder / UNNAMED)

    @override
    def on_fit_end(self, trainer: Trainer, *_: Any) -> None:
        # Not before: a run that is resumed from the end calls no other callback's `on_train_end`.
        if trainer.is_global_zero and (self.folder / UNNAMED).exists():
            rename_checkpoint(self.folder / UNNAMED, self._path(trainer))
        self._tidy(trainer)

    def _path(self, trainer: Trainer) -> Path:
        return self.folder / f"step-{trainer.global_step:09d}.ckpt"

    def _commit(self, trainer: Trainer) -> None:
        trainer.save_checkpoint(self._path(trainer))
        self._tidy(trainer)

    def _tidy(self, trainer: Trainer) -> None:
        self.saved_at = time.monotonic()
        if trainer.is_global_zero:
            saved = {*self.folder.glob(PATTERN)}  # one of a later step was found damaged
            kept = sorted(each for each in saved if each <= self._path(trainer))[-NUM_KEPT:]
            for old in saved - set(kept):
                self.io.remove_checkpoint(old)


def apply_changes(changed: Mapping[str, tuple[Any, Any]], checkpoint: dict[str, Any]) -> None:
    """Put changed settings into the stored states of optimizer and scheduler, which would win.

    `changed` has by dotted config key the value before and now; the learning rate that a schedule has
    reached changes in proportion. `checkpoint` is changed in place.
    """
    groups = [each for state in checkpoint["optimizer_states"] for each in state["param_groups"]]
    states = {"optimizer": groups, "scheduler": checkpoint["lr_schedulers"]}
    for key, (before, now) in changed.items():
        section, _, name = key.partition(".")
        if key == "optimizer.lr":
            for state in (*groups, *checkpoint["lr_schedulers"]):
                for rate in RATES & state.keys():
                    state[rate] = apply_to_collection(state[rate], float, mul, now / before)
        else:
            for state in states.get(section, ()):
                if name in state:
                    state[name] = now


def relocate(folder: Path, checkpoint: dict[str, Any]) -> None:
    """Point the stored states of ModelCheckpoints at `folder`, as far as BestCheckpoint's folder was meant.

    They forget a checkpoint that moved, and delete an older one below their own folder.
    """
    callbacks = checkpoint["callbacks"]
    before = next((s["dirpath"] for key, s in callbacks.items() if key.startswith("BestCheckpoint{")), folder)

    def move(path: str) -> str:
        rest = Path(path).relative_to(before) if Path(path).is_relative_to(before) else Path(path)
        if ".." in rest.parts:
            raise ValueError(f"{path} may be anywhere")
        return str(folder / rest) if path else path

    for state in callbacks.values():
        if isinstance(state, dict) and "best_model_path" in state:
            for key in ("dirpath", "best_model_path", "kth_best_model_path", "last_model_path"):
                state[key] = move(state[key])
            state["best_k_models"] = {move(path): score for path, score in state["best_k_models"].items()}
