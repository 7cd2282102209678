"""The names of tags, artifacts and folders, as stores and disks hold them."""

import hashlib
import re
from collections.abc import Mapping
from typing import Any

RUNS_FOLDER = "artifacts"  # in the tracking directory: one folder a run
NEW_PREFIX = ".new-"  # of a run's folder until the store has answered with the run's id
ARTIFACTS_FOLDER = "artifacts"  # in a run's folder
WAL_FILE = "points.wal"  # in a run's folder

KEY_TAG = "tracklight.key"  # unique: finds a run whose creation was not confirmed
IDENTITY_TAG = "tracklight.identity"
SETTING_TAG = "tracklight.setting"  # the identity without seeds, and the data set: shared by runs to average
PARENT_TAG = "mlflow.parentRunId"  # MLflow's own
DATA_TAG = "tracklight.data"  # digest of the data set, split as the seed says
DATA_NAME_TAG = "tracklight.data_name"
DATA_SET_TAG = "tracklight.data_set"  # digest of the data set before the seed splits it, where it is known
SWEEP_TAG = "tracklight.sweep"  # of a sweep's parent run: the sweep's identity
BEST_TAG = "best.run"  # of a sweep's parent run: id of its best trial
REPRODUCES_TAG = "tracklight.reproduces"  # id of the run that one was made again from
EVALUATES_TAG = "tracklight.evaluates"  # id of the run whose weights one tested again
PUSHED_TAG = "tracklight.pushed_from"  # of a copy: id of the run in the store that it was pushed from
COPIED_TAG = "tracklight.copied"  # of a whole copy: that id, and the end and status that were copied
OUTCOME_TAG = "tracklight.outcome"  # of a trial that has ended: complete, pruned or failed
PRUNED = "pruned"

# A run's source and progress.
COMMAND_TAG = "tracklight.command"
CODE_TAG = "tracklight.code"
COMMIT_TAG = "mlflow.source.git.commit"
DIRTY_TAG = "mlflow.source.git.dirty"
EPOCHS_TAG = "tracklight.epochs"  # that the run was asked for
NON_FINITE_TAG = "tracklight.non_finite_step"
CHANGES_TAG = "tracklight.changes"  # under which it was continued

# Of a sweep's trials, and of its parent run.
POINT_TAG = "tracklight.point"  # key of the trial's config
TRIAL_TAG = "tracklight.trial"
EPOCHS_RUN_TAG = "tracklight.epochs_run"
SECONDS_TAG = "tracklight.seconds"  # that a trial trained, all its starts together
REASON_TAG = "tracklight.reason"
TESTED_TAG = "tracklight.tested"  # of the winner, once it met the test set
POPULATION_TAG = "tracklight.population"  # of a trial that was trained with others: how many they were
NEVER_BEGAN_TAG = "tracklight.never_began"  # of a failed run that holds nothing to continue
THREADS_TAG = "tracklight.threads"

NAME_TAG, USER_TAG = "mlflow.runName", "mlflow.user"
NOTE_TAG = "mlflow.note.content"  # the description that MLflow's UI shows as Markdown
MAX_TAG_CHARS = 5000  # MLflow takes 8000; nobody reads a longer one
MAX_PARAM_CHARS = 6000  # MLflow's own, see mlflow.utils.validation
SCORE = "score"  # metric: the best value of the monitored one, of every run that ended well

# Artifacts of a run.
CONFIG = "config.yaml"  # its resolved config
SUMMARY = "summary.json"  # what it came to, for programs
INPUTS = "inputs.json"  # what its model takes
CHECKPOINTS = "checkpoints"
BEST = f"{CHECKPOINTS}/best.ckpt"
LAST = f"{CHECKPOINTS}/last.ckpt"
PROFILE = "profile"  # end of the names of files that trainer.profiler leaves


def shorten(text: str, limit: int) -> str:
    """Cut a text that is too long; it ends with its digest then, so that different texts stay different."""
    if len(text) <= limit:
        return text
    ending = f"... sha256:{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    return text[: limit - len(ending)] + ending


def own_tags(flat: Mapping[str, Any], note: str | None) -> dict[str, str]:
    """Return the tags that a config gives its runs, the note among them; `flat` has dotted keys."""
    own = {key: str(value) for key, value in flat.items()} | ({NOTE_TAG: note} if note else {})
    return {key: shorten(value, MAX_TAG_CHARS) for key, value in own.items()}


def same_data(tags: Mapping[str, str]) -> dict[str, str]:
    """Return the tag that runs on one data set share: its digest, or its name where that is unknown."""
    key = DATA_SET_TAG if DATA_SET_TAG in tags else DATA_NAME_TAG
    return {key: tags[key]} if key in tags else {}


def is_run_id(text: str) -> bool:
    """Return whether a text is an id as MLflow makes them, and so the name of one folder."""
    return re.fullmatch("[0-9a-f]{32}", text) is not None


def read_count(tags: Mapping[str, str], name: str, default: int) -> int:
    """Return the whole number that a tag holds, the default where it holds none."""
    text = tags.get(name, "")
    return int(text) if re.fullmatch(r"\d{1,12}", text) else default


def is_sweep(tags: Mapping[str, str]) -> bool:
    """Return whether a run is the parent of a sweep, which has trials but no config of its own."""
    return SWEEP_TAG in tags and IDENTITY_TAG not in tags


def is_pruned(tags: Mapping[str, str]) -> bool:
    """Return whether a run is a trial that its sweep pruned."""
    return tags.get(OUTCOME_TAG) == PRUNED
