"""Sweeps in processes of their own."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from process import Process, Trainees

HERE = Path(__file__).resolve().parent


class Commander(Trainees):
    """Starts sweeps."""

    def sweep(self, directory: Path, *arguments: str, **more: Any) -> Process:
        """Run `train.py -m ARGUMENTS` to its end."""
        return self.train(directory, "-m", *arguments, **more)


@pytest.fixture(scope="session")
def commander(template) -> Iterator[Commander]:
    commander = Commander(template, HERE / "commander.py")
    yield commander
    commander.close()
