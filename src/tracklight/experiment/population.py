"""Many runs trained together: each is tracked, checkpointed and continued as if it had run alone.

Shapes: `M` members, `S` optimizer steps.
"""

import bisect
import math
import resource
import time
import traceback
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from tracklight.engine import checkpoint_io
from tracklight.engine.blocks import check_loss, steps_per_block
from tracklight.engine.lightning_internals import set_progress
from tracklight.engine.population import Population, shared_shape
from tracklight.engine.signals import SafeStop, Stopped
from tracklight.errors import BadInput, RunFailed
from tracklight.experiment.group import Group, NotStackable
from tracklight.experiment.member import Member
from tracklight.redact import redact
from tracklight.tracking import tags

SAVED_SHARE = 0.1  # of the time that checkpoints may take
SAVING_S = 0.02  # a member, until it is measured
ROWS_PER_BLOCK = 1 << 15  # of all members
OPEN_FILES = 6  # at most, of a run in progress


def run(
    cfgs: Sequence[DictConfig],
    run_tags: Sequence[Mapping[str, str]],
    run_ids: Sequence[str | None],  # of runs to continue
    max_members: int | None,  # trained at once; None: as many as fit
    report: Callable[[Mapping[int, float], int], set[int]],  # scores by index, the epoch: those to prune
    end: Callable[..., None],  # takes an index and the fields of a `TrialResult`
) -> None:
    """Train tracked runs that differ in what can be stacked; call `end` for each.

    Raises:
        NotStackable: They cannot be trained together.
    """
    # The members' own optimizers only hold settings and state.
    warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
    with SafeStop().listening() as stop:
        torch.set_num_threads(cfgs[0].num_threads or torch.get_num_threads())
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        group = Group(cfgs[0], report, end, stop)
        size = min(len(cfgs), max_members or group.num_fitting(), max(1, limit // OPEN_FILES))
        members = [Member(*each) for each in zip(range(len(cfgs)), cfgs, run_tags, run_ids, strict=True)]
        with closing(group.store):
            for start in range(0, len(cfgs), size):
                _run_group(group, members[start : start + size])
                stop.check()


def _run_group(group: Group, members: Sequence[Member]) -> None:
    """Build, open, train and end members; each fails alone, whatever is wrong with it."""
    shapes = set[str]()
    for member in members:
        with group.ending_alone(member):
            data = group.build_data(member.cfg)
            member.build(data, group.trainer, group.num_batches)
            splits = [(len(split), split.features.shape[1:]) for split in data.splits.values()]
            shapes.add(f"{splits} {shared_shape(member.model, member.optimizer)}")
    if len(shapes) > 1:
        raise NotStackable("their models or data have different shapes or attributes")
    members = [each for each in members if not each.has_ended]
    for member in members:
        with group.ending_alone(member):
            member.open(group.store, len(members))
    try:
        _train(group, [each for each in members if not each.has_ended])
    except BaseException as error:
        if not isinstance(error, BadInput | RunFailed | Stopped):
            print(redact(traceback.format_exc()), flush=True)
        for member in members:
            if not member.has_ended:
                group.fail(member, error)
        if not isinstance(error, Exception):
            raise


def _train(group: Group, members: Sequence[Member]) -> None:
    """Train members to their end; if the memory is short, one half after the other."""
    for step, alike in _by_start(members).items():
        try:
            Training(group, alike, step).fit()
            continue
        except (RuntimeError, MemoryError) as error:
            is_known = isinstance(error, torch.OutOfMemoryError | MemoryError)
            rest = [each for each in alike if not each.has_ended]
            if not (is_known or "DefaultCPUAllocator" in str(error)) or len(rest) < 2:
                raise
        half = math.ceil(len(rest) / 2)
        short = f"out of memory with {len(rest)} members"
        print(f"population: {short}: {half} are trained at once", flush=True)
        for part in (rest[:half], rest[half:]):
            for member in part:
                member.build(member.data, group.trainer, group.num_batches)
                member.reset()
            _train(group, part)


def _by_start(members: Sequence[Member]) -> dict[int, list[Member]]:
    """Group members by the step from which they go on: the newest that all have, else each its own."""
    steps = [set(each.starts) for each in members if each.starts]
    common = max(set.intersection(*steps), default=None) if steps else None
    groups = defaultdict[int, list[Member]](list)
    for each in members:
        groups[common if common in each.starts else max(each.starts, default=0)].append(each)
    return groups


class Training:
    """One training of stacked members, from an epoch that all of them have done."""

    def __init__(self, group: Group, members: Sequence[Member], step: int):
        self.group, self.members = group, [*members]
        self.epoch = max([member.restore(step) for member in members])
        # Not yet logged, by metric: the steps, and the values (S, M).
        self.points = defaultdict[str, list[tuple[range, Tensor]]](list)
        self.values: dict[str, list[float]] = {}  # of the last epoch, (M,)
        self._loops: dict[int, Any] = {}  # Lightning's counters after so many epochs
        # Best score and its epoch; a score that is not finite, and since which epoch none is. Epochs from 1.
        self.scores = torch.zeros(4, len(members), dtype=torch.float64)
        self.saved_s, self.saving_s = time.monotonic(), SAVING_S * len(members)
        for member in members:
            member.data.steps_per_block = steps_per_block(group.batch_size, ROWS_PER_BLOCK // len(members))
        self._stack()
        self.best = [parameter.detach().clone() for parameter in self.population.parameters]
        for position, member in enumerate(members):
            if self.epoch and (path := member.folder / checkpoint_io.BEST).exists():
                best, score = member.io.load_checkpoint(path), member.best.best_model_score
                self.scores[:2, position] = torch.tensor([float(score or 0), best["epoch"] + 1])
                for name, stacked in zip(self.population.names, self.best, strict=True):
                    stacked[position] = best["state_dict"][name]
            if since := member.scores.since:
                self.scores[2:, position] = torch.tensor(since[:2])
        self.written = self.scores[1].clone()  # epochs of the best weights that are on disk

    @property
    def active(self) -> list[tuple[int, Member]]:
        """The members that go on, each with its position among the stacked."""
        return [(i, member) for i, member in enumerate(self.members) if not member.has_ended]

    def _stack(self) -> None:
        models, optimizers = zip(*((each.model, each.optimizer) for each in self.members), strict=True)
        self.population = Population(models, optimizers, self.group.device)
        self.population.optimizer.num_steps = self.epoch * self.group.num_batches
        schedules = [(i, each.schedule) for i, each in enumerate(self.members) if each.schedule]
        self.by_step = [each["scheduler"] for _, each in schedules if each["interval"] == "step"]
        self.by_epoch = [(i, each) for i, each in schedules if each["interval"] == "epoch"]

    def fit(self) -> None:
        """Train to the last epoch, and end each member."""
        stop, max_epochs = self.group.stop, self.group.cfg.trainer.max_epochs
        stop.setup()
        try:
            while self.epoch < max_epochs and self.active:
                stop.check()
                self._train_epoch()
                self._thin_out()
                least_s = max(checkpoint_io.INTERVAL_S, self.saving_s / SAVED_SHARE)
                if time.monotonic() - self.saved_s > least_s and self.epoch < max_epochs:
                    self._save()
        finally:
            stop.teardown()
        sign = 1 if self.group.cfg.score.mode == "min" else -1
        scored = [i for i, _ in self.active if self.scores[1, i]]
        best = min(scored, key=lambda i: sign * self.scores[0, i], default=None)
        for position, member in self.active:
            member.tree["tracking"]["figures"] &= position == best  # they take longer than all else
            self._finish(position, member, "complete")

    def _batches(self, part: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield what all members get next, each stacked: (1, n, ...) if they share it, else (M, n, ...)."""
        # Those of the same rows differ in the order of training alone.
        sources = [id(each.data if part == "train" else each.data.splits) for each in self.members]
        sets = dict(zip(sources, (each.data for each in self.members), strict=True))
        index = [[*sets].index(source) for source in sources] if len(sets) > 1 else [0]
        for batches in zip(*(getattr(data, f"{part}_dataloader")() for data in sets.values()), strict=True):
            inputs, targets = zip(*map(self.group.to_precision, batches), strict=True)
            yield torch.stack([inputs[i] for i in index]), torch.stack([targets[i] for i in index])

    def _train_epoch(self) -> None:
        group, start_s, losses = self.group, time.monotonic(), []
        set_progress(group.trainer, self.epoch, group.num_batches)  # seeds the order of the data
        for inputs, targets in self._batches("train"):
            group.stop.check()
            block = inputs, targets, group.batch_size, group.cfg.seed, self.by_step
            losses.append(self.population.train_block(*block))
        table = torch.cat(losses)  # (S, M)
        self.epoch += 1
        step = self.epoch * group.num_batches
        self.points["train/loss"].append((range(step - group.num_batches + 1, step + 1), table))
        if not table[:, [position for position, _ in self.active]].isfinite().all():
            self._fail_diverged(table, step - group.num_batches + 1)
        sizes = table.new_full((len(table), 1), group.batch_size)
        sizes[-1] = group.num_rows - group.batch_size * (len(table) - 1)
        values = {"train/loss_epoch": (table * sizes).sum(0) / group.num_rows} | self._validate()
        for name, column in values.items():
            self.points[name].append((range(step, step + 1), column[None]))
        values["train/loss"] = table[-1]
        columns = torch.stack([each.to(table) for each in values.values()]).double().cpu()
        self.values = dict(zip(values, columns.tolist(), strict=True))
        seconds = (time.monotonic() - start_s) / len(self.members)
        for _, member in self.active:
            member.epochs, member.metrics = self.epoch, tuple(values)
            member.seconds += seconds
        self._end_epoch()

    @torch.no_grad()
    def _validate(self) -> dict[str, Tensor]:
        """Return the means of what the members measure on their validation parts, each (M,)."""
        totals, num_rows = defaultdict[str, Any](int), 0
        for inputs, targets in self._batches("val"):
            self.group.stop.check()
            num_rows += targets.shape[1]
            for name, value in self.population.evaluate(inputs, targets).items():
                totals[f"val/{name}"] += value * targets.shape[1]
        return {name: total / num_rows for name, total in totals.items()}

    def _end_epoch(self) -> None:
        """Report the scores, keep the best weights, step the schedulers, and end those that are pruned."""
        group, pruned = self.group, set[int]()
        if (metric := group.cfg.score.metric) in self.values:
            value, epoch = torch.tensor(self.values[metric]).double(), torch.tensor(float(self.epoch))
            finite, sign = value.isfinite(), 1 if group.cfg.score.mode == "min" else -1
            best, at, _, since = self.scores
            new = torch.stack([value, epoch.expand_as(value)])
            better = finite & ((at == 0) | (sign * value < sign * best))
            bad = torch.where(since > 0, self.scores[2:], new) * ~finite
            self.scores = torch.cat([torch.where(better, new, self.scores[:2]), bad])
            for kept, parameter in zip(self.best, self.population.parameters, strict=True):
                kept[better] = parameter.detach()[better]
            values = {each.index: self.values[metric][i] for i, each in self.active if finite[i]}
            pruned = group.report(values, self.epoch)
        for position, schedule in self.by_epoch:
            scheduler, found = schedule["scheduler"], self.values.get(schedule["monitor"])
            if not isinstance(scheduler, ReduceLROnPlateau):
                scheduler.step()
            elif found is not None:
                scheduler.step(found[position])
        for position, member in self.active:
            if member.index in pruned:
                member.pruning.pruned = member.last.stopped_early = True
                member.tree["tracking"]["figures"] = False
                self._finish(position, member, tags.PRUNED)

    def _flush(self, last_steps: Mapping[int, int] | None = None) -> None:
        """Log the points so far to the members' runs; `last_steps` says at which those at a position end."""
        every, last_steps = self.group.cfg.trainer.log_every_n_steps, last_steps or {}
        if self.points:  # there were steps since the last time
            self.population.optimizer.export_state()
        for name, blocks in self.points.items():
            interval = every if name == "train/loss" else 1
            steps = [step for part, _ in blocks for step in part]
            kept = [i for i, step in enumerate(steps) if interval and step % interval == 0]
            steps, rows = [steps[i] for i in kept], torch.cat([table for _, table in blocks])[kept].T.tolist()
            for position, member in self.active if steps else ():
                count = bisect.bisect_right(steps, last_steps.get(position, steps[-1]))
                assert member.run
                member.run.log_series(name, steps[:count], rows[position][:count])
        self.points.clear()

    def _fail_diverged(self, table: Tensor, start: int) -> None:
        """End the members whose loss is no number at a step of the epoch, which starts with step `start`."""
        rows = [column.index(False) if False in column else None for column in table.isfinite().T.tolist()]
        self._flush({position: start + row for position, row in enumerate(rows) if row is not None})
        for position, member in self.active:
            if (row := rows[position]) is not None:
                with self.group.ending_alone(member):
                    check_loss(start + row, table[row, position].item())

    def _thin_out(self) -> None:
        """Free the places of members that have ended, once they are a quarter."""
        positions = [position for position, _ in self.active]
        if positions and 4 * len(positions) <= 3 * len(self.members):
            self._flush()
            self.members = [self.members[position] for position in positions]
            self.best = [kept[positions] for kept in self.best]
            self.scores, self.written = self.scores[:, positions], self.written[positions]
            self._stack()

    def _save(self) -> None:
        """Save checkpoints from which each member could go on, alone or with others."""
        start_s = time.monotonic()
        self._flush()
        for position, member in self.active:
            with self.group.ending_alone(member):
                self._save_member(position, member, is_last=False)
                assert member.run
                member.run.flush(0)
        self.saved_s = time.monotonic()
        self.saving_s = self.saved_s - start_s

    def _save_member(self, position: int, member: Member, is_last: bool) -> None:
        """Write a member's best weights, unless they are written, and a checkpoint to continue from."""
        member.set_scores(self.group.num_batches, *self.scores[:, position].tolist())
        if (epoch := int(self.scores[1, position])) != self.written[position]:
            best = {name: kept[position] for name, kept in zip(self.population.names, self.best, strict=True)}
            whole = member.checkpoint(self._progress(epoch, epoch - 1), best)
            member.io.save_checkpoint(whole, member.folder / checkpoint_io.BEST)
            member.io.write_pending()
            self.written[position] = epoch
        member.save(self._progress(self.epoch, self.epoch), is_last)

    def _progress(self, epochs: int, epoch: int) -> dict[str, Any]:
        """Return what checkpoints hold of Lightning's counters; `epoch` is the current one, from 0."""
        if epochs not in self._loops:  # takes a millisecond, and moves the Trainer's own counters
            self._loops[epochs] = set_progress(self.group.trainer, epochs, self.group.num_batches)
        return {"epoch": epoch, "global_step": epochs * self.group.num_batches, "loops": self._loops[epochs]}

    def _finish(self, position: int, member: Member, outcome: str) -> None:
        """End a member well: its last checkpoint, its score with the best weights, its status."""
        self._flush()
        score, epoch = self.scores[:2, position].tolist()
        step, at = self.epoch * self.group.num_batches, int(epoch) * self.group.num_batches
        with self.group.ending_alone(member):
            assert (run := member.run)
            run.steps_completed = lambda: step
            self._save_member(position, member, is_last=True)
            member.scores.check(has_score=epoch > 0)
            for name, kept in zip(self.population.names, self.best, strict=True):
                member.model.get_parameter(name).data = kept[position].cpu()
            reference, values = member.recorder.log_reference(run), self.values.items()
            member.recorder.log_final(self.group.store, run, at, score, False, None)
            measured = {name: column[position] for name, column in values} | reference
            member.recorder.summarise(run, score, at, measured)
            member.end(None, outcome)
            self.group.end(member.index, kind=outcome, score=score, **member.result)
