"""The one door to Optuna: what it says of itself goes off while it is imported."""

import logging
import warnings

import optuna

optuna.logging.set_verbosity(optuna.logging.WARNING)
# Its one warning tells, in a page of SQL, that a query failed and is asked in another way; where
# that fails too, the error says so.
logging.getLogger("optuna.storages._rdb.storage").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)

__all__ = ["optuna"]
