"""Hydra's command line with our gate before it: all that touches Hydra's private names.

Checked with Hydra 1.3.8. `hydra.main` instantiates callbacks and configures logging from whatever
was composed, before any code of ours runs; here the nodes are checked first.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from tracklight.config.instantiate import check_plain, check_targets, find_class, targets_of
from tracklight.errors import BadInput

PLUGINS = ("hydra_plugins", "hydra._internal.core_plugins", "hydra.experimental.callbacks")
BUILT = ("callbacks", "launcher", "sweeper")  # nodes that Hydra instantiates
LOGGING = ("job_logging", "hydra_logging")  # nodes that go to logging.config.dictConfig
FACTORIES = ("class", "()")  # keys by which those name what is called
STREAMS = ("ext://sys.stdout", "ext://sys.stderr")
INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")


def flags_parser() -> ArgumentParser:
    """Return a parser of Hydra's flags.

    Hydra's own computes a help text only when it is printed, which Python 3.14 refuses.
    """
    from hydra import __version__

    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    add = parser.add_argument
    add("overrides", nargs="*", help="KEY=VALUE, GROUP=CHOICE")
    add("--help", "-h", action="store_true", help="the keys and groups of this program")
    add("--hydra-help", action="store_true", help="Hydra's help")
    add("--version", action="version", version=f"Hydra {__version__}")
    add("--cfg", "-c", choices=("job", "hydra", "all"), help="print the config, run nothing")
    add("--resolve", action="store_true", help="with --cfg: interpolations resolved")
    add("--package", "-p", help="with --cfg: only this part")
    add("--run", "-r", action="store_true", help="a single run")
    add("--multirun", "-m", action="store_true", help="a run for each value of a list")
    add("--shell-completion", "-sc", action="store_true", help="install=SHELL or uninstall=SHELL")
    add("--config-path", "-cp", help="a folder in place of conf/")
    add("--config-name", "-cn", help="a file in place of config.yaml")
    add("--config-dir", "-cd", help="a further folder of config files, before conf/")
    add("--experimental-rerun", help="refused: it would run a pickle")
    add("--info", "-i", const="all", nargs="?", choices=INFO, help="what Hydra found")
    return parser


def run_hydra(
    arguments: Namespace,
    overrides: list[str],
    job: Callable[[DictConfig], Any],
    conf: Path,
    allowed: list[str],
) -> None:
    """Do what Hydra's flags ask for, as `hydra.main` would.

    Args:
        arguments: As `flags_parser` gave them.
        overrides: Of the command line, checked.
        job: Takes the composed config of a single run.
        conf: The folder of config files.
        allowed: Modules whose classes a node may name.

    Raises:
        BadInput: A folder is not there, or a node names what is not allowed.
        HydraException: The config cannot be composed.
    """
    from hydra._internal.hydra import Hydra
    from hydra._internal.utils import create_config_search_path
    from hydra.core.config_search_path import SearchPathQuery
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode

    name = arguments.config_name or "config"
    path = create_config_search_path(str(_folder("--config-path", arguments.config_path) or conf))
    if (further := _folder("--config-dir", arguments.config_dir)) is not None:
        path.prepend("command-line", f"file://{further}", SearchPathQuery(provider="schema"))
    hydra = Hydra.create_main_hydra2("train", path)
    try:
        mode = hydra.get_mode(name, overrides)
        mode = RunMode.MULTIRUN if arguments.multirun else mode or RunMode.RUN
        cfg = hydra.compose_config(name, overrides, mode, with_log_configuration=False)
        check_nodes(cfg.hydra, allowed)
        arguments.overrides = overrides
        if arguments.help:
            hydra.app_help(name, flags_parser(), arguments)
        elif arguments.hydra_help:
            hydra.hydra_help(name, flags_parser(), arguments)
        elif arguments.cfg:
            hydra.show_cfg(name, overrides, arguments.cfg, arguments.package, arguments.resolve)
        elif arguments.info:
            hydra.show_info(arguments.info, name, overrides)
        elif arguments.shell_completion:
            hydra.shell_completion(name, overrides)
        elif mode is RunMode.MULTIRUN:
            hydra.multirun(name, job, overrides)
        else:
            hydra.run(name, job, overrides)
    finally:
        GlobalHydra.instance().clear()


def _folder(flag: str, value: str | None) -> Path | None:
    if value is None:
        return None
    folder = Path(value).expanduser().absolute()
    if not folder.is_dir():
        raise BadInput(f"{flag} {value}: there is no such folder")
    return folder


def check_nodes(hydra: DictConfig, allowed: list[str]) -> None:
    """Refuse nodes of Hydra's own config that would build or call what is not allowed.

    Args:
        hydra: The composed node `hydra`.
        allowed: Modules, beside Hydra's plugins, whose classes may be named.

    Raises:
        BadInput: The message names the key.
    """
    trusted = [*PLUGINS, *allowed]
    for name in BUILT:
        where = f"hydra.{name}"
        tree = OmegaConf.to_container(hydra.get(name) or OmegaConf.create(), resolve=True)
        check_plain(tree, where)
        check_targets(tree, trusted, where)
        for key, target in targets_of(tree, where):
            if key != where:  # of plugins, Hydra itself takes only those that it has discovered
                find_class(target, trusted, f"{key}._target_")
    for name in LOGGING:
        tree = OmegaConf.to_container(hydra.get(name) or OmegaConf.create(), resolve=True)
        check_plain(tree, f"hydra.{name}")
        _check_logging(tree, f"hydra.{name}", ["logging", *allowed])


def _check_logging(tree: Any, where: str, allowed: list[str]) -> None:
    """Refuse what `logging.config.dictConfig` would import, call or follow."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            if name in FACTORIES:
                check_targets({"_target_": value}, allowed, f"{where}.{name}")
                find_class(value, allowed, f"{where}.{name}")
            _check_logging(value, f"{where}.{name}", allowed)
    elif isinstance(tree, list):
        for index, value in enumerate(tree):
            _check_logging(value, f"{where}[{index}]", allowed)
    elif isinstance(tree, str) and "://" in tree and tree not in STREAMS:
        raise BadInput(f"{where}={tree} is refused; it can be {' or '.join(STREAMS)}")
