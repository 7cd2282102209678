"""One run, from its config to its score: the only file that joins all rooms."""

import shlex
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers.logger import DummyLogger

from tracklight.config import compose as config
from tracklight.data.tensor_data import TensorData
from tracklight.engine import distributed as ranks
from tracklight.engine import progress as report
from tracklight.engine.blocks import Blocks, NonFiniteLoss
from tracklight.engine.checkpoints import (
    DurableCheckpointIO,
    ResumeCheckpoint,
    keep_last,
    load_weights,
    remove_leftovers,
    resume_point,
)
from tracklight.engine.signals import SafeStop, Stopped
from tracklight.errors import BadInput, RunFailed
from tracklight.experiment import build as assemble
from tracklight.experiment import stored as resume
from tracklight.experiment.record import describe, log_failed, log_final, open_run, open_store
from tracklight.models.linear_regression import LinearRegression
from tracklight.paths import ROOT
from tracklight.redact import redact
from tracklight.runs import select as query
from tracklight.tracking import provenance
from tracklight.tracking.run import Run
from tracklight.tracking.tags import BEST, CHECKPOINTS, NON_FINITE_TAG


def run(
    cfg: DictConfig,
    tags: Mapping[str, str] | None = None,
    callbacks: Sequence[Callback] = (),
    test: bool = True,
    into: str | None = None,
) -> float | None:
    """Train what a config describes, track it, test its best checkpoint once.

    Args:
        cfg: The composed config, checked.
        tags: Further tags of the run.
        callbacks: Further callbacks.
        test: Whether to evaluate on the test part at the end and log the model; trials of a sweep
            are not.
        into: Id of a run of this very config to continue; the config's own `resume` is then moot.

    Returns:
        The best value of `score.metric`, the last where nothing is tracked; None where no metric
        is named.

    Raises:
        BadInput: The config asks for what cannot be; no run was made.
        RunFailed: The run began and could not end well.
        Stopped: A signal ended it.
    """
    with SafeStop().listening() as stop:
        return _Experiment(cfg, tags or {}, callbacks, stop, into).run(test)


class _Experiment:
    """The parts of one run, made in the order in which one depends on the other."""

    def __init__(
        self,
        cfg: DictConfig,
        tags: Mapping[str, str],
        callbacks: Sequence[Callback],
        stop: SafeStop,
        into: str | None,
    ):
        self.tags = dict(tags)
        self.stop = stop
        self.saves = cfg.tracking.enabled
        self.leader = ranks.leader()
        self.store = None if ranks.is_follower() else open_store(cfg)
        _set_threads(cfg)  # before the identity, of which it is a part
        self.cfg, self.continued = (
            (cfg, None) if self.store is None else resume.resolve(cfg, self.store, into)
        )
        _set_threads(self.cfg)  # a stored config has its own
        self.facts = provenance.collect(
            ROOT,
            redact(shlex.join(sys.argv)),
            provenance.code_digest(config.targets(self.cfg)),
        )
        self.data = assemble.build_data(self.cfg)
        self.model = assemble.build_model(self.cfg, self.data)
        if self.cfg.init_from is not None and self._resume_point() is None:
            self.tags["tracklight.init_from"] = self._load_initial_weights(self.cfg.init_from)
        self.io = DurableCheckpointIO()
        self.blocks = Blocks(self.cfg.seed)
        self.best = ModelCheckpoint(
            filename="best",
            monitor=self.cfg.score.metric,
            mode=self.cfg.score.mode,
            save_weights_only=True,
            enable_version_counter=False,
        )
        self.last = ResumeCheckpoint(self.io)
        self.trainer: Any = self._build_trainer([*callbacks, stop])
        self.tracked: Run | None = None

    def _build_trainer(self, callbacks: list[Callback]) -> Trainer:
        shown = report.progress(self.cfg.trainer.enable_progress_bar)
        callbacks = [
            *assemble.build_callbacks(self.cfg),
            self.blocks,
            *callbacks,
            *([shown] if shown else []),
        ]
        ours: dict[str, Any] = {"enable_checkpointing": self.saves}
        if isinstance(shown, report.EpochLines):
            ours["enable_progress_bar"] = False
        if isinstance(self.data, TensorData) and "val" not in self.data.splits:
            ours["limit_val_batches"] = 0
        saving = [self.last, self.best] if self.saves else []
        root = self.cfg.tracking.dir
        return assemble.build_trainer(
            self.cfg, [*callbacks, *saving], [self.io] if self.saves else [], root, **ours
        )

    def _load_initial_weights(self, run_id: str) -> str:
        """Start from that run's best weights; return its whole id."""
        if self.store is None:
            raise BadInput(f"init_from={run_id} needs tracking=mlflow, where that run is")
        run = query.find_run(self.store, run_id)
        weights = load_weights(query.fetch(self.store, run, BEST))
        try:
            self.model.load_state_dict(weights)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise BadInput(
                f"init_from={run_id}: its weights do not fit this model: {reason}"
            ) from None
        return run.info.run_id

    def run(self, test: bool) -> float | None:
        """Open the run, last of all; then train, test, and close it as it really ended."""
        started = time.perf_counter()
        if self.store is None:
            with self.stop.prevailing():
                self._fit(self._follow())
                score = self._close(test)
            if not ranks.is_follower():
                print(self._summary(score, time.perf_counter() - started))
            return score
        self.tracked = open_run(
            self.store, self.cfg, self.model, self.data, self.continued, self.facts, self.tags
        )
        status = "FAILED"
        try:
            with self.stop.prevailing():
                describe(self.tracked, self.cfg, self.data, self.facts)
                self._fit(self._prepare_folder(self.tracked))
                score = self._close(test)
            status = "FINISHED"
        except Stopped:
            status = "KILLED"
            raise
        except NonFiniteLoss as error:
            self.tracked.set_tags({NON_FINITE_TAG: str(error.step)})
            raise
        finally:
            if status == "FAILED" and self.cfg.tracking.figures:
                log_failed(self.tracked, self.model)
            self.tracked.finish(status)
        print(self._summary(score, time.perf_counter() - started))
        return score

    def _prepare_folder(self, run: Run) -> Path | None:
        """Point everything at the run's folder; return the checkpoint to continue from."""
        folder = run.artifacts / CHECKPOINTS
        remove_leftovers(folder)
        run.steps_completed = lambda: self.trainer.global_step
        self.trainer.logger = run
        self.blocks.track = run
        self.io.before_commit = run.sync
        self.best.dirpath = str(folder)
        self.last.folder = folder
        if not self.continued:
            return None
        self.last.changed = self.continued.changed
        if self.continued.best and not (run.artifacts / BEST).exists():
            best = self.io.load_checkpoint(self.continued.best)
            self.io.save_checkpoint(best, run.artifacts / BEST)
        return self._resume_point()

    def _resume_point(self) -> Path | None:
        """Return the checkpoint to continue from; None for a run from its start."""
        if self.store is None or self.continued is None:
            return None
        folder = self.store.root / self.continued.run.info.run_id / "artifacts" / CHECKPOINTS
        return resume_point(folder) or self.continued.checkpoint

    def _follow(self) -> Path | None:
        """Return the checkpoint that the first process continues from."""
        if self.saves:
            self.trainer.logger = DummyLogger()
        found = self.leader.checkpoint if self.leader else None
        return None if found is None else Path(found)

    def _fit(self, checkpoint: Path | None) -> None:
        ranks.lead(self.trainer.strategy, config.plain(self.cfg), checkpoint)
        began = time.perf_counter()
        size = OmegaConf.select(self.cfg, "data.batch_size")
        with warnings.catch_warnings(), told(size, self.trainer.world_size):
            # A continued run's folder is not empty.
            warnings.filterwarnings("ignore", "Checkpoint directory .* is not empty")
            self.trainer.fit(self.model, datamodule=self.data, ckpt_path=checkpoint)
        self.stop.check()  # of a signal after the last batch
        self.fit_s = time.perf_counter() - began

    def _close(self, test: bool) -> float | None:
        """Test the best checkpoint once and log what the run leaves; return the score."""
        tracked = self.tracked
        score = (
            self.best.best_model_score
            if self.saves
            else self.trainer.callback_metrics.get(self.cfg.score.metric)
        )
        step = self.trainer.global_step
        if (
            tracked
            and isinstance(self.model, LinearRegression)
            and isinstance(self.data, TensorData)
        ):
            train = self.data.splits["train"]
            tracked.log_metrics(
                self.model.reference(self.data.transform(train.features), train.targets)
            )
        if self.saves:
            self._keep_a_best()
            best = self.io.load_checkpoint(Path(self.best.dirpath or "") / "best.ckpt")
            self.model.load_state_dict(best["state_dict"])
            step = best["global_step"]
        if test and assemble.has_test(self.model, self.data) and not self.trainer.fast_dev_run:
            self.trainer.test(self.model, datamodule=self.data, verbose=False)
            self.stop.check()
        score = None if score is None else float(score)
        if tracked and self.store:
            keep_last(tracked.artifacts / CHECKPOINTS, self.io)
            figures = self.cfg.tracking.figures
            log_final(self.store, tracked, self.model, self.data, step, score, test, figures)
        return score

    def _keep_a_best(self) -> None:
        """Take the last weights for the best where no epoch came to be compared."""
        path = Path(self.best.dirpath or "") / "best.ckpt"
        if path.exists():
            return
        if self.trainer.is_global_zero:
            print(
                f"{self.cfg.score.metric} was not measured at the end of an epoch; "
                "best.ckpt holds the last weights"
            )
        self.trainer.save_checkpoint(path, weights_only=True)

    def _summary(self, score: float | None, total_s: float) -> str:
        metrics = {key: float(value) for key, value in self.trainer.callback_metrics.items()}
        epochs = self.trainer.current_epoch - self.last.first_epoch
        rows = len(self.data.splits["train"]) if isinstance(self.data, TensorData) else 0
        named = {}
        if self.tracked:
            run = self.tracked
            named["run"] = f"{run.run_id} ({run.name})"
            named["best"] = str(run.artifacts / BEST)
            named["look"] = run.look
        return report.summary(
            score={} if score is None else {self.cfg.score.metric: score},
            of="best" if self.saves else "last",
            test={key: value for key, value in metrics.items() if key.startswith("test/")},
            seconds=(self.fit_s, total_s),
            num_examples=rows * epochs,
            **named,
        )


def _set_threads(cfg: DictConfig) -> None:
    """Use the asked number of threads, and record the number used: it changes bits."""
    devices = cfg.trainer.devices
    if cfg.num_threads is not None:
        torch.set_num_threads(cfg.num_threads)
    elif isinstance(devices, int) and devices > 1:  # a process each
        torch.set_num_threads(max(1, torch.get_num_threads() // devices))
    cfg.num_threads = torch.get_num_threads()


@contextmanager
def told(batch_size: Any, num_processes: int) -> Iterator[None]:
    """Raise RunFailed for errors whose traceback would say less than a line.

    Args:
        batch_size: To be made smaller where memory runs out.
        num_processes: Of this run; with several, one can lose the others.
    """
    try:
        yield
    except Exception as error:
        if _is_out_of_memory(error):
            why = f"out of memory; make data.batch_size={batch_size} smaller first"
        elif isinstance(error, MisconfigurationException):
            why = " ".join(str(error).split())
        elif num_processes > 1 and any(name in str(error) for name in ("gloo", "NCCL")):
            why = "another process of this run is gone; resume=auto continues it"
        else:
            raise
        raise RunFailed(why) from error


def _is_out_of_memory(error: Exception) -> bool:
    # On the CPU, PyTorch has no exception of its own for it.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )
