"""All that differs between two runs: config, code, data, environment and what came out."""

import difflib
import io
import json
import statistics
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tracklight.reuse.leaderboard import CODE, COMMIT, DIRTY, decides, guess_mode
from tracklight.reuse.statistic import difference, half_width
from tracklight.tracking.choice import SCORE, choose_id
from tracklight.tracking.layout import DATA_TAG, FOLDER, SETTING_TAG
from tracklight.tracking.ledger import Chosen, Entry, Ledger

ROOT = Path(__file__).resolve().parents[3]
MAX_LINES = 40  # of one kind; a patch asked for by --diff is whole


def told(ledger: Ledger, asked: Any) -> str:
    """Return the report on two runs.

    Raises:
        BadInput: A run is not to be had.
    """
    ids = [choose_id(ledger, word, asked.experiment) for word in asked.runs]
    by_id = {entry.run_id: entry for entry in ledger.entries(ids)}
    one, other = (by_id[run_id] for run_id in ids)
    if asked.form == "json":
        return json.dumps(_plain(ledger, one, other), indent=1) + "\n"
    out = io.StringIO()
    for name, entry in (("A", one), ("B", other)):
        print(f"{name}  {entry.run_id}  {entry.name}  {entry.status}", file=out)
    texts = [_artifacts(asked, entry) for entry in (one, other)]
    sections = {
        "config": _changes(_deciding(one.params), _deciding(other.params)),
        "code": _code(one, other),
        "data": _tags(one, other, {"digest": DATA_TAG}),
        "packages": _changes(_packages(texts[0]), _packages(texts[1])),
        "machine": _changes(_machine(texts[0]), _machine(texts[1])),
        "metrics": _metrics(one.metrics, other.metrics),
        "score": _scores(ledger, one, other),
    }
    for title, lines in sections.items():
        print(f"\n{title}", file=out)
        for line in lines[:MAX_LINES] or ["the same"]:
            print(f"  {line}", file=out)
        if len(lines) > MAX_LINES:
            print(f"  and {len(lines) - MAX_LINES} more (--json has all)", file=out)
    if asked.diff:
        print("\n" + _patch(one, other, texts), file=out)
    return out.getvalue()


def _plain(ledger: Ledger, one: Entry, other: Entry) -> dict[str, Any]:
    values = [_seeds(ledger, entry) for entry in (one, other)]
    found = difference(*values)
    return {
        "runs": [one.run_id, other.run_id],
        "config": _changes(_deciding(one.params), _deciding(other.params)),
        "code": _code(one, other),
        "data": _tags(one, other, {"digest": DATA_TAG}),
        "metrics": {
            key: [one.metrics.get(key), other.metrics.get(key)]
            for key in sorted({*one.metrics, *other.metrics})
        },
        "scores": values,
        "difference": found and [found.value, found.low, found.high],
        "more_than_noise": found and found.is_real,
    }


def _deciding(params: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in params.items() if decides(key)}


def _changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    return [
        f"{key}: {before.get(key, 'absent')} -> {after.get(key, 'absent')}"
        for key in dict.fromkeys((*before, *after))
        if before.get(key) != after.get(key)
    ]


def _tags(one: Entry, other: Entry, tags: Mapping[str, str]) -> list[str]:
    before = {name: one.tags.get(tag, "unknown")[:12] for name, tag in tags.items()}
    after = {name: other.tags.get(tag, "unknown")[:12] for name, tag in tags.items()}
    return _changes(before, after)


def _code(one: Entry, other: Entry) -> list[str]:
    lines = _tags(one, other, {"digest": CODE, "commit": COMMIT, "uncommitted": DIRTY})
    stat = _git(one, other, "--stat")
    return lines + stat.splitlines()


def _git(one: Entry, other: Entry, *options: str) -> str:
    """Return git's difference between the two commits, or nothing where it does not know them."""
    commits = [entry.tags.get(COMMIT, "") for entry in (one, other)]
    if commits[0] == commits[1] or not all(len(c) >= 40 and c.isalnum() for c in commits):
        return ""
    command = [
        "git",
        "-C",
        str(ROOT),
        "diff",
        "--no-color",
        *options,
        *commits,
        "--",
        "src",
        "conf",
    ]
    try:
        return subprocess.run(
            [*command, "--", "src", "conf"], capture_output=True, text=True, timeout=10
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def _patch(one: Entry, other: Entry, texts: list[dict[str, str]]) -> str:
    before, after = (each.get("provenance/diff.patch", "") for each in texts)
    beside = difflib.unified_diff(
        before.splitlines(), after.splitlines(), "A: uncommitted", "B: uncommitted", lineterm=""
    )
    return _git(one, other) + "\n".join(beside)


def _artifacts(asked: Any, entry: Entry) -> dict[str, str]:
    """Read what the run kept of its environment, where its files are on this machine."""
    folder = asked.dir.absolute() / FOLDER / entry.run_id / "artifacts"
    paths = ("provenance/packages.txt", "provenance/machine.json", "provenance/diff.patch")
    found = {path: folder / path for path in paths if (folder / path).is_file()}
    return {path: file.read_text(encoding="utf-8") for path, file in found.items()}


def _packages(texts: dict[str, str]) -> dict[str, str]:
    lines = texts.get("provenance/packages.txt", "").splitlines()
    return dict(line.split("==", 1) for line in lines if "==" in line)


def _machine(texts: dict[str, str]) -> dict[str, Any]:
    return json.loads(texts.get("provenance/machine.json", "{}"))


def _metrics(before: Mapping[str, float], after: Mapping[str, float]) -> list[str]:
    lines = []
    for key in sorted({*before, *after}):
        one, other = before.get(key), after.get(key)
        if one is not None and other is not None:
            if one != other and not key.startswith("system/"):
                lines.append(f"{key}: {one:.6g} -> {other:.6g} ({other - one:+.3g})")
        else:
            lines.append(f"{key}: {'absent' if one is None else f'{one:.6g}'} -> "
                         f"{'absent' if other is None else f'{other:.6g}'}")  # fmt: skip
    return lines


def _seeds(ledger: Ledger, entry: Entry) -> list[float]:
    """Return the scores of all runs of this run's setting."""
    setting = entry.tags.get(SETTING_TAG)
    if setting is None:
        return [entry.metrics[SCORE]] if SCORE in entry.metrics else []
    found = ledger.scored(Chosen(tags={SETTING_TAG: setting}), SCORE)
    return [run.value for run in found if run.value is not None]


def _scores(ledger: Ledger, one: Entry, other: Entry) -> list[str]:
    metric = one.params.get("score.metric")
    if metric != other.params.get("score.metric"):
        return [f"A is scored by {metric}, B by {other.params.get('score.metric')}"]
    values = [_seeds(ledger, entry) for entry in (one, other)]
    lines = []
    for name, found in zip("AB", values, strict=True):
        half = half_width(found)
        spread = "" if half is None else f" ± {half:.2g}"
        mean = f"{statistics.fmean(found):.6g}" if found else "none"
        lines.append(f"{name}: {metric} {mean}{spread} over {len(found)} runs of its setting")
    if one.tags.get(SETTING_TAG) == other.tags.get(SETTING_TAG) and SETTING_TAG in one.tags:
        return [*lines[:1], "A and B are of one setting: what differs is chance, or the code"]
    found = difference(*values)
    if found is None:
        return [*lines, "one run each cannot tell chance apart; train both with several seeds"]
    mode = one.params.get("score.mode") or guess_mode(metric or "")
    better = "better" if (found.value > 0) == (mode == "max") else "worse"
    verdict = f"more than noise: B is {better}" if found.is_real else "no more than noise"
    interval = f"95 % interval {found.low:+.3g} to {found.high:+.3g}"
    return [*lines, f"B - A: {found.value:+.4g}, {interval}: {verdict}"]
