"""Which run a word means: an id, the beginning of one, `last` or `best`."""

import re
from collections.abc import Mapping

from tracklight.errors import BadInput
from tracklight.tracking.layout import DATA_NAME_TAG, EVALUATES_TAG
from tracklight.tracking.ledger import Chosen, Ledger

SCORE = "score"  # metric: the best value of the monitored one, of every run that ended well
WORDS = ("best", "last")


def check_id(word: str) -> None:
    """Refuse what can be neither a run's id nor the beginning of one.

    Raises:
        BadInput: It is no such word.
    """
    if not re.fullmatch(r"[0-9a-f]{4,32}", word):
        raise BadInput(
            f"run id {word[:60]!r} must be 4 to 32 hexadecimal digits, as MLflow shows it"
        )


def check_trained(run_id: str, tags: Mapping[str, str]) -> None:
    """Refuse a run that holds but a repeated test.

    Raises:
        BadInput: It does; the message names the run that was tested.
    """
    if EVALUATES_TAG in tags:
        raise BadInput(f"run {run_id} is an evaluation of run {tags[EVALUATES_TAG]}; name that one")


def deleted(run_id: str, shown_uri: str) -> str:
    """Say of a run that it is deleted, and how it is brought back."""
    return f"run {run_id} is deleted; restore it with {restoring(run_id, shown_uri)}"


def restoring(run_id: str, shown_uri: str) -> str:
    """Return the command that brings a deleted run back."""
    return f"`MLFLOW_TRACKING_URI={shown_uri} mlflow runs restore --run-id {run_id}`"


def choose_id(ledger: Ledger, word: str, experiment: str | None = None) -> str:
    """Return the id of the run that a word names, as `choose` does.

    Raises:
        BadInput: There is no such run.
    """
    if word not in WORDS:
        check_id(word)
        found = ledger.ids(word)
        if len(found) == 1:
            return found[0]
        if not found and (gone := ledger.ids(word, deleted=True)):
            raise BadInput(deleted(gone[0], ledger.shown_uri))
        what = "several runs begin" if found else "no run begins"
        raise BadInput(f"{what} with {word} in {ledger.shown_uri}")
    runs = ledger.scored(Chosen(experiment), SCORE)
    if word == "best":  # of what is comparable with the newest run that came to a score
        runs = [run for run in runs if run.value is not None]
    if not runs:
        where = "" if experiment is None else f" experiment {experiment} of"
        raise BadInput(
            f"there is no {word} run in{where} {ledger.shown_uri}; train something first"
        )
    if word == "last":
        return runs[0].run_id
    newest = ledger.entries([runs[0].run_id])[0]
    tags = {key: newest.tags[key] for key in (DATA_NAME_TAG,) if key in newest.tags}
    params = {"score.metric": newest.params["score.metric"]}
    sign = 1 if newest.params["score.mode"] == "max" else -1
    rivals = ledger.scored(Chosen(experiment, tags=tags, params=params), SCORE)
    values = {run.run_id: sign * run.value for run in rivals if run.value is not None}
    return max(values, key=values.__getitem__)
