"""How a script begins: in the environment, or with the line that says how to get there."""

import importlib
import sys


def enter(name: str) -> None:
    """Run a script's main, `tracklight.commands.NAME`, and exit as it says.

    Raises:
        SystemExit: Always.
    """
    try:
        command = importlib.import_module("tracklight.commands.parser")
        script = importlib.import_module(f"tracklight.commands.{name}")
    except ModuleNotFoundError as error:
        print(f"no {error.name} here: `source .venv/bin/activate` or `make train`", file=sys.stderr)
        sys.exit(2)
    command.enter(script.main)
