"""One run of a population: its objects, its checkpoints, its start and its end."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from omegaconf import DictConfig
from torch import Tensor

from tracklight.config.compose import list_targets, to_plain
from tracklight.config.hardware import describe_machine
from tracklight.config.instantiate import naming
from tracklight.config.overrides import redact_command
from tracklight.data.tensor_data import TensorData
from tracklight.engine import checkpoint_io, checkpoints
from tracklight.engine.monitors import PruningCallback, ScoreMonitor
from tracklight.experiment import build, stored
from tracklight.experiment.record import Recorder, finish_run
from tracklight.paths import ROOT
from tracklight.tracking import provenance, tags
from tracklight.tracking.run import Run
from tracklight.tracking.store import Store

LIGHTNING = version("pytorch-lightning")  # read once: that takes as long as to write a checkpoint


@cache
def _provenance(*targets: str) -> provenance.Provenance:
    return provenance.collect(ROOT, redact_command(sys.argv), targets, describe_machine())


@dataclass(eq=False)
class Member:
    """One run of a population, with the callbacks whose states its checkpoints hold."""

    index: int
    cfg: DictConfig
    run_tags: Mapping[str, str]
    run_id: str | None  # of a run to continue
    run: Run | None = None
    has_ended: bool = False
    epochs: int = 0
    seconds: float = 0.0  # of training, over all starts
    metrics: tuple[str, ...] = ()  # names of what is logged

    def build(self, data: TensorData, trainer: Any, num_batches: int) -> None:
        """Build the model, the optimizer and the scheduler as they are before the first step."""
        self.data = data
        self.model: Any = build.build_model(self.cfg, data)
        self.model.trainer = data.trainer = trainer
        with naming("optimizer"):
            self.optimizer = self.model.optimizer_factory(self.model.parameters())
        with naming("scheduler"):
            make = self.model.scheduler_factory
            self.schedule: Any = make(self.optimizer, num_batches) if make else None
        self.model.trainer = None  # a copy of the model would copy its trainer, too

    def open(self, store: Store, size: int) -> None:
        """Create the run, or reopen it, and describe it."""
        resumed = stored.resolve_resume(self.cfg, store, self.run_id)[1] if self.run_id else None
        self.tree = to_plain(self.cfg)
        self.recorder = Recorder(self.tree, self.model, self.data, _provenance(*list_targets(self.tree)))
        self.run = self.recorder.open_run(store, resumed, {**self.run_tags, tags.POPULATION_TAG: str(size)})
        self.run_id = self.run.run_id
        self.recorder.describe(self.run)
        self.folder, self.began = self.run.artifacts / tags.CHECKPOINTS, self.run.wal.position[0]
        checkpoint_io.remove_leftovers(self.folder)
        self.reset()
        if resumed and resumed.best and not (best := self.run.artifacts / tags.BEST).exists():
            self.io.save_checkpoint(self.io.load_checkpoint(resumed.best), best)
        if not self.starts and resumed and resumed.checkpoint:
            self.starts[self.io.load_checkpoint(resumed.checkpoint)["global_step"]] = resumed.checkpoint

    def reset(self) -> None:
        """Make the callbacks anew, and find the checkpoints to continue from, by their step."""
        assert self.run
        metric, self.io = self.cfg.score.metric, checkpoint_io.DurableCheckpointIO(self.run.sync)
        self.best = checkpoints.BestCheckpoint(metric, self.cfg.score.mode, False)
        self.last = checkpoints.ResumeCheckpoint(self.io, build.early_stops(self.tree))
        self.last.folder, self.last.wal, self.best.dirpath = self.folder, self.run.wal, str(self.folder)
        self.scores, self.pruning = ScoreMonitor(metric), PruningCallback(metric, lambda *_: False)
        self.callbacks = [self.best, self.scores, self.last, self.pruning]
        newest = checkpoint_io.newest_resume_checkpoint(self.folder)  # raises if none is intact
        found = [*self.folder.glob(checkpoint_io.PATTERN), newest] if newest else []
        self.starts = {checkpoint_io.Checksum.of(p).step: p for p in found if checkpoint_io.is_intact(p)}

    def restore(self, step: int) -> int:
        """Load the checkpoint of a step; return the epochs that it has done."""
        assert self.run
        if not step:
            if self.run.wal.end:
                self.run.wal.replay_from((self.began, 0))
            return 0
        checkpoint = self.io.load_checkpoint(self.starts[step])
        checkpoints.relocate(self.folder, checkpoint)
        stored.restore_weights(self.model, checkpoint)
        self.optimizer.load_state_dict(checkpoint["optimizer_states"][0])
        if self.schedule:
            self.schedule["scheduler"].load_state_dict(checkpoint["lr_schedulers"][0])
        for callback in self.callbacks:
            if (state := checkpoint["callbacks"].get(callback.state_key)) is not None:
                callback.load_state_dict(state)
        self.seconds = self.pruning.earlier_s
        return checkpoint["loops"]["fit_loop"]["epoch_progress"]["total"]["completed"]

    def set_scores(self, num_batches: int, best: float, epoch: float, bad: float, since: float) -> None:
        """Give the callbacks the best score and one that is not finite, with their epochs from 1; 0: none."""
        self.scores.since = (bad, int(since), int(since) * num_batches) if since else None
        self.pruning.earlier_s, self.pruning.epochs = self.seconds, self.epochs
        if epoch:
            path = str(self.folder / checkpoint_io.BEST)
            keeper, score = self.best, torch.tensor(best).double()
            keeper.best_model_path = keeper.kth_best_model_path = path
            keeper.best_model_score = keeper.kth_value = keeper.current_score = score
            keeper.best_k_models = {path: score}

    def checkpoint(self, progress: Mapping[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return what Lightning's checkpoint of the weights alone holds."""
        model = self.model
        name, key = model.CHECKPOINT_HYPER_PARAMS_NAME, model.CHECKPOINT_HYPER_PARAMS_KEY
        own = {name: "kwargs", key: dict(model.hparams)} if model.hparams else {}
        cloned = {name: each.detach().clone() for name, each in weights.items()}  # not what they are views of
        return {"pytorch-lightning_version": LIGHTNING, **progress, **own, "state_dict": cloned}

    def save(self, progress: Mapping[str, Any], is_last: bool) -> None:
        """Write a checkpoint to continue from, which holds what Lightning's does."""
        whole = self.checkpoint(progress, dict(self.model.named_parameters()))
        states = {each.state_key: each.state_dict() for each in self.callbacks}
        whole["callbacks"] = {key: state for key, state in states.items() if state}
        whole["optimizer_states"] = [apply_to_collection(self.optimizer.state_dict(), Tensor, Tensor.clone)]
        whole["lr_schedulers"] = [self.schedule["scheduler"].state_dict()] if self.schedule else []
        name = checkpoint_io.LAST if is_last else f"step-{progress['global_step']:09d}.ckpt"
        self.io.save_checkpoint(whole, self.folder / name)
        earlier = sorted(self.folder.glob(checkpoint_io.PATTERN))
        for old in earlier if is_last else earlier[: -checkpoints.NUM_KEPT]:
            self.io.remove_checkpoint(old)

    @property
    def result(self) -> dict[str, Any]:
        """What a `TrialResult` tells of a run however it ended."""
        return {key: getattr(self, key) for key in ("run_id", "epochs", "seconds", "metrics")}

    def end(self, error: BaseException | None, outcome: str = "") -> None:
        """End the run, if there is one, as it ends alone: well, or by an error, which is raised."""
        self.has_ended = True
        with finish_run(self.run, self.model, None, figures=False):
            if self.run:
                spent = {tags.EPOCHS_RUN_TAG: str(self.epochs), tags.SECONDS_TAG: f"{self.seconds:.3f}"}
                self.run.set_tags(spent | ({tags.OUTCOME_TAG: outcome} if outcome else {}))
            if error is not None:
                raise error
