"""Where things lie: the checkout, its config files and its runs."""

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
ROOT = PACKAGE.parents[1]  # train.py's folder
CONF = ROOT / "conf"
HOME = ROOT / "mlruns"  # as conf/tracking/mlflow.yaml has it


def sync_folder(folder: Path) -> None:
    """Return once the names in a folder are on the disk: a rename is durable only then."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
