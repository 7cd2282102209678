"""What two runs kept of their environment, and how it differs: code, packages, machine."""

import contextlib
import difflib
import io
import json
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tracklight.errors import BadInput
from tracklight.paths import ROOT
from tracklight.runs.leaderboard import between, decides, guess_mode, half_width
from tracklight.runs.reader import ClientReader, RunFilter, RunReader, RunRecord, distinct, finite
from tracklight.runs.select import check_trained, choose_id
from tracklight.tracking.tags import (
    BEST_TAG,
    CODE_TAG,
    COMMIT_TAG,
    DATA_NAME_TAG,
    DATA_TAG,
    DIRTY_TAG,
    FOLDER,
    PRUNED,
    SCORE,
    SETTING_TAG,
    is_pruned,
    is_sweep,
)

KEPT = ("provenance/packages.txt", "provenance/machine.json", "provenance/diff.patch")
PACKAGES, MACHINE, PATCH = KEPT
Texts = Mapping[str, str]  # what a run kept of its environment, by path; without what is gone


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Return a line for each key whose values differ."""
    return [
        f"{key}: {before.get(key, 'absent')} -> {after.get(key, 'absent')}"
        for key in dict.fromkeys((*before, *after))
        if before.get(key) != after.get(key)
    ]


def git_diff(one: RunRecord, other: RunRecord, *options: str) -> str:
    """Return git's difference between the two commits, or nothing where it does not know them."""
    commits = [entry.tags.get(COMMIT_TAG, "") for entry in (one, other)]
    if commits[0] == commits[1] or not all(len(c) >= 40 and c.isalnum() for c in commits):
        return ""
    command = ["git", "-C", str(ROOT), "diff", "--no-color", *options, *commits]
    try:
        return subprocess.run(
            [*command, "--", "src", "conf"], capture_output=True, text=True, timeout=10
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def patch(one: RunRecord, other: RunRecord, before: Texts, after: Texts) -> str:
    """Return the difference of the code: between the commits, and of what was not committed."""
    sides = zip("AB", (one, other), (before, after), strict=True)
    gone = [
        f"{side}: uncommitted changes not known (its files are gone)\n"
        for side, entry, texts in sides
        if entry.tags.get(DIRTY_TAG) == "true" and not texts
    ]
    old, new = (texts.get(PATCH, "").splitlines() for texts in (before, after))
    beside = difflib.unified_diff(old, new, "A: uncommitted", "B: uncommitted", lineterm="")
    return git_diff(one, other) + "".join(gone) + "\n".join(beside)


def kept(ledger: RunReader, asked: Any, ids: Sequence[str]) -> list[Texts]:
    """Read what each run kept of its environment, as far as it is still there."""
    if isinstance(ledger, ClientReader):
        return _fetched(asked, ids)
    folders = [asked.dir.absolute() / FOLDER / run_id / "artifacts" for run_id in ids]
    if not all(folder.is_dir() for folder in folders):  # elsewhere, or deleted: MLflow knows
        return _fetched(asked, ids)
    return [
        {path: (folder / path).read_text("utf-8") for path in KEPT if (folder / path).is_file()}
        for folder in folders
    ]


def _fetched(asked: Any, ids: Sequence[str]) -> list[Texts]:
    from tracklight.runs import select as query  # imports MLflow, which a local store does without
    from tracklight.tracking.store import connect

    store = connect(asked.uri, asked.dir)
    found: list[dict[str, str]] = []
    for run in (query.find_run(store, run_id) for run_id in ids):
        found.append({})
        for path in KEPT:
            with contextlib.suppress(BadInput):  # it is gone, or never was
                found[-1][path] = query.read_text(store, run, path)
    return [*found]


def packages(before: Texts, after: Texts) -> list[str] | None:
    """Return the packages whose versions differ; None where a list is gone."""
    if PACKAGES not in before or PACKAGES not in after:
        return None
    return changes(*(_versions(each[PACKAGES]) for each in (before, after)))


def _versions(listed: str) -> dict[str, str]:
    return dict(line.split("==", 1) for line in listed.splitlines() if "==" in line)


def machine(before: Texts, after: Texts) -> list[str] | None:
    """Return what differs between the machines; None where one is not known."""
    if MACHINE not in before or MACHINE not in after:
        return None
    return changes(*(json.loads(each[MACHINE]) for each in (before, after)))


def or_unknown(found: list[str] | None, path: str, before: Texts, after: Texts) -> list[str]:
    """Return the differences found, or which side's file at `path` is gone."""
    if found is not None:
        return found
    sides = zip("AB", (before, after), strict=True)
    return [f"{side}: not known (its files are gone)" for side, each in sides if path not in each]


pass
pass

MAX_LINES = 40  # of one kind; a patch asked for by --diff is whole


def told(ledger: RunReader, asked: Any) -> str:
    """Return the report on two runs.

    Raises:
        BadInput: A run is not to be had.
    """
    one, other = (_trained(ledger, choose_id(ledger, w, asked.experiment)) for w in asked.runs)
    ids = [one.run_id, other.run_id]
    texts = kept(ledger, asked, ids)
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
        "packages": or_unknown(packages(*texts), PACKAGES, *texts),
        "machine": or_unknown(machine(*texts), MACHINE, *texts),
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
        print("\n" + patch(one, other, *texts), file=out)
    return out.getvalue()


def _trained(ledger: RunReader, run_id: str) -> RunRecord:
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


def _plain(
    ledger: RunReader, one: RunRecord, other: RunRecord, before: Texts, after: Texts
) -> dict[str, Any]:
    scores = [_seeds(ledger, entry) for entry in (one, other)]
    found = between(*scores) if _metric(one) == _metric(other) else None
    return {
        "runs": [one.run_id, other.run_id],
        "config": changes(_deciding(one.params), _deciding(other.params)),
        "code": _code(one, other),
        "data": _tags(one, other, {"digest": DATA_TAG}),
        "packages": packages(before, after),
        "machine": machine(before, after),
        "metrics": {
            key: [finite(entry.metrics.get(key)) for entry in (one, other)]
            for key in sorted({*one.metrics, *other.metrics})
        },
        "scores": [[*each.values()] for each in scores],
        "paired": found and found.is_paired,
        "difference": found and [found.value, found.low, found.high],
        "more_than_noise": found and found.is_real,
    }


def _metric(entry: RunRecord) -> str | None:
    return entry.params.get("score.metric")


def _deciding(params: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in params.items() if decides(key)}


def _tags(one: RunRecord, other: RunRecord, tags: Mapping[str, str]) -> list[str]:
    before = {name: one.tags.get(tag, "unknown")[:12] for name, tag in tags.items()}
    after = {name: other.tags.get(tag, "unknown")[:12] for name, tag in tags.items()}
    return changes(before, after)


def _code(one: RunRecord, other: RunRecord) -> list[str]:
    lines = _tags(one, other, {"digest": CODE_TAG, "commit": COMMIT_TAG, "uncommitted": DIRTY_TAG})
    stat = git_diff(one, other, "--stat")
    return lines + stat.splitlines()


def _metrics(a: RunRecord, b: RunRecord) -> list[str]:
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


def _seeds(ledger: RunReader, entry: RunRecord) -> dict[str, float]:
    """Return the scores of all runs of this run's setting, by what their seeds are."""
    setting = entry.tags.get(SETTING_TAG)
    if setting is None:
        return {"": entry.metrics[SCORE]} if SCORE in entry.metrics else {}
    data = {key: entry.tags[key] for key in (DATA_NAME_TAG,) if key in entry.tags}
    found = distinct(ledger.scored(RunFilter(tags={SETTING_TAG: setting, **data}), SCORE))
    values = {run.run_id: run.value for run in found if run.value is not None}
    return {
        " ".join(
            text for key, text in run.params.items() if key.rpartition(".")[2] == "seed"
        ): values[run.run_id]
        for run in ledger.entries([*values])
    }


def _scores(ledger: RunReader, one: RunRecord, other: RunRecord) -> list[str]:
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
