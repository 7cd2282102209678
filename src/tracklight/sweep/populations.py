"""Which trials of a sweep are trained together, and the executor that does it."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tracklight.config import compose
from tracklight.config.rules import nested_items
from tracklight.sweep.executors import Message, ProcessExecutor
from tracklight.sweep.plan import Job
from tracklight.sweep.trial import NotStacked, TrialSpec

# Keys in which trials of one population may differ; of data, the numbers of those that are generated.
OF_OPTIMIZER = ("lr", "momentum", "dampening", "weight_decay", "betas", "eps")
STACKABLE = ("seed", "data.seed", "data.slope", "data.intercept", "data.noise", "model.dropout", "scheduler")
STACKABLE += tuple(f"optimizer.{key}" for key in OF_OPTIMIZER)
# What else changes a step or an epoch, or listens to them, is a matter of Lightning's own loop.
NEEDED: tuple[tuple[tuple[Any, ...], str], ...] = (
    ((True,), "tracking.enabled"),
    (
        (False,),
        "tracking.gradients tracking.system_metrics compile trainer.fast_dev_run trainer.detect_anomaly",
    ),
    ((None,), "init_from trainer.min_steps trainer.max_time trainer.gradient_clip_val trainer.profiler"),
    ((None,), "trainer.plugins"),
    ((None, 1), "scheduler.frequency"),
    ((None, 1.0), "trainer.limit_train_batches trainer.limit_val_batches trainer.val_check_interval"),
    ((0.0,), "trainer.overfit_batches"),
    ((1, "1"), "trainer.devices trainer.num_nodes"),
    ((1,), "trainer.accumulate_grad_batches trainer.check_val_every_n_epoch"),
    ((-1,), "trainer.max_steps"),
    (("auto",), "trainer.strategy"),
    (("32-true", "64-true"), "trainer.precision"),
    (("torch.optim.SGD", "torch.optim.Adam", "torch.optim.AdamW"), "optimizer._target_"),
)


def why_alone(job: Job) -> str | None:
    """Return the first setting for which a trial is trained alone, in words."""
    values = dict(nested_items(job.cfg))
    for allowed, keys in NEEDED:
        for key in keys.split():
            value = values.get(key)
            if not any(value == each and type(value) is type(each) for each in allowed):
                return f"{key}={value}"
    return next((f"callbacks.{name}" for name, node in (job.cfg["callbacks"] or {}).items() if node), None)


def shared_digest(job: Job) -> str:
    """Return the digest of what the trials of one population share."""
    values = compose.result_keys(job.cfg)
    shared = {key: value for key, value in values.items() if not compose.is_below(key, STACKABLE)}
    has_dropout = bool(job.cfg["model"].get("dropout"))  # without, there is no such layer
    return compose.json_digest([shared, has_dropout, job.cfg["trainer"]["max_epochs"]])


def group_jobs(jobs: Sequence[Job]) -> tuple[list[list[int]], str]:
    """Return the indices of the jobs of each group, and in words how they were grouped."""
    groups: dict[str, list[int]] = {}
    reasons = [why_alone(job) for job in jobs]
    for index, (job, reason) in enumerate(zip(jobs, reasons, strict=True)):
        groups.setdefault(f"alone {index}" if reason else shared_digest(job), []).append(index)
    together = [str(len(group)) for group in groups.values() if len(group) > 1]
    words = [f"{' + '.join(together)} runs trained together"] if together else []
    if alone := len(groups) - len(together):
        why = ", ".join(dict.fromkeys(filter(None, reasons)))
        words.append(f"{alone} alone" + (f" ({why})" if why else ""))
    return [*groups.values()], "population  " + ", ".join(words)


class PopulationExecutor(ProcessExecutor):
    """Trains what can be stacked together, in one process a group, and the rest as ever."""

    def __init__(
        self, num_workers: int, num_gpus: int, settings: Any, is_search: bool, note: Callable[[str], None]
    ):
        super().__init__(num_workers, num_gpus)
        self.max_members, self._note = settings.max_members, note
        self._batch_size: int | None = settings.batch_size if is_search else None  # None: all jobs are known
        self._batch: list[tuple[TrialSpec, Job]] = []
        self._groups: list[list[tuple[TrialSpec, Job]]] = []

    @property
    def has_room(self) -> bool:
        """Whether the batch can grow."""
        is_idle = not (self._workers or self._groups)
        return self._batch_size is None or (is_idle and len(self._batch) < self._batch_size)

    @property
    def running(self) -> list[Job]:
        """The jobs of the batch, and those in progress."""
        return [*super().running, *(job for group in (self._batch, *self._groups) for _, job in group)]

    def start(self, spec: TrialSpec, job: Job) -> None:
        """Add a trial to the batch."""
        self._batch.append((spec, job))

    def messages(self, timeout_s: float) -> Iterator[Message]:
        """Start what there is room for; yield the reports and results of trials."""
        if self._batch and not (self._workers or self._groups):
            batch, self._batch = self._batch, []
            groups, words = group_jobs([job for _, job in batch])
            if batch[0][0].test:  # the winner's runs are tested, not trained
                groups = [[index] for index in range(len(batch))]
            elif len(batch) > 1:
                self._note(words)
            self._groups = [[batch[index] for index in group] for group in groups]
        while self._groups and super().has_room:
            self.start_group(self._groups.pop(0))
        yield from super().messages(timeout_s)

    def take_back(self, group: Sequence[tuple[TrialSpec, Job]], why: NotStacked) -> None:
        """Train alone what could not be stacked after all."""
        self._note(f"population  {len(group)} runs are trained alone: {why.reason}")
        self._groups += [[each] for each in group]

    def stop(self) -> Iterator[Message]:
        """Discard what was not started; stop the rest, and yield its last messages."""
        self._batch, self._groups = [], []
        return super().stop()
