"""Imported by the process from which all trials are forked: signals, code digest, imports.

The process ignores Ctrl-C and SIGUSR1, which the sweep's process handles. It reads the digest of the code,
so that all trials have that of the sweep's start, whatever is edited meanwhile. Then it imports what trials
need; an import that fails here fails again in the trial, which reports it.
"""

import contextlib
import errno
import importlib
import logging
import signal
import sys
from typing import Any

from tracklight.tracking.provenance import own_code

IMPORTED = (
    "tracklight.experiment.train tracklight.figures.plots mlflow.store.tracking.sqlalchemy_store hydra.utils "
    "sqlalchemy.dialects.sqlite alembic.command fsspec.implementations.local PIL.PngImagePlugin"
)


def _print_unless_out_of_resources(kind: type, error: BaseException, trace: Any) -> None:
    """Print an error, but for a lack of processes or memory, which the sweep's process tells in one line."""
    if getattr(error, "errno", None) not in (errno.EAGAIN, errno.ENOMEM):
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _print_unless_out_of_resources
for number in (signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, signal.SIG_IGN)
own_code()
logging.getLogger("matplotlib").setLevel(logging.ERROR)  # as in the sweep's process
for name in IMPORTED.split():
    with contextlib.suppress(Exception):
        importlib.import_module(name)
