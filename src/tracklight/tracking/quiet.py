"""The one door to MLflow; its usage reporting, decided while it is imported, goes off first."""

import logging
import os

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# What it prints at the end of a run shows the password of a URI that has one.
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")

import mlflow  # noqa: E402
import mlflow.entities  # noqa: E402
import mlflow.exceptions  # noqa: E402

# Every failed call is reported by us, once and in one line; these two print a traceback each time.
logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
logging.getLogger("alembic").setLevel(logging.WARNING)
# On import, mlflow.pytorch sets the root's level to ERROR, which would silence our warnings.
logging.getLogger("tracklight").setLevel(logging.WARNING)

__all__ = ["mlflow"]
