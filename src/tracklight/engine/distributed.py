"""The processes of a distributed run: rank zero tracks it, the others only train."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tracklight.errors import RunFailed

# Environment variable for the processes that Lightning launches.
RANK_ZERO_RUN = "TRACKLIGHT_LEADER"
# Above 0 in all processes but the first; by torchrun, Lightning, a cluster of nodes, SLURM.
RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")


class RankZeroRun(NamedTuple):
    """What rank zero runs, for the processes that it launches.

    Args:
        cfg: The config as plain values: their own command line is not read again.
        checkpoint: To continue from; None for a new run.
    """

    cfg: Mapping[str, Any]
    checkpoint: str | None = None


def is_nonzero_rank() -> bool:
    """Check whether another process is rank zero."""
    return any(int(os.environ.get(name) or 0) > 0 for name in RANKS)


def export_rank_zero_run(strategy: Any, cfg: Mapping[str, Any], checkpoint: Path | None) -> None:
    """Pass the config and checkpoint on to the processes that a Lightning strategy will launch.

    Args:
        strategy: Of the trainer.
        cfg: As plain values.
        checkpoint: That this process continues from; None for a new run.

    Raises:
        RunFailed: They are launched from outside, so the checkpoint cannot be passed on.
    """
    if getattr(strategy, "num_processes", 1) == 1 or is_nonzero_rank():
        return
    if checkpoint and strategy.cluster_environment.creates_processes_externally:
        raise RunFailed(
            "processes launched from outside cannot be told which run to continue; drop resume,"
            " or let trainer.devices launch them"
        )
    os.environ["OMP_NUM_THREADS"] = str(cfg["num_threads"])  # else Lightning decides
    run = RankZeroRun({**cfg, "resume": None, "init_from": None}, checkpoint and str(checkpoint))
    os.environ[RANK_ZERO_RUN] = json.dumps(run._asdict())


def read_rank_zero_run() -> RankZeroRun | None:
    """Read what rank zero exported; None in rank zero and in processes launched from outside."""
    if RANK_ZERO_RUN not in os.environ or not is_nonzero_rank():
        return None
    return RankZeroRun(**json.loads(os.environ[RANK_ZERO_RUN]))
