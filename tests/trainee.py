"""The training process of the tests of faults and sweeps, forked from one that has everything imported.

A process start costs seconds of imports, and the tests need hundreds. Run as a script, this reads
a request a line (see `process.py`) and forks a process that runs the command line as `train.py`
would. The trials of sweeps are forked by a forkserver, which is forked itself.
"""

import atexit
import contextlib
import ctypes
import functools
import gc
import importlib
import io
import json
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

SCRIPT = Path(__file__).resolve().parents[1] / "train.py"
LATEST = "_get_latest_schema_revision"  # of MLflow's `store.db.utils`: reads seventy files each time


def accept() -> None:
    """Fork for each request until there are no more."""
    gc.freeze()  # so that children share these pages
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    print("ready", flush=True)
    while line := sys.stdin.readline():
        request = json.loads(line)
        _compose(request.get("arguments", []))
        if os.fork() == 0:
            _watch(request)


def _compose(arguments: list[str]) -> None:
    """Compose what these groups make, which all that are forked from now on remember."""
    from tracklight.config.hydra_internals import compose_config, initialize

    with contextlib.suppress(Exception), initialize():  # the child will say what is wrong
        compose_config(arguments)


def _watch(request: dict[str, Any]) -> NoReturn:
    """Stay beside the trainee to tell how it ends: a parent alone can know."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if pid == 0:
        serve(**request) if "port" in request else train(**request)
    os.write(1, f"{pid}\n".encode())
    _, status = os.waitpid(pid, 0)
    folder = Path(request["folder"])
    with contextlib.suppress(OSError):  # the test may be over
        (folder / "exit.new").write_text(str(os.waitstatus_to_exitcode(status)))
        (folder / "exit.new").rename(folder / "exit")
    os._exit(0)


def train(folder: str, arguments: list[str], env: dict[str, str], faults: list[list[Any]]) -> NoReturn:
    """Run the command line; its output goes to files in `folder`."""
    os.setsid()
    for number, name in ((0, os.devnull), (1, f"{folder}/stdout"), (2, f"{folder}/stderr")):
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC
        os.dup2(os.open(name, os.O_RDONLY if number == 0 else flags, 0o644), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(env)
    os.chdir(folder)
    sys.argv = [str(SCRIPT), *arguments]
    for name, *rest in faults:
        FAULTS[name](*rest)
    from tracklight.cli import main

    code = 0
    try:
        main(run)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # the interpreter's own dismantling takes seconds in a forked process


def serve(folder: str, port: int) -> None:
    """Be an MLflow server on the database and artifacts in `folder`."""
    os.setsid()
    os.dup2(os.open(f"{folder}/server", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), 2)
    sys.path.insert(0, str(SCRIPT.parent / "tests" / "tracking"))
    from serving import serve

    serve(folder, port)
    os._exit(0)


def run(cfg: Any) -> Any:
    """As in train.py."""
    from tracklight.experiment.train import run

    return run(cfg)


def _patch(target: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace what `package.module:name.name` names by `wrap` of it."""
    module, _, path = target.partition(":")
    *owners, name = path.split(".")
    owner: Any = importlib.import_module(module)
    for each in owners:
        owner = getattr(owner, each)
    original = owner.__dict__[name] if isinstance(owner, type) else getattr(owner, name)
    setattr(owner, name, wrap(original))


def strike(target: str, call: int, signals: list[str], after: bool = False) -> None:
    """Send this process signals as it makes its n-th call of `target`, or just after it."""
    calls = iter(range(1, 1 << 62))

    def hit() -> None:
        for each in signals:
            os.kill(os.getpid(), signal.Signals[each])

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def struck(*args: Any, **kwargs: Any) -> Any:
            now = next(calls) == call
            if now and not after:
                hit()
            result = original(*args, **kwargs)
            if now and after:
                hit()
            return result

        return struck

    _patch(target, wrap)


def halve(target: str, call: int) -> None:
    """Write half of what the n-th call of a `write(path, content)` is to write, and die."""
    calls = iter(range(1, 1 << 62))

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def halved(path: Path, content: bytes) -> Any:
            if next(calls) != call:
                return original(path, content)
            original(path, bytes(content)[: len(content) // 2])
            return os.kill(os.getpid(), signal.SIGKILL)

        return halved

    _patch(target, wrap)


def meet(target: str, call: int, name: str) -> None:
    """Touch a file at the n-th call of `target` and wait there until it is gone again."""
    calls = iter(range(1, 1 << 62))

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def waiting(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == call:
                mark = Path(name)
                mark.touch()
                while mark.exists():
                    time.sleep(0.01)
            return original(*args, **kwargs)

        return waiting

    _patch(target, wrap)


def slow(target: str, seconds: float) -> None:
    """Sleep before each call of `target`."""

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def slowed(*args: Any, **kwargs: Any) -> Any:
            time.sleep(seconds)
            return original(*args, **kwargs)

        return slowed

    _patch(target, wrap)


def put(target: str, value: Any) -> None:
    """Set a constant."""
    _patch(target, lambda _: value)


def spare_model() -> None:
    """Log no model and draw nothing: it takes longer than the training of these tests."""
    put("tracklight.experiment.record:log_model", lambda *_, **__: None)
    put("tracklight.experiment.record:draw_figures", lambda *_, **__: None)


def limit_files(num_bytes: int) -> None:
    """Let no file grow beyond a size, as a full disk would not."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))


def fill(target: str, call: int, folder: str) -> None:
    """Leave not a byte on the file system of `folder` from the n-th call of `target` on."""
    calls = iter(range(1, 1 << 62))

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def filled(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == call:
                with contextlib.suppress(OSError), (Path(folder) / "ballast").open("wb", buffering=0) as file:
                    while True:
                        file.write(bytes(4096))
            return original(*args, **kwargs)

        return filled

    _patch(target, wrap)


def lead(descriptor: int, where: str) -> None:
    """Lead standard output or error to a file, to a pipe without a reader, or nowhere, as a shell does."""
    name = {1: "stdout", 2: "stderr"}[descriptor]
    if where == "closed":
        os.close(descriptor)
        setattr(sys, name, None)
    elif where == "left":
        reader, writer = os.pipe()
        os.dup2(writer, descriptor)
        os.close(reader)
        os.close(writer)
    else:
        os.dup2(os.open(where, os.O_WRONLY), descriptor)


def ignore(name: str) -> None:
    """Ignore a signal, as nohup does."""
    signal.signal(signal.Signals[name], signal.SIG_IGN)


def change_code() -> None:
    """Pretend that the code is another."""
    from tracklight.tracking import provenance

    found, new = provenance.code_files, {"tracklight/models/new.py": "f" * 64}
    put("tracklight.tracking.provenance:code_files", lambda targets: found(targets) | new)


def enter_network(name: str) -> None:
    """Enter a network namespace, as `ip netns exec` does."""
    with Path("/run/netns", name).open() as file:
        assert ctypes.CDLL(None).setns(file.fileno(), 0x40000000) == 0  # CLONE_NEWNET


def respect_modes() -> None:
    """Give up root's right to write where a mode forbids it, or no folder is read-only to it."""
    if os.geteuid() == 0:
        libc = ctypes.CDLL(None)
        header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
        sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; each in two halves
        assert libc.capget(header, sets) == 0
        for index in (0, 1):
            sets[index] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        assert libc.capset(header, sets) == 0


def forget_epoch_order() -> None:
    """Mutation: an epoch's order comes from wherever the global generator stands."""
    import torch

    from tracklight.engine import seeding

    put("tracklight.data.tensor_data:epoch_order", lambda n, seed, epoch: torch.randperm(n))
    seeding.seed_all = lambda *_: None


def forget_step_seeding() -> None:
    """Mutation: dropout draws from wherever the global generator stands."""
    for module in ("seeding", "blocks"):
        put(f"tracklight.engine.{module}:seed_step", lambda *_: None)
    put("tracklight.engine.seeding:seed_all", lambda *_: None)  # as an epoch begins


def forget_replay_filter() -> None:
    """Mutation: a continued run logs again what it logged before."""

    put("tracklight.tracking.wal:WriteAheadLog._expect", lambda *_: None)


FAULTS: dict[str, Callable[..., None]] = {
    function.__name__: function
    for function in (
        *(strike, halve, meet, slow, put, spare_model, limit_files, fill, lead, ignore, respect_modes),
        *(change_code, enter_network, forget_epoch_order, forget_step_seeding, forget_replay_filter),
    )
}


def prepare() -> None:
    """Import all that a run imports, which takes seconds."""
    from tracklight.cli import quiet

    quiet()
    for name in PRELOADED:
        importlib.import_module(name)
    _patch(f"mlflow.store.db.utils:{LATEST}", functools.cache)
    _warm_up()


def _warm_up() -> None:
    """Train once: grammars, traces and dispatch tables are then there for all that are forked."""
    from tracklight.config.compose import compose

    with contextlib.redirect_stdout(io.StringIO()):
        run(compose(["trainer.max_epochs=1", "num_threads=1", "tracking=none"]))


PRELOADED = (
    *(
        "foreign",
        "foreign_loaders",
        "tracklight.experiment.train",
        "tracklight.config.overrides",
        "hydra.main",
    ),
    *("mlflow.pytorch", "mlflow.pyfunc.loaders", "mlflow.store.tracking.sqlalchemy_store"),
    *("torch.export._trace", "torch._functorch.aot_autograd", "torch._export.non_strict_utils"),
    *(f"tracklight.sweep.{name}" for name in ("study", "parent_run", "loop", "progress")),
    *("optuna.visualization", "tracklight.sweep.trial"),
)


def fork_forkserver() -> None:
    """Fork the forkserver of the trials of sweeps, which would take the seconds of the imports again."""
    from tracklight.sweep import executors

    def fork(path: str, arguments: list[str], descriptors: list[int]) -> int:
        if pid := os.fork():
            return pid
        for number in range(3, 256):
            if number not in descriptors:  # above all the end that keeps it alive
                with contextlib.suppress(OSError):
                    os.close(number)
        sys.argv = arguments[arguments.index("-c") :]
        try:
            exec(sys.argv.pop(1))
        finally:
            os._exit(0)

    multiprocessing.get_context("forkserver").set_forkserver_preload(executors.PRELOADED)
    with mock.patch("multiprocessing.util.spawnv_passfds", fork):
        forkserver.ensure_running()
    # A forked sweep may use the forkserver, but is not its parent and cannot wait for it.
    forkserver.ForkServer.ensure_running = lambda self: None


if __name__ == "__main__":
    sys.path.insert(1, str(SCRIPT.parent / "tests" / "sweep"))
    prepare()
    fork_forkserver()
    accept()
    os._exit(0)  # as above
