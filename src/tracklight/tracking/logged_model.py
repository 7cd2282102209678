"""A trained network as an MLflow model: a traced graph that loads without this code base.

Only the client passed in is used: MLflow's active run and tracking URI stay as they were.
"""

import contextlib
import copy
import logging
import tempfile
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import torch
from mlflow import pytorch as flavor
from mlflow.entities import LoggedModelOutput
from mlflow.models import Model, infer_signature
from mlflow.utils import environment
from torch import Tensor, nn

from tracklight.tracking.mlflow_client import mlflow

# isort: split

_REQUIRED = ("mlflow", "numpy", "torch")
_SPARED_CHECK = "warn_dependency_requirement_mismatches"
_log = logging.getLogger(__name__)


def log_model(
    client: mlflow.MlflowClient,
    run_id: str,
    model: nn.Module,
    example: Tensor,
    name: str = "model",
    step: int = 0,
) -> str | None:
    """Log `model` to its run, in evaluation mode and on the CPU; the module itself stays untouched.

    A model of the same run and name logged before is replaced. What cannot be exported or stored
    costs one line of warning, never the run.

    Args:
        client: Speaks to the store that holds the run.
        run_id: The run that trained the model.
        model: Maps inputs (B, ...) to one tensor (B, ...).
        example: A few real inputs (B, ...).
        name: What the model is called in its run.
        step: The optimizer step its weights are from.

    Returns:
        The model's address `models:/<id>`, or None if it was not logged.
    """
    with tempfile.TemporaryDirectory() as scratch, _quiet():
        folder = Path(scratch) / "model"
        try:
            described = _export(model, example, folder)
            return _store(client, run_id, described, folder, name, step)
        except Exception as error:  # noqa: BLE001, an arbitrary module or server fails as it likes
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    _log.warning("%s was not logged as an MLflow model: %s", type(model).__name__, reason)
    return None


def _export(model: nn.Module, example: Tensor, folder: Path) -> Model:
    """Write the model's folder, free in its batch size, and return its description."""
    inputs = example.detach().cpu()
    if len(inputs) < 2:  # torch.export takes a size of one for a constant
        inputs = torch.cat([inputs, inputs])
    twin = copy.deepcopy(model).cpu().eval()  # a LightningModule's copy has no trainer
    with torch.no_grad():
        outputs = twin(inputs)
    described = Model()
    flavor.save_model(
        twin,
        str(folder),
        mlflow_model=described,
        signature=infer_signature(inputs.numpy(), outputs.numpy()),
        input_example=inputs.numpy(),
        pip_requirements=[f"{package}=={version(package)}" for package in _REQUIRED],
        serialization_format="pt2",
    )
    # Exported on the CPU it runs there only, while MLflow's default is the GPU of who loads it.
    described.flavors["python_function"]["config"] = {"device": "cpu"}
    graph = torch.export.load(folder / "data" / "model.pt2").module()
    with torch.no_grad():
        graph(torch.cat([inputs, inputs[:1]]))  # raises where the batch size became a constant
    return described


def _store(
    client: mlflow.MlflowClient,
    run_id: str,
    described: Model,
    folder: Path,
    name: str,
    step: int,
) -> str:
    """Upload the folder as a logged model of the run, then drop the one it replaces."""
    experiment = client.get_run(run_id).info.experiment_id
    query = f"name = '{name}' AND source_run_id = '{run_id}'"
    replaced = client.search_logged_models([experiment], filter_string=query)
    logged = client.create_logged_model(experiment, name=name, source_run_id=run_id)
    described.model_id = described.model_uuid = logged.model_id
    described.run_id = run_id
    described.artifact_path = logged.artifact_location
    described.save(str(folder / "MLmodel"))
    try:
        client.log_model_artifacts(logged.model_id, str(folder))
        client.finalize_logged_model(logged.model_id, "READY")
    except Exception:
        with contextlib.suppress(Exception):
            client.finalize_logged_model(logged.model_id, "FAILED")
        raise
    client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step)])
    for old in replaced:
        client.delete_logged_model(old.model_id)
    return logged.model_uri


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence what export and MLflow remark on, and spare a check that takes most of the time.

    MLflow compares the requirements with the environment that they were read from a line above,
    for which it lists the files of every installed package.
    """
    check = getattr(environment, _SPARED_CHECK)
    loggers = [logging.getLogger(name) for name in ("mlflow", "torch")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        setattr(environment, _SPARED_CHECK, lambda requirements: None)
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            setattr(environment, _SPARED_CHECK, check)
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
