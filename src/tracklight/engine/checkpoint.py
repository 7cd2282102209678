"""Checkpoints that survive a crash at any instant, and the one from which a run continues.

A checkpoint is written beside its final name, synced, and renamed; the digest beside it is there
before the rename, so whatever stands under the final name can be proved whole.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from lightning_fabric.plugins.io.checkpoint_io import CheckpointIO
from torch.serialization import MAP_LOCATION
from typing_extensions import override

from tracklight.errors import BadInput, RunFailed


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
    return path.with_name(path.name + ".sha256.json")


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
        BadInput: The file is missing, no checkpoint, or holds anything that would run code.
    """
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
    return loaded


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
                    torch.save(checkpoint, sink)
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
            _write_durably(
                checksum_path(final), Checksum(accepted, checkpoint.get("global_step", -1))
            )
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


def _write_durably(path: Path, checksum: Checksum) -> None:
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

    Warns of each damaged one that is newer.

    Raises:
        RunFailed: There are checkpoints, and none is intact.
    """
    candidates = sorted(checkpoints, key=lambda path: Checksum.of(path).step, reverse=True)
    for path in candidates:
        if is_intact(path):
            return path
        warnings.warn(
            f"checkpoint {path} is damaged (checksum differs); using the one before", stacklevel=2
        )
    if candidates:
        raise RunFailed(f"no checkpoint in {candidates[0].parent} is intact; not starting afresh")
    return None


def remove_leftovers(folder: Path) -> None:
    """Delete what a crash left half written."""
    for file in folder.glob(".*.tmp"):
        file.unlink(missing_ok=True)
