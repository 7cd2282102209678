"""Lightning's finders of a learning rate and of a batch size: what they find is recorded as if typed.

They try values before there is a run, and the config gets the one that they find in their place. So the
run, its resumption and its reproduction are those of that value.
"""

import io
from contextlib import redirect_stderr
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict
from pytorch_lightning.tuner.tuning import Tuner

from tracklight.config.compose import to_plain
from tracklight.config.hardware import num_devices
from tracklight.config.instantiate import naming
from tracklight.data.tensor_data import TensorData
from tracklight.engine.checkpoint_io import DurableCheckpointIO
from tracklight.engine.lightning_internals import set_root_dir
from tracklight.engine.seeding import EpochSeeds
from tracklight.errors import BadInput
from tracklight.experiment.build import build_data, build_model, build_trainer

KEYS = {"LearningRateFinder": "optimizer.lr", "BatchSizeFinder": "data.batch_size"}  # what each one finds


def find_values(cfg: DictConfig) -> dict[str, Any]:
    """Replace each finder among the config's callbacks by the value it finds; return the values by key."""
    found: dict[str, Any] = {}
    for name, node in [*(cfg.callbacks or {}).items()]:
        kind = str((node or {}).get("_target_")).rpartition(".")[2]
        if kind not in KEYS:
            continue
        where, key = f"callbacks.{name}", KEYS[kind]
        if cfg.resume == "auto":
            raise BadInput(f"{where} finds another {key} each time; leave out resume=auto, or give {key}")
        if num_devices(cfg.trainer.devices) != 1 or OmegaConf.select(cfg, key) is None:
            raise BadInput(f"{where} needs a config that uses {key}, and trainer.devices=1; leave it out")
        with open_dict(cfg):
            options: dict[str, Any] = to_plain(cfg.callbacks.pop(name))
        del options["_target_"]
        found[key] = _find(cfg, kind, options, where)
        OmegaConf.update(cfg, key, found[key])
        print(f"{kind}: {key}={found[key]}", flush=True)
    return found


def _find(cfg: DictConfig, kind: str, options: dict[str, Any], where: str) -> Any:
    """Let Lightning's Tuner try values on a model of its own, which is then forgotten."""
    cfg = cfg.copy()
    cfg.tracking.enabled, cfg.trainer.enable_progress_bar = False, False
    with open_dict(cfg):
        cfg.callbacks, cfg.scheduler = {}, {"_target_": None}
    data = build_data(cfg)
    model = build_model(cfg, data)
    trainer = build_trainer(cfg, data, [EpochSeeds(cfg.seed)], [], DurableCheckpointIO())
    tuner = Tuner(trainer)
    with TemporaryDirectory() as folder, redirect_stderr(io.StringIO()), naming(where):  # its own bar
        set_root_dir(trainer, Path(folder))
        if kind == "BatchSizeFinder":
            size = tuner.scale_batch_size(model, datamodule=data, **options)
            return min(size or 1, len(data.splits["train"])) if isinstance(data, TensorData) else size
        options["num_training"] = options.pop("num_training_steps", 100)
        curve = tuner.lr_find(model, datamodule=data, **{**options, "update_attr": False})
        if curve is None or (rate := curve.suggestion()) is None:
            raise BadInput(f"{where}: no learning rate lowers the loss; set optimizer.lr")
        return float(f"{rate:.3g}")
