"""How a script starts: in the environment, or with the line that says how to activate it."""

import sys


def enter(command: str) -> None:
    """Run a command of `tracklight.commands` and exit with its code."""
    try:
        from tracklight import cli
    except ModuleNotFoundError as error:
        print(f"no {error.name} here: `source .venv/bin/activate` or `make train`", file=sys.stderr)
        sys.exit(2)
    cli.enter(command)
