"""Ranks configs by the mean of their scores over seeds, and tells differences from chance."""

import difflib
import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from tracklight.config import compose, rules
from tracklight.errors import BadInput, count
from tracklight.runs.reader import RunFilter, RunReader, RunRecord, RunScore, finite, latest_seeds
from tracklight.tracking import lock, tags

NUM_NAMED = 100  # of the runs that are left out, the newest: their metrics are named
MIN_PAIRS = 3  # of two, the interval would be wider than what it compares, almost always
# Groups by how much their parameters matter, and keys that hardly do: they are shown last.
GROUPS = ("model.", "optimizer.", "scheduler.", "data.", "callbacks.", "trainer.")
HARDLY = ("data.download", "data.fallback", "num_threads", "compile")
LOSSES = ("train/loss_epoch", "train/loss", "val/loss", "train_loss", "val_loss", "loss")


@dataclass(frozen=True)
class Difference:
    """The difference of two means and its confidence interval."""

    value: float
    low: float
    high: float
    is_paired: bool = False

    @property
    def is_significant(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low > 0 or self.high < 0


def t_quantile(freedom: float) -> float:
    """Return the 97.5 % quantile of Student's t for so many degrees of freedom."""
    from scipy.special import stdtrit  # takes a while, and a leaderboard without seeds needs none

    return float(stdtrit(freedom, 0.975))


def half_width(values: Sequence[float]) -> float | None:
    """Return half the width of the mean's 95 % t interval; None for fewer than two values."""
    if len(values) < 2:
        return None
    return t_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


def welch_difference(before: Sequence[float], after: Sequence[float]) -> Difference | None:
    """Compare the means of independent samples; None unless there are two values of each.

    Source: Welch 1947, "The generalization of 'Student's' problem".
    """
    if len(before) < 2 or len(after) < 2:
        return None
    value = statistics.fmean(after) - statistics.fmean(before)
    parts = [(statistics.variance(each) / len(each), len(each) - 1) for each in (before, after)]
    total = sum(part for part, _ in parts)
    freedom = total**2 / sum(part**2 / n for part, n in parts) if total else 1.0
    half = t_quantile(freedom) * math.sqrt(total)
    return Difference(value, value - half, value + half)


def difference(before: Mapping[str, float], after: Mapping[str, float]) -> Difference | None:
    """Compare scores by seed: in pairs if enough seeds are shared, else as independent samples.

    A seed decides initial weights, order and perhaps split of the data on both sides alike.
    """
    deltas = [after[seed] - before[seed] for seed in before if seed in after]
    if len(deltas) < MIN_PAIRS:
        return welch_difference([*before.values()], [*after.values()])
    value, half = statistics.fmean(deltas), half_width(deltas) or 0.0
    return Difference(value, value - half, value + half, is_paired=True)


@dataclass
class LeaderboardRow:
    """A config: its runs, one per seed, and their scores."""

    run_ids: list[str]
    scores: list[float]
    params: dict[str, str] = field(default_factory=dict)  # those that differ between rows
    state: str = "complete"  # or why it is not ranked: failed, pruned, running, stopped
    rank: int | None = None
    delta: float | None = None  # of the score, to the first row's
    runs: list[RunRecord] = field(default_factory=list)
    flags: list[str] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    trial: int = -1  # the first with this config; this and the following are of a sweep
    epochs: int = 0
    seconds: float = 0.0
    reason: str = ""  # why it failed

    @property
    def score(self) -> float | None:
        """The mean over the seeds."""
        return statistics.fmean(self.scores) if self.scores else None

    @property
    def half_width(self) -> float | None:
        """Half the width of the mean's 95 % interval."""
        return half_width(self.scores)

    def to_dict(self) -> dict[str, Any]:
        """Return the cells of a sweep's table by column."""
        num, half, mean = len(self.run_ids), self.half_width, self.score
        cells: dict[str, Any] = {"rank": self.rank, "trial": self.trial, **self.params, "score": mean}
        if num > 1:
            std = statistics.stdev(self.scores) if len(self.scores) > 1 else None
            low, high = (None, None) if half is None or mean is None else (mean - half, mean + half)
            cells |= {"std": std, "ci95_low": low, "ci95_high": high, "runs": num}
        cells |= {"state": self.state, "epochs": self.epochs, "seconds": round(self.seconds, 2)}
        return cells | {"reason": self.reason, "run_id": " ".join(self.run_ids)}


@dataclass
class Leaderboard:
    """Rows in order, and what they are ranked by."""

    metric: str
    mode: str
    rows: list[LeaderboardRow]
    columns: list[str]  # the parameters that differ
    num_runs: int
    num_settings: int
    left_out: str  # how many runs are left out and why


Column = tuple[str, dict[str, Any], Callable[[LeaderboardRow], str]]  # name, rich's options, a row's cell
RIGHT = {"justify": "right", "no_wrap": True}


def score_columns(metric: str, with_seeds: bool) -> list[Column]:
    """Return the first columns of a table for the screen: rank and score, and what seeds tell of it."""
    columns: list[Column] = [
        ("#", RIGHT, lambda row: str(row.rank or "-")),
        (metric, RIGHT, lambda row: "-" if row.score is None else f"{row.score:.5g}"),
        ("± 95 %", RIGHT, lambda row: "" if row.half_width is None else f"±{row.half_width:.2g}"),
        ("runs", RIGHT, lambda row: str(len(row.run_ids))),
    ]
    return columns if with_seeds else columns[:2]


def to_table(rows: Sequence[LeaderboardRow], columns: Sequence[Column]) -> Table:
    """Return a table for the screen, the best row in bold."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name, options, _ in columns:
        table.add_column(name, **options)
    for row in rows:
        cells = (Text(cell(row)) for _, _, cell in columns)
        table.add_row(*cells, style="bold green" if row.rank == 1 else None)
    return table


def rank_rows(rows: Sequence[LeaderboardRow], mode: str) -> list[LeaderboardRow]:
    """Sort rows by score, the best first, and set ranks; the sort is stable, unranked rows last."""
    scored = [(row, row.score) for row in rows if row.state == "complete"]
    ranked = [(row, score) for row, score in scored if score is not None]
    ranked.sort(key=lambda each: each[1] if mode == "min" else -each[1])
    for rank, (row, score) in enumerate(ranked, 1):
        row.rank, row.delta = rank, score - ranked[0][1] if rank > 1 else None
    return [row for row, _ in ranked] + [row for row in rows if row.rank is None]


def rank_runs(
    reader: RunReader,
    run_filter: RunFilter,
    metric: str | None,  # else each run's own score, of those that share the newest run's `score.metric`
    mode: str | None,  # else that of the metric
    limit: int,
    each: bool = False,  # whether each run has a row
    folders: Path | None = None,  # of the runs, whose locks tell which of them died
    chosen: Sequence[str] = (),  # the parameters that are columns, else those that differ
) -> Leaderboard:
    """Rank the training runs of a store by setting; each data set has a ranking, the newest run's first.

    Raises:
        BadInput: There are no such runs, or they have no such parameters.
    """
    scores = reader.search_scores(run_filter, metric or tags.SCORE)
    if not scores:
        raise BadInput(f"no run in {reader.display_uri} is like that; leave a filter out")
    newest_id = next((run for run in scores if run.value is not None), scores[0]).run_id
    (newest,) = reader.get_runs([newest_id])
    every, score_metric = scores, newest.params.get("score.metric")
    if metric is not None:
        scores = [run for run in scores if run.last is not None]
        if not scores:
            there = ", ".join(sorted(newest.metrics)[:12])
            raise BadInput(f"--metric {metric}: no chosen run has it; the newest has {there}")
    elif score_metric is not None:
        params = run_filter.params | {"score.metric": score_metric}
        scores = reader.search_scores(replace(run_filter, params=params), tags.SCORE)
    if metric in (None, tags.SCORE, score_metric):
        mode = mode or newest.params.get("score.mode")
    shown_metric = metric or score_metric or tags.SCORE
    mode = mode or rules.guess_mode(shown_metric) or "max"
    why = "scored by another metric" if metric is None else f"without a finite {metric}"
    left_out = f"{count(len(every) - len(scores), 'run')} {why} left out" if len(scores) < len(every) else ""
    if metric is None and left_out:
        ranked = {run.run_id for run in scores}
        others = reader.get_runs([run.run_id for run in every if run.run_id not in ranked][:NUM_NAMED])
        names = {run.params["score.metric"] for run in others if "score.metric" in run.params}
        left_out += f" (--metric {' or '.join(sorted(names))})" if names else ""
    rows = [row for group in _group_by_setting(scores, each) for row in rank_rows(group, mode)]
    shown, columns = _fill_in(reader, rows[:limit], shown_metric, folders, chosen)
    return Leaderboard(shown_metric, mode, shown, columns, len(scores), len(rows), left_out)


def result_params(run: RunRecord) -> dict[str, str]:
    """Return the parameters on which the result may depend, each once (see `short_params`)."""
    ignored = [key for key in compose.NOT_IN_DIGEST if key != "trainer.max_epochs"]
    for key, value in run.params.items():
        group, _, name = key.rpartition(".")
        is_saved = group == "model" and run.params.get(name) == value  # as a module's hyperparameter
        is_twice = is_saved or (group and value[:1] == "[")  # a list as text, too
        ignored += [group] if name == "_target_" else [name, f"{group}-{name}"] if is_twice else []
    below = tuple(f"{key}." for key in compose.NOT_IN_DIGEST)
    return {k: v for k, v in run.params.items() if k not in ignored and not k.startswith(below)}


def _group_by_setting(scores: Sequence[RunScore], each: bool) -> list[list[LeaderboardRow]]:
    """Return a list of rows for each data set."""
    settings: dict[tuple[str, str], list[RunScore]] = {}
    for run in scores:
        settings.setdefault((run.data, run.run_id if each else run.setting), []).append(run)
    groups: dict[str, list[LeaderboardRow]] = {}
    for (data, _), all_runs in settings.items():
        runs = latest_seeds(all_runs)
        values = [run.value for run in runs if run.value is not None]
        groups.setdefault(data, []).append(LeaderboardRow([run.run_id for run in runs], values))
    return [*groups.values()]


def _fill_in(
    reader: RunReader, rows: list[LeaderboardRow], metric: str, folders: Path | None, chosen: Sequence[str]
) -> tuple[list[LeaderboardRow], list[str]]:
    """Fill in what a table shows of the rows; return those still there and their columns."""
    records = {run.run_id: run for run in reader.get_runs([i for row in rows for i in row.run_ids])}
    for run in records.values():  # what is a column beside the parameters, if it differs
        is_named = run.params.get("tracking.run_name", "null") != "null" and tags.PARENT_TAG not in run.tags
        data = f"{run.tags.get(tags.DATA_NAME_TAG, '')} {run.tags.get(tags.DATA_SET_TAG, '')[:6]}"
        run.params |= {"data": data.strip(), "name": run.name if is_named else ""}
    for row in rows:
        row.runs = [records[run_id] for run_id in row.run_ids if run_id in records]
    rows = [row for row in rows if row.runs]
    groups, known = [row.runs for row in rows], dict.fromkeys(k for r in records.values() for k in r.params)
    columns = [_find_param(name, [*known]) for name in chosen] or _differing_params(groups)
    first: dict[str, list[RunRecord]] = {}
    losses = _read_losses(reader, [row.runs[0].run_id for row in rows], metric)
    for row in rows:
        row.params = {key: _joined_value(row.runs, key) for key in columns}
        leaders = first.setdefault(row.runs[0].params["data"], row.runs)
        row.flags = _flag_differences(row.runs, leaders) + _flag_states(row.runs, folders)
        row.losses = losses.get(row.runs[0].run_id, [])
    return rows, columns


def _read_losses(reader: RunReader, ids: list[str], ranked_by: str) -> dict[str, list[float]]:
    """Return the first loss that each run has, else the metric that it is ranked by."""
    found: dict[str, list[float]] = {}
    for metric in dict.fromkeys((*LOSSES, ranked_by)):
        missing = [run_id for run_id in ids if run_id not in found]
        for run_id, history in reader.get_histories(missing, metric).items():
            found[run_id] = [value for _, value in history if finite(value) is not None]
    return found


def _differing_params(groups: list[list[RunRecord]]) -> list[str]:
    """Return the parameters that differ between rows, by how much they matter and how many rows have them."""
    keys = dict.fromkeys(key for runs in groups for key in ("data", "name", *result_params(runs[0])))
    values = {key: [_joined_value(runs, key) for runs in groups] for key in keys}
    repeated = {"seed", "data.fold"} if any(len(runs) > 1 for runs in groups) else set()
    seeds = {key for key in values if key.endswith(".seed") or key in repeated}
    differing = [key for key, column in values.items() if len({*column}) > 1 and key not in seeds]

    def weight(key: str) -> tuple[bool, int, int]:
        group = next((i for i, name in enumerate(GROUPS) if key.startswith(name)), len(GROUPS))
        return key in HARDLY, -1 if key in ("data", "name") else group, values[key].count("")

    return sorted(differing, key=weight)


def _find_param(name: str, known: Sequence[str]) -> str:
    """Return the parameter of this dotted name, or the first whose last part it is."""
    found = [key for key in known if key == name] or [key for key in known if key.endswith(f".{name}")]
    if not found:
        similar = ", ".join(difflib.get_close_matches(name, known, n=5, cutoff=0.0))
        raise BadInput(f"--columns {name}: no run shown has it; the most similar are {similar}")
    return found[0]


def _joined_value(runs: list[RunRecord], key: str) -> str:
    return ", ".join(dict.fromkeys(run.params.get(key, "") for run in runs))


def _flag_differences(runs: Sequence[RunRecord], first: Sequence[RunRecord]) -> list[str]:
    """Flag code and data that differ from the first row's, or among the runs."""
    flags = []
    for name, tag in (("git", tags.COMMIT_TAG), ("code", tags.CODE_TAG)):
        found = {run.tags.get(tag) for run in runs}
        if len(found) > 1:
            flags.append(f"mixed {name}")
        elif found != {first[0].tags.get(tag)}:
            flags.append(f"other {name}")
    # Seed and fold may decide how the data are split: digests are compared one by one.
    keys = ("seed", "data.fold")
    digests = {(*map(run.params.get, keys), run.tags.get(tags.DATA_TAG)) for run in (*runs, *first)}
    if len(digests) > len({digest[:-1] for digest in digests}):
        flags.append("other data")
    if any(run.tags.get(tags.DIRTY_TAG) == "true" for run in runs):
        flags.append("uncommitted")
    return flags


def _flag_states(runs: Sequence[RunRecord], folders: Path | None) -> list[str]:
    """Flag runs that ended early; the store takes a run whose process died for running."""
    flags = []
    for run in runs:
        died = run.status == "RUNNING" and folders and lock.was_abandoned(folders / run.run_id)
        flags += [] if run.status == "FINISHED" else ["died" if died else run.status.lower()]
        flags += [tags.PRUNED] if tags.is_pruned(run.tags) else []
    return [*dict.fromkeys(flags)]


@dataclass(frozen=True)
class TrialRun:
    """A run of a sweep's trial, tracked or not."""

    trial: int
    params: dict[str, str]
    seed: int
    state: str
    score: float | None
    epochs: int = 0
    seconds: float = 0.0
    run_id: str = ""
    reason: str = ""
    setting: str = ""  # digest of the config without its seeds; empty where it is not known


def read_trial_run(run: Any, names: Sequence[str] = ()) -> TrialRun:
    """Convert MLflow's run of a trial, whose tags hold the values of what the sweep varies."""
    info, values = run.info, run.data.tags
    unfinished = {"FAILED": "failed", "KILLED": "stopped", "RUNNING": "running"}
    state = unfinished.get(info.status) or values.get(tags.OUTCOME_TAG, "complete")
    step = values.get(tags.NON_FINITE_TAG)
    why = values.get(tags.REASON_TAG, "" if step is None else f"not finite at step {step}")
    lasted_s = ((info.end_time or info.start_time) - info.start_time) / 1000
    return TrialRun(
        trial=tags.read_count(values, tags.TRIAL_TAG, -1),
        params={name: values[name] for name in names if name in values},
        seed=tags.read_count(run.data.params, "seed", 0),
        state=state,
        score=finite(run.data.metrics.get(tags.SCORE)) if info.status == "FINISHED" else None,
        epochs=tags.read_count(values, tags.EPOCHS_RUN_TAG, 0),
        seconds=float(values.get(tags.SECONDS_TAG, lasted_s)),
        run_id=info.run_id,
        reason=why if state == "failed" else "",
        setting=values.get(tags.SETTING_TAG, ""),
    )


def rank_trials(runs: Sequence[TrialRun], mode: str, num_seeds: int) -> list[LeaderboardRow]:
    """Rank a sweep's configs; unless all `num_seeds` runs are complete, a config has no rank.

    The runs are given newest first.
    """
    groups: dict[tuple[tuple[str, str], ...], list[TrialRun]] = {}
    for run in runs:
        groups.setdefault(tuple(sorted(run.params.items())), []).append(run)
    rows = [_trial_row(group, num_seeds) for group in groups.values()]
    return rank_rows(sorted(rows, key=lambda row: row.trial), mode)


def _trial_row(runs: list[TrialRun], num_seeds: int) -> LeaderboardRow:
    # A value such as `adam` may come to stand for another config: the newest counts.
    newest = next((run.setting for run in runs if run.setting), "")
    runs = sorted((run for run in runs if run.setting in ("", newest)), key=lambda run: (run.trial, run.seed))
    states = {run.state for run in runs} | ({"stopped"} if len(runs) < num_seeds else set())
    order = ("failed", "pruned", "running", "stopped")
    state = next((state for state in order if state in states), "complete")
    scores = [run.score for run in runs if run.score is not None]
    if state == "complete" and len(scores) < len(runs):  # a seed diverged: no mean of the others
        scores = []
    return LeaderboardRow(
        run_ids=[run.run_id for run in runs],
        scores=scores,
        params=runs[0].params,
        state=state,
        trial=runs[0].trial,
        epochs=sum(run.epochs for run in runs),
        seconds=sum(run.seconds for run in runs),
        reason=next((run.reason for run in runs if run.reason), ""),
    )


def short_names(keys: Sequence[str]) -> list[str]:
    """Return the last part of each dotted key, or the whole key where that is ambiguous."""
    short = {key: key.rpartition(".")[2] for key in keys}
    ambiguous = {"_target_", *(name for name, n in Counter(short.values()).items() if n > 1)}
    return [key if short[key] in ambiguous else short[key] for key in keys]
