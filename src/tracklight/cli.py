"""The command line: every way to end has its exit code, and bad input is one line."""

import gc
import io
import logging
import os
import signal
import sys
import traceback
import warnings
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Any, NoReturn

from tracklight.errors import BadInput, RunFailed

Task = Callable[[Any], Any]

PACKAGE = Path(__file__).parent

# No usage reporting, no lines of advertising: set before any library is imported.
QUIET = {
    "DO_NOT_TRACK": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "RAY_USAGE_STATS_ENABLED": "0",
    "GIT_PYTHON_REFRESH": "quiet",
}

# Allocations between collections of garbage: the imports make a million objects, all to stay, and
# searching them again and again takes seconds.
SELDOM = (50_000, 10, 10)


def main(task: Task) -> Any:
    """Compose the config that the command line describes and run the task on it.

    Returns:
        What the task returns. Otherwise the process exits: 1 the run failed, 2 bad input (one line
        on stderr), 130 Ctrl-C, 143 SIGTERM.
    """
    quiet()
    gc.set_threshold(*SELDOM)
    signal.signal(signal.SIGTERM, exit_terminated)  # until the engine's handlers take over
    try:
        return _run(task, sys.argv[1:])
    except SystemExit:
        raise
    except BaseException as error:
        sys.exit(exit_code(error))
    finally:
        gc.freeze()  # else the interpreter searches a million objects on its way out


def quiet() -> None:
    """Switch off usage reporting and advertising of every library, in child processes too."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    log = logging.getLogger("pytorch_lightning.utilities.rank_zero")
    # Lightning asks PyTorch about pytrees in a way that PyTorch has since renamed.
    warnings.filterwarnings("ignore", ".*treespec, LeafSpec", FutureWarning)
    if _is_no_advertisement not in log.filters:
        log.addFilter(_is_no_advertisement)
    warnings.formatwarning = _format_warning


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: Any = None
) -> str:
    """Lay out a warning in a line; ours speak to the user, and need no place in the code."""
    ours = Path(filename).is_relative_to(PACKAGE)
    place = "" if ours else f" ({category.__name__} at {filename}:{lineno})"
    return f"warning: {message}{place}\n"


def exit_code(error: BaseException) -> int:
    """Say on stderr how the program ends, and return its exit code."""
    from tracklight.redact import redact

    signals = sys.modules.get("tracklight.engine.signals")
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT
    if signals is not None and isinstance(error, signals.Stopped):
        return 128 + int(getattr(error, "signum", signal.SIGTERM))
    if isinstance(error, BadInput | RunFailed):
        print(f"error: {redact(' '.join(str(error).split()))}", file=sys.stderr)
        return 2 if isinstance(error, BadInput) else 1
    print(redact("".join(traceback.format_exception(error))), file=sys.stderr, end="")
    return 1


def _run(task: Task, argv: Sequence[str]) -> Any:
    from omegaconf import OmegaConf

    from tracklight.config.compose import compose, settled
    from tracklight.config.overrides import read, split_for_resume
    from tracklight.engine import distributed as ranks

    leader = ranks.leader()
    if leader is not None:
        return task(settled(OmegaConf.create(dict(leader.cfg))))
    arguments = _parse(argv)
    flags = {name: value for name, value in vars(arguments).items() if name != "overrides"}
    many = arguments.multirun or "hydra.mode=multirun" in map(str.lower, arguments.overrides)
    words = read(arguments.overrides, many=many)
    if many or any(value not in (None, False) for value in flags.values()):
        return _run_through_hydra(task, arguments, words)
    now, later = split_for_resume(words)
    cfg = compose(now)
    cfg.overrides = later
    return task(cfg)


def _run_through_hydra(task: Task, arguments: Namespace, words: list[str]) -> Any:
    """Let Hydra act on its flags: -m, --help, --cfg, --config-dir and so on."""
    from hydra.errors import HydraException, InstantiationException

    from tracklight.config.compose import allowed_targets, checked, settled
    from tracklight.config.hydra_internals import run_hydra
    from tracklight.config.overrides import told
    from tracklight.paths import CONF
    from tracklight.redact import redact

    outcome: list[Any] = []

    def run_point(cfg: Any) -> Any:
        return task(settled(cfg))

    def keep(cfg: Any) -> None:
        try:
            outcome.append(checked(cfg))
        except BadInput as error:  # raised here, Hydra would print a line of its own
            outcome.append(error)

    shown = io.StringIO()
    shows = arguments.help or arguments.hydra_help or arguments.cfg or arguments.info is not None
    job = run_point if arguments.multirun else keep
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come out as they are
    try:
        with redirect_stdout(shown) if shows else nullcontext():
            run_hydra(arguments, words, job, CONF, allowed_targets())
    except HydraException as error:
        if isinstance(error, InstantiationException):
            raise
        raise BadInput(told(error)) from error
    finally:
        print(redact(shown.getvalue()), end="")
    for cfg in outcome:
        if isinstance(cfg, BadInput):
            raise cfg
        return task(cfg)
    return None


def _parse(argv: Sequence[str]) -> Namespace:
    """Parse Hydra's flags; what is wrong with them is bad input like any other."""
    from tracklight.config.hydra_internals import flags_parser

    parser = flags_parser()
    for word in argv:
        if word.startswith("--") and "." in word.partition("=")[0]:
            raise BadInput(f"{word}: keys take no dashes; write {word.lstrip('-')}")

    def fail(message: str) -> NoReturn:
        raise BadInput(f"{message}; `python train.py --help` shows what can be given")

    parser.error = fail
    arguments = parser.parse_intermixed_args(list(argv))
    if arguments.experimental_rerun is not None:
        raise BadInput("--experimental-rerun would run a pickle; use scripts/reproduce.py RUN_ID")
    return arguments


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("💡 Tip:")


def exit_terminated(signum: int, frame: Any) -> NoReturn:
    """Handle SIGTERM by leaving as from any exit, so that what is to be cleared away is."""
    sys.exit(128 + signum)
