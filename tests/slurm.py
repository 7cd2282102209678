"""A Slurm cluster of one node, which runs in a folder of its own and touches no other on the machine."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from process import free_port

ROOT = Path(__file__).resolve().parents[1]
DAEMONS = ("munged", "slurmctld", "slurmd")
ENDED_S = 300.0
CONFIG = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
KillWait=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=localhost NodeHostname=localhost NodeAddr=127.0.0.1 CPUs=2 RealMemory=2000
PartitionName=main Nodes=ALL Default=YES PriorityTier=1
PartitionName=patient Nodes=ALL PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL PriorityTier=2
"""


def missing() -> str:
    """Say what this machine lacks for a cluster; empty if nothing."""
    absent = [name for name in (*DAEMONS, "sbatch") if shutil.which(name) is None]
    if absent:
        return f"needs {', '.join(absent)} (Debian: slurmctld slurmd slurm-client munge)"
    return "" if os.geteuid() == 0 else "needs root, as slurmd does"


class Cluster:
    """Runs until `close`; partition `urgent` preempts the others, `patient` with a grace of a minute."""

    def __init__(self, folder: Path):
        self.folder = folder
        for name in ("state", "spool"):
            (folder / name).mkdir()
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o600)
        path = folder / "slurm.conf"
        path.write_text(CONFIG.format(folder=folder, ports=(free_port(), free_port())))
        self.env = {**os.environ, "SLURM_CONF": str(path)}
        self._daemons: list[subprocess.Popen[bytes]] = []
        files = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munge.pid"}
        files |= {"log-file": "munge.log", "seed-file": "munge.seed"}
        # By force: others may list the folders above.
        self._start("munged", "-F", "--force", *(f"--{k}={folder / v}" for k, v in files.items()))
        self.wait_until((folder / "munge.socket").exists)
        self._start("slurmctld", "-D", "-c")
        self._start("slurmd", "-D", "-c", "-N", "localhost")
        self.wait_until(lambda: self._ask("sinfo", "-h", "-p", "main", "-o", "%T") == "idle")

    def _start(self, *command: str) -> None:
        with (self.folder / f"{command[0]}.out").open("wb") as output:
            self._daemons.append(
                subprocess.Popen(command, stdout=output, stderr=output, env=self.env, cwd=self.folder)
            )

    def _ask(self, *command: str) -> str:
        return subprocess.run(command, env=self.env, capture_output=True, text=True).stdout.strip()

    def run(self, *command: str | Path, **env: str) -> str:
        """Run one of Slurm's commands, which must succeed; return what it says."""
        done = subprocess.run(command, env=self.env | env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def submit(self, output: Path, words: Sequence[str], *options: str) -> str:
        """Submit `scripts/slurm.sbatch WORDS`, which takes the whole node; return the job's id."""
        found = [str(ROOT / "tests"), str(ROOT / "tests" / "sweep"), os.environ.get("PYTHONPATH", "")]
        env = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": ":".join(found)}
        options = ("--parsable", "--cpus-per-task=2", f"--chdir={ROOT}", f"--output={output}", *options)
        return self.run("sbatch", *options, ROOT / "scripts" / "slurm.sbatch", *words, **env)

    def state(self, job: str) -> str:
        """Return a job's state, RUNNING say; empty once it is forgotten."""
        return self._ask("squeue", "-h", "-t", "all", "-j", job, "-o", "%T")

    def start_now(self, job: str, *changes: str) -> None:
        """Wait until a job is requeued and spare it the two minutes that such a job waits."""
        self.wait_until(lambda: self.state(job) == "PENDING")
        # Within the same second, slurmd would take it for the job that it has just killed.
        self.run("scontrol", "update", f"JobId={job}", "StartTime=now+2", *changes)
        self.wait_until(lambda: self.state(job) != "PENDING")

    @staticmethod
    def wait_until(holds: Callable[[], bool], seconds: float = ENDED_S) -> None:
        """Wait for something that a job does."""
        end = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end, "waited in vain"
            time.sleep(0.1)

    def close(self) -> None:
        """End all jobs and the daemons."""
        self._ask("scancel", "--state=RUNNING,PENDING,SUSPENDED", "--user=root")
        self._ask("scancel", "-s", "KILL", "--user=root")
        end = time.monotonic() + 20.0
        while self._ask("squeue", "-h") and time.monotonic() < end:
            time.sleep(0.1)
        for daemon in reversed(self._daemons):
            daemon.terminate()
            daemon.wait(30)
