"""Many runs at once, read for comparison."""

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from tracklight.errors import BadInput
from tracklight.tracking import address
from tracklight.tracking.layout import PARENT_TAG, REPRODUCES_TAG

_MAX_VARIABLES = 500  # of one SQL statement, and of one of the client's filters


@dataclass
class Entry:
    """One training run as a leaderboard shows it; a metric is its last value."""

    run_id: str
    name: str
    experiment: str
    status: str
    start_ms: int
    end_ms: int | None
    params: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Scored:
    """What ranking needs of a run: which setting it is an example of, and how it did.

    A trial that was pruned came to no value: its sweep compared it with others of its age, and
    others went on.
    """

    run_id: str
    setting: str  # the config without its seeds; the run itself where that is not known
    identity: str  # the config with its seeds: the same again is no new evidence
    data: str  # name of the data set
    last: float | None  # value of the metric
    start_ms: int
    is_pruned: bool

    @property
    def value(self) -> float | None:
        """What the run came to; None where it has no finite value, or did not get to its end."""
        return None if self.is_pruned else self.last


@dataclass(frozen=True)
class Chosen:
    """Which training runs are asked for; None and empty leave all of them in.

    Reproductions, which are no new evidence, are left out unless ids or their tag ask for them.

    Attributes:
        experiment: Name of their experiment.
        parent: Id of the sweep they are trials of.
        tags: Values of their tags.
        params: Values of their parameters.
        ids: Their ids.
    """

    experiment: str | None = None
    parent: str | None = None
    tags: dict[str, str] = field(default_factory=dict)
    params: dict[str, str] = field(default_factory=dict)
    ids: Sequence[str] | None = None

    @property
    def with_reproductions(self) -> bool:
        """Whether runs made again are asked for."""
        return self.ids is not None or REPRODUCES_TAG in self.tags

    @property
    def all_tags(self) -> dict[str, str]:
        """The tags, the one that names the parent among them."""
        return self.tags | ({PARENT_TAG: self.parent} if self.parent else {})


class Ledger(Protocol):
    """The reading side of a store. Runs that training did not make, and deleted ones, are no part.

    Every list is newest first.
    """

    shown_uri: str

    def ids(self, prefix: str, deleted: bool = False) -> list[str]:
        """Return up to two ids that begin so, of runs of any kind, or of deleted ones."""
        ...

    def scored(self, chosen: Chosen, metric: str) -> list[Scored]:
        """Return all chosen runs with their last value of a metric."""
        ...

    def entries(self, ids: Sequence[str]) -> list[Entry]:
        """Return these runs."""
        ...

    def series(self, ids: Sequence[str], metric: str) -> dict[str, list[tuple[int, float]]]:
        """Return steps and values of a metric, by rising step, of the runs that have it."""
        ...


def open_ledger(uri: str | None, directory: Path) -> Ledger:
    """Open a store for reading; nothing is made.

    Raises:
        BadInput: There is none.
    """
    full = address.resolve(uri, directory.absolute())
    path = address.sqlite_path(full)
    if path is None:
        from tracklight.tracking.store import connect  # imports MLflow, in seconds

        store = connect(uri, directory)
        from tracklight.tracking.client_ledger import ClientLedger

        return ClientLedger(store.client, store.shown_uri)
    if not path.is_file():
        raise BadInput(f"there is no store {path} yet; train something first, or name it: --uri")
    from tracklight.tracking.sqlite_ledger import SqliteLedger

    return SqliteLedger(path)


def finite(value: float | None) -> float | None:
    """Return the value, or None where it is no finite number."""
    # SQL has no infinity: MLflow stores the largest float instead.
    is_finite = value is not None and abs(value) < sys.float_info.max
    return value if is_finite else None


def restored(value: float) -> float:
    """Return a metric's value as it was logged: infinite, where MLflow stored the largest float."""
    return value if finite(value) is not None else math.copysign(math.inf, value)


def distinct(found: Iterable[Scored]) -> list[Scored]:
    """Keep of the runs of one config, seeds included, the newest that has a value."""
    kept: dict[str, Scored] = {}
    for run in sorted(found, key=lambda each: each.value is None):
        kept.setdefault(run.identity, run)
    return [*kept.values()]


def newest_first(entries: Iterable[Entry]) -> list[Entry]:
    """Return the runs in the order of every list here."""
    return sorted(entries, key=lambda each: (-each.start_ms, each.run_id))


def parts(ids: Sequence[str]) -> Iterable[Sequence[str]]:
    """Cut a list of ids so that one question holds each part."""
    return (ids[at : at + _MAX_VARIABLES] for at in range(0, len(ids), _MAX_VARIABLES))
