"""MLflow's server as a process that starts at once where its modules are imported already."""

import os
import warnings

from tracklight.tracking.mlflow_client import mlflow  # noqa: F401

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # MLflow's own use of a deprecated part of Starlette
    import mlflow.store.tracking.sqlalchemy_store  # noqa: F401
    import uvicorn
    from alembic import command  # noqa: F401
    from mlflow.server import fastapi_app


def serve(folder: str, port: int) -> None:
    """What `mlflow server` runs in its worker, on the database and artifacts in `folder`."""
    os.environ |= {
        "_MLFLOW_SERVER_FILE_STORE": f"sqlite:///{folder}/mlflow.db",
        "_MLFLOW_SERVER_ARTIFACT_ROOT": "mlflow-artifacts:/",
        "_MLFLOW_SERVER_ARTIFACT_DESTINATION": f"{folder}/artifacts",
        "_MLFLOW_SERVER_SERVE_ARTIFACTS": "true",
    }
    uvicorn.run(fastapi_app.app, host="127.0.0.1", port=port, log_level="critical")
