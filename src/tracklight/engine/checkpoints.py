"""Checkpoints that survive a crash at any instant, and the one from which a run continues.

A checkpoint is written beside its final name, synced, and renamed. Its checksum comes first, so
whatever has the final name can be verified.
"""

import hashlib
import json
import math
import os
import re
import sys
import time
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from io import BytesIO
from operator import mul
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning_fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning_utilities.core.apply_func import apply_to_collection
from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer
from pytorch_lightning.callbacks import BaseFinetuning, EarlyStopping, ModelCheckpoint, ModelPruning
from pytorch_lightning.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.serialization import MAP_LOCATION
from typing_extensions import override

from tracklight.engine.lightning_internals import begin_epoch_anew
from tracklight.errors import BadInput, RunFailed
from tracklight.paths import read_bounded, sync_folder

CHECKSUM = ".sha256.json"
INTERVAL_S = 1.0  # the least time between two resume checkpoints within a fit
NUM_KEPT = 2
PATTERN = "step-*.ckpt"
BEST, LAST = "best.ckpt", "last.ckpt"
UNNAMED = ".end.tmp"  # the last resume checkpoint, until all hooks of the training's end were called
FURTHER = "further"  # the folder of ModelCheckpoints that name none
PLAIN = (bool, int, float, str, bytes, Tensor, torch.nn.Parameter, torch.dtype, torch.device)
RATES = {"lr", "initial_lr", "max_lr", "min_lr", "base_lrs", "_last_lr"}  # in PyTorch's states


class Checksum(NamedTuple):
    """Digests that a checkpoint's file may have: of the new content, and of the one before."""

    sha256: Sequence[str] = ()
    step: int = -1
    run: str = ""  # that wrote it

    @classmethod
    def of(cls, checkpoint: Path) -> "Checksum":
        """Read the checksum of a checkpoint; an empty one if there is none that can be read."""
        try:
            stored = json.loads(read_bounded(checksum_path(checkpoint)))
            return cls([*map(str, stored["sha256"])], int(stored["step"]), str(stored.get("run", "")))
        except (OSError, ValueError, TypeError, LookupError, OverflowError, RecursionError):
            return cls()


def checksum_path(checkpoint: Path) -> Path:
    """Return the path of a checkpoint's checksum."""
    return checkpoint.with_name(checkpoint.name + CHECKSUM)


def write_checksum(checkpoint: Path, checksum: Checksum) -> None:
    """Write a checkpoint's checksum, durably."""
    path = checksum_path(checkpoint)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        _write_synced(temporary, json.dumps(checksum._asdict()).encode())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def is_intact(checkpoint: Path) -> bool:
    """Check a checkpoint's content against its checksum."""
    try:
        with checkpoint.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() in Checksum.of(checkpoint).sha256
    except OSError:
        return False


def load_plain(
    path: Path, map_location: MAP_LOCATION = "cpu", damaged: type[Exception] = BadInput
) -> dict[str, Any]:
    """Load a checkpoint that holds plain values and tensors only.

    Raises:
        damaged: The content does not match the checksum.
        BadInput: The file is missing, no checkpoint, from a later version of Lightning, or holds
            anything that would run code.
    """
    if checksum_path(path).exists() and path.exists() and not is_intact(path):
        raise damaged(f"checkpoint {path} is damaged: its content does not match its checksum; take another")
    try:
        if zipfile.is_zipfile(path):  # of what PyTorch writes nothing is compressed
            with zipfile.ZipFile(path) as content:
                if sum(each.file_size for each in content.infolist()) > path.stat().st_size:
                    raise ValueError("it unfolds to more than it is")
        loaded = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:
        if isinstance(error, FileNotFoundError):
            reason = " does not exist"
        elif "weights_only" in str(error) or "Unsupported" in str(error):
            reason = ": unsafe content refused (plain values and tensors only)"
        else:
            reason = " cannot be read: empty, cut off, or no checkpoint at all"
        raise BadInput(f"checkpoint {path}{reason}") from None
    has_states = isinstance(loaded, dict) and isinstance(loaded.get("callbacks", {}), dict)
    if not has_states or not isinstance(loaded.get("state_dict"), dict):
        raise BadInput(f"checkpoint {path} holds no `state_dict`; expected a checkpoint that Lightning wrote")
    name = "pytorch-lightning"
    written, installed = str(loaded.get(f"{name}_version", "0.0")), version(name)
    if _release(written) > _release(installed):
        raise BadInput(
            f"checkpoint {path} was written by {name} {written[:20]}, which is later than"
            f" {installed} here; pip install '{name}>={written[:20]}'"
        )
    return loaded


def _to_plain(value: Any) -> Any:
    """Return a hyperparameter as numbers, text, lists, dicts and tensors; `...` if it needs anything else."""
    if isinstance(value, Mapping):
        return {key: plain for key, each in value.items() if (plain := _to_plain(each)) is not ...}
    if isinstance(value, Sequence | set) and not isinstance(value, str | bytes):
        items = list(map(_to_plain, value))
        return ... if any(each is ... for each in items) else items
    value = value.item() if isinstance(value, np.generic) else value
    return value if value is None or type(value) in PLAIN else ...


def _serialize(checkpoint: dict[str, Any]) -> bytes:
    """Return the content of a checkpoint's file, with the plain hyperparameters alone."""
    kept = dict(checkpoint)
    for owner in (LightningModule, LightningDataModule):  # they are rebuilt from the config
        kept.pop(owner.CHECKPOINT_HYPER_PARAMS_TYPE, None)  # a class
        if (name := owner.CHECKPOINT_HYPER_PARAMS_KEY) in kept:
            kept[name] = _to_plain(kept[name])
    if "callbacks" in kept:  # numpy's numbers are easily mistaken for Python's
        kept["callbacks"] = apply_to_collection(kept["callbacks"], np.generic, np.generic.item)
    buffer = BytesIO()  # torch.save into a file would hide why a write failed
    torch.save(kept, buffer)
    buffer.seek(0)
    if refused := torch.serialization.get_unsafe_globals_in_checkpoint(buffer):
        names = ", ".join(sorted(refused))
        raise RunFailed(f"a checkpoint holds plain values and tensors, not {names} of a module or callback")
    return buffer.getvalue()  # a view would outlive the buffer, which Python 3.13 warns of


def _release(written: str) -> tuple[int, ...]:
    """Return major and minor number of a version; any other text compares as the latest."""
    numbers = re.match(r"(\d+)\.(\d+)", written)
    return tuple(map(int, numbers.groups())) if numbers else (sys.maxsize,)


class DurableCheckpointIO(CheckpointIO):
    """Writes checkpoints so that power loss leaves the old one or the new one, never half.

    Best weights that follow the last writing within `INTERVAL_S` are kept in memory, until something is
    written that builds on them or `write_pending` is called: an epoch may take a millisecond.
    `before_commit` is called when the content is on disk and before it takes its name: what the
    checkpoint builds on (the metrics up to it) must be durable first.
    """

    def __init__(self, before_commit: Callable[[], None] = lambda: None):
        self.before_commit, self.run_id = before_commit, ""
        self._pending: tuple[dict[str, Any], Path] | None = None
        self._written_at = -math.inf

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        if storage_options is not None:
            raise TypeError("storage_options cannot be obeyed: a checkpoint is a local file")
        final = Path(path)
        if self._pending is not None and self._pending[1] != final:
            self.write_pending()
        self._pending = None
        is_best = final.name == BEST and "optimizer_states" not in checkpoint
        if is_best and time.monotonic() - self._written_at < INTERVAL_S:
            weights = apply_to_collection(checkpoint["state_dict"], Tensor, Tensor.clone)
            self._pending = checkpoint | {"state_dict": weights}, final
        else:
            self._write(checkpoint, final)

    def write_pending(self) -> None:
        """Write the best weights that are kept in memory, if any."""
        pending, self._pending = self._pending, None
        if pending is not None:
            self._write(*pending)

    def _write(self, checkpoint: dict[str, Any], final: Path) -> None:
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = final.with_name(f".{final.name}.tmp")
        content = _serialize(checkpoint)
        try:
            _write_synced(temporary, content)
            self.before_commit()
            digests = [hashlib.sha256(content).hexdigest(), *Checksum.of(final).sha256[:1]]
            write_checksum(final, Checksum(digests, checkpoint.get("global_step", -1), self.run_id))
            temporary.replace(final)
            sync_folder(final.parent)
            self._written_at = time.monotonic()
        except OSError as error:
            num_bytes = temporary.stat().st_size if temporary.exists() else 0
            temporary.unlink(missing_ok=True)
            raise RunFailed(
                f"checkpoint {final} could not be written ({num_bytes:,} bytes so far):"
                f" {error.strerror}; the previous one is untouched"
            ) from error

    @override
    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        if str(path).startswith(("http://", "https://")):
            raise BadInput(f"checkpoint {path} is remote; only local files are loaded: download it first")
        checkpoint = load_plain(Path(path), map_location or "cpu", damaged=RunFailed)
        states = checkpoint.get("callbacks", {})
        names = {key.partition("{")[0] for key in states}
        if "ResumeCheckpoint" in names and "BestCheckpoint" not in names:  # of version 0.1
            for key in [key for key in states if key.startswith("ModelCheckpoint{")]:
                states[key.replace("Model", "Best", 1)] = states.pop(key)
        return checkpoint

    @override
    def remove_checkpoint(self, path: str | Path) -> None:
        for file in (Path(path), checksum_path(Path(path))):
            file.unlink(missing_ok=True)


def newest_resume_checkpoint(folder: Path) -> Path | None:
    """Return the intact resume checkpoint of the highest step, if any; warn of damaged ones.

    Raises:
        RunFailed: There are some, and none is intact.
    """
    paths = sorted([*folder.glob(PATTERN), *folder.glob(LAST)])
    intact = {path: Checksum.of(path).step for path in paths if is_intact(path)}
    for path in sorted(set(paths) - set(intact)):
        warnings.warn(f"checkpoint {path} is damaged (checksum differs); using another", stacklevel=2)
    if paths and not intact:
        raise RunFailed(f"no checkpoint in {folder} is intact; not starting afresh")
    return max(intact, key=lambda path: intact[path], default=None)


def remove_leftovers(folder: Path) -> None:
    """Delete temporary files of a crash, and checksums without a checkpoint."""
    for file in (*folder.glob(".*.tmp"), *folder.glob(f"*{CHECKSUM}")):
        if file.suffix == ".tmp" or not file.with_name(file.name.removesuffix(CHECKSUM)).exists():
            file.unlink(missing_ok=True)


def rename_checkpoint(checkpoint: Path, name: Path) -> None:
    """Rename a checkpoint within its folder, its checksum first."""
    digests = [*Checksum.of(checkpoint).sha256[:1], *Checksum.of(name).sha256[:1]]
    write_checksum(name, Checksum.of(checkpoint)._replace(sha256=digests))
    sync_folder(name.parent)
    checkpoint.replace(name)
    sync_folder(name.parent)
    checksum_path(checkpoint).unlink(missing_ok=True)


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

    @override
    def setup(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
        super().setup(trainer, *args, **kwargs)
        # A callback may save other weights than the module's, as averaging does: those were scored.
        # Lightning asks it only for whole checkpoints.
        self.save_weights_only = not any(
            is_overridden("on_save_checkpoint", each, Callback) for each in trainer.callbacks
        )

    @override
    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        self._before = trainer.callback_metrics.get(self.metric)

    @override
    def check_monitor_top_k(self, trainer: Trainer, current: Tensor | None = None) -> bool:
        if current is None or trainer.callback_metrics.get(self.metric) is self._before:
            return False
        is_finite = trainer.strategy.reduce_boolean_decision(bool(current.isfinite().all()))
        return is_finite and super().check_monitor_top_k(trainer, current)


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
        recent = trainer.world_size == 1 and time.monotonic() - self.saved_at < INTERVAL_S
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
