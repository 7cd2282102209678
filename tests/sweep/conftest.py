"""Sweeps in processes of their own."""

import pytest

from process import Trainees
from team_server import PostgreSQL


@pytest.fixture(scope="session")
def commander(trainees) -> Trainees:
    """What starts sweeps."""
    return trainees


@pytest.fixture
def postgres():
    """A PostgreSQL server of its own."""
    server = PostgreSQL("me")
    yield server
    server.close()
