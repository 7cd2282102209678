import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tracklight.tracking

FILES = sorted(p.stem for p in Path(tracklight.tracking.__path__[0]).glob("[!_]*.py"))
CHECK = """
import importlib, logging, sys
for name in sys.argv[1:]:
    importlib.import_module(f"tracklight.tracking.{name}")
from mlflow.telemetry.client import get_telemetry_client
from mlflow.environment_variables import MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT
assert get_telemetry_client() is None
assert "torch" not in sys.modules
assert MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT.get()
"""


def importing(files: list[str], check: str = CHECK, **chosen: str) -> subprocess.CompletedProcess:
    # Without what makes MLflow think that it is in CI, where it reports nothing anyway.
    kept = ("PATH", "HOME", "PYTHONPATH", "LD_LIBRARY_PATH")
    environment = {key: os.environ[key] for key in kept if key in os.environ} | chosen
    return subprocess.run(
        [sys.executable, "-c", check, *files], env=environment, capture_output=True, text=True
    )


def test_who_imports_the_store_gets_no_usage_reporting_and_no_torch():
    done = importing(["store"])
    assert done.returncode == 0, done.stderr


def test_mlflows_own_waiting_is_bounded_unless_the_user_chose():
    show = """
import tracklight.tracking.mlflow_client
from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_MAX_RETRIES as retries
from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_TIMEOUT as timeout
print(retries.get(), timeout.get())
"""
    done = importing([], show, MLFLOW_HTTP_REQUEST_TIMEOUT="99")
    retries, timeout = map(int, done.stdout.split())
    assert timeout == 99
    assert retries <= 3


@pytest.mark.parametrize("file", FILES)
def test_no_file_of_this_room_imports_mlflow_past_the_door(file):
    source = (Path(tracklight.tracking.__path__[0]) / f"{file}.py").read_text()
    first = next(iter(re.findall(r"^(?:from|import) .*mlflow.*", source, re.M)), None)
    door = "from tracklight.tracking.mlflow_client import "
    assert file == "mlflow_client" or first is None or first.startswith(door)


def test_our_warnings_are_heard_after_mlflow_silenced_the_root():
    import logging

    import mlflow.pytorch  # noqa: F401

    assert logging.getLogger("tracklight.tracking.run").isEnabledFor(logging.WARNING)
