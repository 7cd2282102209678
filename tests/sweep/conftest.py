"""Sweeps in processes of their own."""

import pytest

from process import Trainees


@pytest.fixture(scope="session")
def commander(trainees) -> Trainees:
    """What starts sweeps."""
    return trainees
