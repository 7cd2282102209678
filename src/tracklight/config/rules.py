"""Which values a config may hold, checked without torch."""

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tracklight.config.hardware import check_machine
from tracklight.config.types import LARGEST, SHIPPED, describe, is_like, is_number, value_in_conf
from tracklight.errors import BadInput
from tracklight.paths import uri_setting

LARGEST_SEED = 2**32 - 1  # what numpy and Lightning accept
PRECISIONS = ["16-mixed", "16-true", "32-true", "64-true", "bf16-mixed", "bf16-true"]
PRECISIONS += ["transformer-engine", "transformer-engine-float16", "16", "32", "64", "bf16"]
SECTIONS = ["score", "data", "model", "optimizer", "scheduler", "trainer", "callbacks", "tracking", "sweep"]

# Trainer arguments that tracklight sets itself, and what to use instead.
OWNED = {
    "logger": "tracking=mlflow or tracking=none",
    "callbacks": "callbacks=early_stopping or a file of your own in conf/callbacks",
    "default_root_dir": "tracking.dir=FOLDER",
    "enable_checkpointing": "tracking=none (a tracked run keeps its best and its last checkpoint)",
    "barebones": "tracking=none trainer.enable_progress_bar=false",
    "enable_autolog_hparams": "tracking=none (a tracked run always records its config)",
    "model_registry": "tracking.uri=URI",
}

# Words of a metric's name that tell whether less or more of it is better.
MINIMISED = (
    "loss|error|err|gap|r?mse|mae|mape|nll|bce|kl|divergence|distance|perplexity|ppl|[wc]er|fid|ece|brier"
)
MAXIMISED = (
    "accuracy|acc|f1|auc|auroc|auprc|m?ap|precision|recall|sensitivity|specificity|r2|m?iou|dice|jaccard"
    "|bleu|rouge|psnr|ssim|pearson|spearman|kappa|mcc|reward|return"
)


class Values(NamedTuple):
    """A set of values: the predicate, and its description in error messages."""

    accepts: Callable[[Any], bool]
    description: str

    def __or__(self, other: "Values") -> "Values":
        description = f"{self.description}, or {other.description}"
        return Values(lambda value: self.accepts(value) or other.accepts(value), description)


class Rule(NamedTuple):
    """The values of one or several keys; the example is one of them."""

    keys: str
    values: Values
    example: str
    ours_only: bool = False  # a class of the user's may mean something else by the name


def _null(meaning: str = "") -> Values:
    return Values(lambda value: value is None, f"null{meaning}")


def _integer(low: int, high: int = LARGEST) -> Values:
    limits = f"{low} or more" if high == LARGEST else f"from {low} to {high}"
    return Values(lambda v: type(v) is int and low <= v <= high, f"a whole number, {limits}")


def _number(fits: Callable[[float], bool], description: str) -> Values:
    return Values(lambda v: is_number(v) and fits(v), description)


def _one_of(*choices: str) -> Values:
    description = ", ".join(choices[:-1]) + " or " + choices[-1]
    return Values(lambda value: isinstance(value, str) and value in choices, description)


def _text(pattern: str, description: str) -> Values:
    return Values(lambda v: isinstance(v, str) and bool(re.fullmatch(pattern, v)), description)


def _list_of(values: Values) -> Values:
    description = f"a list, each {values.description}"
    return Values(lambda v: isinstance(v, list) and all(map(values.accepts, v)), description)


def _is_devices(value: Any) -> bool:
    if isinstance(value, list):
        return value != [] and all(type(index) is int and index >= 0 for index in value)
    if isinstance(value, str):
        return bool(re.fullmatch(r"auto|-1|\d+(,\d+)*,?", value))
    return STEPS.accepts(value)


COUNT = _integer(1)
NULL = _null()
MAPPING = Values(lambda value: isinstance(value, Mapping), "a mapping, {KEY: VALUE}")
TAG = r"(?!(mlflow|tracklight)(\.|$))[\w.\- ]{1,250}"
TAGS = Values(
    lambda value: isinstance(value, Mapping) and all(re.fullmatch(TAG, str(key)) for key in value),
    "a mapping; names are letters, digits, blanks and any of _.-, and mlflow and tracklight are taken",
)
TIME = _text(r"\d+(:\d\d){3}", "days:hours:minutes:seconds") | MAPPING
POSITIVE = _number(lambda v: v > 0, "a finite number above 0")
NOT_NEGATIVE = _number(lambda v: v >= 0, "a finite number, 0 or more")
FRACTION = _number(lambda v: 0 <= v < 1, "a number from 0 to below 1")
RUN = "last|best|[0-9a-f]{1,32}"
RUN_ID = _text(RUN, "last, best or a run id (hexadecimal digits)")
NAME = _text(r".*\S.*", "a name")
METRIC = _text(r"\S+", "a metric's name")
TOTAL = COUNT | _null(" for the length of the run")
DATABASE = _text(
    r"(?i:sqlite(\+\w+)?:///|(postgresql|mysql|mariadb|mssql|oracle|cockroachdb)(\+\w+)?://).+",
    "a database's address, sqlite:///FILE or postgresql://HOST/NAME",
)
STORE = _text(
    r"(?i:sqlite:///|https?://|(postgresql|mysql|mssql)(\+\w+)?://).+",
    "sqlite:///FILE, http(s)://HOST:PORT, a postgresql, mysql or mssql database",
)
BATCHES = "a whole number of batches, or a fraction from 0.0 to 1.0"
LIMIT = _number(lambda v: v >= 0 and (type(v) is int or v <= 1), BATCHES)
SOME = Values(lambda v: v != 0 and LIMIT.accepts(v), "1 batch or more, or a fraction above 0, up to 1.0")
PART = _number(
    lambda v: 0 <= v < 1 or (type(v) is int and v >= 1),
    "a whole number, 0 or more, or a fraction of all below 1",
)
STEPS = Values(lambda v: type(v) is int and (v == -1 or 1 <= v <= LARGEST), "-1 or 1 or more")
AUTO = "true, false or auto, where data.root is the default"
FALLBACK = Values(lambda v: type(v) is bool or v == "auto", AUTO)
OBJECT = Values(lambda v: isinstance(v, Mapping) and "_target_" in v, "{_target_: CLASS}")
STRATEGY = _text(
    r"auto|ddp(_find_unused_parameters_(false|true))?|fsdp(_cpu_offload)?|single_(device|tpu|xla)|xla(_debug)?"
    r"|deepspeed(_stage_(1|2|2_offload|3|3_offload|3_offload_nvme))?",
    "auto, ddp, fsdp, deepspeed, a variant that does not fork: a copied process would write to MLflow",
)
DEV_RUN = Values(lambda v: type(v) in (bool, int), "true, false or a whole number of batches")
DEVICES = Values(_is_devices, "a number of devices, a list of their indices, or auto")
PRECISION = Values(lambda value: str(value) in PRECISIONS, "one of " + ", ".join(PRECISIONS))

RULES = (
    Rule("seed", _integer(0, LARGEST_SEED), "7"),
    Rule("num_threads", COUNT | _null(" for torch's own choice"), "2"),
    Rule("resume", _text(f"auto|{RUN}", f"auto, {RUN_ID.description}") | NULL, "auto"),
    Rule("init_from", RUN_ID | NULL, "null"),
    Rule("allowed_targets", _list_of(_text(r"\w+(\.\w+)*", "a module's name")), "[tracklight]"),
    Rule("score.metric", METRIC | NULL, "train/loss"),
    Rule("score.mode", _one_of("min", "max"), "min"),
    Rule("data.batch_size", COUNT | _null(" for all examples at once"), "64", ours_only=True),
    Rule("data.fallback", FALLBACK, "true", ours_only=True),
    Rule("data.num_val data.num_test", PART, "100", ours_only=True),
    Rule("model.hidden model.channels", _list_of(COUNT), "[128]", ours_only=True),
    Rule("model.kernel_size model.width", COUNT, "3", ours_only=True),
    Rule("model.dropout", FRACTION, "0.1", ours_only=True),
    Rule("optimizer.lr", POSITIVE, "0.01"),
    Rule("optimizer.weight_decay optimizer.momentum", NOT_NEGATIVE, "0.0"),
    Rule("optimizer.betas", _list_of(FRACTION), "[0.9,0.999]"),
    Rule("optimizer.eps", NOT_NEGATIVE, "1e-8"),
    Rule("scheduler.interval", _one_of("step", "epoch"), "epoch"),
    Rule("scheduler.monitor", METRIC, "train/loss"),
    Rule("scheduler.step_size", COUNT, "30", ours_only=True),
    Rule("scheduler.T_max scheduler.total_steps scheduler.total_iters", TOTAL, "null", ours_only=True),
    Rule("trainer.accelerator", _one_of("auto", "cpu", "gpu", "cuda", "mps"), "auto"),
    Rule("trainer.devices", DEVICES, "1"),
    Rule("trainer.strategy", STRATEGY | OBJECT, "auto"),
    Rule("trainer.plugins", _list_of(OBJECT) | OBJECT | NULL, "null"),
    Rule("trainer.profiler", _one_of("simple", "advanced", "pytorch", "xla") | OBJECT | NULL, "simple"),
    Rule("trainer.precision", PRECISION | NULL, "32-true"),
    Rule("trainer.max_epochs", COUNT, "5"),
    Rule("trainer.min_epochs trainer.min_steps", COUNT | NULL, "null"),
    Rule("trainer.max_steps", STEPS, "-1"),
    Rule("trainer.max_time", TIME | NULL, "00:01:30:00"),
    Rule("callbacks.early_stopping.patience scheduler.patience", _integer(0), "3", ours_only=True),
    Rule("trainer.limit_train_batches", SOME | NULL, "null"),
    Rule("trainer.limit_val_batches trainer.limit_test_batches", LIMIT | NULL, "null"),
    Rule("trainer.limit_predict_batches", LIMIT | NULL, "null"),
    Rule("trainer.overfit_batches", LIMIT, "0.0"),
    Rule("trainer.fast_dev_run", DEV_RUN, "true"),
    Rule("trainer.check_val_every_n_epoch", COUNT | NULL, "1"),
    Rule("trainer.num_sanity_val_steps", _integer(-1) | NULL, "0"),
    Rule("trainer.log_every_n_steps trainer.accumulate_grad_batches", COUNT, "1"),
    Rule("trainer.num_nodes sweep.workers", COUNT, "1"),
    Rule("trainer.gradient_clip_val", NOT_NEGATIVE | NULL, "1.0"),
    Rule("trainer.gradient_clip_algorithm", _one_of("norm", "value") | NULL, "norm"),
    Rule("tracking.uri", STORE | _null(" for SQLite in tracking.dir"), "null"),
    Rule("tracking.dir", NAME, "mlruns"),
    Rule("tracking.experiment", NAME, "tracklight"),
    Rule("tracking.run_name tracking.note", NAME | NULL, "first"),
    Rule("tracking.keep", _one_of("best", "all"), "best"),
    Rule("tracking.tags", TAGS, "{project: x}"),
    Rule("sweep.trials", COUNT | NULL, "20"),
    Rule("sweep.seeds", COUNT, "5"),
    Rule("sweep.folds", _integer(2) | _null(" for none"), "5"),
    Rule("sweep.sampler", _one_of("tpe", "random", "qmc", "grid", "cmaes", "gp"), "tpe"),
    Rule("sweep.pruner", _one_of("none", "median", "percentile", "hyperband", "asha"), "median"),
    Rule("sweep.warmup_trials", _integer(0), "5"),
    Rule("sweep.warmup_epochs", PART, "0.3"),
    Rule("sweep.on_failure", _one_of("continue", "stop"), "continue"),
    Rule("sweep.space sweep.sampler_options sweep.pruner_options", MAPPING | NULL, "null"),
    Rule("sweep.storage", DATABASE | _null(" for a file in tracking.dir"), "null"),
)
RULE_OF = {key: rule for rule in RULES for key in rule.keys.split()}


def guess_mode(metric: str) -> str | None:
    """Return whether the `min` or the `max` of a metric is best by its name; None if that does not tell."""
    is_less, is_more = (
        re.search(f"(?<![a-z0-9])({words})(?![a-z0-9])", metric.lower()) is not None
        for words in (MINIMISED, MAXIMISED)
    )
    return None if is_less == is_more else "min" if is_less else "max"


def mode_of(metric: Any) -> str:
    """Return the mode of a `score.metric` that comes without one; refuse a name that does not tell it."""
    mode = "min" if metric in (None, "null") else guess_mode(str(metric))  # null: nothing is compared
    if mode is None:
        raise BadInput(f"score.metric={metric}: is less of it better, or more? Add score.mode=min or =max")
    return mode


def nested_items(tree: Any, above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every dotted key of nested mappings with its value, mappings before what they hold."""
    for name, value in tree.items():
        key = f"{above}{name}"
        yield key, value
        if isinstance(value, Mapping):
            yield from nested_items(value, f"{key}.")


def check_sections(tree: Any) -> None:
    """Refuse a single value where a group of keys belongs, as in `score=0.9`."""
    for name in SECTIONS:
        if not isinstance(tree.get(name, {}), Mapping):
            value = format_value(tree[name])
            raise BadInput(f"{name}={value} must be a group of keys; try {name}.KEY=VALUE")


def check_values(tree: Mapping[str, Any]) -> None:
    """Refuse a value that its rule does not accept, or of another type than the one in conf/."""
    items = dict(nested_items(tree))
    for key, value in items.items():
        got = f"{key}={format_value(value)}"
        section, _, name = key.partition(".")
        if section == "trainer" and name in OWNED:
            raise BadInput(f"{got} is set by tracklight itself; use {OWNED[name]}")
        target = items.get(key.rpartition(".")[0], tree).get("_target_")
        rule, example = RULE_OF.get(key), value_in_conf(key, target)
        if rule is None or (rule.ours_only and not str(target).startswith(SHIPPED)):
            if example is None or is_like(value, example):
                continue
            allowed, example = describe(type(example)), format_value(example)
        elif rule.values.accepts(value):
            continue
        else:
            allowed, example = rule.values.description, rule.example
        if type(value) in (int, float) and rule and rule.values.accepts(str(value)):  # text of digits
            example = f"'\"{value}\"'"
        elif type(value) in (int, float) and rule and rule.values.accepts([value]):
            example = f"[{value}]"
        if key == "tracking.uri":
            got = f"{uri_setting(value)}={value}"
        raise BadInput(f"{got} must be {allowed}; try {key}={example}")


def is_float(key: str, value: Any, target: Any) -> bool:
    """Return whether numbers, one or a list, mean the same as floats under a key, of the class `target`."""
    values = value if isinstance(value, list) else [value]
    if not all(map(is_number, values)):
        return False
    example = value_in_conf(key, target)
    example = example if isinstance(example, list) else [example]
    takes_floats = float in map(type, example) or (
        key in RULE_OF and RULE_OF[key].values.accepts([0.5] * len(values) if values is value else 0.5)
    )
    tells_apart = re.search(r"_batches$|\.num_\w+$|^sweep\.|interval$", key)  # a count from a fraction
    return takes_floats and not tells_apart


def check_relations(tree: Mapping[str, Any], on_this_machine: bool = True) -> None:
    """Refuse values that contradict each other, or ask for what this machine lacks."""
    data, trainer, score, tracking = (tree.get(name, {}) for name in ("data", "trainer", "score", "tracking"))
    for name in ("model", "optimizer"):
        if tree.get(name, {}).get("_target_") is None:
            raise BadInput(f"{name}._target_ is missing: it names the class; choose one by {name}=NAME")
    if tree.get("resume") and not tracking.get("enabled", True):
        raise BadInput(f"resume={tree['resume']} needs the record of a run; use tracking=mlflow")
    no_val = data.get("num_val", 1) == 0 and not data.get("num_folds")
    if no_val and str(score.get("metric")).startswith("val/"):
        problem = f"score.metric={score['metric']} needs validation examples, but data.num_val=0"
        raise BadInput(f"{problem}; use score.metric=train/loss_epoch score.mode=min")
    least, most = trainer.get("min_epochs") or 0, trainer.get("max_epochs", math.inf)
    if least > most:
        problem = f"trainer.min_epochs={least} must not be above trainer.max_epochs={most}"
        raise BadInput(f"{problem}; try trainer.max_epochs={least}")
    is_mixed = re.search("mixed|^b?f?16$", str(precision := trainer.get("precision")))
    if is_mixed and trainer.get("gradient_clip_val") and tree.get("optimizer", {}).get("fused"):
        why = f"under trainer.precision={precision} Lightning does not clip for a fused optimizer"
        raise BadInput(f"optimizer.fused=true: {why}; try optimizer.fused=null")
    accumulated = trainer.get("accumulate_grad_batches", 1)
    if accumulated > 1 and str(tree.get("optimizer", {}).get("_target_")).endswith(".LBFGS"):
        why = "LBFGS evaluates a step's last batch again and again and would add up its gradients"
        raise BadInput(f"trainer.accumulate_grad_batches={accumulated}: {why}; use a larger data.batch_size")
    if on_this_machine:
        if tracking.get("enabled") and "dir" in tracking:
            _check_writable(Path(tracking["dir"]))
        check_machine(str(trainer.get("accelerator", "auto")), trainer.get("devices", 1))


def _check_writable(folder: Path) -> None:
    """Refuse a folder that cannot be written or created."""
    path = folder.absolute()
    existing = next(each for each in (path, *path.parents) if os.path.lexists(each))
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        problem = "is not writable" if existing.is_dir() else "is a file where a folder should be"
        raise BadInput(f"tracking.dir={folder}: {existing} {problem}; try another tracking.dir")


def format_value(value: Any) -> str:
    """Format a value as one would type it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{','.join(map(format_value, value))}]"
    return type(value).__name__ if type(value).__repr__ is object.__repr__ else str(value)  # no address
