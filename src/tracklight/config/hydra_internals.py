"""Hydra's command line after our checks, and all use of private names of Hydra and OmegaConf.

Checked with Hydra 1.3.8 and 1.4.0rc3. `hydra.main` instantiates callbacks and configures logging
from whatever was composed, before any code of ours runs; here the nodes are checked first.
"""

import pickle
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
import omegaconf
from hydra import version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import ConfigSearchPath, SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from tracklight.errors import BadInput
from tracklight.paths import CONF, PROJECT

# What Hydra 1.3 has to be told, 1.4 warns of; the same of the name that OmegaConf has for a function.
VERSION_BASE: dict[str, Any] = {"version_base": "1.3"} if hydra.__version__.startswith("1.3.") else {}
_NAME = "register_new_resolver" if omegaconf.__version__ < "2.4" else "register_resolver"
register_resolver: Callable[..., None] = getattr(OmegaConf, _NAME)
_composed: dict[tuple[Any, ...], bytes] = {}  # by overrides, and by config files with their times


class _CheckedLoader(ConfigLoaderImpl):
    """Composes, and checks the node `hydra` before Hydra acts on it."""

    def __init__(self, path: ConfigSearchPath, check_nodes: Callable[[DictConfig], None]):
        super().__init__(path)
        self._check_nodes = check_nodes

    def _load_configuration_impl(self, *args: Any, **kwargs: Any) -> DictConfig:
        cfg = super()._load_configuration_impl(*args, **kwargs)  # Hydra 1.4 has several ways to it
        self._check_nodes(cfg.hydra)
        return cfg


def run_hydra(
    parser: ArgumentParser,
    args: Namespace,  # that it parsed
    job: Callable[[DictConfig], Any],  # takes a run's config
    check_nodes: Callable[[DictConfig], None],  # takes the composed node `hydra` before Hydra acts on it
) -> None:
    """Do what Hydra's flags ask for, as `hydra.main` would."""
    version.setbase(VERSION_BASE.get("version_base", version._UNSPECIFIED_))
    name, overrides = args.config_name or "config", args.overrides
    before = [] if args.config_dir is None else [_folder("--config-dir", args.config_dir)]
    path = _search_path(_folder("--config-path", args.config_path or str(CONF)), before)
    app = Hydra("train", _CheckedLoader(path, check_nodes))
    GlobalHydra.instance().initialize(app)
    try:
        mode, load = RunMode.MULTIRUN, app.config_loader.load_configuration
        if not args.multirun:  # one of the overrides may say it; composed as several runs, lists pass
            asked = load(name, overrides, mode, validate_sweep_overrides=False).hydra.mode
            mode = asked or RunMode.RUN
        if args.help:
            app.app_help(name, parser, args)
        elif args.hydra_help:
            app.hydra_help(name, parser, args)
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


@contextmanager
def initialize() -> Iterator[None]:
    """Let `hydra.compose` read the project's conf/ and ours."""
    with hydra.initialize_config_dir(str(CONF), **VERSION_BASE):
        if PROJECT.conf:
            GlobalHydra.instance().clear()
            Hydra.create_main_hydra2("app", _search_path(str(CONF)))
        yield


def compose_config(overrides: Sequence[str]) -> DictConfig:
    """Compose within `initialize` as `hydra.compose` does, the node `hydra` included.

    Hydra would read and merge all files each time, which takes 0.1 s: of what the same groups made before,
    and files that have not changed since, a copy is made, in which keys are set.
    """
    folders = [each for each in (PROJECT.conf, CONF) if each]
    files = (file for folder in folders for file in sorted(folder.rglob("*.yaml")))
    keys, others = list[Override](), list[str]()
    for each in OverridesParser.create().parse_overrides([*overrides]):
        is_group = each.package is not None or any((f / each.key_or_group).is_dir() for f in folders)
        is_special = each.is_hydra_override() or each.is_delete() or each.is_sweep_override()
        others.append(each.input_line or "") if is_group or is_special else keys.append(each)
    made_of = (*others, *((file, file.stat().st_mtime_ns) for file in files))
    if made_of not in _composed:
        _composed[made_of] = pickle.dumps(hydra.compose("config", others, return_hydra_config=True))
    cfg: DictConfig = pickle.loads(_composed[made_of])
    apply_parsed_overrides(keys, cfg)
    cfg.hydra.overrides.task += [each.input_line for each in keys]
    return cfg


def _search_path(main: str, before: Sequence[str] = ()) -> ConfigSearchPath:
    """Return where config files are looked for: in `before`, in the project's conf/, then in `main`."""
    path = create_config_search_path(main)
    for folder in (*before, *([PROJECT.conf] if PROJECT.conf else [])):
        path.prepend("tracklight", f"file://{folder}", SearchPathQuery(provider="main"))
    return path


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
