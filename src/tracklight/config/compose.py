"""A run's config: composed by Hydra, checked, resolved, digested and compared."""

import hashlib
import itertools
import json
import pickle
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from tracklight.config import instantiate, rules
from tracklight.config.hardware import resolve_precision
from tracklight.config.hydra_internals import compose_config, initialize, register_resolver
from tracklight.config.overrides import check_added, explaining, parse_overrides, unknown_key
from tracklight.config.rules import format_value, nested_items
from tracklight.config.types import LOADER, value_in_conf
from tracklight.errors import BadInput
from tracklight.paths import PROJECT, ROOT
from tracklight.redact import redact

register_resolver("root", lambda path: str(ROOT / path), replace=True)
register_resolver("mode_of", rules.mode_of, replace=True)

MAX_DEPTH = 32  # of a stored config
MAX_TICK_CHARS = 10  # that MLflow's charts show of a value

# Keys on which the result of a run does not depend.
NOT_IN_DIGEST = (
    *("resume", "allow_changes", "overrides", "allowed_targets", "tracking", "sweep", "data.root"),
    *("trainer.max_epochs", "trainer.profiler"),
    *("trainer.enable_progress_bar", "trainer.enable_model_summary"),
)


def compose(overrides: Sequence[str] = (), on_this_machine: bool = True) -> DictConfig:
    """Compose one run's config from conf/; return it checked, resolved and closed to new keys."""
    before = HydraConfig.instance().cfg
    try:
        with initialize():
            with explaining(overrides):
                cfg = compose_config(overrides)
            instantiate.check_hydra_nodes(cfg.hydra, allowed_targets())
            HydraConfig.instance().set_config(cfg)
            with open_dict(cfg):
                del cfg["hydra"]
            return resolve_composed(cfg, on_this_machine)
    finally:
        HydraConfig.instance().cfg = before


def resolve_composed(cfg: DictConfig, on_this_machine: bool = True) -> DictConfig:
    """Check and resolve what Hydra has just composed, its preset included."""
    check_composed(cfg)
    return resolve_config(cfg, on_this_machine)


def check_composed(cfg: DictConfig) -> None:
    """Check what was added to a config that Hydra has just composed, and its preset; set its allow-list."""
    composed = HydraConfig.get()
    words: Any = OmegaConf.to_container(composed.overrides.task)  # unresolved
    set_allowed_targets(cfg)
    check_added(cfg, words, composed.runtime.choices)
    choices = {k: name for k, name in composed.runtime.choices.items() if "hydra" not in k}
    if (preset := choices.pop("experiment", None)) is not None:
        _check_preset(preset, cfg, choices, words)


def resolve_config(cfg: DictConfig, on_this_machine: bool = True) -> DictConfig:
    """Check a config; return it resolved and closed to new keys, its precision as it will be used."""
    return to_config(resolve_values(cfg, on_this_machine))


def resolve_values(cfg: DictConfig, on_this_machine: bool = True) -> dict[str, Any]:
    """Check a config; return what `resolve_config` does, as plain values."""
    tree = check_config(cfg, on_this_machine)
    leaves = _leaves(tree)
    for key, value in result_keys(tree).items():
        if isinstance(value, list):  # torch refuses betas of 0 and 0.9
            leaves[key][:] = value
    trainer = tree["trainer"]
    asked, accelerator = trainer["precision"], str(trainer["accelerator"]) if on_this_machine else "unknown"
    trainer["precision"] = used = resolve_precision(asked, accelerator)
    if used == "bf16-mixed" and "bf16" not in str(asked):
        warnings.warn(f"trainer.precision={asked}: a CPU trains in {used}, which is recorded", stacklevel=2)
    return tree


def to_config(tree: Mapping[str, Any]) -> DictConfig:
    """Return a resolved config, given as plain values, closed to new keys."""
    resolved = OmegaConf.create(dict(tree))
    OmegaConf.set_struct(resolved, True)
    return resolved


def to_configs(trees: Sequence[Mapping[str, Any]]) -> list[DictConfig]:
    """Return many resolved configs: copies of the first, in which values are set, for the sake of speed."""
    first, configs = pickle.dumps(to_config(trees[0])), list[DictConfig]()
    for tree in trees:
        is_alike = tree.keys() == trees[0].keys()
        configs.append(pickle.loads(first) if is_alike else to_config(tree))
        if is_alike:
            _set_values(configs[-1], trees[0], tree)
    return configs


def _set_values(cfg: Any, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Set the values in which a config, `old` as plain values, differs from `new`."""
    for name, value in new.items():
        was = old[name]
        if isinstance(value, Mapping) and isinstance(was, Mapping) and value.keys() == was.keys():
            _set_values(cfg[name], was, value)
        elif repr(value) != repr(was):  # 1, 1.0 and True are equal
            cfg[name] = value


def check_config(cfg: DictConfig, on_this_machine: bool = True) -> dict[str, Any]:
    """Check a config, and where it runs on this machine its devices and folder; return it as plain values."""
    rules.check_sections(OmegaConf.to_container(cfg))
    tree = to_plain(cfg)
    rules.check_values(tree)
    instantiate.check_targets(tree, tree.get("allowed_targets", allowed_targets()))
    rules.check_relations(tree, on_this_machine)
    return tree


def allowed_targets() -> list[str]:
    """Read the allow-list of conf/config.yaml and the project; that of a stored config is not trusted."""
    return [*value_in_conf("allowed_targets", None), *PROJECT.allowed_targets]


def set_allowed_targets(cfg: DictConfig) -> None:
    """Give a config that Hydra has composed its allow-list: that of `allowed_targets`, and what was typed.

    No other file grants anything, wherever it lies.
    """
    words: Any = OmegaConf.to_container(HydraConfig.get().overrides.task)  # unresolved
    is_typed = any(word.lstrip("+").startswith("allowed_targets=") for word in words)
    typed = cfg.get("allowed_targets") if is_typed else OmegaConf.create([])
    if isinstance(typed, ListConfig):  # what else was typed is refused later
        value = [*allowed_targets(), *(OmegaConf.to_container(typed) or ())]
        OmegaConf.update(cfg, "allowed_targets", value, force_add=True)


def to_plain(cfg: Any) -> dict[str, Any]:
    """Resolve a config into plain values, once; refuse it if an interpolation refers to nothing."""
    tree: Any = cfg
    try:
        if OmegaConf.is_config(cfg):
            tree = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except InterpolationResolutionError as error:
        said = " ".join(str(error.msg or error).split("\n")[0].split())
        kind, _, reason = said.rpartition(" raised while resolving interpolation: ")
        if kind == "BadInput":
            raise BadInput(reason) from error
        reason = reason.strip("\"'")
        raise BadInput(f"{error.full_key}: {reason}; set it, or {error.full_key}=VALUE") from error
    except OmegaConfBaseException as error:
        raise BadInput(f"{error.full_key} has no value; set {error.full_key}=VALUE") from error
    instantiate.check_plain(tree)
    return tree


def parse_stored(text: str) -> dict[str, Any]:
    """Parse a stored config: mappings, lists, texts and numbers, nested to a bounded depth.

    An alias may stand for itself, or for a billion values; in no config that was written here is one.
    Anything else raises ValueError.
    """
    depth = 0
    for event in yaml.parse(text, Loader=LOADER):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent) or depth > MAX_DEPTH:
            what = "an alias" if depth <= MAX_DEPTH else f"nested deeper than {MAX_DEPTH}"
            raise ValueError(f"line {event.start_mark.line + 1}: {what}")
    tree = yaml.load(text, LOADER)
    if not isinstance(tree, dict):
        raise ValueError(f"a mapping is expected, not {type(tree).__name__}")
    json.dumps(tree)  # raises for what is no plain value
    return tree


def check_stored_paths(stored: Mapping[str, Any], overrides: Sequence[str], folder: Path) -> None:
    """Refuse what a stored config would write or read outside of the run's folder, unless typed again."""
    typed = {override.key_or_group for override in parse_overrides(overrides)}
    for section in ("callbacks", "trainer"):  # whose classes write files
        for key, value in instantiate.iter_values(stored.get(section), section):
            if isinstance(value, str) and not is_below(key, typed) and _leads_out(key, value, folder):
                raise BadInput(
                    f"{key}={value} of the stored config may write or read outside of the run's folder, "
                    f"{folder}; if it is yours, type it: {key}={value}"
                )


def _leads_out(key: str, value: str, folder: Path) -> bool:
    path, name = Path(value), re.sub(r"\[\d+\]", "", key)
    is_folder = name.endswith(("dir", "path", "folder", "root", "_args_"))  # relative to where one stands
    # Lightning formats names of files: {epoch].real} is no metric.
    if ".." in path.parts or re.search(r"^~|://|{[^}]*(\]|:[^}]*\d{3})", value):
        return True
    return (path.is_absolute() or is_folder) and not path.resolve().is_relative_to(folder.resolve())


def apply_overrides(stored: Mapping[str, Any], overrides: Sequence[str]) -> DictConfig:
    """Apply dotted overrides to a stored, resolved config, under this checkout's allow-list.

    Raises:
        BadInput: An override names no key, replaces a group or holds an interpolation.
    """
    instantiate.check_plain(stored)
    try:
        cfg = OmegaConf.create({**stored, "allowed_targets": allowed_targets()})
    except OmegaConfBaseException as error:
        raise BadInput(f"the stored config is none: {str(error).splitlines()[0]}") from None
    known = dict(nested_items(stored))
    for override in parse_overrides(overrides):
        key, text = override.key_or_group, override.input_line
        if override.is_delete() or isinstance(known.get(key), Mapping):
            raise BadInput(f"{text}: of a stored config only single keys can be set, KEY=VALUE")
        if key not in known and not (override.is_add() or override.is_force_add()):
            raise BadInput(unknown_key(key, known))
        value = override.value()
        instantiate.check_plain(value, key)
        if key == "allowed_targets" and isinstance(value, list):
            value = allowed_targets() + value
        OmegaConf.update(cfg, key, value, force_add=True)
    OmegaConf.set_struct(cfg, True)
    return cfg


def result_keys(cfg: Any) -> dict[str, Any]:
    """Return, by dotted key, the values on which the result depends; equal numbers are one: 1, 1.0."""
    leaves = {k: v for k, v in _leaves(to_plain(cfg)).items() if not is_below(k, NOT_IN_DIGEST)}
    for key, value in leaves.items():
        if rules.is_float(key, value, leaves.get(f"{key.rpartition('.')[0]}._target_")):
            leaves[key] = [float(v) + 0.0 for v in value] if isinstance(value, list) else float(value) + 0.0
    return leaves


def json_digest(value: Any) -> str:
    """Return the SHA-256 (hexadecimal) of a value as JSON, keys sorted."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def config_digest(cfg: Any) -> str:
    """Return the digest of all values on which the result depends."""
    return json_digest(result_keys(cfg))


def digest_without_seed(cfg: Any, data: str | None = None) -> str:
    """Return the digest that runs share which differ in seed or fold alone; `data` is the data set's."""
    tree = result_keys(cfg) | {"trainer.max_epochs": to_plain(cfg)["trainer"]["max_epochs"]}
    tree = {key: value for key, value in tree.items() if key.rpartition(".")[2] not in ("seed", "fold")}
    if data is not None:
        tree["data"] = data
    return json_digest(tree)


def list_targets(cfg: Any) -> list[str]:
    """Return the names of all classes in a config, sorted, each once."""
    return sorted({target for _, target in instantiate.iter_targets(to_plain(cfg))})


def flatten(cfg: Any) -> dict[str, str | int | float]:
    """Return a config as dotted keys with numbers and text, secrets redacted."""
    return flatten_redacted(redact(to_plain(cfg)))


def flatten_redacted(tree: Mapping[str, Any]) -> dict[str, str | int | float]:
    """Return a config, given as plain values without secrets, as dotted keys with numbers and text."""
    items = _leaves(tree).items()
    return {key: value if type(value) in (int, float) else format_value(value) for key, value in items}


def short_params(flat: Mapping[str, Any]) -> dict[str, str]:
    """Return short texts beside those of `flatten`: MLflow's charts cut a value at ten characters.

    A class stands under the name of its group, `optimizer` = SGD, a list under its own, `hidden` = 128-64, or
    `model-hidden` if that is taken; what would be cut is CosAnnLR, 256x3-64, or ends with a digest.
    """
    short, groups = dict[str, str](), {key.partition(".")[0] for key in flat}
    names = [key.rpartition(".")[2] for key, value in flat.items() if str(value).startswith("[")]
    for key, value in flat.items():
        group, _, name = key.rpartition(".")
        if name == "_target_" and value != "null":
            text = str(value).rpartition(".")[2]
            words = re.findall("[A-Z]+(?![a-z])|[A-Z][a-z]{,2}", text)
            short[group] = _tick(text, "".join(words) if len(words) > 1 else text)
        elif group and str(value).startswith("["):
            parts = str(value).strip("[]").split(",")
            runs = [(each, len([*same])) for each, same in itertools.groupby(parts)]
            folded = "-".join(each if count == 1 else f"{each}x{count}" for each, count in runs)
            is_taken = name in groups or names.count(name) > 1
            short[f"{group}-{name}" if is_taken else name] = _tick("-".join(parts), folded)
    return short


def _tick(text: str, shorter: str) -> str:
    """Return the first of two texts that is no longer than a tick, else the start of one and its digest."""
    ending = f"~{json_digest(text)[:5]}"
    fitting = (each for each in (text, shorter) if len(each) <= MAX_TICK_CHARS)
    return next(fitting, shorter[: MAX_TICK_CHARS - len(ending)] + ending)


def diff_configs(old: Any, new: Any) -> list[str]:
    """Describe each key that differs in one line, `optimizer.lr: 0.1 -> 0.01`, secrets redacted."""
    before, after = (
        {key: json.dumps(value) for key, value in _leaves(to_plain(cfg)).items()} for cfg in (old, new)
    )
    old_text, new_text = flatten(old), flatten(new)
    return [
        f"{key}: {old_text.get(key, 'absent')} -> {new_text.get(key, 'absent')}"
        for key in before | after
        if before.get(key) != after.get(key)
    ]


def _leaves(tree: Mapping[str, Any]) -> dict[str, Any]:
    items = nested_items(tree)
    return {key: value for key, value in items if not isinstance(value, Mapping) or not value}


def is_below(key: str, tops: Collection[str]) -> bool:
    """Return whether a dotted key is one of some keys, or lies below one."""
    return f"{key}.".startswith(tuple(f"{top}." for top in tops))


def _check_preset(preset: str, cfg: DictConfig, choices: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """Refuse keys that the preset sets where the chosen groups have none."""
    bare = hydra.compose("config", [f"{group}={name}" for group, name in choices.items() if name])
    added = [word.lstrip("+").partition("=")[0] for word in overrides if word.startswith("+")]
    trees = (OmegaConf.to_container(each) for each in (bare, cfg))
    without, within = (dict(nested_items(tree)) for tree in trees)
    for key in within:
        group = key.partition(".")[0]
        replaced = within.get(f"{group}._target_") != without.get(f"{group}._target_")
        if key in without or replaced or is_below(key, ("callbacks", "tracking.tags", *added)):
            continue
        chosen = f"{group}={choices[group]}" if group in choices else "this config"
        raise BadInput(
            f"experiment={preset} sets {key}, which {chosen} does not have; "
            f"drop {chosen} or experiment={preset}, or the key from conf/experiment/{preset}.yaml"
        )
