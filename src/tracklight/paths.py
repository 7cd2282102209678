"""Paths of the checkout, its config files and its runs."""

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
ROOT = PACKAGE.parents[1]  # train.py's folder
CONF = ROOT / "conf"
HOME = ROOT / "mlruns"  # as conf/tracking/mlflow.yaml has it


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to disk: a rename is durable only then."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
