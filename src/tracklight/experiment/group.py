"""What the runs of a population share: the store, data sets, a Trainer; and whether they can be stacked."""

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from omegaconf import DictConfig
from pytorch_lightning.utilities.model_helpers import is_overridden

from tracklight.config.compose import json_digest, to_plain
from tracklight.data.tensor_data import TensorData
from tracklight.engine.checkpoint_io import DurableCheckpointIO
from tracklight.engine.eligibility import overridden_hook
from tracklight.engine.population import Population, why_not_stacked
from tracklight.engine.signals import SafeStop, Stopped
from tracklight.engine.steps import EAGER_STEPS, can_trace, make_step
from tracklight.errors import BadInput, RunFailed
from tracklight.experiment import build, stored
from tracklight.experiment.member import Member
from tracklight.models.supervised import Supervised

COPIES = 6  # of its parameters that a member needs: moments, gradient, best, temporary
MEMORY_SHARE = 0.5  # of what is free, that members may take
NUM_TIMED, TIMED_STEPS = 8, 8  # members, and steps, to compare with single ones on a CPU
LONG_S = 0.01  # that a stacked step takes at least, where single ones may be faster
FASTER = 0.8  # share of the time at which single steps are taken


class NotStackable(Exception):
    """Runs cannot be trained together, for a reason in words; those that have not ended were not begun."""


class Group:
    """What members share: the store, data sets, and the Trainer of the first, for its device and counters."""

    def __init__(self, cfg: DictConfig, report: Any, end: Callable[..., None], stop: SafeStop):
        self.cfg, self.report, self.end, self.stop = cfg, report, end, stop
        self.data_sets: dict[str, TensorData] = {}
        untracked = cfg.copy()
        untracked.tracking.enabled = untracked.trainer.enable_progress_bar = False
        self.data = self.build_data(cfg)
        self.num_rows = len(self.data.splits["train"])
        self.batch_size = min(self.data.batch_size or self.num_rows, self.num_rows)
        self.num_batches = math.ceil(self.num_rows / self.batch_size)
        self.model: Any = build.build_model(cfg, self.data)
        self.trainer: Any = build.build_trainer(untracked, self.data, [], [], DurableCheckpointIO())
        self.device = self.trainer.strategy.root_device
        self.to_precision = self.trainer.precision_plugin.convert_input  # of a batch
        if reason := self._why_alone():
            raise NotStackable(reason)
        build.rehearse(cfg, self.model, self.data, self.trainer)
        self.store = stored.open_store(cfg.tracking.uri, Path(cfg.tracking.dir), create=True)
        self.store.send_directly()

    def build_data(self, cfg: DictConfig) -> TensorData:
        """Build a data set, once for all members that have it; those with the same rows share them."""
        key = json_digest(to_plain(cfg.data))
        if key not in self.data_sets:
            data = build.build_data(cfg)
            if not isinstance(data, TensorData):
                raise NotStackable(f"{type(data).__name__} is not a tracklight data set (TensorData)")
            for other in self.data_sets.values():
                if other.digest == data.digest:
                    data.splits = other.splits
            self.data_sets[key] = data
        return self.data_sets[key]

    def _why_alone(self) -> str | None:
        """Return the first reason against training members together, beside those that a config tells."""
        model, name, split = self.model, type(self.model).__name__, self.data.splits["train"]
        if not build.is_plain(model):
            return f"{name} is not a tracklight model (Supervised), or has hooks of its own"
        if not can_trace(model) or is_overridden("configure_optimizers", model, Supervised):
            return f"{name} is not `pure`, has buffers or frozen weights, or configures its own optimizer"
        models = [copy.deepcopy(model) for _ in range(NUM_TIMED)]
        optimizers = [model.optimizer_factory(each.parameters()) for each in models]
        if reason := overridden_hook(model, self.data) or why_not_stacked(optimizers[0]):
            return reason
        rows = split.features[: self.batch_size].to(self.device)
        y = split.targets[: self.batch_size].to(self.device)
        x, y = self.to_precision((self.data.transform(rows), y))
        stacked = torch.stack([x] * NUM_TIMED), torch.stack([y] * NUM_TIMED)
        try:
            population = Population(models, optimizers, self.device)
            population.evaluate(*stacked)
            stacked_s = _time(lambda: population.train_block(*stacked, len(rows), 0, []))
        except (RuntimeError, ValueError, TypeError) as error:
            return f"{name} cannot be batched over models ({' '.join(str(error).split())[:200]})"
        if self.device.type != "cpu" or stacked_s < LONG_S:
            return None
        alone = make_step(single := copy.deepcopy(model), model.optimizer_factory(single.parameters()))
        ratio = _time(lambda: alone(x, y)) * NUM_TIMED / stacked_s
        return f"single steps take {ratio:.2f} of the time of stacked ones" if ratio < FASTER else None

    def num_fitting(self) -> int:
        """Return how many members fit into the memory that is free."""
        on_gpu = self.device.type == "cuda"
        free = torch.cuda.mem_get_info(self.device)[0] if on_gpu else psutil.virtual_memory().available
        weights = sum(each.nbytes for each in self.model.parameters())
        examples = sum(each.features.nbytes + each.targets.nbytes for each in self.data.splits.values())
        return max(1, int(MEMORY_SHARE * free / (COPIES * weights + examples)))

    @contextmanager
    def ending_alone(self, member: Member) -> Iterator[None]:
        """End the member alone if the block fails."""
        try:
            yield
        except (BadInput, RunFailed, OSError) as error:
            self.fail(member, error)

    def fail(self, member: Member, error: BaseException) -> None:
        """End a member that was stopped or has failed."""
        kind, reason = ("stopped", "") if isinstance(error, Stopped) else ("failed", str(error))
        if not isinstance(error, BadInput | RunFailed | Stopped):
            reason = f"{type(error).__name__}: {reason}"
        with suppress(BaseException):
            member.end(error)
        is_input = isinstance(error, BadInput)
        self.end(member.index, kind=kind, reason=reason, is_input=is_input, **member.result)


def _time(step: Callable[[], Any]) -> float:
    """Return the CPU seconds that a step takes once it is traced, whatever else the machine does."""
    seconds = []
    for _ in range(EAGER_STEPS + TIMED_STEPS):
        start_s = time.process_time()
        step()
        seconds.append(time.process_time() - start_s)
    return min(seconds[EAGER_STEPS:])
