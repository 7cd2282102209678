"""The processes of a distributed run: the first tracks it, the others train along."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

LEADER = "TRACKLIGHT_LEADER"  # environment variable, for the processes that Lightning launches
# Above 0 in all processes but the first; by torchrun, Lightning, a cluster of nodes, SLURM.
RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")


@dataclass(frozen=True)
class Leader:
    """What the first process tells those it launches.

    Args:
        cfg: The config it runs, as plain values: their own command line is not read again.
        checkpoint: Where it continues from, if it does.
    """

    cfg: Mapping[str, Any]
    checkpoint: str | None = None


def is_follower() -> bool:
    """Say whether another process leads this one."""
    return any(int(os.environ.get(name) or 0) > 0 for name in RANKS)


def lead(leader: Leader) -> None:
    """Tell the processes launched from now on."""
    os.environ[LEADER] = json.dumps(asdict(leader))


def leader() -> Leader | None:
    """Return what this process was told; None for the first, and for one launched from outside."""
    if LEADER not in os.environ or not is_follower():
        return None
    return Leader(**json.loads(os.environ[LEADER]))
