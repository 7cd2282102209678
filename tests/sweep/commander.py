"""Sweeps for the tests, forked from one process, their trials from one forkserver.

Both take the seconds of the imports once; otherwise a sweep runs as `train.py -m` would.
"""

import multiprocessing
import sys
from multiprocessing import forkserver
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

if __name__ == "__main__":
    import trainee
    from tracklight.sweep.executors import PRELOADED

    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
    forkserver.ensure_running()
    trainee.prepare()
    for name in ("study", "parent_run", "loop", "progress"):
        __import__(f"tracklight.sweep.{name}")
    import optuna.visualization  # noqa: F401

    # A forked sweep may use the forkserver, but is not its parent and cannot wait for it.
    forkserver.ForkServer.ensure_running = lambda self: None
    trainee.accept()
