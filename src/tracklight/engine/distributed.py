"""The processes of a distributed run: rank zero tracks it, the others only train."""

import importlib
import json
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from tracklight.config.hardware import num_devices
from tracklight.errors import BadInput, RunFailed

# Environment variable for the processes that Lightning launches.
RANK_ZERO_RUN = "TRACKLIGHT_LEADER"
# Above 0 in all processes but the first; by torchrun, Lightning, a cluster of nodes, SLURM.
RANKS = ("RANK", "LOCAL_RANK", "GROUP_RANK", "NODE_RANK", "SLURM_PROCID")
# By launcher: a variable of its own, and the number of its processes (SLURM_NTASKS is that of the job).
LAUNCHERS = {
    "torchrun": ("TORCHELASTIC_RUN_ID", "WORLD_SIZE"),
    "srun": ("SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS"),
}
NOT_RESUMABLE = (
    "these processes cannot be told which run to continue; drop resume, let trainer.devices, torchrun on one"
    " machine or srun launch them, or start the nodes yourself, each with resume=auto"
)
WAIT_S = 300.0  # for the other processes to start, and at each exchange with them


class RankZeroRun(NamedTuple):
    """What rank zero runs, for the processes that it launches; their own command line is not read again."""

    cfg: Mapping[str, Any]  # plain values
    checkpoint: str | None = None  # to continue from; None for a new run


def check_ranks() -> None:
    """Refuse a rank in the environment that is no number, before Lightning is imported, which reads it."""
    for name in RANKS:
        if not (value := os.environ.get(name) or "0").isdecimal():
            raise BadInput(f"{name}={value} in the environment is no rank; try `unset {name}`")


def _launch() -> tuple[str, int]:
    """Return what launched this process as one of several, and how many they are; 1 for a single one."""
    for launcher, (mark, size) in LAUNCHERS.items():
        if mark in os.environ:
            return launcher, int(os.environ.get(size) or 1)
    return "", 1


def settle_ranks(devices: Any, num_nodes: int, resume: str | None = None) -> None:
    """Refuse to go on if others than the processes asked for were launched; alone, this one is rank zero.

    Each would train for itself, or wait for one that is not there. While the config of a run to `resume` by
    its id is not yet known, processes that were launched are not counted.
    """
    per_node, (launcher, size) = num_devices(devices), _launch()
    wanted = None if per_node is None else per_node * num_nodes  # None: as many as there are
    if wanted not in (None, size) and (size > 1 or launcher == "torchrun"):
        if resume not in (None, "auto"):
            return
        raise BadInput(
            f"{launcher} launched {size} process{'es' * (size > 1)}, and trainer.devices={devices} times "
            f"trainer.num_nodes={num_nodes} is {wanted}; try trainer.devices={max(1, size // num_nodes)}, or "
            f"leave {launcher} out"
        )
    if size == 1:  # ranks may be left of an outer job; Lightning launches the others, or a user on each node
        kept = {"LOCAL_RANK": wanted != 1, "NODE_RANK": num_nodes > 1, "GROUP_RANK": num_nodes > 1}
        for name in RANKS:
            if not kept.get(name):
                os.environ.pop(name, None)
    if wanted == 1:
        fabric: Any = importlib.import_module("lightning_fabric.utilities.rank_zero")
        fabric.rank_zero_only.rank = 0  # it was read from the environment


def cluster_environment() -> Any:
    """Return what tells Lightning the ranks; in SLURM, it is not to requeue the job by itself."""
    kinds: Any = importlib.import_module("lightning_fabric.plugins.environments")
    launcher, size = _launch()
    if size > 1:
        is_slurm = launcher == "srun"
        return kinds.SLURMEnvironment(auto_requeue=False) if is_slurm else kinds.TorchElasticEnvironment()
    others = (kinds.LSFEnvironment, kinds.MPIEnvironment)
    return next((kind for kind in others if kind.detect()), kinds.LightningEnvironment)()


def is_nonzero_rank() -> bool:
    """Check whether another process is rank zero."""
    return any(int(os.environ.get(name) or 0) > 0 for name in RANKS)


class RankStore:
    """Lets rank zero tell processes that it did not launch which run all of them continue.

    It is PyTorch's own store at MASTER_PORT, where Lightning's processes meet afterwards. If rank zero serves
    it, it ends when this object is deleted.
    """

    def __init__(self, environment: Any):
        self._is_first = not is_nonzero_rank()
        # torchrun serves the store itself, also to processes that it starts again.
        serves = self._is_first and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        self._prefix = f"tracklight/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '')}/"
        place = environment.main_address, environment.main_port, None, serves, timedelta(seconds=WAIT_S)
        distributed: Any = importlib.import_module("torch.distributed")
        with _explaining_silence():
            self._store = distributed.TCPStore(*place, wait_for_workers=False, multi_tenant=True)

    def share(self, name: str, value: Any) -> Any:
        """Return rank zero's value, plain, in all processes."""
        if self._is_first:
            self._store.set(self._prefix + name, json.dumps(value))
            return value
        with _explaining_silence():
            return json.loads(self._store.get(self._prefix + name))


@contextmanager
def _explaining_silence() -> Iterator[None]:
    error_type: Any = importlib.import_module("torch.distributed").DistError
    try:
        yield
    except error_type as error:
        raise RunFailed(explain_silence("the first process", "start all of them again")) from error


def explain_silence(process: str, cure: str) -> str:
    """Return the line for a run of which a process does not answer."""
    return f"{process} of this run is gone, or has not answered for {WAIT_S:.0f} s; {cure}"


def open_rank_store(num_nodes: int, resume: str | None) -> RankStore | None:
    """Return what tells all processes which run to continue; None if they need not, or cannot, be told."""
    are_nodes = num_nodes > 1 and resume == "auto"
    if resume is None or not (_launch()[1] > 1 or are_nodes):
        return None
    environment = cluster_environment()
    if not can_resume(environment):
        return None
    if is_nonzero_rank():
        announce_nodes(environment, num_nodes)
    return RankStore(environment)


def can_resume(environment: Any) -> bool:
    """Check whether a run continues if all its processes are started again with resume=auto."""
    kinds: Any = importlib.import_module("lightning_fabric.plugins.environments")
    able = kinds.LightningEnvironment, kinds.TorchElasticEnvironment, kinds.SLURMEnvironment
    # torchrun's agents on several machines count their restarts each for itself, and keep what was shared.
    is_alone = int(os.environ.get("GROUP_WORLD_SIZE") or 1) == 1
    return isinstance(environment, able) and (is_alone or not isinstance(environment, able[1]))


def check_resumable(trainer: Any, store: RankStore | None) -> None:
    """Raise BadInput if processes that others than Lightning launch would begin a new run, not resume."""
    is_outside = trainer.num_nodes > 1
    if trainer.world_size > 1:
        is_outside |= trainer.strategy.cluster_environment.creates_processes_externally
    if is_outside and store is None:
        raise BadInput(NOT_RESUMABLE)


def announce_nodes(environment: Any, num_nodes: int) -> None:
    """Say that a node waits for the others, and how they find each other."""
    if num_nodes > 1 and environment.local_rank() == 0:
        rank, place = environment.node_rank(), f"MASTER_ADDR={environment.main_address}"
        place += f" MASTER_PORT={environment.main_port}"
        waiting = f"waiting up to {WAIT_S:.0f} s for all {num_nodes} nodes; this is NODE_RANK={rank}"
        print(f"{waiting}, each runs the same command, with {place}", flush=True)


def export_rank_zero_run(
    strategy: Any, cfg: Mapping[str, Any], checkpoint: Path | None, store: RankStore | None
) -> None:
    """Pass the config and checkpoint on to the processes that the trainer's strategy will launch."""
    if (nodes := cfg["trainer"]["num_nodes"]) > 1:
        _choose_interface(strategy.cluster_environment.main_address)
        if store is None or not is_nonzero_rank():  # else it has waited before
            announce_nodes(strategy.cluster_environment, nodes)
    if getattr(strategy, "num_processes", 1) == 1 or is_nonzero_rank():
        return
    os.environ["OMP_NUM_THREADS"] = str(cfg["num_threads"])  # else Lightning decides
    run = RankZeroRun({**cfg, "resume": None, "init_from": None}, checkpoint and str(checkpoint))
    os.environ[RANK_ZERO_RUN] = json.dumps(run._asdict())


def _choose_interface(address: str) -> None:
    """Let gloo use the interface that leads to `address`; a host's own name often means its loopback."""
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))  # sends nothing
        own = probe.getsockname()[0]
        for name, addresses in psutil.net_if_addrs().items():
            if own in (each.address for each in addresses) and not own.startswith("127."):
                os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def read_rank_zero_run() -> RankZeroRun | None:
    """Read what rank zero exported; None in rank zero and in processes launched from outside."""
    if RANK_ZERO_RUN not in os.environ or not is_nonzero_rank():
        return None
    return RankZeroRun(**json.loads(os.environ[RANK_ZERO_RUN]))
