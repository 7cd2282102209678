"""Paths of the checkout, its config files and its runs."""

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
ROOT = PACKAGE.parents[1]  # train.py's folder
CONF = ROOT / "conf"
HOME = ROOT / "mlruns"  # as conf/tracking/mlflow.yaml has it


def uri_setting(uri: object) -> str:
    """Return the name of the setting that a tracking URI comes from."""
    name = "MLFLOW_TRACKING_URI"
    return name if uri is not None and os.environ.get(name) == uri else "tracking.uri"


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to disk: a rename is durable only then."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
