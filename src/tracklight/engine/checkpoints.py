"""Checkpoints that survive a crash at any instant, and the one from which a run continues.

A checkpoint is written beside its final name, synced, and renamed; the digest beside it is there
before the rename, so whatever stands under the final name can be proved whole.
"""

import hashlib
import json
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from operator import mul
from pathlib import Path
from typing import IO, Any, cast

import torch
from lightning_fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning_utilities.core.apply_func import apply_to_collection
from pytorch_lightning import Callback, Trainer
from torch import Tensor
from torch.serialization import MAP_LOCATION
from typing_extensions import override

from tracklight.errors import BadInput, RunFailed
from tracklight.paths import sync_folder

CHECKSUM = ".sha256.json"
LIGHTNING = "pytorch-lightning"


@dataclass(frozen=True)
class Checksum:
    """What may rightly stand under a checkpoint's name: the new content, or the one before."""

    sha256: list[str] = field(default_factory=list)
    step: int = -1

    @classmethod
    def of(cls, path: Path) -> "Checksum":
        """Read the checksum beside `path`; an empty one where there is none that can be read."""
        try:
            return cls(**json.loads(checksum_path(path).read_text()))
        except (OSError, ValueError, TypeError):
            return cls()


def checksum_path(path: Path) -> Path:
    """Return where the checksum of the checkpoint `path` lies."""
    return path.with_name(path.name + CHECKSUM)


def is_intact(path: Path) -> bool:
    """Say whether the checkpoint's content is what was written."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() in Checksum.of(path).sha256
    except OSError:
        return False


def load_plain(path: Path, map_location: MAP_LOCATION = "cpu") -> dict[str, Any]:
    """Load a checkpoint that holds plain values and tensors only.

    Raises:
        BadInput: The file is missing, damaged, no checkpoint, from a later version, or holds
            anything that would run code.
    """
    if checksum_path(path).exists() and path.exists() and not is_intact(path):
        raise BadInput(
            f"checkpoint {path} is damaged: its content does not match its checksum; take another"
        )
    try:
        loaded = torch.load(path, map_location=map_location, weights_only=True)
    except FileNotFoundError:
        raise BadInput(f"checkpoint {path} does not exist") from None
    except Exception as error:
        if "weights_only" in str(error) or "Unsupported" in str(error):
            raise BadInput(
                f"checkpoint {path}: unsafe content refused (plain values and tensors only)"
            ) from None
        raise BadInput(
            f"checkpoint {path} cannot be read: empty, cut off, or no checkpoint at all"
        ) from None
    if not isinstance(loaded, dict) or not isinstance(loaded.get("state_dict"), dict):
        raise BadInput(
            f"checkpoint {path} holds no `state_dict`; expected a checkpoint that Lightning wrote"
        )
    written, ours = str(loaded.get("pytorch-lightning_version", "0.0")), version(LIGHTNING)
    if _release(written) > _release(ours):
        raise BadInput(
            f"checkpoint {path} was written by {LIGHTNING} {written[:20]}, which is later than"
            f" {ours} here; pip install '{LIGHTNING}>={written[:20]}'"
        )
    return loaded


def load_weights(path: Path) -> dict[str, Tensor]:
    """Load the weights of a checkpoint, to start from.

    Raises:
        BadInput: As for `load_plain`, or a weight is no finite number.
    """
    weights = load_plain(path)["state_dict"]
    for name, tensor in weights.items():
        if not isinstance(tensor, Tensor):
            raise BadInput(f"checkpoint {path}: {str(name)[:80]} of its `state_dict` is no tensor")
        if not tensor.isfinite().all():
            raise BadInput(f"checkpoint {path}: {name} holds NaN or infinite values")
    return weights


def _release(written: str) -> tuple[int, ...]:
    """Return major and minor number of a version; what is none compares as the latest."""
    numbers = re.match(r"(\d+)\.(\d+)", written)
    return tuple(map(int, numbers.groups())) if numbers else (sys.maxsize,)


class _HashingFile:
    """Passes what `torch.save` writes on to a file, hashing and counting on the way."""

    def __init__(self, file: IO[bytes]):
        self.file = file
        self.digest = hashlib.sha256()
        self.num_bytes = 0
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.num_bytes += len(data)
        try:
            return self.file.write(data)
        except OSError as error:  # torch.save turns it into a RuntimeError that no longer says why
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


class DurableCheckpointIO(CheckpointIO):
    """Writes checkpoints so that power loss leaves the old one or the new one, never half.

    Args:
        before_commit: Called once the content is on disk and before it takes its name: what the
            checkpoint builds on (the metrics up to it) must be durable first.
    """

    def __init__(self, before_commit: Callable[[], None] = lambda: None):
        self.before_commit = before_commit

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        final = Path(path)
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = final.with_name(f".{final.name}.tmp")
        num_bytes = 0
        try:
            with temporary.open("wb") as file:
                sink = _HashingFile(file)
                try:
                    torch.save(checkpoint, cast(IO[bytes], sink))
                except RuntimeError:
                    if sink.error is None:
                        raise
                    raise sink.error from None
                finally:
                    num_bytes = sink.num_bytes
                file.flush()
                os.fsync(file.fileno())
            self.before_commit()
            accepted = [sink.digest.hexdigest(), *Checksum.of(final).sha256[:1]]
            write_checksum(final, Checksum(accepted, checkpoint.get("global_step", -1)))
            temporary.replace(final)
            sync_folder(final.parent)
        except OSError as error:
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
            raise BadInput(
                f"checkpoint {path} is remote; only local files are loaded: download it first"
            )
        if checksum_path(Path(path)).exists() and not is_intact(Path(path)):
            raise RunFailed(
                f"checkpoint {path} is damaged: its content does not match its checksum"
            )
        return load_plain(Path(path), map_location or "cpu")

    @override
    def remove_checkpoint(self, path: str | Path) -> None:
        for file in (Path(path), checksum_path(Path(path))):
            file.unlink(missing_ok=True)


def write_checksum(checkpoint: Path, checksum: Checksum) -> None:
    """Write the checksum beside a checkpoint, durably."""
    path = checksum_path(checkpoint)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w") as file:
        json.dump(asdict(checksum), file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def newest_intact(checkpoints: Iterable[Path]) -> Path | None:
    """Return the intact checkpoint of the highest step, judged by content alone.

    Warns of each damaged one.

    Raises:
        RunFailed: There are checkpoints, and none is intact.
    """
    intact = []
    for path in (found := sorted(checkpoints)):
        if is_intact(path):
            intact.append(path)
        else:
            warnings.warn(
                f"checkpoint {path} is damaged (checksum differs); using another", stacklevel=2
            )
    if found and not intact:
        raise RunFailed(f"no checkpoint in {found[0].parent} is intact; not starting afresh")
    return max(intact, key=lambda path: Checksum.of(path).step, default=None)


def remove_leftovers(folder: Path) -> None:
    """Delete what a crash left half written, and checksums of what was not written at all."""
    for file in folder.glob(".*.tmp"):
        file.unlink(missing_ok=True)
    for file in folder.glob(f"*{CHECKSUM}"):
        if not file.with_name(file.name.removesuffix(CHECKSUM)).exists():
            file.unlink(missing_ok=True)


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
