"""Whether what a sweep's trials share is still what it was when they ran."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tracklight import config
from tracklight.errors import BadInput
from tracklight.resume import CODE_TAG
from tracklight.sweep.points import Job
from tracklight.tracking import provenance
from tracklight.tracking.layout import DATA_TAG


def check_unchanged(jobs: Sequence[Job], children: Iterable[Any], data: str | None) -> None:
    """Refuse to mix trials of this code and data with those of another.

    Args:
        jobs: What is to run.
        children: The runs that there are, as MLflow has them.
        data: Digest of the first job's data; None where it is not known.

    Raises:
        BadInput: One of the runs had other code or data.
    """
    kinds = {tuple(config.targets(job.cfg)) for job in jobs}
    digests = {kind: provenance.code_digest(kind) for kind in kinds}
    first = _settings(config.flatten(jobs[0].cfg))
    for child in children:
        tags, params = child.data.tags, child.data.params
        own = tuple(sorted({v for k, v in params.items() if k.rpartition(".")[2] == "_target_"}))
        if own not in digests:  # a point that this command does not name
            digests[own] = provenance.code_digest(own)
        _check("code", tags.get(CODE_TAG), {*digests.values()})
        if data is not None and _settings(params) == first:
            _check("data", tags.get(DATA_TAG), {data})


def _check(what: str, before: str | None, now: set[str]) -> None:
    if before is not None and before not in {*now, "unknown"}:
        raise BadInput(
            f"the {what} has changed since this sweep began (digest {before[:12]} -> "
            f"{min(now)[:12]}); sweep.fresh=true starts over, allow_changes=true continues "
            "all the same"
        )


def _settings(params: Mapping[str, Any]) -> dict[str, str]:
    """Pick what decides which data a run reads: neither their folder nor the batch size does."""
    return {
        key: str(value)
        for key, value in params.items()
        if key.startswith("data.") and key not in ("data.root", "data.batch_size")
    }
