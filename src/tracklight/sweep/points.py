"""The points of a sweep: composed by Hydra, checked as single runs are, and identified."""

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_loader import ConfigLoader
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf, open_dict

from tracklight import config
from tracklight.errors import BadInput
from tracklight.sweep.leaderboard import short_names
from tracklight.sweep.space import Space


@dataclass(frozen=True)
class Job:
    """One run of a point: the point under one seed.

    Args:
        number: The trial's, counted from 0.
        params: What varies, axis name to text.
        cfg: The resolved config.
        words: The overrides that make it.
        key: The point's and the seed's identity.
    """

    number: int
    params: dict[str, str]
    cfg: DictConfig
    words: list[str]
    key: str

    @property
    def name(self) -> str:
        """Tell the trial in a line: its number and what varies."""
        seed = "" if "seed" in self.params else f" seed={self.cfg.seed}"
        return f"{self.number} {shown(self.params)}{seed}"

    def numbered(self, number: int) -> "Job":
        """Return it as part of another trial."""
        return replace(self, number=number)


def shown(params: Mapping[str, str]) -> str:
    """Lay out what varies, keys by their last part and numbers with five digits."""
    names = short_names([*params])
    return " ".join(
        f"{n}={short_value(text)}" for n, text in zip(names, params.values(), strict=True)
    )


def short_value(text: str) -> str:
    """Return a number with five digits, anything else as it is."""
    try:
        number = float(text)
    except ValueError:
        return text
    return text if len(text) < 8 else f"{number:.5g}"


def pinned(job: Job, threads: int) -> Job:
    """Write the number of threads into a run's config, if it leaves that open."""
    if job.cfg.num_threads is None:
        job.cfg.num_threads = threads
    return replace(job, key=_key(job.cfg, job.params))


class Composer:
    """Turns points into configs; what all points share is composed once.

    Attributes:
        space: What varies.

    Args:
        loader: Hydra's.
        master: The config of the whole command.
        space: What varies.
        here: Whether trials run on this machine.
    """

    def __init__(self, loader: ConfigLoader, master: DictConfig, space: Space, here: bool):
        self._loader = loader
        self._master = master
        self.space = space
        self._here = here
        self._parser = OverridesParser.create(config_loader=loader)
        self._templates: dict[tuple[str, ...], tuple[DictConfig, DictConfig]] = {}
        self._checked: set[tuple[str, ...]] = set()

    def job(self, number: int, params: Mapping[str, str], seed: int | None = None) -> Job:
        """Compose one run of a point.

        Args:
            number: The trial's.
            params: Axis name to text.
            seed: How far to move the seed; None leaves it.

        Raises:
            BadInput: The point is no valid config.
        """
        words = self.space.words(params)
        is_group = [self._is_group(word) for word in words]
        groups = tuple(word for word, group in zip(words, is_group, strict=True) if group)
        dotted = [word for word, group in zip(words, is_group, strict=True) if not group]
        hydra, template = self._template(groups)
        HydraConfig.instance().set_config(hydra)
        cfg = copy.deepcopy(template)
        parsed = self._parser.parse_overrides(dotted)
        ConfigLoaderImpl._apply_overrides_to_config(parsed, cfg)  # as Hydra ends a composition
        if seed:
            cfg.seed += seed
        check = config.settled if groups in self._checked else config.checked
        cfg = check(cfg, self._here)
        self._checked.add(groups)
        moved = [f"seed={cfg.seed}"] if seed else []
        return Job(
            number,
            dict(params),
            cfg,
            [*self.space.fixed, *words, *moved],
            _key(cfg, params),
        )

    def shared(self) -> DictConfig:
        """Return what the points share, before any of them sets its own."""
        return copy.deepcopy(self._template(())[1])

    def _is_group(self, word: str) -> bool:
        key = word.partition("=")[0].lstrip("+~").partition("@")[0]
        return "." not in key and bool(self._loader.get_group_options(key))

    def _template(self, groups: tuple[str, ...]) -> tuple[DictConfig, DictConfig]:
        if groups not in self._templates:
            words = [*self.space.fixed, *groups]
            full = self._loader.load_sweep_config(self._master, words)
            template = copy.deepcopy(full)
            with open_dict(template):
                del template["hydra"]
            self._templates[groups] = (full, template)
        return self._templates[groups]


def _key(cfg: DictConfig, params: Mapping[str, str]) -> str:
    """Identify a run of a sweep by its resolved config: its identity, and what varies outside."""
    decides = config.deciding(cfg)
    beside = sorted(
        (key, text) for key, text in params.items() if "." in key and key not in decides
    )
    parts = [config.identity(cfg), cfg.trainer.max_epochs, beside]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def params_key(params: Mapping[str, str]) -> str:
    """Identify a point that is no valid config, which has no identity of its own."""
    return hashlib.sha256(json.dumps(dict(params)).encode()).hexdigest()


def sweep_identity(cfg: DictConfig, space: Space, how: Mapping[str, Any], is_search: bool) -> str:
    """Identify a sweep by what its points share and by what it varies.

    A grid is the same whatever the values on its axes, so that it can be extended.

    Args:
        cfg: What the points share; changed.
        space: What varies.
        how: What else decides which trials run, and how far.
        is_search: Whether Optuna draws the points.
    """
    names = [axis.name.partition("@")[0] for axis in space.axes]
    for name in names:
        if OmegaConf.select(cfg, name, throw_on_missing=False) is None and "." in name:
            OmegaConf.update(cfg, name, 0, force_add=True)
    tree = config.deciding(cfg) | {"trainer.max_epochs": cfg.trainer.max_epochs}
    shared = {
        key: value
        for key, value in tree.items()
        if not any(key == name or key.startswith(f"{name}.") for name in names)
    }
    varied: Any = space.written() if is_search else sorted(names)
    parts = [is_search, shared, varied, dict(how)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def check_scores(jobs: list[Job]) -> tuple[str, str]:
    """Return the metric and the mode by which all points are ranked.

    Raises:
        BadInput: They are scored by different metrics.
    """
    scores = dict.fromkeys((job.cfg.score.metric, job.cfg.score.mode) for job in jobs)
    if len(scores) > 1:
        told = ", ".join(f"{metric} ({mode})" for metric, mode in scores)
        raise BadInput(
            f"the points are scored by different metrics, {told}, and cannot be ranked; "
            "set score.metric and score.mode for all of them"
        )
    return next(iter(scores))
