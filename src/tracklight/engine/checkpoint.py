"""Checkpoints that survive a crash at any instant, and the one from which a run continues.

A checkpoint is written beside its final name, synced, and renamed; the digest beside it is there
before the rename, so whatever stands under the final name can be proved whole.
"""

import hashlib
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any, cast

import torch
from lightning_fabric.plugins.io.checkpoint_io import CheckpointIO
from torch import Tensor
from torch.serialization import MAP_LOCATION
from typing_extensions import override

from tracklight.errors import BadInput, RunFailed

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


def sync_folder(folder: Path) -> None:
    """Make renames within `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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
