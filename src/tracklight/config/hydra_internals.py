"""Hydra's command line with our gate before it: all that uses private names of Hydra or OmegaConf.

Checked with Hydra 1.3.8 and OmegaConf 2.3.1. `hydra.main` instantiates callbacks and configures
logging from whatever was composed, before any code of ours runs; here the nodes are checked first.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from tracklight.errors import BadInput
from tracklight.paths import CONF

INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")


class _FlagsParser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise BadInput(f"{message}; `python train.py --help` shows what can be given")


def parse_flags(argv: Sequence[str]) -> Namespace:
    """Parse Hydra's flags and the overrides between them."""
    for word in argv:
        if word.startswith("--") and "." in word.partition("=")[0]:
            raise BadInput(f"{word}: keys take no dashes; write {word.lstrip('-')}")
    args = _flags_parser().parse_intermixed_args(list(argv))
    if args.experimental_rerun is not None:
        raise BadInput("--experimental-rerun would run a pickle; use scripts/reproduce.py RUN_ID")
    return args


def _flags_parser() -> ArgumentParser:
    """Return a parser like Hydra's own, whose lazy help text Python 3.14 refuses."""
    parser = _FlagsParser(add_help=False, allow_abbrev=False)
    add = parser.add_argument
    add("overrides", nargs="*", help="KEY=VALUE, GROUP=CHOICE")
    add("--help", "-h", action="store_true", help="the keys and groups of this program")
    add("--hydra-help", action="store_true", help="Hydra's help")
    add("--version", action="version", version=f"Hydra {hydra.__version__}")
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
    args: Namespace, job: Callable[[DictConfig], Any], check_nodes: Callable[[DictConfig], None]
) -> None:
    """Do what Hydra's flags ask for, as `hydra.main` would.

    `check_nodes` takes the composed node `hydra` before Hydra acts on it, `job` a run's config.
    """
    name, overrides = args.config_name or "config", args.overrides
    path = create_config_search_path(_folder("--config-path", args.config_path or str(CONF)))
    if args.config_dir is not None:
        further = _folder("--config-dir", args.config_dir)
        path.prepend("command-line", f"file://{further}", SearchPathQuery(provider="schema"))
    app = Hydra.create_main_hydra2("train", path)
    try:
        mode = RunMode.MULTIRUN if args.multirun else app.get_mode(name, overrides) or RunMode.RUN
        check_nodes(app.compose_config(name, overrides, mode, with_log_configuration=False).hydra)
        if args.help:
            app.app_help(name, _flags_parser(), args)
        elif args.hydra_help:
            app.hydra_help(name, _flags_parser(), args)
        elif args.cfg:
            app.show_cfg(name, overrides, args.cfg, args.package, args.resolve)
        elif args.info:
            app.show_info(args.info, name, overrides)
        elif args.shell_completion:
            app.shell_completion(name, overrides)
        elif mode is RunMode.MULTIRUN:
            app.multirun(name, job, overrides)
        else:
            app.run(name, job, overrides)
    finally:
        GlobalHydra.instance().clear()


def _folder(flag: str, value: str) -> str:
    folder = Path(value).expanduser().absolute()
    if not folder.is_dir():
        raise BadInput(f"{flag} {value}: there is no such folder")
    return str(folder)


def full_key(node: DictConfig) -> str:
    """Return the dotted key of a node in its config, empty for the root: no public name does."""
    return node._get_full_key(None) or ""


def unresolved_root(node: Any) -> Any:
    """Return the whole config around a node, interpolations as written; {} for no node."""
    return {} if node is None else OmegaConf.to_container(node._get_root())


def apply_parsed_overrides(overrides: list[Override], cfg: DictConfig) -> None:
    """Set dotted keys as Hydra does at the end of a composition, with its checks and errors.

    Hydra offers this only as part of a whole composition, which takes 0.1 s for each trial.
    """
    ConfigLoaderImpl._apply_overrides_to_config(overrides, cfg)
