"""What the values of a config may be, told from the config alone: torch is not needed."""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from tracklight.config.hardware import check_folder, check_machine
from tracklight.errors import BadInput

LARGEST_SEED = 2**32 - 1  # what numpy and Lightning accept
PRECISIONS = (
    *("16-mixed", "16-true", "32-true", "64-true", "bf16-mixed", "bf16-true"),
    *("transformer-engine", "transformer-engine-float16", "16", "32", "64", "bf16"),
)
SECTIONS = (
    "score",
    "data",
    "model",
    "optimizer",
    "scheduler",
    "trainer",
    "callbacks",
    "tracking",
    "sweep",
)

# Trainer arguments that tracklight sets itself, and what to say instead.
OWNED = {
    "logger": "tracking=mlflow or tracking=none",
    "callbacks": "callbacks=early_stopping or a file of your own in conf/callbacks",
    "default_root_dir": "tracking.dir=FOLDER",
    "enable_checkpointing": "tracking=none (a tracked run keeps its best and its last checkpoint)",
    "barebones": "tracking=none trainer.enable_progress_bar=false",
    "enable_autolog_hparams": "tracking=none (a tracked run always records its config)",
    "model_registry": "tracking.uri=URI",
}


class Values(NamedTuple):
    """A set of values: the predicate, and how to say it."""

    holds: Callable[[Any], bool]
    said: str


class Rule(NamedTuple):
    """Every key that matches the pattern takes one of these values; the example is one of them."""

    keys: str
    values: Values
    example: str
    ours_only: bool = False  # other people's models may mean something else by the name


def _or_null(values: Values, meaning: str = "") -> Values:
    said = f"{values.said}, or null{meaning}"
    return Values(lambda value: value is None or values.holds(value), said)


def _whole(low: int, high: float = math.inf) -> Values:
    said = f"{low} or more" if high == math.inf else f"from {low} to {high}"
    return Values(
        lambda value: type(value) is int and low <= value <= high, f"a whole number, {said}"
    )


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _one_of(*choices: str) -> Values:
    said = ", ".join(choices[:-1]) + " or " + choices[-1]
    return Values(lambda value: isinstance(value, str) and value in choices, said)


def _text(pattern: str, said: str) -> Values:
    return Values(lambda value: isinstance(value, str) and bool(re.fullmatch(pattern, value)), said)


def _list_of(values: Values) -> Values:
    def holds(value: Any) -> bool:
        return isinstance(value, list) and all(map(values.holds, value))

    return Values(holds, f"a list, each {values.said}")


def _is_limit(value: Any) -> bool:
    return (type(value) is int and value >= 0) or (type(value) is float and 0 <= value <= 1)


def _is_devices(value: Any) -> bool:
    if isinstance(value, str):
        return value == "auto" or bool(re.fullmatch(r"-1|\d+(,\d+)*,?", value))
    if isinstance(value, list):
        return value != [] and all(type(index) is int and index >= 0 for index in value)
    return type(value) is int and (value == -1 or value >= 1)


COUNT = _whole(1)
SWITCH = Values(lambda value: type(value) is bool, "true or false")
ABOVE_ZERO = Values(lambda value: _is_number(value) and value > 0, "a finite number above 0")
NOT_NEGATIVE = Values(lambda value: _is_number(value) and value >= 0, "a finite number, 0 or more")
FRACTION = Values(lambda value: _is_number(value) and 0 <= value < 1, "a number from 0 to below 1")
RUN_ID = _text("[0-9a-f]{1,32}", "a run id (hexadecimal digits)")
NAME = _text(r".*\S.*", "a name")
STORE = _text(
    r"(?i:sqlite:///|https?://|(postgresql|mysql|mssql)(\+\w+)?://).+",
    "sqlite:///FILE, http(s)://HOST:PORT, a postgresql, mysql or mssql database",
)
LIMIT = Values(_is_limit, "a whole number of batches, or a fraction from 0.0 to 1.0")
PART = Values(
    lambda value: _is_number(value) and (0 <= value < 1 or (type(value) is int and value >= 1)),
    "a whole number of examples, 0 or more, or a fraction below 1",
)
STEPS = Values(lambda value: type(value) is int and (value == -1 or value >= 1), "-1 or 1 or more")
DEVICES = Values(_is_devices, "a number of devices, a list of their indices, or auto")
PRECISION = Values(lambda value: str(value) in PRECISIONS, "one of " + ", ".join(PRECISIONS))

MAPPING = Values(lambda value: isinstance(value, Mapping), "a mapping, {KEY: VALUE}")

RULES = (
    Rule("seed", _whole(0, LARGEST_SEED), "7"),
    Rule("num_threads", _or_null(COUNT, " for torch's own choice"), "2"),
    Rule("compile", SWITCH, "true"),
    Rule("allow_changes", SWITCH, "true"),
    Rule("resume", _or_null(_text("auto|[0-9a-f]{1,32}", f"auto, {RUN_ID.said}")), "auto"),
    Rule("init_from", _or_null(RUN_ID), "null"),
    Rule("allowed_targets", _list_of(_text(r"\w+(\.\w+)*", "a module's name")), "[tracklight]"),
    Rule("score.metric", _or_null(_text(r"\S+", "a metric's name")), "train/loss"),
    Rule("score.mode", _one_of("min", "max"), "min"),
    Rule("data.batch_size", _or_null(COUNT, " for all examples at once"), "64"),
    Rule("data.num_val", PART, "100"),
    Rule("data.num_test", PART, "100"),
    Rule("model.hidden", _list_of(COUNT), "[128]", ours_only=True),
    Rule("model.dropout", FRACTION, "0.1"),
    Rule("optimizer.lr", ABOVE_ZERO, "0.01"),
    Rule("optimizer.weight_decay", NOT_NEGATIVE, "0.0"),
    Rule("optimizer.momentum", NOT_NEGATIVE, "0.9"),
    Rule("optimizer.betas", _list_of(FRACTION), "[0.9,0.999]"),
    Rule("optimizer.eps", NOT_NEGATIVE, "1e-8"),
    Rule("scheduler.interval", _one_of("step", "epoch"), "epoch"),
    Rule("trainer.accelerator", _one_of("auto", "cpu", "gpu", "cuda", "mps", "tpu"), "auto"),
    Rule("trainer.devices", DEVICES, "1"),
    Rule("trainer.num_nodes", COUNT, "1"),
    Rule("trainer.precision", _or_null(PRECISION), "32-true"),
    Rule("trainer.max_epochs", COUNT, "5"),
    Rule("trainer.min_epochs", _or_null(COUNT), "null"),
    Rule("trainer.max_steps", STEPS, "-1"),
    Rule("trainer.min_steps", _or_null(COUNT), "null"),
    Rule("trainer.limit_*_batches", _or_null(LIMIT), "null"),
    Rule("trainer.overfit_batches", LIMIT, "0.0"),
    Rule("trainer.check_val_every_n_epoch", _or_null(COUNT), "1"),
    Rule("trainer.num_sanity_val_steps", _or_null(_whole(-1)), "0"),
    Rule("trainer.log_every_n_steps", COUNT, "1"),
    Rule("trainer.accumulate_grad_batches", COUNT, "1"),
    Rule("trainer.gradient_clip_val", _or_null(NOT_NEGATIVE), "1.0"),
    Rule("trainer.gradient_clip_algorithm", _or_null(_one_of("norm", "value")), "norm"),
    Rule("trainer.detect_anomaly", SWITCH, "true"),
    Rule("tracking.enabled", SWITCH, "true"),
    Rule("tracking.uri", _or_null(STORE, " for SQLite in tracking.dir"), "null"),
    Rule("tracking.dir", NAME, "mlruns"),
    Rule("tracking.experiment", NAME, "tracklight"),
    Rule("tracking.figures", SWITCH, "true"),
    Rule("tracking.gradients", SWITCH, "true"),
    Rule("tracking.system_metrics", SWITCH, "true"),
    Rule("sweep.trials", _or_null(COUNT), "20"),
    Rule("sweep.workers", COUNT, "1"),
    Rule("sweep.seeds", COUNT, "5"),
    Rule("sweep.sampler", _one_of("tpe", "random", "qmc", "grid", "cmaes", "gp"), "tpe"),
    Rule("sweep.pruner", _one_of("none", "median", "percentile", "hyperband", "asha"), "median"),
    Rule("sweep.on_failure", _one_of("continue", "stop"), "continue"),
    Rule("sweep.fresh", SWITCH, "true"),
    Rule("sweep.dry_run", SWITCH, "true"),
    Rule("sweep.space", _or_null(MAPPING), "null"),
    Rule("sweep.sampler_options", _or_null(MAPPING), "null"),
    Rule("sweep.pruner_options", _or_null(MAPPING), "null"),
    Rule("sweep.storage", _or_null(NAME, " for a file in tracking.dir"), "null"),
)


def nodes(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every dotted key of nested mappings with its value, mappings before what they hold."""
    for name, value in tree.items():
        key = f"{above}{name}"
        yield key, value
        if isinstance(value, Mapping):
            yield from nodes(value, f"{key}.")


def check_sections(tree: Mapping[str, Any]) -> None:
    """Refuse a lone value where a group of keys belongs.

    Raises:
        BadInput: As in `score=0.9`.
    """
    for name in SECTIONS:
        if not isinstance(tree.get(name, {}), Mapping):
            got = f"{name}={shown(tree[name])}"
            raise BadInput(f"{got} must be a group of keys; try {name}.KEY=VALUE")


def check_values(tree: Mapping[str, Any]) -> None:
    """Hold every single value against its rule.

    Raises:
        BadInput: A value is out of range; the message names key, value, range and a cure.
    """
    for key, value in nodes(tree):
        name = key.removeprefix("trainer.")
        if name != key and name in OWNED:
            raise BadInput(f"{key}={shown(value)} is set by tracklight itself; use {OWNED[name]}")
        for rule in RULES:
            if not fnmatchcase(key, rule.keys) or (rule.ours_only and _foreign(tree, key)):
                continue
            if not rule.values.holds(value):
                got = f"{key}={shown(value)}"
                raise BadInput(f"{got} must be {rule.values.said}; try {key}={rule.example}")


def check_relations(tree: Mapping[str, Any], here: bool = True) -> None:
    """Hold against each other the values that limit each other.

    Args:
        tree: The config.
        here: Whether it will run on this machine.

    Raises:
        BadInput: Two keys contradict each other, or the machine lacks what is asked for.
    """
    data, trainer, score = tree.get("data", {}), tree.get("trainer", {}), tree.get("score", {})
    if tree.get("resume") and not tree.get("tracking", {}).get("enabled", True):
        raise BadInput(f"resume={tree['resume']} needs the record of a run; use tracking=mlflow")
    if data.get("num_val", 1) == 0 and str(score.get("metric")).startswith("val/"):
        raise BadInput(
            f"score.metric={score['metric']} needs validation examples, but data.num_val=0; "
            "use score.metric=train/loss_epoch score.mode=min"
        )
    if (trainer.get("min_epochs") or 0) > trainer.get("max_epochs", math.inf):
        raise BadInput(
            f"trainer.min_epochs={trainer['min_epochs']} must not be above trainer.max_epochs="
            f"{trainer['max_epochs']}; try trainer.max_epochs={trainer['min_epochs']}"
        )
    if tree.get("tracking", {}).get("enabled") and "dir" in tree["tracking"]:
        check_folder("tracking.dir", Path(tree["tracking"]["dir"]))
    if here:
        check_machine(str(trainer.get("accelerator", "auto")), trainer.get("devices", 1))


def _foreign(tree: Mapping[str, Any], key: str) -> bool:
    section = tree.get(key.partition(".")[0])
    return isinstance(section, Mapping) and not str(section.get("_target_")).startswith(
        "tracklight."
    )


def shown(value: Any) -> str:
    """Write a value as one would type it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"[{','.join(map(shown, value))}]" if isinstance(value, list) else str(value)
