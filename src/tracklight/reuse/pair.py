"""All that differs between two runs: config, code, data, environment and what came out."""

import io
import json
import statistics
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tracklight.errors import BadInput
from tracklight.reuse import environment
from tracklight.reuse.environment import MACHINE, PACKAGES, Texts, changes
from tracklight.reuse.ranking import CODE, COMMIT, DIRTY, decides, guess_mode
from tracklight.statistic import between, half_width
from tracklight.tracking.choice import SCORE, check_trained, choose_id
from tracklight.tracking.layout import (
    BEST_TAG,
    DATA_NAME_TAG,
    DATA_TAG,
    PRUNED,
    SETTING_TAG,
    is_pruned,
    is_sweep,
)
from tracklight.tracking.ledger import Chosen, Entry, Ledger, distinct, finite

MAX_LINES = 40  # of one kind; a patch asked for by --diff is whole


def told(ledger: Ledger, asked: Any) -> str:
    """Return the report on two runs.

    Raises:
        BadInput: A run is not to be had.
    """
    one, other = (_trained(ledger, choose_id(ledger, w, asked.experiment)) for w in asked.runs)
    ids = [one.run_id, other.run_id]
    texts = environment.kept(ledger, asked, ids)
    if asked.form == "json":
        return json.dumps(_plain(ledger, one, other, *texts), indent=1) + "\n"
    out = io.StringIO()
    for name, entry in (("A", one), ("B", other)):
        state = f"{entry.status}, {PRUNED}" if is_pruned(entry.tags) else entry.status
        print(f"{name}  {entry.run_id}  {entry.name}  {state}", file=out)
    sections = {
        "config": changes(_deciding(one.params), _deciding(other.params)),
        "code": _code(one, other),
        "data": _tags(one, other, {"digest": DATA_TAG}),
        "packages": environment.or_unknown(environment.packages(*texts), PACKAGES, *texts),
        "machine": environment.or_unknown(environment.machine(*texts), MACHINE, *texts),
        "metrics": _metrics(one, other),
        "score": _scores(ledger, one, other),
    }
    for title, lines in sections.items():
        print(f"\n{title}", file=out)
        for line in lines[:MAX_LINES] or ["the same"]:
            print(f"  {line}", file=out)
        if len(lines) > MAX_LINES:
            print(f"  and {len(lines) - MAX_LINES} more (--json has all)", file=out)
    if asked.diff:
        print("\n" + environment.patch(one, other, *texts), file=out)
    return out.getvalue()


def _trained(ledger: Ledger, run_id: str) -> Entry:
    """Return the run; of a sweep, the best of its trials."""
    (entry,) = ledger.entries([run_id])
    check_trained(run_id, entry.tags)
    if not is_sweep(entry.tags):
        return entry
    if BEST_TAG not in entry.tags:
        raise BadInput(f"run {run_id} is a sweep without a finished trial; name a run")
    (best,) = ledger.entries([entry.tags[BEST_TAG]]) or [None]
    if best is None:
        raise BadInput(f"run {run_id} is a sweep whose best trial was deleted; name a run")
    return replace(best, name=f"{best.name}, the best of {entry.name}")


def _plain(ledger: Ledger, one: Entry, other: Entry, before: Texts, after: Texts) -> dict[str, Any]:
    scores = [_seeds(ledger, entry) for entry in (one, other)]
    found = between(*scores) if _metric(one) == _metric(other) else None
    return {
        "runs": [one.run_id, other.run_id],
        "config": changes(_deciding(one.params), _deciding(other.params)),
        "code": _code(one, other),
        "data": _tags(one, other, {"digest": DATA_TAG}),
        "packages": environment.packages(before, after),
        "machine": environment.machine(before, after),
        "metrics": {
            key: [finite(entry.metrics.get(key)) for entry in (one, other)]
            for key in sorted({*one.metrics, *other.metrics})
        },
        "scores": [[*each.values()] for each in scores],
        "paired": found and found.is_paired,
        "difference": found and [found.value, found.low, found.high],
        "more_than_noise": found and found.is_real,
    }


def _metric(entry: Entry) -> str | None:
    return entry.params.get("score.metric")


def _deciding(params: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in params.items() if decides(key)}


def _tags(one: Entry, other: Entry, tags: Mapping[str, str]) -> list[str]:
    before = {name: one.tags.get(tag, "unknown")[:12] for name, tag in tags.items()}
    after = {name: other.tags.get(tag, "unknown")[:12] for name, tag in tags.items()}
    return changes(before, after)


def _code(one: Entry, other: Entry) -> list[str]:
    lines = _tags(one, other, {"digest": CODE, "commit": COMMIT, "uncommitted": DIRTY})
    stat = environment.git_diff(one, other, "--stat")
    return lines + stat.splitlines()


def _metrics(a: Entry, b: Entry) -> list[str]:
    before, after = a.metrics, b.metrics
    lines = []
    for key in sorted({*before, *after}):
        if key == SCORE and _metric(a) != _metric(b):
            continue  # two things of one name
        one, other = before.get(key), after.get(key)
        if one is not None and other is not None:
            if one != other and not key.startswith("system/"):
                lines.append(f"{key}: {one:.6g} -> {other:.6g} ({other - one:+.3g})")
        else:
            lines.append(f"{key}: {'absent' if one is None else f'{one:.6g}'} -> "
                         f"{'absent' if other is None else f'{other:.6g}'}")  # fmt: skip
    return lines


def _seeds(ledger: Ledger, entry: Entry) -> dict[str, float]:
    """Return the scores of all runs of this run's setting, by what their seeds are."""
    setting = entry.tags.get(SETTING_TAG)
    if setting is None:
        return {"": entry.metrics[SCORE]} if SCORE in entry.metrics else {}
    data = {key: entry.tags[key] for key in (DATA_NAME_TAG,) if key in entry.tags}
    found = distinct(ledger.scored(Chosen(tags={SETTING_TAG: setting, **data}), SCORE))
    values = {run.run_id: run.value for run in found if run.value is not None}
    return {
        " ".join(
            text for key, text in run.params.items() if key.rpartition(".")[2] == "seed"
        ): values[run.run_id]
        for run in ledger.entries([*values])
    }


def _scores(ledger: Ledger, one: Entry, other: Entry) -> list[str]:
    metric = _metric(one)
    if metric != _metric(other):
        return [f"A is scored by {metric}, B by {_metric(other)}"]
    scores = [_seeds(ledger, entry) for entry in (one, other)]
    lines = []
    for name, found in zip("AB", scores, strict=True):
        half = half_width([*found.values()])
        spread = "" if half is None else f" ± {half:.2g}"
        mean = f"{statistics.fmean(found.values()):.6g}" if found else "none"
        lines.append(f"{name}: {metric} {mean}{spread} over {len(found)} seeds of its setting")
    if one.tags.get(SETTING_TAG) == other.tags.get(SETTING_TAG) and SETTING_TAG in one.tags:
        return [*lines[:1], "A and B are of one setting: what differs is chance, or the code"]
    found = between(*scores)
    if found is None:
        return [*lines, "a single seed cannot tell chance apart; train both with several seeds"]
    mode = one.params.get("score.mode") or guess_mode(metric or "")
    better = "better" if (found.value > 0) == (mode == "max") else "worse"
    verdict = f"more than noise: B is {better}" if found.is_real else "no more than noise"
    pairs = ", seed by seed" if found.is_paired else ""
    interval = f"95 % interval {found.low:+.3g} to {found.high:+.3g}{pairs}"
    return [*lines, f"B - A: {found.value:+.4g}, {interval}: {verdict}"]
