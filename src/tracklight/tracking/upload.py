"""Brings a run's artifact files to where its store keeps them, if that is not where they lie."""

from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname


def temporary(path: Path) -> Path:
    """Return the name under which a file is written until it is whole; it is not sent."""
    return path.with_name(f".{path.name}.tmp")


def _is_temporary(path: Path) -> bool:
    return path.name.startswith(".") and path.suffix == ".tmp"


class Upload:
    """Sends each file of `folder` once, and again when it changes.

    Args:
        client: MLflow's.
        run_id: The run.
        artifact_uri: Where the store keeps the run's artifacts.
        folder: Where they lie on this machine.
    """

    def __init__(self, client: Any, run_id: str, artifact_uri: str, folder: Path):
        self._client = client
        self._run_id = run_id
        self._folder = folder
        self._done: dict[Path, tuple[int, int]] = {}
        parts = urlsplit(artifact_uri)
        local = url2pathname(parts.path) if parts.scheme in ("", "file") else None
        self.needed = local is None or Path(local) != folder

    def all(self) -> None:
        """Send what is new; whatever MLflow raises passes through."""
        if not self.needed:
            return
        for path in sorted(self._folder.rglob("*")):
            if path.is_file() and not _is_temporary(path):
                stat = path.stat()
                mark = (stat.st_size, stat.st_mtime_ns)
                if self._done.get(path) != mark:
                    inside = path.parent.relative_to(self._folder).as_posix()
                    target = None if inside == "." else inside
                    self._client.log_artifact(self._run_id, str(path), target)
                    self._done[path] = mark
