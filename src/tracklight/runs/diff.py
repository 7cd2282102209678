"""Diffs two runs: config, code, data, packages, machine, metrics, score."""

import difflib
import json
import statistics
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from tracklight.config import compose, rules
from tracklight.errors import BadInput, count
from tracklight.paths import PROJECT, ROOT, parse_mapping, read_bounded
from tracklight.runs.leaderboard import difference, half_width, result_params
from tracklight.runs.reader import RunFilter, RunReader, RunRecord, finite, latest_seeds
from tracklight.runs.select import MAX_TEXT_BYTES, read_text, select_id, select_run, trained_id
from tracklight.tracking import provenance, tags

ENVIRONMENT = {"packages": "provenance/packages.txt", "machine": "provenance/machine.json"}
PATCH = "provenance/diff.patch"
CODE_TAGS = {"digest": tags.CODE_TAG, "commit": tags.COMMIT_TAG, "uncommitted": tags.DIRTY_TAG}
MAX_CHARS = 400  # of one value
MAX_LINES = 40  # of one section; a patch that --diff prints is whole
Scores = dict[str, float]  # by seed
Texts = Mapping[str, str]  # a run's environment: its provenance artifacts, by path


def diff_values(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Return a line for each key whose values differ: `key: before -> after`."""
    return [
        f"{key}: "
        + " -> ".join(tags.shorten(str(each.get(key, "absent")), MAX_CHARS) for each in (before, after))
        for key in dict.fromkeys((*before, *after))
        if before.get(key) != after.get(key)
    ]


def diff_environments(before: Texts, after: Texts) -> dict[str, list[str] | None]:
    """Diff packages and machines; None stands for what is not known of both runs."""
    found: dict[str, list[str] | None] = {}
    for name, path in ENVIRONMENT.items():
        known = [texts[path] for texts in (before, after) if path in texts]
        parse = parse_mapping if name == "machine" else _parse_packages
        found[name] = diff_values(*map(parse, known)) if len(known) == 2 else None
    return found


def read_environment(uri: str | None, directory: Path, run_id: str) -> Texts:
    """Read what is there of a run's environment."""
    found = {path: _read_artifact(uri, directory, run_id, path) for path in (*ENVIRONMENT.values(), PATCH)}
    return {path: text for path, text in found.items() if text is not None}


def _read_artifact(uri: str | None, directory: Path, run_id: str, path: str) -> str | None:
    """Read a text artifact of a run from its folder or, if it lies elsewhere, by MLflow."""
    folder = directory.absolute() / tags.RUNS_FOLDER / run_id / tags.ARTIFACTS_FOLDER
    try:
        if folder.is_dir():
            return read_bounded(folder / path, MAX_TEXT_BYTES)
        from tracklight.tracking.store import connect  # imports MLflow, which takes seconds

        store = connect(uri, directory, reads_only=True)
        return read_text(store, select_run(store, run_id), path)
    except (OSError, ValueError):  # it is not there, or nothing that a run has written
        return None


def _whole_params(uri: str | None, directory: Path, run: RunRecord) -> dict[str, Any]:
    """Return a run's parameters; those too long for MLflow are taken from its stored config."""
    params: dict[str, Any] = result_params(run)
    cut = [key for key, text in params.items() if len(text) >= tags.MAX_PARAM_CHARS]
    if cut and (text := _read_artifact(uri, directory, run.run_id, tags.CONFIG)):
        with suppress(yaml.YAMLError, ValueError, TypeError):
            whole = compose.flatten(compose.parse_stored(text))
            params |= {key: whole[key] for key in cut if key in whole}
    return params


def diff_runs(reader: RunReader, args: Any) -> str:
    """Return the report on the two runs of a command line, as text or JSON."""
    a, b = (_trained_run(reader, select_id(reader, w, args.experiment)) for w in args.runs)
    texts = [read_environment(args.uri, args.dir, run.run_id) for run in (a, b)]
    scores = [_scores_by_seed(reader, run) for run in (a, b)]
    data = {run.tags.get(tags.DATA_TAG, "unknown") for run in (a, b)}
    sections: dict[str, Any] = {
        "config": diff_values(*(_whole_params(args.uri, args.dir, run) for run in (a, b))),
        "code": _diff_tags(a, b, CODE_TAGS) + _git_diff(a, b, "--stat").splitlines(),
        "data": _diff_tags(a, b, {"digest": tags.DATA_TAG}) if data != {"unknown"} else None,
        **diff_environments(*texts),
    }
    if args.form == "json":
        runs = {"runs": [a.run_id, b.run_id]}
        return json.dumps(runs | sections | _diff_numbers(a, b, scores), indent=1) + "\n"
    for name, path in ENVIRONMENT.items():
        if sections[name] is None:
            gone = [side for side, each in zip("AB", texts, strict=True) if path not in each]
            sections[name] = [f"{side}: not known (its files are gone)" for side in gone]
    if sections["data"] is None:
        sections["data"] = ["not known: no digest is taken of data modules of one's own (no TensorData)"]
    sections |= {"metrics": _diff_metrics(a, b), "score": _describe_scores(a, b, scores)}
    lines = []
    for name, run in (("A", a), ("B", b)):
        status = f"{run.status}, {tags.PRUNED}" if tags.is_pruned(run.tags) else run.status
        lines.append(f"{name}  {run.run_id}  {run.name}  {status}")
    for title, found in sections.items():
        found = found or ["the same"]
        lines += ["", title, *(f"  {line}" for line in found[:MAX_LINES])]
        if len(found) > MAX_LINES:
            lines.append(f"  and {len(found) - MAX_LINES} more (--json has all)")
    if args.diff:
        lines += ["", _diff_patches(a, b, *texts)]
    return "\n".join(lines) + "\n"


def _trained_run(reader: RunReader, run_id: str) -> RunRecord:
    (run,) = reader.get_runs([run_id])
    if (best_id := trained_id(run_id, run.tags)) == run_id:
        return run
    for best in reader.get_runs([best_id]):
        return replace(best, name=f"{best.name}, the best of {run.name}")
    raise BadInput(f"run {run_id} is a sweep whose best trial was deleted; name a run")


def _parse_packages(text: str) -> dict[str, str]:
    return dict(line.split("==", 1) for line in text.splitlines() if "==" in line)


def _diff_tags(a: RunRecord, b: RunRecord, names: Mapping[str, str]) -> list[str]:
    before, after = (
        {name: run.tags.get(tag, "unknown")[:12] for name, tag in names.items()} for run in (a, b)
    )
    return diff_values(before, after)


def _git_diff(a: RunRecord, b: RunRecord, *options: str) -> str:
    """Return git's diff of the two commits, or nothing if it does not know them."""
    commits = [run.tags.get(tags.COMMIT_TAG, "") for run in (a, b)]
    if commits[0] != commits[1] and all(len(c) >= 40 and c.isalnum() for c in commits):
        code = (".",) if PROJECT.package else ("src", "conf")
        with suppress(*provenance.GIT_ERRORS):
            return provenance.ask_git(ROOT, "diff", "--no-color", *options, *commits, "--", *code)
    return ""


def _diff_patches(a: RunRecord, b: RunRecord, before: Texts, after: Texts) -> str:
    """Return the diff of the commits, and of the uncommitted patches."""
    gone = [
        f"{side}: uncommitted changes not known (its files are gone)\n"
        for side, run, texts in zip("AB", (a, b), (before, after), strict=True)
        if run.tags.get(tags.DIRTY_TAG) == "true" and not texts
    ]
    old, new = (texts.get(PATCH, "").splitlines() for texts in (before, after))
    patches = difflib.unified_diff(old, new, "A: uncommitted", "B: uncommitted", lineterm="")
    return _git_diff(a, b) + "".join(gone) + "\n".join(patches)


def _share_metric(a: RunRecord, b: RunRecord) -> bool:
    return a.params.get("score.metric") == b.params.get("score.metric")


def _diff_numbers(a: RunRecord, b: RunRecord, scores: list[Scores]) -> dict[str, Any]:
    found = difference(*scores) if _share_metric(a, b) else None
    return {
        "metrics": {
            key: [finite(run.metrics.get(key)) for run in (a, b)] for key in sorted({*a.metrics, *b.metrics})
        },
        "scores": [[*each.values()] for each in scores],
        "paired": found and found.is_paired,
        "difference": found and [found.value, found.low, found.high],
        "more_than_noise": found and found.is_significant,
    }


def _diff_metrics(a: RunRecord, b: RunRecord) -> list[str]:
    lines = []
    for key in sorted({*a.metrics, *b.metrics}):
        if key == tags.SCORE and not _share_metric(a, b):
            continue  # two things of one name
        before, after = a.metrics.get(key), b.metrics.get(key)
        if before is None or after is None:
            one, other = ("absent" if v is None else f"{v:.6g}" for v in (before, after))
            lines.append(f"{key}: {one} -> {other}")
        elif before != after and not key.startswith("system/"):
            lines.append(f"{key}: {before:.6g} -> {after:.6g} ({after - before:+.3g})")
    return lines


def _scores_by_seed(reader: RunReader, run: RunRecord) -> Scores:
    """Return the scores of all runs of this run's setting, by their seeds."""
    setting = run.tags.get(tags.SETTING_TAG)
    if setting is None:
        return {"": run.metrics[tags.SCORE]} if tags.SCORE in run.metrics else {}
    same = {tags.SETTING_TAG: setting, **tags.same_data(run.tags)}
    found = latest_seeds(reader.search_scores(RunFilter(tags=same), tags.SCORE))
    values = {run.run_id: run.value for run in found if run.value is not None}
    scores = {}
    for each in reader.get_runs([*values]):
        seeds = (text for key, text in each.params.items() if key.rpartition(".")[2] == "seed")
        scores[" ".join(seeds)] = values[each.run_id]
    return scores


def _describe_scores(a: RunRecord, b: RunRecord, scores: list[Scores]) -> list[str]:
    metric, setting = a.params.get("score.metric"), a.tags.get(tags.SETTING_TAG)
    if not _share_metric(a, b):
        return [f"A is scored by {metric}, B by {b.params.get('score.metric')}"]
    lines = []
    for name, found in zip("AB", scores, strict=True):
        half = half_width([*found.values()])
        spread = "" if half is None else f" ± {half:.2g}"
        mean = f"{statistics.fmean(found.values()):.6g}" if found else "none"
        lines.append(f"{name}: {metric} {mean}{spread} over {count(len(found), 'seed')} of its setting")
    if setting is not None and setting == b.tags.get(tags.SETTING_TAG):
        return [*lines[:1], "A and B are of one setting: what differs is chance, or the code"]
    found = difference(*scores)
    if found is None:
        return [*lines, "a single seed cannot tell chance apart; train both with several seeds"]
    mode = a.params.get("score.mode") or rules.guess_mode(str(metric)) or "max"
    better = "better" if (found.value > 0) == (mode == "max") else "worse"
    verdict = f"more than noise: B is {better}" if found.is_significant else "no more than noise"
    pairs = ", seed by seed" if found.is_paired else ""
    interval = f"95 % interval {found.low:+.3g} to {found.high:+.3g}{pairs}"
    return [*lines, f"B - A: {found.value:+.4g}, {interval}: {verdict}"]
