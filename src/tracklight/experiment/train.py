"""One run, from its config to its score: the file to read first."""

import signal
import sys
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig
from pytorch_lightning import Callback, LightningDataModule, LightningModule
from pytorch_lightning.callbacks import LambdaCallback
from pytorch_lightning.loggers.logger import DummyLogger
from pytorch_lightning.profilers import PassThroughProfiler
from torch.distributed import DistError

from tracklight.config.compose import list_targets, resolve_config, to_plain
from tracklight.config.hardware import default_threads, describe_machine
from tracklight.config.overrides import redact_command
from tracklight.engine import checkpoint_io, checkpoints, distributed, progress
from tracklight.engine.attributes import AttributeKeeper
from tracklight.engine.blocks import Blocks
from tracklight.engine.lightning_internals import evaluation_steps, logging_step, set_root_dir
from tracklight.engine.monitors import ScoreMonitor
from tracklight.engine.seeding import SETUPS, EpochSeeds, seed_all
from tracklight.engine.signals import SafeStop
from tracklight.errors import RunFailed
from tracklight.experiment import build, stored
from tracklight.experiment.find import find_values
from tracklight.experiment.record import Recorder, finish_run
from tracklight.models.supervised import Supervised
from tracklight.paths import PACKAGE, ROOT
from tracklight.tracking import provenance
from tracklight.tracking.mlflow_api import logging_to
from tracklight.tracking.run import Run
from tracklight.tracking.tags import BEST, CHECKPOINTS, PROFILE


def run(
    cfg: DictConfig,
    tags: Mapping[str, str] | None = None,  # beside those of every run
    callbacks: Sequence[Callback] = (),  # beside the config's
    test: bool = True,  # without it, as in trials of a sweep, the run is not tested and logs no model
    run_id: str | None = None,  # of a run of this very config to resume; `cfg.resume` is then ignored
    summary: dict[str, Any] | None = None,  # is filled with what summary.json holds
) -> float | None:
    """Train what a config describes, track it, and test its best checkpoint once.

    Returns:
        The best value of `score.metric`, or the last one if nothing is tracked; None if the metric
        was not logged.

    Raises:
        BadInput: The config cannot be run; no run was created.
        RunFailed: The run started and failed.
        Stopped: A signal ended the run.
    """
    with SafeStop().listening() as stop:
        distributed.settle_ranks(cfg.trainer.devices, cfg.trainer.num_nodes, cfg.resume)
        store = None
        if cfg.tracking.enabled and not distributed.is_nonzero_rank():
            store = stored.open_store(cfg.tracking.uri, Path(cfg.tracking.dir), create=True)
        _set_num_threads(cfg)  # part of the digest by which resume=auto finds its run
        stop.has_company = distributed.is_nonzero_rank()
        ranks = distributed.open_rank_store(cfg.trainer.num_nodes, cfg.resume)
        cfg, resumed = stored.resolve_resume(cfg, store, run_id)
        if ranks:
            cfg = _share_config(ranks, cfg)
        _set_num_threads(cfg)  # a stored config has its own number
        found = {} if resumed or not test else find_values(cfg)  # a sweep's trials are given theirs
        stop.check()
        source = provenance.Provenance({}, {})
        if store is not None:
            source = provenance.collect(ROOT, redact_command(sys.argv), list_targets(cfg), describe_machine())
        data = build.build_data(cfg)
        model = build.build_model(cfg, data)
        build.check_module_callbacks(model)
        tags, callbacks = dict(tags or {}), [*callbacks, stop]
        tags |= {f"tracklight.found.{key}": str(value) for key, value in found.items()}
        has_weights = (resumed and resumed.find_checkpoint()) or distributed.is_nonzero_rank()  # rank zero's
        if cfg.init_from is not None and not has_weights:
            tags["tracklight.init_from"] = stored.load_best_weights(model, store, cfg.init_from, callbacks)
        training = Training(cfg, data, model, callbacks)
        stop.has_company = training.trainer.world_size > 1
        if resumed:
            distributed.check_resumable(training.trainer, ranks)
            training.last.check(resumed.find_checkpoint(), training.trainer.callbacks)
        build.rehearse(cfg, model, data, training.trainer)

        # The run is opened last: what fails earlier leaves no empty run behind.
        recorder = Recorder(to_plain(cfg), model, data, source)
        tracked = store and recorder.open_run(store, resumed, tags)
        finishing = finish_run(tracked, model, training.trainer, cfg.tracking.figures)
        with finishing, stop.converting_errors(), logging_to(tracked):
            if tracked:
                recorder.describe(tracked)
            training.fit(training.track(tracked, resumed), ranks)
            stop.check()  # for a signal after the last batch

            reference = recorder.log_reference(tracked) if tracked else {}
            score, step = training.load_best()
            metrics = {**training.trainer.callback_metrics}  # which a test empties
            if test and build.has_test(model, data) and not training.trainer.fast_dev_run:
                seed_all(cfg.seed, SETUPS, 0)
                for result in training.trainer.test(model, data, verbose=False):
                    training.tested |= result
                stop.check()
            if store and tracked:
                checkpoints.keep_last(tracked.artifacts / CHECKPOINTS, training.io)
                recorder.log_final(store, tracked, step, score, test, training.blocks.example)
            ended = recorder.summarise(tracked, score, step, metrics | training.tested | reference)
            if summary is not None:
                summary |= ended
        if not distributed.is_nonzero_rank():
            print(training.summary(score, tracked, reference))
        return score


class Training:
    """Lightning's Trainer with the model, the data and the checkpoints of one run."""

    def __init__(
        self,
        cfg: DictConfig,
        data: LightningDataModule | None,
        model: LightningModule,
        callbacks: Sequence[Callback],
    ):
        self.cfg, self.data, self.model = cfg, data, model
        self.blocks = Blocks(cfg.seed)
        self.score = ScoreMonitor(cfg.score.metric)
        self.io = checkpoint_io.DurableCheckpointIO()
        within_epochs = str(cfg.trainer.val_check_interval) not in ("None", "1.0")
        self.last = checkpoints.ResumeCheckpoint(self.io, build.early_stops(cfg))
        self.best = checkpoints.BestCheckpoint(cfg.score.metric, cfg.score.mode, within_epochs)
        self.tested: dict[str, float] = {}
        tracked = cfg.tracking.enabled
        first = [EpochSeeds(cfg.seed), *([AttributeKeeper(), self.last] if tracked else [])]
        callbacks = [self.blocks, self.score, *callbacks, *([self.best] if tracked else [])]
        self.trainer: Any = build.build_trainer(cfg, data, first, callbacks, self.io)

    def track(self, run: Run | None, resumed: stored.ResumedRun | None) -> Path | None:
        """Log to a run and save to its folder; return the checkpoint to resume from, if any."""
        if run is None:
            # Rank zero tracks, or nobody; a foreign module logs by its logger all the same.
            if self.cfg.tracking.enabled or not isinstance(self.model, Supervised):
                self.trainer.logger = DummyLogger()
            rank_zero = distributed.read_rank_zero_run()
            return Path(rank_zero.checkpoint) if rank_zero and rank_zero.checkpoint else None
        folder = run.artifacts / CHECKPOINTS
        checkpoint_io.remove_leftovers(folder)
        run.steps_completed = lambda: self.trainer.global_step
        run.mid_step = lambda: self.blocks.mid_step
        run.lightning_step = lambda: logging_step(self.trainer)
        run.evaluation_steps = lambda: evaluation_steps(self.trainer)
        self.trainer.logger = self.blocks.logger = run
        set_root_dir(self.trainer, run.folder)
        self.io.before_commit, self.io.run_id = run.sync, run.run_id
        profiler = self.trainer.profiler  # its tables are too wide for a screen
        if not isinstance(profiler, PassThroughProfiler) and profiler.filename is None:
            profiler.dirpath, profiler.filename = str(run.artifacts), PROFILE
        self.best.dirpath = str(folder)
        self.last.folder, self.last.wal = folder, run.wal
        if resumed is None:
            return None
        self.last.changed = resumed.changed
        if resumed.best and not (run.artifacts / BEST).exists():
            self.io.save_checkpoint(self.io.load_checkpoint(resumed.best), run.artifacts / BEST)
        return resumed.find_checkpoint()

    def fit(self, checkpoint: Path | None, ranks: distributed.RankStore | None) -> None:
        """Train to the end, from a checkpoint if there is one."""
        distributed.export_rank_zero_run(self.trainer.strategy, to_plain(self.cfg), checkpoint, ranks)
        start_s = time.perf_counter()
        try:
            if ranks:
                path = ranks.share("checkpoint", checkpoint and str(checkpoint))
                checkpoint = path and Path(path)
            with warnings.catch_warnings():
                # The folder of a resumed run holds its checkpoints.
                warnings.filterwarnings("ignore", "Checkpoint directory .* is not empty")
                # Where validation is rarer than epochs; `load_best` tells of a metric that never came.
                rare = ".*could not find the monitored key|ReduceLRO.* not available"
                warnings.filterwarnings("ignore", rare)
                warnings.filterwarnings("ignore", ".*add the following callbacks: ..Timer..")  # max_time=null
                seed_all(self.cfg.seed, SETUPS, 0)
                self.trainer.fit(self.model, datamodule=self.data, ckpt_path=checkpoint)
        except Exception as error:
            if reason := _explain(error, self.cfg, self.trainer):
                if (launcher := self.trainer.strategy.launcher) is not None:
                    launcher.kill(signal.SIGKILL)  # a process that hangs, or is stopped, would stay
                raise RunFailed(reason) from error
            raise
        if not self.trainer.fit_loop.epoch_loop.batch_progress.total.ready:
            why = f"trainer.max_time={self.cfg.trainer.max_time} is too short, or the training data are empty"
            raise RunFailed(f"nothing was trained: the run ended before its first batch; {why}")
        if self.blocks.has_loss is False:
            raise RunFailed("nothing was trained: training_step returned a loss for none of the batches")
        self.fit_s = time.perf_counter() - start_s

    def load_best(self) -> tuple[float | None, int]:
        """Load the best weights, if saved; return their score, a finite number, and their optimizer step."""
        metric = self.cfg.score.metric
        if not self.cfg.tracking.enabled:
            self.score.check(has_score=False)
            score = self.trainer.callback_metrics.get(metric)
            return None if score is None else float(score), self.trainer.global_step
        path = Path(self.best.dirpath or "") / "best.ckpt"
        self.score.check(has_score=path.exists())
        if not path.exists():
            if self.trainer.is_global_zero:
                print(f"{metric} was not measured at the end of an epoch; best.ckpt holds the last weights")
            self.trainer.save_checkpoint(path, weights_only=True)
            self.io.write_pending()
        best = self.io.load_checkpoint(path)
        stored.restore_weights(self.model, best)
        # Once `setup` is through, which may make layers; given the path, averaging would test other weights.
        load, load_weights = self.io.load_checkpoint, stored.restore_weights
        self.trainer.callbacks.append(LambdaCallback(on_test_start=lambda _, m: load_weights(m, load(path))))
        score = self.best.best_model_score
        return None if score is None else float(score), best["global_step"]

    def summary(self, score: float | None, run: Run | None, reference: Mapping[str, float]) -> str:
        """Return the closing summary of the run; `reference` is what its model is compared with."""
        epoch = "best" if self.cfg.tracking.enabled else "last"
        score_text = "" if score is None else progress.format_metrics({self.cfg.score.metric: score})
        items = {
            "score": score_text and f"{score_text} ({epoch} epoch)",
            "test": progress.format_metrics(self.tested),
            "time": progress.format_time(self.fit_s, self.blocks.num_examples),
            "exact": progress.format_metrics(reference),
        }
        if run is not None:
            items["run"] = f"{run.run_id} ({run.name})"
            items["best"] = str(run.artifacts / BEST)
            items["profile"] = ", ".join(map(str, sorted(run.artifacts.glob(f"*-{PROFILE}*"))))
            items["look"] = run.ui_hint
        return progress.align_lines(items)


def _share_config(ranks: distributed.RankStore, cfg: DictConfig) -> DictConfig:
    """Return the config in all processes; that of a run to resume by its id, rank zero alone has read."""
    if cfg.resume == "auto":  # typed in each, whose paths may be other ones
        cfg.num_threads = ranks.share("num_threads", cfg.num_threads)
        return cfg
    shared = ranks.share("config", {**to_plain(cfg), "init_from": None})
    if distributed.is_nonzero_rank():
        cfg = resolve_config(DictConfig(shared))
    distributed.settle_ranks(cfg.trainer.devices, cfg.trainer.num_nodes)
    return cfg


def _set_num_threads(cfg: DictConfig) -> None:
    """Use the configured number of threads; record the number used, since it changes bits."""
    if cfg.num_threads is None:
        devices = cfg.trainer.devices  # each has its own process
        processes = devices if isinstance(devices, int) and devices > 1 else 1
        cfg.num_threads = default_threads(processes, torch.get_num_threads())
    torch.set_num_threads(cfg.num_threads)


def _explain(error: Exception, cfg: DictConfig, trainer: Any) -> str | None:
    """Return one line for an error whose traceback explains less; None for any other."""
    # PyTorch has no exception of its own for the memory of the CPU.
    on_cpu = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    if on_cpu or isinstance(error, torch.OutOfMemoryError | MemoryError):
        return f"out of memory; make data.batch_size={cfg.data.get('batch_size')} smaller first"
    is_silence = any(word in str(error) for word in ("gloo", "pair closure", "NCCL"))
    if trainer.world_size > 1 and (isinstance(error, DistError) or is_silence):
        cure = "resume=auto continues it" + " if all nodes are given it" * (trainer.num_nodes > 1)
        is_resumable = distributed.can_resume(trainer.strategy.cluster_environment)
        cure = cure if is_resumable else "start all of them again"
        return distributed.explain_silence(f"another of the {trainer.world_size} processes", cure)
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    text = " ".join(str(error).split())
    is_restoring = any(each.endswith("checkpoint_connector.py") for each in files)
    if is_restoring and all("lib/python" in each or each.startswith(str(PACKAGE)) for each in files):
        return f"the checkpoint to continue from is none that a run writes: {type(error).__name__} {text}"
    if isinstance(error, MisconfigurationException) or "pytorch_lightning" in Path(files[-1]).parts:
        return text
    # Of a library's own callback, say, which asks for what the model does not have.
    in_libraries = all("lib/python" in each and not each.startswith(str(PACKAGE)) for each in files[1:])
    return f"{type(error).__name__}: {text}" if in_libraries else None
