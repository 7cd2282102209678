"""Attributes of users' objects that training has changed, kept for a resumed run."""

import pickle
from typing import Any

import numpy as np
from lightning_utilities.core.apply_func import apply_to_collection
from pytorch_lightning import Callback, LightningDataModule, LightningModule
from pytorch_lightning.utilities.model_helpers import is_overridden
from torch import Tensor
from typing_extensions import override

from tracklight.engine.checkpoint_io import PLAIN

MOST = 10_000  # items of a container that is kept
LIBRARIES = ("tracklight.", "pytorch_lightning.", "builtins")
OF_LIGHTNING = {*vars(LightningModule()), *vars(LightningDataModule())}


class AttributeKeeper(Callback):
    """Takes over to a resumed run the attributes that training changed: no checkpoint of Lightning has them.

    Of a module and all modules in it, metrics included, its data module and callbacks without a state of
    their own: numbers, text, tensors, and lists, tuples and dicts of these.
    """

    supports_blocks = True

    def __init__(self) -> None:
        self.owners: dict[str, Any] = {}
        self.before: dict[str, dict[str, bytes]] = {}  # as training began in this process
        self.changed: dict[str, dict[str, Any]] = {}

    @override
    def state_dict(self) -> dict[str, Any]:
        for name, owner in self.owners.items():
            values, before = _plain_attributes(owner), self.before[name]
            self.changed[name] = {k: v for k, v in values.items() if pickle.dumps(v) != before.get(k)}
        return {name: values for name, values in self.changed.items() if values}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.changed = state_dict

    @override
    def on_train_epoch_start(self, trainer: Any, pl_module: LightningModule) -> None:
        if self.owners or trainer.world_size > 1:  # of several processes, each has its own
            return
        callbacks = {f"callback {i}": each for i, each in enumerate(trainer.callbacks)}
        owners = {k: each for k, each in callbacks.items() if not is_overridden("state_dict", each, Callback)}
        owners |= dict(pl_module.named_modules(prefix="module")) | {"data": trainer.datamodule}
        self.owners = {k: v for k, v in owners.items() if not type(v).__module__.startswith(LIBRARIES)}
        for name, owner in self.owners.items():
            self.before[name] = {k: pickle.dumps(v) for k, v in _plain_attributes(owner).items()}
            for key, value in self.changed.get(name, {}).items():
                device = getattr(vars(owner).get(key), "device", pl_module.device)
                vars(owner)[key] = apply_to_collection(value, Tensor, Tensor.to, device)


def _plain_attributes(owner: Any) -> dict[str, Any]:
    return {k: v for k, v in vars(owner).items() if k not in OF_LIGHTNING and _is_plain(v)}


def _is_plain(value: Any) -> bool:
    if type(value) in (list, tuple, dict):
        items = [*value, *value.values()] if type(value) is dict else value
        return len(value) <= MOST and all(map(_is_plain, items))
    return value is None or type(value) in PLAIN or isinstance(value, np.generic)
