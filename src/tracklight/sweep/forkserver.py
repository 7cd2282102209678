"""What the process from which all trials are forked does first, as this file is imported.

It ignores Ctrl-C and SIGUSR1, which the sweep's process handles, and reads the digest of the code, so
that all trials have that of the sweep's start, whatever is edited meanwhile. Then it imports what trials
need; what cannot be imported fails in the trial again, which says so.
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
