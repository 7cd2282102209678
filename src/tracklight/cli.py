"""The command line: its exit codes, and its errors in one line."""

import difflib
import errno
import gc
import io
import json
import logging
import os
import re
import signal
import sys
import traceback
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TextIO

from hydra.errors import HydraException, InstantiationException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from tracklight.config.compose import allowed_targets, compose, resolve_composed, resolve_config
from tracklight.config.hardware import choose_temporary_folder
from tracklight.config.hydra_internals import run_hydra
from tracklight.config.instantiate import check_hydra_nodes
from tracklight.config.overrides import check_overrides, explain, flags_parser, parse_flags, split_for_resume
from tracklight.engine.distributed import check_ranks, read_rank_zero_run
from tracklight.errors import BadInput, RunFailed
from tracklight.paths import PROJECT, TRAIN
from tracklight.redact import CONTROL, redact, redact_messages
from tracklight.tracking.address import resolve_uri

Task = Callable[[Any], Any]
_warned = set[str]()  # of the project

# No usage reporting, no lines of advertising: set before the libraries concerned are imported.
QUIET = {
    "DO_NOT_TRACK": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "RAY_USAGE_STATS_ENABLED": "0",
    "GIT_PYTHON_REFRESH": "quiet",
}
# Control characters, any of which a stored name may hold, but for those that draw progress bars.
_STEERING = re.compile(rf"(?!\r|\x1b\[(?:\d*[A-DGJK]|[\d;]*m|\?25[hl])){CONTROL.pattern}")
# Of a disk or its quota: the line says what and where, a traceback no more.
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.ENAMETOOLONG}
# From so many runnable processes a core on, OpenMP's threads sleep while they wait for each other. By default
# they spin: on idle cores that is 1.8 times as fast, on others it keeps the core from the thread waited for.
CROWDED = 1.5
# Imports make a million objects, all to stay; collecting garbage at every turn would take seconds.
GC_THRESHOLDS = (50_000, 10, 10)


def main(task: Task | None = None, argv: Sequence[str] | None = None) -> Any:
    """Compose the config that `argv`, or the command line, describes; return what the task returns for it.

    The task is to train, unless another is given. Where it does not return, the process exits: 1 the run
    failed, 2 bad input, 130 Ctrl-C, 143 SIGTERM.
    """
    gc.set_threshold(*GC_THRESHOLDS)
    try:
        with _exit_codes():
            return _run(task, sys.argv[1:] if argv is None else argv)
    finally:
        gc.freeze()  # else the interpreter searches a million objects on its way out


def enter(command: str, argv: Sequence[str] | None = None) -> NoReturn:
    """Run a command of `commands.parser` on the arguments typed and exit."""
    from tracklight.commands import parser

    with _exit_codes():
        code = parser.main(command, sys.argv[1:] if argv is None else argv)
    sys.exit(code)


def tracklight() -> None:
    """Run `tracklight COMMAND ...`, the program that the package installs."""
    from tracklight.commands.parser import COMMANDS

    command, *words = sys.argv[1:] or ["--help"]
    if command == "train" or read_rank_zero_run() is not None:  # or a further process of a distributed run
        main(argv=words)
    elif command in COMMANDS:
        enter(command, words)
    else:
        with _exit_codes():
            _help(command)


def _help(command: str) -> None:
    from tracklight.commands.parser import COMMANDS, help_of

    if command not in ("-h", "--help"):
        close = difflib.get_close_matches(command, ["train", *COMMANDS], n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise BadInput(f"tracklight {command} is no command{hint}; `tracklight --help` lists them")
    print("tracklight COMMAND ...; `tracklight COMMAND --help` explains one\n")
    print("  train       Train what the words describe.")
    for name in COMMANDS:
        print(f"  {name:<11} {help_of(name).splitlines()[0]}")


def _train(summary: dict[str, Any], cfg: Any) -> Any:
    from tracklight.experiment.train import run

    return run(cfg, summary=summary)


def check_project(warn: bool = False) -> None:
    """Raise BadInput if what makes the project is not right; warn once of what may not be meant."""
    if PROJECT.problem:
        raise BadInput(PROJECT.problem)
    for text in sorted({*PROJECT.warnings()} - _warned) if warn else ():
        _warned.add(text)
        warnings.warn(text, stacklevel=1)


def quiet() -> None:
    """Switch off usage reporting and advertising of every library, in child processes too."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    with suppress(OSError):  # of a container that does not tell its load
        if os.getloadavg()[0] >= CROWDED * (os.cpu_count() or 1):
            os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # the bits stay; GOMP_SPINCOUNT would win
    # Libraries warn while they are imported, so that under PYTHONWARNINGS=error none could be.
    if strict := [option for option in sys.warnoptions if option.startswith("error")]:
        sys.warnoptions[:] = [option for option in sys.warnoptions if option not in strict]
        os.environ["PYTHONWARNINGS"] = ",".join(sys.warnoptions)
        filters: Any = warnings.filters
        filters[:] = [each for each in filters if each[0] != "error"]
    # Lightning asks PyTorch about pytrees in a way that PyTorch has since renamed.
    warnings.filterwarnings("ignore", ".*treespec, LeafSpec", FutureWarning)
    # On a cluster's login node, too, where one process is what is wanted.
    warnings.filterwarnings("ignore", "The `srun` command is available on your system but is not used")
    # conf/hydra/launcher/ray.yaml, which is named as the plugin's own.
    warnings.filterwarnings("ignore", "\n'hydra/launcher/ray' is validated against")
    warnings.filterwarnings("ignore", "IProgress not found")  # tqdm's, in a notebook without ipywidgets
    lightning = logging.getLogger("pytorch_lightning.utilities.rank_zero")
    lightning.addFilter(lambda record: not record.getMessage().startswith("💡 Tip:"))
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns of a home that cannot be written
    redact_messages()


def _escape(characters: re.Pattern[str], text: str) -> str:
    return characters.sub(lambda found: ascii(found[0])[1:-1], text)


class _SafeStream:
    """A standard stream that cannot fail: once its reader or its disk is gone, it discards."""

    def __init__(self, stream: TextIO | None, descriptor: int):
        try:
            os.fstat(descriptor)
        except OSError:  # closed by the shell; a file opened later would be printed into
            os.dup2(os.open(os.devnull, os.O_RDWR), descriptor)
        self._stream = stream or os.fdopen(descriptor, "w", closefd=False)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write, control characters escaped but those of `_STEERING`'s exceptions; or discard."""
        escaped = _escape(_STEERING, text)
        self._attempt(lambda: self._stream.write(escaped))
        return len(text)

    def flush(self) -> None:
        """Flush, or discard."""
        self._attempt(self._stream.flush)

    def _attempt(self, call: Callable[[], Any]) -> None:
        try:
            call()
        except (OSError, ValueError):  # broken pipe, full disk, terminal gone; or closed
            with suppress(OSError, ValueError):  # what is buffered goes there, too
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


@contextmanager
def _safe_streams() -> Iterator[None]:
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = streams = _SafeStream(sys.stdout, 1), _SafeStream(sys.stderr, 2)
    try:
        yield
    finally:
        for stream in streams:
            stream.flush()
        if None not in before:
            sys.stdout, sys.stderr = before


@contextmanager
def _exit_codes() -> Iterator[None]:
    """Exit with the code of an error, its message on stderr."""
    quiet()
    # Until the engine's handlers take over: exit as usual, so that what needs clearing up is.
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup does
            signal.signal(number, lambda number, frame: sys.exit(128 + number))
    with _safe_streams(), _exit_on_error():
        check_project()
        check_ranks()
        yield


@contextmanager
def _exit_on_error() -> Iterator[None]:
    try:
        yield
    except SystemExit:
        raise
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except (BadInput, RunFailed) as error:
        print(f"error: {_escape(CONTROL, redact(' '.join(str(error).split())))}", file=sys.stderr)
        sys.exit(2 if isinstance(error, BadInput) else 1)
    except BaseException as error:
        if isinstance(number := getattr(error, "signum", None), int):  # of engine.signals.Stopped
            sys.exit(128 + number)
        text = redact("".join(traceback.format_exception(error)))
        if isinstance(error, BlockingIOError) or "start new thread" in str(error):
            text = "error: no further process or thread can be started; is `ulimit -u` too low?\n"
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            text = redact(f"error: {error.strerror}{f': {error.filename}' if error.filename else ''}\n")
        print(text, file=sys.stderr, end="")
        sys.exit(1)


def _run(task: Task | None, argv: Sequence[str]) -> Any:
    summary: dict[str, Any] = {}
    task = task or partial(_train, summary)
    rank_zero = read_rank_zero_run()
    if rank_zero is not None:
        return task(resolve_config(OmegaConf.create(dict(rank_zero.cfg))))
    check_project(warn=True)
    args = parse_flags(flags_parser(), argv)
    multirun = args.multirun or "hydra.mode=multirun" in map(str.lower, args.overrides)
    flags = {name: value for name, value in vars(args).items() if name != "overrides"}
    args.overrides = check_overrides(args.overrides, multirun=multirun)
    with redirect_stdout(sys.stderr) if flags.pop("json") else nullcontext():
        if multirun or any(value not in (None, False) for value in flags.values()):
            result = _run_through_hydra(task, args)
        else:
            result = task(compose_run(args.overrides))
    if args.json:
        if multirun:
            from tracklight.sweep.sweeper import summary
        print(json.dumps(summary, indent=1))
    return result


def compose_run(overrides: Sequence[str]) -> Any:
    """Compose the config of a single run, and choose the folder of its temporary files."""
    now, later = split_for_resume(overrides)
    cfg = compose(now)
    cfg.overrides = later
    if cfg.tracking.enabled:  # or it is refused after seconds of imports
        resolve_uri(cfg.tracking.uri, Path(cfg.tracking.dir))
    choose_temporary_folder(Path(cfg.tracking.dir))  # before anything is imported that asks for one
    return cfg


def _run_through_hydra(task: Task, args: Namespace) -> Any:
    """Let Hydra act on its flags: -m, --help, --cfg, --config-dir and so on."""
    composed: list[Any] = []

    def run_job(cfg: Any) -> Any:
        if args.multirun:
            return task(resolve_composed(cfg))
        try:
            composed.append(resolve_composed(cfg))
        except BadInput as error:  # raised here, Hydra would print a line of its own
            composed.append(error)

    prints = args.help or args.hydra_help or args.cfg or args.info is not None
    printed = io.StringIO()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come out as they are
    try:
        with redirect_stdout(printed) if prints else nullcontext():
            check_nodes = partial(check_hydra_nodes, allowed=allowed_targets())
            run_hydra(flags_parser(), args, run_job, check_nodes)
    except Exception as error:  # of a single run, only Hydra's and OmegaConf's: nothing of it has begun
        by_hydra = HydraException | OmegaConfBaseException | YAMLError | UnicodeDecodeError
        is_other = args.multirun and not isinstance(error, by_hydra)
        if isinstance(error, BadInput | InstantiationException) or is_other:
            raise
        raise BadInput(explain(error, args.overrides, args.config_dir)) from error
    finally:
        print(redact(printed.getvalue()).replace("python train.py", TRAIN), end="")
    if composed and isinstance(composed[0], BadInput):
        raise composed[0]
    if not composed:
        return None
    choose_temporary_folder(Path(composed[0].tracking.dir))
    return task(composed[0])
