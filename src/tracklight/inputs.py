"""What a trained model takes, written down by training so that its data need not be there later."""

from typing import Any

import numpy as np

from tracklight.data.table import Table
from tracklight.data.tensor_data import TensorData

INPUTS = "inputs.json"  # artifact of a run
_FACTS = ("name", "in_features", "out_features", "feature_names", "class_names")


def describe(data: TensorData) -> dict[str, Any]:
    """Return, as plain values, all that turns raw rows into model input."""
    facts = {key: getattr(data, key, None) for key in _FACTS}
    facts["shape"] = list(data.splits["train"].features.shape[1:])  # of one raw example
    if data.class_names is None:
        named = getattr(data, "target", None) or ["target"]
        facts["target_names"] = [str(name) for name in named]
    if isinstance(data, Table) and data.standardise:
        facts["mean"], facts["std"] = data.mean.tolist(), data.std.tolist()
    return facts


def recall(data: Any, facts: dict[str, Any]) -> None:
    """Tell a data set that was not read what it knew when the model was trained on it."""
    for key in _FACTS:
        if facts.get(key) is not None:
            setattr(data, key, facts[key])
    if isinstance(data, Table):
        mean, std = (np.array(facts[key]) if key in facts else None for key in ("mean", "std"))
        data.recall(facts["feature_names"], mean, std)
