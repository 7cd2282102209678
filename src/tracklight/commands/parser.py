"""What the scripts share: how a store and a run are named, and how a script ends."""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from tracklight import cli
from tracklight.errors import BadInput
from tracklight.paths import HOME

RUN_HELP = (
    "id of a run, the unique beginning of one, `last`, or `best`: of the runs with the newest's "
    "metric and data set"
)


class Parser(argparse.ArgumentParser):
    """Takes a command line; what is wrong with it is bad input like any other."""

    def __init__(self, description: str, epilog: str | None = None):
        super().__init__(
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.add_argument(
            "--uri",
            default=os.environ.get("MLFLOW_TRACKING_URI"),
            help="MLflow's address (default: mlflow.db in --dir)",
        )
        self.add_argument(
            "--dir",
            type=Path,
            default=HOME,
            metavar="FOLDER",
            help="where the runs' folders lie (default: mlruns beside train.py)",
        )
        self.add_argument(
            "--experiment", metavar="NAME", help="stay within this one (default: all)"
        )

    def error(self, message: str) -> NoReturn:
        """Refuse the command line.

        Raises:
            BadInput: Always.
        """
        raise BadInput(f"{message}; `python {sys.argv[0]} --help` shows what can be given")


def enter(main: Callable[[Sequence[str]], int]) -> NoReturn:
    """Run a script's main on the command line and exit as the contract says."""
    cli.quiet()
    signal.signal(signal.SIGTERM, cli.exit_terminated)
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except SystemExit:
        raise
    except BrokenPipeError:  # whoever read had enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except BaseException as error:  # noqa: BLE001, each kind has its exit code
        code = cli.exit_code(error)
        sys.stdout.flush()
    sys.exit(code)
