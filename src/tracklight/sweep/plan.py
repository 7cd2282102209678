"""A sweep, read from the command line and checked, before anything runs."""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf

from tracklight.errors import BadInput
from tracklight.machine import count_cores, count_gpus, num_devices
from tracklight.rules import check_values
from tracklight.sweep.methods import Methods
from tracklight.sweep.points import Composer, Job, check_scores, pinned, sweep_identity
from tracklight.sweep.space import Space, read_space
from tracklight.sweep.trial import Assignment

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


def assign(job: Job, **further: Any) -> Assignment:
    """Return what a run's process is told."""
    cfg = OmegaConf.to_container(job.cfg)
    assert isinstance(cfg, dict)
    cfg["trainer"]["enable_progress_bar"] = False
    cfg["tracking"]["run_name"] = job.name.replace("${", "{")  # text, not to be resolved
    cfg["resume"] = None
    kept = [word for word in job.words if word.partition("=")[0] != "num_threads"]
    words = (*kept, f"num_threads={job.cfg.num_threads}", "trainer.enable_progress_bar=false")
    return Assignment({str(key): value for key, value in cfg.items()}, words, **further)
