"""Whole training processes: started in a moment, struck by faults, compared in the end."""

import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Sequence
from contextlib import closing, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent
ENDED_S = 90.0
# Runs commands, given as JSON, in one process of its own: the imports take seconds.
COMMANDS = """
import json, sys
from tracklight import cli
for command, *words in json.loads(sys.argv[1]):
    sys.argv[1:] = words
    try:
        cli.enter(command)
    except SystemExit as end:
        print("exit", command, end.code, flush=True)
"""

# Forks for each program, a JSON object a line, and runs it as `python -c` would.
FORKER = """
import importlib, json, os, sys, traceback
for name in sys.argv[1:]:
    importlib.import_module(name)
for line in sys.stdin:
    program = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.chdir(program["folder"])
        os.environ.clear()
        os.environ.update(program["env"])
        for number in (1, 2):
            os.dup2(os.open(program["output"][number - 1], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.argv, code = program["argv"], 0
        try:
            exec(compile(program["code"], "<string>", "exec"), {"__name__": "__main__"})
        except SystemExit as end:
            code = end.code
        except BaseException:
            code = traceback.print_exc() or 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Programs:
    """Runs short Python programs, forked from a process that has imported some modules already."""

    def __init__(self, folder: Path, *imported: str):
        self._output = [str(folder / name) for name in ("stdout", "stderr")]
        self._server = subprocess.Popen(
            [sys.executable, "-c", FORKER, *imported],
            cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, folder: Path, code: str, *argv: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Run a program to its end, in `folder`."""
        program = {"folder": str(folder), "code": code, "argv": ["-c", *argv], "env": {**os.environ, **env}}
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps(program | {"output": self._output}) + "\n")
        self._server.stdin.flush()
        exit_code = int(self._server.stdout.readline())
        stdout, stderr = (Path(name).read_text() for name in self._output)
        return subprocess.CompletedProcess(argv, exit_code, stdout, stderr)

    def close(self) -> None:
        """End the process that forks."""
        self._server.communicate(timeout=10)


class Process:
    """A training process under way, or ended."""

    def __init__(self, pid: int, folder: Path):
        self.pid = pid
        self.folder = folder

    @property
    def exit_code(self) -> int | None:
        """As a shell's `$?`, negative for a signal; None while it runs."""
        path = self.folder / "exit"
        return int(path.read_text()) if path.exists() else None

    @property
    def stdout(self) -> str:
        return self._output("stdout")

    @property
    def stderr(self) -> str:
        """Standard error, without what a run says where git is not installed."""
        lines = self._output("stderr").splitlines(keepends=True)
        return "".join(line for line in lines if "is not recorded (git: not installed)" not in line)

    def _output(self, name: str) -> str:
        path = self.folder / name  # which the process itself creates
        return path.read_text() if path.exists() else ""

    def send(self, signum: signal.Signals, group: bool = False) -> None:
        """Send a signal, to all processes of its terminal as Ctrl-C does if `group`."""
        if self.exit_code is None:
            with suppress(ProcessLookupError):  # it ended just now
                (os.killpg if group else os.kill)(self.pid, signum)

    def wait(self, seconds: float = ENDED_S) -> int:
        end = time.monotonic() + seconds
        while (code := self.exit_code) is None:
            if time.monotonic() > end:
                self.send(signal.SIGKILL)
                raise TimeoutError(f"still running after {seconds} s:\n{self.stdout}{self.stderr}")
            time.sleep(0.005)
        return code

    def wait_for(self, mark: Path, seconds: float = ENDED_S) -> None:
        """Wait until the process has touched `mark`."""
        end = time.monotonic() + seconds
        while not mark.exists():
            assert self.exit_code is None, f"ended early:\n{self.stdout}{self.stderr}"
            assert time.monotonic() < end, "waited in vain"
            time.sleep(0.005)


class Trainees:
    """Starts training processes, all forked from one that took the seconds of the imports.

    Args:
        template: The empty store that each tracking directory starts with a copy of.
        more: Environment variables of all of them, the trials of sweeps included.
    """

    def __init__(self, template: Path, **more: str) -> None:
        self._template = template
        env = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "MNIST_ROOT"))} | more
        self._server = subprocess.Popen(
            [sys.executable, TESTS / "trainee.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )
        self._number = 0
        assert self._answer() == "ready"

    def _answer(self) -> str:
        assert self._server.stdout is not None
        return self._server.stdout.readline().strip()

    def start(
        self,
        directory: Path,
        arguments: Sequence[str],
        faults: Sequence[Sequence[Any]] = (),
        env: dict[str, str] | None = None,
        bare: bool = False,
        log: Path | None = None,
    ) -> Process:
        """Start `train.py ARGUMENTS` tracked in `directory`.

        Args:
            directory: Becomes tracking.dir.
            arguments: Of the command line.
            faults: What goes wrong: names and arguments of functions in `trainee.py`.
            env: Further environment variables.
            bare: Whether the arguments say themselves where to track.
            log: The folder for the output, beside `directory` by default.
        """
        self._number += 1
        folder = log or directory.parent / f"{directory.name}.process-{self._number}"
        folder.mkdir(parents=True)
        self.furnish(directory)
        words = [*arguments, *([] if bare else [f"tracking.dir={directory}"])]
        request = {"arguments": words, "folder": str(folder), "env": env or {}}
        return self._fork(folder, request | {"faults": list(faults)})

    def furnish(self, directory: Path) -> None:
        """Put an empty store where there is none."""
        if not directory.exists():
            directory.mkdir(parents=True)
            shutil.copy(self._template, directory)

    def serve(self, directory: Path, port: int) -> Process:
        """Start an MLflow server on the store in `directory`, and wait until it answers."""
        self.furnish(directory)
        (directory / "exit").unlink(missing_ok=True)
        server = self._fork(directory, {"folder": str(directory), "port": port})
        end = time.monotonic() + ENDED_S
        while not _answers(port):
            assert time.monotonic() < end and server.exit_code is None, "no server"
            time.sleep(0.05)
        return server

    def _fork(self, folder: Path, request: dict[str, Any]) -> Process:
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return Process(int(self._answer()), folder)

    def train(self, directory: Path, *arguments: str, **more: Any) -> Process:
        """Start and wait; the process has ended."""
        process = self.start(directory, arguments, **more)
        process.wait()
        return process

    def sweep(self, directory: Path, *arguments: str, **more: Any) -> Process:
        """Run `train.py -m ARGUMENTS` to its end."""
        return self.train(directory, "-m", *arguments, **more)

    def close(self) -> None:
        for pipe in (self._server.stdin, self._server.stdout):
            if pipe is not None:
                pipe.close()
        self._server.wait(60)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _answers(port: int) -> bool:
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
    except OSError:
        return False
    return True


class TrialResult:
    """All that a tracking directory with one run holds of it, read without MLflow."""

    def __init__(self, directory: Path):
        self.directory = directory
        with closing(sqlite3.connect(directory / "mlflow.db")) as connection:
            self.runs: list[tuple[str, str]] = connection.execute(
                "SELECT run_uuid, status FROM runs ORDER BY start_time"
            ).fetchall()
            self.points: list[tuple[str, int, float, bool]] = connection.execute(
                "SELECT key, step, value, is_nan FROM metrics ORDER BY key, step, value"
            ).fetchall()
            self.tags = dict(connection.execute("SELECT key, value FROM tags"))

    @property
    def run_id(self) -> str:
        return self.runs[-1][0]

    @property
    def status(self) -> str:
        return self.runs[-1][1]

    @property
    def checkpoints(self) -> Path:
        return self.directory / "artifacts" / self.run_id / "artifacts" / "checkpoints"

    def steps(self, key: str) -> list[int]:
        return [step for name, step, *_ in self.points if name == key]

    def checkpoint(self, name: str) -> dict[str, Any]:
        import torch

        return torch.load(self.checkpoints / f"{name}.ckpt", weights_only=True)

    @cached_property
    def logged(self) -> Counter[tuple[str, int]]:
        """How many points of each metric and step the run's own log has.

        MLflow keeps only one of several equal points of the same millisecond.
        """
        from tracklight.tracking.wal import Points, read_records

        path = self.directory / "artifacts" / self.run_id / "points.wal"
        records = (record for record, _ in read_records(path)) if path.exists() else ()
        steps = ((each.key, each.steps) for each in records if isinstance(each, Points))
        return Counter((key, step) for key, steps in steps for step in steps)

    def _doubled(self, other: "TrialResult") -> list[tuple[str, int]]:
        stored = Counter((key, step) for key, step, *_ in self.points)
        wanted = other.logged or Counter(set(stored))
        return list((stored | self.logged) - wanted)[:3]

    def _further(self) -> list[str]:
        """The files of other ModelCheckpoints."""
        return sorted(path.name for path in self.checkpoints.glob("further/**/*"))

    def differences(self, other: "TrialResult") -> list[str]:
        """What this run, continued through faults, differs in from an undisturbed one."""
        found = []
        if [status for _, status in self.runs] != ["FINISHED"]:
            found.append(f"runs: {self.runs}")
        mine, whole = self.points, set(other.points)
        found += [f"doubled: {key} at {step}" for key, step in self._doubled(other)]
        found += [f"lost: one of {key} at {step}" for key, step in other.logged - self.logged][:3]
        found += [f"lost: {point[:3]}" for point in sorted(whole - set(mine))[:3]]
        found += [f"not in the other: {point[:3]}" for point in sorted(set(mine) - whole)[:3]]
        for name in ("last", "best"):
            a, b = self.checkpoint(name), other.checkpoint(name)
            for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch"):
                if not _equal(a.get(key), b.get(key)):
                    found.append(f"{name}.ckpt: {key}")
        names = {path.name for path in self.checkpoints.iterdir()} - {"further"}
        if names != {f"{n}.ckpt{end}" for n in ("best", "last") for end in ("", ".sha256.json")}:
            found.append(f"left behind: {sorted(names)}")
        if (names := self._further()) != (others := other._further()):
            found.append(f"left behind: {names} instead of {others}")
        left = [path.name for path in self.directory.rglob("*") if _is_left_over(path)]
        return [*found, *(f"left behind: {name}" for name in left)]


def _is_left_over(path: Path) -> bool:
    return path.suffix == ".tmp" or path.name == "run.lock" or path.name.startswith(".new-")


def _equal(a: Any, b: Any) -> bool:
    """Say whether two nested values are the same, tensors to the bit."""
    import torch

    if isinstance(a, torch.Tensor):
        same = isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape
        return same and a.numpy().tobytes() == b.numpy().tobytes()
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    return bool(a == b)
