"""Plan a sweep: compose and check the configs of its trials before the first one starts."""

import importlib.util
import math
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf

from tracklight.config import compose
from tracklight.config.hardware import count_gpus, default_threads, num_devices
from tracklight.config.hydra_internals import apply_parsed_overrides
from tracklight.config.overrides import explaining
from tracklight.config.rules import check_values
from tracklight.errors import BadInput
from tracklight.runs.leaderboard import short_names
from tracklight.sweep.space import read_space
from tracklight.sweep.trial import TrialSpec

if TYPE_CHECKING:
    from tracklight.sweep.study import OptunaSettings

BASIC_LAUNCHER = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
JOBLIB_LAUNCHER = "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher"  # local
POPULATION_LAUNCHER = "hydra_plugins.tracklight.launcher.PopulationLauncher"
NOT_SWEEPABLE = ("sweep", "tracking", "resume", "allow_changes", "overrides", "allowed_targets", "hydra")
DEFAULT_TRIALS = 20  # of a search
WARMUP_KEYS = ("warmup_trials", "warmup_epochs")


@dataclass(frozen=True)
class Job:
    """One job of a multirun, as Hydra calls it: a trial's config under one seed."""

    number: int  # of the trial, from 0
    params: dict[str, str]  # name of each axis to its value as text
    cfg: dict[str, Any]  # resolved, plain values
    overrides: list[str]  # that compose it
    key: str  # digest of the config; jobs of one key have one result

    @property
    def name(self) -> str:
        """The trial's number, its params, the seed and the fold."""
        repeated = {} if "seed" in self.params else {"seed": str(self.cfg["seed"])}
        data = self.cfg.get("data", {})
        folds = data.get("num_folds") and "data.fold" not in self.params
        repeated |= {"fold": str(data["fold"])} if folds else {}
        return f"{self.number} {format_params({**self.params, **repeated})}"


def format_params(params: Mapping[str, str]) -> str:
    """Format params in one line, keys by their last part and numbers with five digits."""
    pairs = zip(short_names([*params]), params.values(), strict=True)
    return " ".join(f"{name}={format_number(text)}" for name, text in pairs)


def format_number(text: str) -> str:
    """Shorten a number to five digits; return any other text unchanged."""
    try:
        return text if len(text) < 8 else f"{float(text):.5g}"
    except ValueError:
        return text


def with_num_threads(job: Job, num_threads: int) -> Job:
    """Set the number of threads, which changes results, in a job's config, unless the user has."""
    if job.cfg["num_threads"] is not None:
        return job
    cfg = job.cfg | {"num_threads": num_threads}
    return replace(job, cfg=cfg, key=_job_key(cfg, job.params))


def make_trial_spec(job: Job, **options: Any) -> TrialSpec:
    """Return what the process of a job needs; `options` are further arguments of `TrialSpec`."""
    trainer = job.cfg["trainer"] | {"enable_progress_bar": False}
    tracking = job.cfg["tracking"] | {"run_name": job.name.replace("${", "{")}  # not an interpolation
    cfg = job.cfg | {"trainer": trainer, "tracking": tracking, "resume": None}
    kept = [each for each in job.overrides if each.partition("=")[0] != "num_threads"]
    fixed = (f"num_threads={cfg['num_threads']}", "trainer.enable_progress_bar=false")
    return TrialSpec(cfg, (*kept, *fixed), **options)


def _job_key(cfg: Mapping[str, Any], params: Mapping[str, str]) -> str:
    keys = compose.result_keys(cfg)
    others = sorted((key, text) for key, text in params.items() if "." in key and key not in keys)
    return compose.json_digest([compose.json_digest(keys), cfg["trainer"]["max_epochs"], others])


class Plan:
    """A sweep that is read and checked, and has not started."""

    def __init__(self, overrides: list[str], master: DictConfig, context: HydraContext):
        settings: Any = OmegaConf.to_container(master.sweep, resolve=True)
        check_values({"sweep": settings})
        self.master = master
        self.context = context
        self.settings: dict[str, Any] = settings  # the config group `sweep`
        self._loader = context.config_loader
        self.space = read_space(overrides, settings["space"] or {}, self._loader)
        axes = self.space.axes
        # Whether Optuna samples the trials; otherwise they are a grid.
        self.is_search = settings["trials"] is not None or any(axis.is_interval for axis in axes)
        self.num_folds: int = settings["folds"] or 1
        self.num_runs: int = settings["seeds"] * self.num_folds  # of each trial
        self._check_space()
        target = master.hydra.launcher._target_
        is_population = target == POPULATION_LAUNCHER
        self.population: Any = master.hydra.launcher if is_population else None  # its settings
        # None for our own processes.
        self.launcher: str | None = None if is_population or target == BASIC_LAUNCHER else target
        self.prunes: bool = settings["pruner"] != "none"
        self.num_threads = default_threads(settings["workers"])  # of each trial
        self._parser = OverridesParser.create(config_loader=self._loader)
        keys = [axis.override.key_or_group for axis in axes]
        self._is_group = ["." not in k and bool(self._loader.get_group_options(k)) for k in keys]
        self._composed: dict[tuple[str, ...], tuple[Any, bytes]] = {}  # by groups: HydraConfig, config
        self._checked: set[tuple[str, ...]] = set()
        if self.is_search:
            configs = [[self._compose_corner(n, c)] for n, c in enumerate(self.space.corners())]
        else:
            configs = [
                [self.compose(number, params, index) for index in range(self.num_runs)]
                for number, params in enumerate(self.space.grid())
            ]
        distinct: dict[str, list[Job]] = {}
        for jobs in configs:
            distinct.setdefault(jobs[0].key, jobs)
        # Of a grid, the jobs of each config, one a seed; of a search, one job for each corner of the space.
        self.configs = [*distinct.values()]
        self.first_cfg = compose.to_config(self.configs[0][0].cfg)
        self.metric, self.mode = self.first_cfg.score.metric, self.first_cfg.score.mode
        self._check_configs()
        trainer = self.first_cfg.trainer
        is_single = num_devices(trainer.devices) == 1
        may_use_gpu = is_single and trainer.accelerator in ("auto", "gpu", "cuda")
        self.num_gpus = (count_gpus() or 0) if may_use_gpu else 0  # that trials share, one each
        if self.is_search or self.prunes or settings["pruner_options"]:
            self.optuna_settings.check(self.space.distributions() if self.is_search else {})

    def compose(self, number: int, params: Mapping[str, str], index: int = 0) -> Job:
        """Compose the config of a trial's run at `index`, its seed and fold; refuse one that is not valid."""
        overrides = self.space.overrides(params)
        pairs = list(zip(overrides, self._is_group, strict=True))
        groups = tuple(override for override, is_group in pairs if is_group)
        dotted = [override for override, is_group in pairs if not is_group]
        with explaining(dotted):
            composed = self._compose_groups(groups)
            apply_parsed_overrides(self._parser.parse_overrides(dotted), composed)
            seed_offset, fold = divmod(index, self.num_folds)
            repeated = [f"seed={composed.seed + seed_offset}"] if seed_offset else []
            folds = [f"data.fold={fold}", f"data.num_folds={self.num_folds}"]
            repeated += folds if self.num_folds > 1 else []
            apply_parsed_overrides(self._parser.parse_overrides(repeated), composed)
        overrides += repeated
        is_local = self.launcher in (None, JOBLIB_LAUNCHER)
        if groups not in self._checked:
            compose.check_composed(composed)
        cfg = compose.resolve_values(composed, is_local)
        self._checked.add(groups)
        key = _job_key(cfg, params)
        return Job(number, dict(params), cfg, [*self.space.fixed, *overrides], key)

    def compose_jobs(self, number: int, params: Mapping[str, str], num_runs: int) -> list[Job]:
        """Compose and check the configs of a trial, one per seed and fold, with the number of threads."""
        jobs = [self.compose(number, params, index) for index in range(num_runs)]
        return [with_num_threads(job, self.num_threads) for job in jobs]

    def _compose_groups(self, groups: tuple[str, ...]) -> DictConfig:
        """Return a copy of the config with the fixed overrides and these group choices."""
        if groups not in self._composed:
            composed = self._loader.load_sweep_config(self.master, [*self.space.fixed, *groups])
            HydraConfig.instance().set_config(composed)
            cfg = OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])
            compose.set_allowed_targets(cfg)
            OmegaConf.set_struct(cfg, True)
            self._composed[groups] = HydraConfig.instance().cfg, pickle.dumps(cfg)
        HydraConfig.instance().cfg, copied = self._composed[groups]
        return pickle.loads(copied)  # ten times as fast as OmegaConf's copies

    @cached_property
    def optuna_settings(self) -> "OptunaSettings":
        """The sampler and the pruner."""
        from tracklight.sweep.study import OptunaSettings  # its import takes 2 s

        cfg, keys = self.first_cfg, ("sampler", "sampler_options", "pruner", "pruner_options")
        options: dict[str, Any] = {key: self.settings[key] or {} for key in keys}
        warmup = {key: self.settings[key] for key in WARMUP_KEYS}
        return OptunaSettings(**options, **warmup, seed=cfg.seed, max_epochs=cfg.trainer.max_epochs)

    @cached_property
    def num_trials(self) -> int | None:
        """Total number of trials of a search; None for a grid."""
        if not self.is_search:
            return None
        total = self.settings["trials"] or DEFAULT_TRIALS
        if self.settings["sampler"] == "grid":
            cells = self.optuna_settings.grid_cells(self.space.distributions())
            total = min(total, math.prod(map(len, cells.values())))
        return total

    @cached_property
    def digest(self) -> str:
        """Digest of what all trials share and of what varies.

        It leaves out the number of trials and the values in a grid, so a sweep can be extended.
        """
        names = [axis.name.partition("@")[0] for axis in self.space.axes]
        cfg = self._compose_groups(())
        for name in names:
            if "." in name and OmegaConf.select(cfg, name, throw_on_missing=False) is None:
                OmegaConf.update(cfg, name, 0, force_add=True)
        values = compose.result_keys(cfg) | {"trainer.max_epochs": cfg.trainer.max_epochs}
        varying = tuple(f"{name}." for name in names)
        shared = {key: value for key, value in values.items() if not f"{key}.".startswith(varying)}
        keys = ["pruner", "pruner_options"]
        keys += WARMUP_KEYS if self.prunes else ()
        keys += ["sampler", "sampler_options", "seeds"] if self.is_search else []
        settings = {key: self.settings[key] for key in keys}
        settings["score"] = [self.metric, self.mode]
        settings["is_mean"] = self.settings["seeds"] > 1  # not comparable with a single score
        settings |= {"folds": self.num_folds} if self.num_folds > 1 else {}
        varied = self.space.expressions() if self.is_search else sorted(names)
        return compose.json_digest([self.is_search, shared, varied, settings])

    @property
    def notes(self) -> list[str]:
        """A line for each setting that has no effect, or another one than expected."""
        notes = []
        sampler = self.settings["sampler"]
        if self.launcher and self.prunes and not self.settings["storage"]:
            needs = "pruning under a launcher needs sweep.storage, a database that its jobs reach"
            notes.append(f"{needs}: sweep.pruner ignored")
        if not self.is_search and (sampler != "tpe" or self.settings["sampler_options"]):
            notes.append("lists alone are a grid: sweep.sampler needs sweep.trials")
        num_points = 0 if self.is_search else math.prod(axis.num_given for axis in self.space.axes)
        if num_points > (num := len(self.configs)):
            points = f"{num_points} points of the grid, {num} of them different"
            notes.append(f"{points}: each of these trains once")
        if self.launcher not in (None, JOBLIB_LAUNCHER) and self.first_cfg.num_threads is None:
            threads = f"{self.num_threads} threads each, this machine's cores divided by sweep.workers"
            notes.append(f"trials use {threads}; num_threads=N for those of another")
        if self.is_search and sampler == "cmaes":
            random = [axis.name for axis in self.space.axes if not axis.is_numeric]
            if len(self.space.axes) - len(random) < 2:
                random = [axis.name for axis in self.space.axes]
            if random:
                needs = "it needs two ranges of numbers at least, and no lists"
                notes.append(f"sweep.sampler=cmaes draws {', '.join(random)} at random: {needs}")
        return notes

    def describe(self) -> str:
        """List what would run."""
        seeds = f", {self.settings['seeds']} seeds each" if self.settings["seeds"] > 1 else ""
        seeds += f", {self.num_folds} folds each" if self.num_folds > 1 else ""
        if self.is_search:
            lines = [f"{self.num_trials} trials{seeds} by {self.settings['sampler']}, of"]
            lines += [f"  {name} = {text}" for name, text in self.space.expressions().items()]
        else:
            lines = [f"{len(self.configs)} trials{seeds}"]
            for number, jobs in enumerate(self.configs):
                lines.append(f"  {number}  {' '.join(self.space.overrides(jobs[0].params))}")
        lines.append(f"{self.settings['workers']} at once, ranked by {self.metric} ({self.mode})")
        return "\n".join([*lines, *self.notes])

    def _check_space(self) -> None:
        axes, seeds = self.space.axes, self.settings["seeds"]
        if not axes and (self.is_search or self.num_runs == 1):
            values = "optimizer.lr=0.1,0.01 or 'optimizer.lr=interval(0.01,0.1)'"
            raise BadInput(f"nothing varies in this sweep; give a key several values, {values}, or drop -m")
        for axis in axes:
            if axis.name.partition("@")[0].partition(".")[0] in NOT_SWEEPABLE:
                why = f"{axis.name} is of the command as a whole, and cannot vary within a sweep"
                raise BadInput(f"{axis.name}={axis.expression}: {why}; give it one value")
            axis.check(self.is_search)
        if importlib.util.find_spec("optuna") is None:
            raise BadInput("sweeps need Optuna and Plotly: pip install 'tracklight[sweep]'")
        if seeds != 1 and any(axis.name == "seed" for axis in axes):
            raise BadInput(f"seed varies already; drop it, or sweep.seeds={seeds}, the seeds of each trial")
        if self.num_folds > 1 and any(axis.name in ("data.fold", "data.num_folds") for axis in axes):
            raise BadInput("sweep.folds sets data.fold and data.num_folds; drop them, or sweep.folds")

    def _compose_corner(self, number: int, params: Mapping[str, str]) -> Job:
        try:
            return self.compose(number, params)
        except BadInput as error:
            for axis in self.space.axes:
                reason = f"{axis.name}={params[axis.name]} must be a whole number"
                if axis.is_interval and reason in str(error):
                    hint = f"whole numbers alone are {axis.name}=int({axis.expression})"
                    raise BadInput(f"{error}; {hint}") from None
            raise

    def _check_configs(self) -> None:
        cfg, scored = self.first_cfg, (jobs[0].cfg["score"] for jobs in self.configs)
        scores = {(each["metric"], each["mode"]): None for each in scored}
        if len(scores) > 1:
            metrics = ", ".join(f"{metric} ({mode})" for metric, mode in scores)
            problem = f"the trials are scored by different metrics, {metrics}, and cannot be ranked"
            raise BadInput(f"{problem}; set score.metric and score.mode for all of them")
        if self.num_folds > 1 and not str(self.metric).startswith("val"):
            problem = f"sweep.folds ranks by validation, not by {self.metric}"
            raise BadInput(f"{problem}; try score.metric=val/loss")
        if self.metric is None:
            raise BadInput("score.metric=null ranks no trials; set score.metric=METRIC score.mode=min or max")
        if self.settings["storage"] and not cfg.tracking.enabled:
            raise BadInput("sweep.storage remembers trials whose runs MLflow has; drop it, or tracking=none")
        if cfg.resume not in (None, "auto"):
            raise BadInput(f"resume={cfg.resume} is one run; drop -m, or resume: a sweep continues by itself")
        if self.prunes and num_devices(cfg.trainer.devices) != 1:
            problem = f"needs trials on one device, not trainer.devices={cfg.trainer.devices}"
            raise BadInput(f"sweep.pruner={self.settings['pruner']} {problem}; try sweep.pruner=none")
