"""Imported by the process from which all trials are forked: signals, code digest, imports.

The process ignores Ctrl-C and SIGUSR1, which the sweep's process handles. It reads the digest of the code,
so that all trials have that of the sweep's start, whatever is edited meanwhile. Then it imports what trials
need; an import that fails here fails again in the trial, which reports it.
"""

import contextlib
import importlib
import logging
import signal

from tracklight.tracking.provenance import own_code

IMPORTED = (
    "tracklight.experiment.train tracklight.figures.plots mlflow.store.tracking.sqlalchemy_store hydra.utils "
    "sqlalchemy.dialects.sqlite alembic.command fsspec.implementations.local PIL.PngImagePlugin"
)

for number in (signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, signal.SIG_IGN)
own_code()
logging.getLogger("matplotlib").setLevel(logging.ERROR)  # as in the sweep's process
for name in IMPORTED.split():
    with contextlib.suppress(Exception):
        importlib.import_module(name)
