"""What outcomes amount to: of a run that ended earlier, and of a point's runs together."""

import statistics
from collections.abc import Sequence
from typing import Any

from tracklight.sweep.leaderboard import SCORE, Row
from tracklight.sweep.points import Job
from tracklight.sweep.trial import REASON_TAG, Outcome
from tracklight.tracking.layout import is_pruned


def known(child: Any | None) -> Outcome | None:
    """Return how a run ended for good; None if there is something to run."""
    from tracklight.resume import NON_FINITE_TAG, is_unfinished

    if child is None or is_unfinished(child, 0):
        return None
    tags, run_id = child.data.tags, child.info.run_id
    if child.info.status == "FAILED":
        reason = tags.get(REASON_TAG, f"not finite at step {tags[NON_FINITE_TAG]}")
        return Outcome("failed", reason=reason, run_id=run_id)
    kind = "pruned" if is_pruned(tags) else "complete"
    return Outcome(kind, child.data.metrics.get(SCORE), run_id=run_id)


def as_row(job: Job, outcome: Outcome) -> Row:
    """Return a run as the leaderboard lists it where nothing is tracked."""
    ended = {"state": outcome.kind, "score": outcome.score, "reason": outcome.reason}
    spent = {"epochs": outcome.epochs, "seconds": outcome.seconds}
    return Row(job.number, job.params, job.cfg.seed, run_id=outcome.run_id or "", **ended, **spent)


def joined(outcomes: Sequence[Outcome]) -> tuple[str, float | None]:
    """Return the outcome of a point and its mean score."""
    kinds = {outcome.kind for outcome in outcomes}
    kind = next((k for k in ("stopped", "failed", "pruned") if k in kinds), "complete")
    scores = [outcome.score for outcome in outcomes if outcome.score is not None]
    return kind, statistics.fmean(scores) if len(scores) > 1 else next(iter(scores), None)
