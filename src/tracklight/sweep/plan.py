"""The points of a sweep: composed by Hydra, checked as single runs are, and identified."""

import copy
import hashlib
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_loader import ConfigLoader
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf, open_dict

from tracklight.config import compose as config
from tracklight.config.hardware import count_cores, count_gpus, num_devices
from tracklight.config.rules import check_values
from tracklight.errors import BadInput
from tracklight.runs.leaderboard import short_names
from tracklight.sweep.samplers import Methods
from tracklight.sweep.space import Space, read_space
from tracklight.sweep.trial import TrialSpec


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


pass

BASIC = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
JOBLIB = "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher"
HERE = (BASIC, JOBLIB)  # launchers whose trials run on this machine
OUTSIDE = ("sweep", "tracking", "resume", "allow_changes", "allowed_targets", "hydra")
TRIALS = 20  # of a search, unless told


@dataclass
class Plan:
    """A sweep, read and checked; nothing has run.

    Args:
        master: The config of the whole command.
        context: Hydra's.
        settings: The `sweep` group.
        space: What varies.
        composer: Makes configs of points.
        points: Of a grid, the runs of each point; of a search, the corners of its space.
        metric: `score.metric`.
        mode: `score.mode`.
    """

    master: DictConfig
    context: HydraContext
    settings: dict[str, Any]
    space: Space
    composer: Composer
    points: list[list[Job]]
    metric: str
    mode: str

    @classmethod
    def of(cls, arguments: list[str], master: DictConfig, context: HydraContext) -> "Plan":
        """Read and check a sweep.

        Raises:
            BadInput: Something is wrong with it.
        """
        settings = OmegaConf.to_container(master.sweep, resolve=True)
        assert isinstance(settings, dict)
        settings = {str(key): value for key, value in settings.items()}
        check_values({"sweep": settings})
        space = read_space(arguments, settings["space"] or {}, context.config_loader)
        searched = space.has_interval or settings["trials"] is not None
        _check_space(space, searched, settings)
        here = master.hydra.launcher._target_ in HERE
        composer = Composer(context.config_loader, master, space, here)
        seeds = settings["seeds"] if isinstance(settings["seeds"], int) else 1
        if searched:
            points = [[_corner(composer, n, each)] for n, each in enumerate(space.corners())]
        else:
            points = [
                [composer.job(number, each, seed) for seed in range(max(1, seeds))]
                for number, each in enumerate(space.grid())
            ]
        points = list({jobs[0].key: jobs for jobs in points}.values())
        metric, mode = check_scores([jobs[0] for jobs in points])
        plan = cls(master, context, settings, space, composer, points, metric, mode)
        _check_points(points, plan.methods, settings["storage"])
        if searched or settings["pruner"] != "none" or settings["pruner_options"]:
            plan.methods.check(space.distributions() if searched else {})
        return plan

    @property
    def is_search(self) -> bool:
        """Whether Optuna draws the points."""
        return self.space.has_interval or self.settings["trials"] is not None

    @cached_property
    def total(self) -> int | None:
        """Trials of a search; None for a grid."""
        if not self.is_search:
            return None
        total = self.settings["trials"] or TRIALS
        if self.settings["sampler"] == "grid":
            num_cells = 1
            for cells in self.methods.cells(self.space.distributions()).values():
                num_cells *= len(cells)
            total = min(total, num_cells)
        return total

    @cached_property
    def methods(self) -> Methods:
        """How it searches and prunes."""
        first = self.points[0][0].cfg
        return Methods(
            self.settings["sampler"],
            self.settings["sampler_options"] or {},
            self.settings["pruner"],
            self.settings["pruner_options"] or {},
            first.seed,
            first.trainer.max_epochs,
        )

    @property
    def identity(self) -> str:
        """Digest of all that makes it this sweep; how many trials or points is not part of it."""
        chosen = ("pruner", "pruner_options")
        searched = ("sampler", "sampler_options", "seeds")
        keys = (*chosen, *searched) if self.is_search else chosen
        how = {key: self.settings[key] for key in keys} | {"score": [self.metric, self.mode]}
        how["is_mean"] = self.settings["seeds"] > 1  # means and single scores are not one ranking
        return sweep_identity(self.composer.shared(), self.space, how, self.is_search)

    @property
    def launcher(self) -> str | None:
        """The launcher that was chosen instead of our own processes."""
        target = self.master.hydra.launcher._target_
        return None if target == BASIC else target

    @property
    def remarks(self) -> list[str]:
        """What of the settings has no effect here, a line each."""
        told = []
        sampler = self.settings["sampler"]
        if self.launcher and self.methods.prunes:
            told.append("pruning needs trials in processes of our own: sweep.pruner ignored")
        if not self.is_search and (sampler != "tpe" or self.settings["sampler_options"]):
            told.append("lists alone are a grid: sweep.sampler needs sweep.trials")
        if self.launcher not in (None, *HERE) and self.points[0][0].cfg.num_threads is None:
            told.append(
                f"trials take {self.threads} threads each, this machine's cores shared out; "
                "num_threads=N for those of another"
            )
        if self.is_search and sampler == "cmaes":
            listed = [axis.name for axis in self.space.axes if not axis.is_numeric]
            if len(self.space.axes) - len(listed) < 2:
                listed = [axis.name for axis in self.space.axes]
            if listed:
                told.append(
                    f"sweep.sampler=cmaes draws {', '.join(listed)} at random: it needs two ranges "
                    "of numbers at least, and no lists"
                )
        return told

    @property
    def gpus(self) -> int:
        """How many GPUs the trials share, one each; 0 on the CPU."""
        trainer = self.points[0][0].cfg.trainer
        if trainer.accelerator not in ("auto", "gpu", "cuda") or num_devices(trainer.devices) != 1:
            return 0
        return count_gpus() or 0

    @property
    def threads(self) -> int:
        """Threads of a trial: the cores, shared out."""
        return max(1, count_cores() // self.settings["workers"])

    def pin(self, threads: int) -> None:
        """Fix the number of threads: it is part of what a trial is."""
        self.points = [[pinned(job, threads) for job in jobs] for jobs in self.points]

    def listing(self) -> str:
        """Tell what would run, a line each."""
        runs = f", {self.settings['seeds']} seeds each" if self.settings["seeds"] > 1 else ""
        if self.is_search:
            told = [f"{self.total} trials{runs} by {self.settings['sampler']}, of"]
            told += [f"  {name} = {values}" for name, values in self.space.written().items()]
        else:
            told = [f"{len(self.points)} points{runs}"]
            for number, jobs in enumerate(self.points):
                told.append(f"  {number}  " + " ".join(self.space.words(jobs[0].params)))
        how = f"{self.settings['workers']} at once, ranked by {self.metric} ({self.mode})"
        return "\n".join([*told, how, *self.remarks])


def _check_space(space: Space, searched: bool, settings: Mapping[str, Any]) -> None:
    if not space.axes and (searched or settings["seeds"] == 1):
        raise BadInput(
            "nothing varies in this sweep; give a key several values, optimizer.lr=0.1,0.01 or "
            "'optimizer.lr=interval(0.01,0.1)', or drop -m"
        )
    for axis in space.axes:
        if axis.name.partition("@")[0].partition(".")[0] in OUTSIDE:
            raise BadInput(
                f"{axis.name}={axis.written}: {axis.name} is of the command as a whole, and cannot "
                "vary within a sweep; give it one value"
            )
        axis.check(searched)
    if importlib.util.find_spec("optuna") is None:
        raise BadInput("sweeps need Optuna and Plotly: pip install 'tracklight[sweep]'")
    if settings["seeds"] != 1 and any(axis.name == "seed" for axis in space.axes):
        raise BadInput(
            f"seed varies already; drop it, or sweep.seeds={settings['seeds']} which runs each "
            "point with that many seeds"
        )


def _check_points(points: list[list[Job]], methods: Methods, storage: str | None) -> None:
    cfg = points[0][0].cfg
    if storage and not cfg.tracking.enabled:
        raise BadInput(
            "sweep.storage remembers trials whose runs MLflow has; drop it, or tracking=none"
        )
    if cfg.resume not in (None, "auto"):
        raise BadInput(
            f"resume={cfg.resume} is one run, and -m makes several; drop -m, or drop resume: a "
            "sweep continues by itself"
        )
    if methods.prunes and num_devices(cfg.trainer.devices) != 1:
        raise BadInput(
            f"sweep.pruner={methods.pruner_name} needs trials on one device, not trainer.devices="
            f"{cfg.trainer.devices}; try sweep.pruner=none"
        )


def _corner(composer: Composer, number: int, params: Mapping[str, str]) -> Job:
    try:
        return composer.job(number, params)
    except BadInput as error:
        for axis in composer.space.axes:
            refused = f"{axis.name}={params[axis.name]} must be a whole number"
            if axis.is_interval and refused in str(error):
                whole = f"whole numbers alone are {axis.name}=int({axis.written})"
                raise BadInput(f"{error}; {whole}") from None
        raise


def assign(job: Job, **further: Any) -> TrialSpec:
    """Return what a run's process is told."""
    cfg = OmegaConf.to_container(job.cfg)
    assert isinstance(cfg, dict)
    cfg["trainer"]["enable_progress_bar"] = False
    cfg["tracking"]["run_name"] = job.name.replace("${", "{")  # text, not to be resolved
    cfg["resume"] = None
    kept = [word for word in job.words if word.partition("=")[0] != "num_threads"]
    words = (*kept, f"num_threads={job.cfg.num_threads}", "trainer.enable_progress_bar=false")
    return TrialSpec({str(key): value for key, value in cfg.items()}, words, **further)
