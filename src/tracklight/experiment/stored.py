"""Stored runs: the one that a command resumes, and any run's config, data and model rebuilt."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning import LightningDataModule, LightningModule
from pytorch_lightning.callbacks import LambdaCallback
from pytorch_lightning.utilities.model_helpers import is_overridden

from tracklight.config import compose
from tracklight.config.rules import nested_items
from tracklight.data.table import Table
from tracklight.data.tensor_data import TensorData
from tracklight.engine.checkpoint_io import load_plain, newest_resume_checkpoint
from tracklight.errors import BadInput, count
from tracklight.experiment.build import build_data, build_model, depends_on_total
from tracklight.paths import parse_mapping
from tracklight.runs.reader import open_reader
from tracklight.runs.select import WORDS, fetch, read_text, resolve_sweep, select_run
from tracklight.tracking import tags
from tracklight.tracking.provenance import code_digest
from tracklight.tracking.store import Store, connect

# Keys that say what a command does with a run; their values never come from a stored config.
COMMAND_KEYS = ("resume", "allow_changes", "tracking", "allowed_targets")
# Keys that every stored config has, whatever it trains; what they may be is for `config.rules`.
NEEDED = ("seed", "num_threads", "compile", "init_from", "score.metric", "score.mode", "trainer.max_epochs")
NEEDED += ("data", "model", "optimizer", "scheduler", "callbacks", "trainer.devices", "trainer.accelerator")
# Overrides for using a model on this machine, whatever it was trained on.
ANY_HARDWARE = ("trainer.accelerator=auto", "trainer.devices=1", "trainer.num_nodes=1")
MAX_EXPANDED = 2**28  # bytes of a tensor that repeats the few values stored


def open_store(uri: str | None, directory: Path, *, create: bool = False) -> Store:
    """Open a tracking store, which without `create` must exist, and recover the runs whose processes died."""
    if not create:
        open_reader(uri, directory)  # raises if there is no store, where `connect` creates one
    store = connect(uri, directory, reads_only=not create)
    store.recover()
    return store


@dataclass(frozen=True)
class ResumedRun:
    """A run to resume, and how its config differs from the one it was started with."""

    run: Any  # MLflow's
    folder: Path  # of its checkpoints on this machine
    checkpoint: Path | None = None  # where to resume from if the folder has none
    best: Path | None = None  # the best weights so far, likewise
    changes: Sequence[str] = ()  # one line for each key that differs
    changed: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)  # key: (before, now)

    def find_checkpoint(self) -> Path | None:
        """Return the newest checkpoint to resume from; None if the run has none."""
        return newest_resume_checkpoint(self.folder) or self.checkpoint


def resolve_resume(
    cfg: DictConfig, store: Store | None, run_id: str | None = None
) -> tuple[DictConfig, ResumedRun | None]:
    """Return the config to run and the run to resume, if any.

    A process that tracks nothing has no store. `run_id` names a run of this very config to resume,
    whatever `cfg.resume` says.

    Raises:
        BadInput: There is no such run, or the command asks for what cannot be resumed.
    """
    if store is None:
        if cfg.resume is not None and not cfg.tracking.enabled:
            raise BadInput(f"resume={cfg.resume} needs tracking=mlflow: untracked runs leave nothing behind")
        return cfg, None
    if cfg.init_from in WORDS:  # they mean another run tomorrow
        cfg.init_from = resolve_sweep(store, select_run(store, cfg.init_from)).info.run_id
    if run_id is not None:
        return cfg, _resumed_run(store, select_run(store, run_id), required=False)
    if cfg.resume is None:
        return cfg, None
    if cfg.resume == "auto":
        if (run := _find_unfinished(cfg, store)) is None:
            print("resume=auto: no unfinished run of this config, a new one starts")
            return cfg, None
        print(f"resume=auto: run {run.info.run_id} ({run.info.run_name}) continues")
        return cfg, _resumed_run(store, run)
    return _resume_by_id(cfg, store)


def _find_unfinished(cfg: DictConfig, store: Store) -> Any | None:
    """Return the newest unfinished run of this config that no other command resumes."""
    max_epochs, identity = str(cfg.trainer.max_epochs), compose.config_digest(cfg)
    for run in store.search(f"tags.`{tags.IDENTITY_TAG}` = '{identity}'"):
        run_id, run_tags = run.info.run_id, run.data.tags
        if {tags.PARENT_TAG, tags.REPRODUCES_TAG} & run_tags.keys():
            continue
        if not store.folder(run_id).is_dir():  # it may be in progress on another machine
            continue
        is_as_long = run_tags.get(tags.EPOCHS_TAG) == max_epochs
        if depends_on_total(cfg.scheduler) and not is_as_long:
            continue
        # One that was killed as it ended may be FINISHED: the same command has nothing else to start.
        if is_unfinished(run) or (is_as_long and run_id in store.recovered):
            return run
    return None


def is_unfinished(run: Any) -> bool:
    """Return whether a run did not get to its end, for another reason than a non-finite loss or score."""
    if run.info.status == "FAILED":
        return tags.NON_FINITE_TAG not in run.data.tags
    return run.info.status != "FINISHED"


def _resume_by_id(cfg: DictConfig, store: Store) -> tuple[DictConfig, ResumedRun]:
    run = select_run(store, str(cfg.resume))
    run_id = run.info.run_id
    if tags.is_sweep(run.data.tags):
        raise BadInput(f"run {run_id} is a sweep: its own command continues it; or name a trial of it")
    stored = _read_config(store, run)
    compose.check_stored_paths(stored, cfg.overrides, store.folder(run_id))
    amended = _amend_config(stored, cfg.overrides, cfg)
    before, now = stored["trainer"]["max_epochs"], amended.trainer.max_epochs
    if now != before and depends_on_total(amended.scheduler) and not amended.allow_changes:
        why = f"the schedule of run {run_id} spans its {count(before, 'epoch')}"
        cure = "would change for the epochs already trained; start a new run"
        raise BadInput(f"trainer.max_epochs={now}: {why} and {cure}")
    old, new = compose.result_keys(stored), compose.result_keys(amended)
    changed = {key: (old[key], new[key]) for key in old.keys() & new.keys() if old[key] != new[key]}
    changes = compose.diff_configs(old, new)
    resumed = _resumed_run(store, run, changes=changes, changed=changed)
    if run.info.status == "FINISHED" and run.data.metrics and resumed.find_checkpoint() is None:
        why = f"run {run_id} keeps its best weights alone, as a finished trial does without tracking.keep=all"
        raise BadInput(f"{why}; a new run can start from them: init_from={run_id}")
    before, now = (math.inf if number in (None, -1) else int(number) for number in (before, now))
    trainer, callbacks = stored["trainer"], stored.get("callbacks")
    may_stop = callbacks or trainer.get("max_time") or trainer.get("max_steps") not in (None, -1)
    if run.info.status == "FINISHED" and now < before and not may_stop:
        why = f"run {run_id} has finished its {count(int(before), 'epoch')}"
        raise BadInput(f"trainer.max_epochs={now}: {why}; give more, or start a new run")
    if run.info.status == "FINISHED" and not changes and now == before:
        cure = f"init_from={run_id} starts another from its best weights"
        if not (may_stop or depends_on_total(amended.scheduler)):
            cure = f"a larger trainer.max_epochs than {before} trains on"
        print(f"resume={cfg.resume}: run {run_id} has finished, so nothing is trained; {cure}")
    return amended, resumed


def _resumed_run(store: Store, run: Any, required: bool = True, **changes: Any) -> ResumedRun:
    """Fetch the checkpoints of a run that has trained, unless its folder is on this machine."""
    run_folder, checkpoint, best = store.folder(run.info.run_id), None, None
    if run.data.metrics and not run_folder.is_dir():
        try:
            checkpoint, best = fetch(store, run, tags.LAST), fetch(store, run, tags.BEST)
        except BadInput:
            if required:  # else it is trained again from its start, to the same end
                raise
    folder = run_folder / tags.ARTIFACTS_FOLDER / tags.CHECKPOINTS
    return ResumedRun(run, folder, checkpoint, best, **changes)


def load_config(store: Store, run: Any, overrides: Sequence[str] = (), *, trains: bool = False) -> DictConfig:
    """Load the config that a run was trained with and apply dotted overrides.

    `trains` says that it will be trained, and so may write files.

    Raises:
        BadInput: The run has no config, or the config or an override is not valid here.
    """
    stored = _read_config(store, run)
    if trains:
        compose.check_stored_paths(stored, overrides, store.folder(run.info.run_id))
    # Nothing is asked of the default tracking.dir, nor of one that may only be read.
    command = compose.compose([], on_this_machine=False)
    OmegaConf.update(command, "tracking.dir", str(store.directory))
    OmegaConf.update(command, "tracking.uri", store.uri)
    return _amend_config(stored, overrides, command, on_this_machine=False)


def _read_config(store: Store, run: Any) -> dict[str, Any]:
    text = read_text(store, run, tags.CONFIG)
    try:
        tree = compose.parse_stored(text)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise BadInput(f"run {run.info.run_id}: its {tags.CONFIG} is no config: {reason}") from None
    for key in sorted({*NEEDED} - {*dict(nested_items(tree))}):
        raise BadInput(f"run {run.info.run_id}: its {tags.CONFIG} has no {key}")
    return tree


def _amend_config(
    stored: dict[str, Any], overrides: Any, command: DictConfig, on_this_machine: bool = True
) -> DictConfig:
    """Apply the overrides and the COMMAND_KEYS of a command to a stored config, and check it."""
    cfg = compose.apply_overrides(stored, overrides)
    for key in COMMAND_KEYS:
        OmegaConf.update(cfg, key, command[key], force_add=True)
    compose.check_config(cfg, on_this_machine)
    return cfg


def load_weights(path: Path) -> dict[str, Any]:
    """Load a checkpoint for its weights, to start from or to test.

    Raises:
        BadInput: As for `load_plain`, or a weight is not a finite number.
    """
    checkpoint = load_plain(path)
    for name, tensor in checkpoint["state_dict"].items():
        if not isinstance(tensor, torch.Tensor):
            raise BadInput(f"checkpoint {path}: {str(name)[:80]} of its `state_dict` is no tensor")
        is_dense = tensor.layout == torch.strided and not (tensor.is_meta or tensor.is_quantized)
        if not is_dense or tensor.nbytes > max(tensor.untyped_storage().nbytes(), MAX_EXPANDED):
            raise BadInput(f"checkpoint {path}: {name} is a tensor of which the file has only a part")
        if not tensor.isfinite().all():
            raise BadInput(f"checkpoint {path}: {name} holds NaN or infinite values")
    return checkpoint


def restore_weights(model: LightningModule, checkpoint: dict[str, Any]) -> None:
    """Load a checkpoint's weights as Lightning does: the module's hook first, as strictly as it asks."""
    model.on_load_checkpoint(checkpoint)
    model.load_state_dict(checkpoint["state_dict"], strict=model.strict_loading)


def _makes_layers_late(model: LightningModule) -> bool:
    return is_overridden("setup", model) or is_overridden("configure_model", model)


def load_best_weights(model: LightningModule, store: Store | None, run_id: str, callbacks: list) -> str:
    """Load the best weights of another run into a model and return that run's full id.

    Where layers are made late, a callback that is added to `callbacks` loads them.

    Raises:
        BadInput: There is no such run, or its weights do not fit.
    """
    if store is None:
        raise BadInput(f"init_from={run_id} needs tracking=mlflow, where that run is")
    run = resolve_sweep(store, select_run(store, run_id))
    checkpoint = load_weights(fetch(store, run, tags.BEST))
    if _makes_layers_late(model):
        callbacks.append(LambdaCallback(on_fit_start=lambda _, module: restore_weights(module, checkpoint)))
    else:
        try:
            restore_weights(model, checkpoint)
        except RuntimeError as error:
            raise BadInput(f"init_from={run_id}: its weights do not fit this model: {error}") from None
    return run.info.run_id


class RebuiltRun(NamedTuple):
    """A run with its config, its data module and its model; `checkpoint` holds its best weights."""

    run: Any
    cfg: DictConfig
    data: LightningDataModule | None
    model: LightningModule
    checkpoint: Path


def rebuild(store: Store, run: Any, cfg: DictConfig, *, read: bool, load: bool = True) -> RebuiltRun:
    """Build a run's data module and its model, with the best weights.

    A data module whose data are not read can only encode new examples. Without `load`, the weights of a
    model whose layers are made late are left to Lightning's own test.

    Raises:
        BadInput: A part of the run is missing, or does not fit this checkout's code.
    """
    path = fetch(store, run, tags.BEST)
    checkpoint = load_weights(path)
    if cfg.num_threads:
        torch.set_num_threads(cfg.num_threads)
    data = build_data(cfg, read=read)
    if not read and data is not None:
        _restore_inputs(data, load_inputs(store, run))
    try:
        model = build_model(cfg, data)
        late = _makes_layers_late(model)
        if load and late:
            model.setup("predict")
            model.configure_model()
        if load or not late:
            restore_weights(model, checkpoint)
    except (RuntimeError, TypeError, BadInput) as error:
        reason = " ".join(str(error).split())[:300]
        code = code_digest(compose.list_targets(cfg))
        if run.data.tags.get(tags.CODE_TAG, code) != code:
            commit = run.data.tags.get(tags.COMMIT_TAG, "unknown")[:12]
            reason += f"; it was trained by other code, of commit {commit}"
        raise BadInput(f"run {run.info.run_id} does not fit this code: {reason}") from None
    return RebuiltRun(run, cfg, data, model.eval(), path)


_INPUT_KEYS = ("name", "in_features", "out_features", "feature_names", "class_names")
_INPUT_KINDS = {"in_features": (int,), "out_features": (int,), "shape": (int,)}
_INPUT_KINDS |= dict.fromkeys(("name", "feature_names", "class_names", "target_names"), (str,))
_INPUT_KINDS |= dict.fromkeys(("mean", "std"), (int, float))
MAX_RAW = 2**27  # values of one raw example


def describe_inputs(data: TensorData) -> dict[str, Any]:
    """Return, as plain values, all that turns raw rows into model input."""
    inputs = {key: getattr(data, key, None) for key in _INPUT_KEYS}
    inputs["shape"] = list(data.splits["train"].features.shape[1:])  # of one raw example
    if data.class_names is None:
        inputs["target_names"] = list(map(str, getattr(data, "target", None) or ["target"]))
    if isinstance(data, Table) and data.standardise:
        inputs["mean"], inputs["std"] = data.mean.tolist(), data.std.tolist()
    return inputs


def load_inputs(store: Store, run: Any) -> dict[str, Any]:
    """Load what `describe_inputs` returned when the run was trained."""
    try:
        inputs = parse_mapping(read_text(store, run, tags.INPUTS))
    except BadInput as error:
        raise BadInput(f"{error}; a run on a data set of one's own (no TensorData) has none") from None
    if "name" not in inputs:
        raise BadInput(f"run {run.info.run_id}: its {tags.INPUTS} is not what a run writes")
    for key, kinds in _INPUT_KINDS.items():
        if (value := inputs.get(key)) is None:
            continue
        values = value if key not in _INPUT_KEYS[:3] else [value]
        if not isinstance(values, list) or not all(type(each) in kinds for each in values):
            raise BadInput(f"run {run.info.run_id}: {key} in its {tags.INPUTS} is not what a run writes")
    columns = [inputs[key] for key in ("feature_names", "mean", "std") if inputs.get(key) is not None]
    if len({*map(len, columns)}) > 1 or math.prod(inputs.get("shape") or ()) > MAX_RAW:
        raise BadInput(f"run {run.info.run_id}: the lengths in its {tags.INPUTS} do not agree")
    return inputs


def _restore_inputs(data: Any, inputs: dict[str, Any]) -> None:
    """Set on a data module that was not read what it knew in training."""
    for key in _INPUT_KEYS:
        if inputs.get(key) is not None:
            setattr(data, key, inputs[key])
    for key in ("mean", "std"):
        if isinstance(data, Table) and inputs.get(key) is not None:
            setattr(data, key, np.array(inputs[key]))
