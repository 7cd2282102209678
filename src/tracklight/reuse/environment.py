"""What two runs kept of their environment, and how it differs: code, packages, machine."""

import contextlib
import difflib
import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tracklight.errors import BadInput
from tracklight.reuse.ranking import COMMIT, DIRTY
from tracklight.tracking.client_ledger import ClientLedger
from tracklight.tracking.layout import FOLDER
from tracklight.tracking.ledger import Entry, Ledger

ROOT = Path(__file__).resolve().parents[3]
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


def git_diff(one: Entry, other: Entry, *options: str) -> str:
    """Return git's difference between the two commits, or nothing where it does not know them."""
    commits = [entry.tags.get(COMMIT, "") for entry in (one, other)]
    if commits[0] == commits[1] or not all(len(c) >= 40 and c.isalnum() for c in commits):
        return ""
    command = ["git", "-C", str(ROOT), "diff", "--no-color", *options, *commits]
    try:
        return subprocess.run(
            [*command, "--", "src", "conf"], capture_output=True, text=True, timeout=10
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def patch(one: Entry, other: Entry, before: Texts, after: Texts) -> str:
    """Return the difference of the code: between the commits, and of what was not committed."""
    sides = zip("AB", (one, other), (before, after), strict=True)
    gone = [
        f"{side}: uncommitted changes not known (its files are gone)\n"
        for side, entry, texts in sides
        if entry.tags.get(DIRTY) == "true" and not texts
    ]
    old, new = (texts.get(PATCH, "").splitlines() for texts in (before, after))
    beside = difflib.unified_diff(old, new, "A: uncommitted", "B: uncommitted", lineterm="")
    return git_diff(one, other) + "".join(gone) + "\n".join(beside)


def kept(ledger: Ledger, asked: Any, ids: Sequence[str]) -> list[Texts]:
    """Read what each run kept of its environment, as far as it is still there."""
    if isinstance(ledger, ClientLedger):
        return _fetched(asked, ids)
    folders = [asked.dir.absolute() / FOLDER / run_id / "artifacts" for run_id in ids]
    if not all(folder.is_dir() for folder in folders):  # elsewhere, or deleted: MLflow knows
        return _fetched(asked, ids)
    return [
        {path: (folder / path).read_text("utf-8") for path in KEPT if (folder / path).is_file()}
        for folder in folders
    ]


def _fetched(asked: Any, ids: Sequence[str]) -> list[Texts]:
    from tracklight.tracking import query  # imports MLflow, which a local store does without
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
