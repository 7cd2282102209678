"""How a logged model answers: the model has a copy of this file, so that it does not need tracklight.

MLflow's own wrapper of a graph takes columns by position and as float32, drops those that it does not
know, and writes NaN into JSON. This one follows the signature or refuses, which MLflow's server answers
with HTTP 400.

Shapes: `B` examples of a request, `...` an example's own shape.
"""

import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from mlflow.exceptions import MlflowException

SERVER = "mlflow.pyfunc.scoring_server"


def refuse_unknown(record: logging.LogRecord) -> bool:
    """Filter log records: raise for MLflow's warning in its server that columns are unknown.

    MLflow drops such columns before the model sees them, and has no setting for it (as of 3.17.2).
    """
    text = record.getMessage()
    if text.startswith("Found extra inputs") and SERVER in sys.modules:
        raise MlflowException.invalid_parameter_value(text.replace("will be ignored", "are refused"))
    return True


class ServedModel:
    """A traced graph that maps (B, ...) to (B, ...), as MLflow's `pyfunc` calls it."""

    def __init__(self, graph: Any, targets: list[str]):
        self.graph = graph
        self.targets = targets  # names of a table's outputs
        weights = next(iter(graph.parameters()), torch.empty(0))
        self.dtype = np.float64 if weights.dtype == torch.float64 else np.float32

    def predict(self, data: Any, params: dict[str, Any] | None = None) -> Any:
        """Answer rows whose columns MLflow has put in the signature's order, or an array (B, ...)."""
        if isinstance(data, dict):  # an array under the signature's one name
            (data,) = data.values()
        with torch.no_grad(), np.errstate(over="ignore"):
            outputs = self.graph(torch.from_numpy(np.array(data, dtype=self.dtype))).numpy()
        if not np.isfinite(outputs).all():
            row = np.argwhere(~np.isfinite(outputs))[0][0]
            raise MlflowException.invalid_parameter_value(f"the answer to row {row} is not a finite number")
        is_table = isinstance(data, pd.DataFrame)
        return pd.DataFrame(outputs, data.index, self.targets) if is_table else outputs


def _load_pyfunc(path: str, model_config: dict[str, Any] | None = None) -> ServedModel:
    """Load the model; MLflow calls this by its name."""
    logger = logging.getLogger("mlflow.models.utils")
    # Each logged model has a function of its own by this name.
    if not any(getattr(each, "__name__", "") == refuse_unknown.__name__ for each in logger.filters):
        logger.addFilter(refuse_unknown)
    graph = torch.export.load(Path(path) / "model.pt2").module()
    return ServedModel(graph, (model_config or {}).get("targets", []))
