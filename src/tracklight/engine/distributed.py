"""The processes of a distributed run: the first tracks it, the others train along."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tracklight.errors import RunFailed

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


def lead(strategy: Any, cfg: Mapping[str, Any], checkpoint: Path | None) -> None:
    """Tell the processes that a Lightning strategy is about to launch what this one runs.

    Args:
        strategy: Of the trainer.
        cfg: The config, as plain values.
        checkpoint: Where this process continues from, if it does.

    Raises:
        RunFailed: They were launched from outside, and cannot be told where to continue.
    """
    if getattr(strategy, "num_processes", 1) == 1 or is_follower():
        return
    if checkpoint and strategy.cluster_environment.creates_processes_externally:
        raise RunFailed(
            "processes launched from outside cannot be told which run to continue; drop resume,"
            " or let trainer.devices launch them"
        )
    os.environ["OMP_NUM_THREADS"] = str(cfg["num_threads"])  # else Lightning decides
    told = {**cfg, "resume": None, "init_from": None}
    os.environ[LEADER] = json.dumps(asdict(Leader(told, checkpoint and str(checkpoint))))


def leader() -> Leader | None:
    """Return what this process was told; None for the first, and for one launched from outside."""
    if LEADER not in os.environ or not is_follower():
        return None
    return Leader(**json.loads(os.environ[LEADER]))
