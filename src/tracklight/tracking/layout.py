"""Names that this room gives to things on the disk and in the store."""

from collections.abc import Mapping
from pathlib import Path

HOME = Path(__file__).resolve().parents[3] / "mlruns"  # as conf/tracking/mlflow.yaml has it
FOLDER = "artifacts"  # in the tracking directory: one folder a run
NEW = ".new-"  # prefix of a run's folder until the store has told its id
POINTS = "points.wal"  # in a run's folder

KEY_TAG = "tracklight.key"  # unique: finds a run whose creation was not confirmed
IDENTITY_TAG = "tracklight.identity"
SETTING_TAG = "tracklight.setting"  # the identity without its seeds: runs to be averaged share it
PARENT_TAG = "mlflow.parentRunId"  # MLflow's own
DATA_TAG = "tracklight.data"  # digest of the data set, split as the seed says
DATA_NAME_TAG = "tracklight.data_name"
SWEEP_TAG = "tracklight.sweep"  # of a sweep's parent run: the sweep's identity
BEST_TAG = "best.run"  # of a sweep's parent run: id of its best trial
REPRODUCES_TAG = "tracklight.reproduces"  # id of the run that one was made again from
EVALUATES_TAG = "tracklight.evaluates"  # id of the run whose weights one tested again
OUTCOME_TAG = "tracklight.outcome"  # of a trial that has ended: complete, pruned or failed
PRUNED = "pruned"


def is_sweep(tags: Mapping[str, str]) -> bool:
    """Say whether a run is the parent of a sweep, which has trials and no config of its own."""
    return SWEEP_TAG in tags and IDENTITY_TAG not in tags


def is_pruned(tags: Mapping[str, str]) -> bool:
    """Say whether a run is a trial that its sweep ended early: no failure, and no result."""
    return tags.get(OUTCOME_TAG) == PRUNED
