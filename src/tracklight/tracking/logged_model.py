"""Logs a trained network as an MLflow model: a traced graph that loads without this code base."""

import contextlib
import copy
import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tracklight.tracking import served_model
from tracklight.tracking.mlflow_client import mlflow, short_reason, skip_requirements_check

# isort: split
from mlflow import pytorch as flavor
from mlflow.entities import LoggedModelOutput
from mlflow.models import Model, infer_signature
from mlflow.types import ColSpec, Schema, TensorSpec

_NAME = "model"
_REQUIRED = ("mlflow", "numpy", "torch")
_EXAMPLES = ("input_example.json", "serving_input_example.json")
_log = logging.getLogger(__name__)


def log_model(
    client: mlflow.MlflowClient,
    run_id: str,
    model: nn.Module,
    example: Tensor | None,
    step: int = 0,
    takes: str = "",
    columns: Sequence[str] = (),
    targets: Sequence[str] = (),
) -> str | None:
    """Log `model` to its run, in evaluation mode and on the CPU; the module itself is unchanged.

    Replaces a model logged to the run before. What cannot be exported or stored costs a warning.
    MLflow's active run and tracking URI stay as they were. `model` maps inputs (B, ...), of which
    `example` holds a few if any are known, to one tensor (B, ...); `step` is that of its weights.
    Weights of half precision are exported as float32.

    The signature names the `columns` and `targets` of a table's model; for any other it says in words
    what the model `takes`.

    Returns:
        The model's URI `models:/<id>`, or None if it was not logged.
    """
    with tempfile.TemporaryDirectory() as scratch, _quiet():
        folder = Path(scratch) / "model"
        try:
            if example is None:
                raise ValueError("its batches begin with no tensor; set its example_input_array")
            mlmodel = _export(model, example, folder)
            _describe(mlmodel, folder, takes, columns, targets)
            return store_model(client, run_id, mlmodel, folder, step)
        except Exception as error:  # noqa: BLE001, an arbitrary module or server fails as it likes
            reason = short_reason(error)
    _log.warning("%s was not logged as an MLflow model: %s", type(model).__name__, reason)
    return None


def _export(model: nn.Module, example: Tensor, folder: Path) -> Model:
    """Write the model's folder, with a dynamic batch size, and return its MLmodel."""
    inputs = example.detach().cpu()
    if len(inputs) < 2:  # torch.export takes a size of one for a constant
        inputs = torch.cat([inputs, inputs])
    twin = copy.deepcopy(model).cpu().eval()  # a LightningModule's copy has no trainer
    dtype = next((each.dtype for each in twin.parameters()), torch.float32)
    if dtype != torch.float64:
        twin, dtype = twin.float(), torch.float32
    inputs = inputs.to(dtype) if inputs.is_floating_point() else inputs
    with torch.no_grad():
        outputs = twin(inputs)
    if not isinstance(outputs, Tensor):
        raise TypeError(f"it returns a {type(outputs).__name__}, where a tensor can be served")
    mlmodel = Model()
    with skip_requirements_check():
        signature = infer_signature(inputs.numpy(), outputs.numpy())
        needs: Any = {"pip_requirements": [f"{package}=={version(package)}" for package in _REQUIRED]}
        needs |= {"code_paths": [served_model.__file__], "serialization_format": "pt2"}
        shown: Any = {"signature": signature, "input_example": inputs.numpy()}
        flavor.save_model(twin, str(folder), mlflow_model=mlmodel, **shown, **needs)
    for copied in (folder / "code").glob("*.py"):  # with the mode of the source, not that of the umask
        text = copied.read_bytes()
        copied.unlink()
        copied.write_bytes(text)
    graph = torch.export.load(folder / "data" / "model.pt2").module()
    with torch.no_grad():
        graph(torch.cat([inputs, inputs[:1]]))  # raises where the batch size became a constant
    return mlmodel


def _describe(mlmodel: Any, folder: Path, takes: str, columns: Sequence[str], targets: Sequence[str]) -> None:
    """Give an exported model its signature, and what answers by it."""
    signature, loader = mlmodel.signature, served_model.__name__.rpartition(".")[2]
    mlmodel.flavors["python_function"] |= {"loader_module": loader, "config": {"targets": [*targets]}}
    mlmodel.metadata = {"takes": takes}
    if columns:
        signature.inputs = Schema([ColSpec("double", each) for each in columns])
        signature.outputs = Schema([ColSpec("double", each) for each in targets])
        mlmodel.saved_input_example_info = None  # an array, which has no names
        for name in _EXAMPLES:
            (folder / name).unlink(missing_ok=True)
    elif takes:
        (spec,) = signature.inputs.inputs
        signature.inputs = Schema([TensorSpec(spec.type, spec.shape, takes)])


def store_model(client: mlflow.MlflowClient, run_id: str, mlmodel: Model, folder: Path, step: int) -> str:
    """Upload the folder as a logged model of the run, then delete the one it replaces."""
    experiment = client.get_run(run_id).info.experiment_id
    query = f"name = '{_NAME}' AND source_run_id = '{run_id}'"
    replaced = client.search_logged_models([experiment], filter_string=query)
    logged = client.create_logged_model(experiment, name=_NAME, source_run_id=run_id)
    mlmodel.model_id = mlmodel.model_uuid = logged.model_id
    mlmodel.run_id = run_id
    mlmodel.artifact_path = logged.artifact_location
    mlmodel.save(str(folder / "MLmodel"))
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
    """Silence the remarks of torch.export and MLflow."""
    levels = {each: each.level for each in map(logging.getLogger, ("mlflow", "torch"))}
    with warnings.catch_warnings(action="ignore"):
        for logger in levels:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in levels.items():
                logger.setLevel(level)
