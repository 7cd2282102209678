"""Sweeps in processes of their own."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from process import Process, Trainees

HERE = Path(__file__).resolve().parent


class Commander(Trainees):
    """Starts sweeps."""

    def __init__(self, folder: Path) -> None:
        self._template = folder / "mlflow.db"
        env = {key: v for key, v in os.environ.items() if not key.startswith("MLFLOW_")}
        self._server = subprocess.Popen(
            [sys.executable, HERE / "commander.py", self._template],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )
        self._number = 0
        assert self._answer() == "ready"

    def sweep(self, directory: Path, *arguments: str, **more: Any) -> Process:
        """Run `train.py -m ARGUMENTS` to its end."""
        return self.train(directory, "-m", *arguments, **more)


@pytest.fixture(scope="session")
def commander(tmp_path_factory) -> Iterator[Commander]:
    commander = Commander(tmp_path_factory.mktemp("template"))
    yield commander
    commander.close()
