"""Checkpoint files that survive a crash at any instant, and hold plain values alone.

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
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning_fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning_utilities.core.apply_func import apply_to_collection
from pytorch_lightning import LightningDataModule, LightningModule
from torch import Tensor
from torch.serialization import MAP_LOCATION
from typing_extensions import override

from tracklight.errors import BadInput, RunFailed
from tracklight.paths import read_bounded, sync_folder

CHECKSUM = ".sha256.json"
INTERVAL_S = 1.0  # the least time between two checkpoints of a kind within a fit
PATTERN = "step-*.ckpt"
BEST, LAST = "best.ckpt", "last.ckpt"
PLAIN = (bool, int, float, str, bytes, Tensor, torch.nn.Parameter, torch.dtype, torch.device)


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
        self._best: dict[str, Any] | None = None  # the best checkpoint as last saved, without its weights
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
        if final.name == BEST and "optimizer_states" not in checkpoint:
            # Without counters of loops, which continue nothing where there is no optimizer.
            checkpoint = {key: value for key, value in checkpoint.items() if key != "loops"}
            self._best = checkpoint | {"state_dict": None}
            if self.keep_best(final, checkpoint):
                return
        self._write(checkpoint, final)

    def keep_best(self, path: Path, now: dict[str, Any]) -> bool:
        """Keep the best weights in memory if they may wait; return whether they do.

        Args:
            path: Of the checkpoint that they are to be.
            now: Weights, epoch and step; the rest is as in the best checkpoint before.
        """
        if self._pending is not None and self._pending[1] != path:
            self.write_pending()  # another callback's
        if self._best is None or time.monotonic() - self._written_at >= INTERVAL_S:
            return False
        weights = apply_to_collection(now["state_dict"], Tensor, Tensor.clone)
        self._pending = self._best | now | {"state_dict": weights}, path
        return True

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
