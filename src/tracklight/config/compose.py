"""A run's config: composed, checked, identified and compared; `build` is the gate to objects."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from tracklight.config.instantiate import check_plain, check_targets, described
from tracklight.config.rules import check_relations, check_sections, check_values, nodes, shown
from tracklight.errors import BadInput
from tracklight.paths import CONF, ROOT
from tracklight.redact import redact

OmegaConf.register_new_resolver("root", lambda path: str(ROOT / path), replace=True)

# What the result of a run does not depend on.
NOT_IDENTITY = (
    *("resume", "allow_changes", "overrides", "allowed_targets", "tracking", "sweep", "data.root"),
    *("trainer.max_epochs", "trainer.profiler"),
    *("trainer.enable_progress_bar", "trainer.enable_model_summary"),
)


def compose(overrides: Sequence[str] = ()) -> DictConfig:
    """Compose one run's config from conf/ and check it.

    Args:
        overrides: As on the command line, without lists of values.

    Returns:
        The resolved config, closed to new keys.

    Raises:
        BadInput: An override does not fit, a value is out of range, a preset's key has no place.
    """
    from hydra import compose, initialize_config_dir
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException

    from tracklight.config.hydra_internals import check_nodes
    from tracklight.config.overrides import told

    before = HydraConfig.instance().cfg
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose("config", list(overrides), return_hydra_config=True)
            check_nodes(cfg.hydra, allowed_targets())
            HydraConfig.instance().set_config(cfg)
            with open_dict(cfg):
                del cfg["hydra"]
            return checked(cfg)
    except HydraException as error:
        raise BadInput(told(error)) from error
    finally:
        HydraConfig.instance().cfg = before


def checked(cfg: DictConfig, here: bool = True) -> DictConfig:
    """Check and resolve what Hydra has just composed (it still knows the choices made)."""
    from hydra import compose
    from hydra.core.hydra_config import HydraConfig

    hydra = HydraConfig.get()
    chosen = {key: name for key, name in hydra.runtime.choices.items() if "hydra" not in key}
    preset = chosen.pop("experiment", None)
    if preset is not None:
        bare = compose("config", [f"{group}={name}" for group, name in chosen.items() if name])
        _check_preset(preset, cfg, bare, chosen, list(hydra.overrides.task))
    return settled(cfg, here)


def settled(cfg: DictConfig, here: bool = True) -> DictConfig:
    """Check a config and resolve it for good; new keys are closed to it."""
    check(cfg, here)
    resolved = OmegaConf.create(plain(cfg))
    OmegaConf.set_struct(resolved, True)
    return resolved


def check(cfg: Any, here: bool = True) -> None:
    """Hold a config against everything that can be told from it alone.

    Args:
        cfg: As composed.
        here: Whether it will run on this machine, and may ask for no more than that has.

    Raises:
        BadInput: One line that names the key, its value, what is allowed and what works.
    """
    check_sections(_written(cfg))
    tree = plain(cfg)
    check_values(tree)
    check_targets(tree, tree.get("allowed_targets", allowed_targets()))
    check_relations(tree, here)


def allowed_targets() -> list[str]:
    """Read the allow-list of this checkout; that of a config stored elsewhere is not believed."""
    text = (CONF / "config.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)["allowed_targets"]


def plain(cfg: Any) -> dict[str, Any]:
    """Resolve a config into dicts, lists and scalars, once: no interpolation is left in it.

    Raises:
        BadInput: An environment variable is not set, a value refers to nothing, or an escaped
            interpolation is left.
    """
    if not OmegaConf.is_config(cfg):
        check_plain(cfg)
        return dict(cfg)
    try:
        tree = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except InterpolationResolutionError as error:
        reason = " ".join(str(error.msg or error).split("\n")[0].split())
        reason = reason.removeprefix("KeyError raised while resolving interpolation: ").strip("\"'")
        raise BadInput(f"{error.full_key}: {reason}; set it, or {error.full_key}=VALUE") from error
    except OmegaConfBaseException as error:
        raise BadInput(f"{error.full_key} has no value; set {error.full_key}=VALUE") from error
    assert isinstance(tree, dict)
    check_plain(tree)
    return {str(key): value for key, value in tree.items()}


def amend(stored: Mapping[str, Any], overrides: Sequence[str]) -> DictConfig:
    """Apply dotted overrides to a stored, resolved config, under this checkout's allow-list.

    What is stored is data: nothing of it is ever resolved.

    Raises:
        BadInput: An override does not read, names no key of that config, or replaces a group; or
            the config or an override holds an interpolation.
    """
    from tracklight.config.overrides import parse, unknown_key

    check_plain(stored)
    cfg = OmegaConf.create({**stored, "allowed_targets": allowed_targets()})
    known = dict(nodes(stored))
    for override in parse(overrides):
        key, text = override.key_or_group, override.input_line
        if override.is_delete() or isinstance(known.get(key), Mapping):
            raise BadInput(f"{text}: of a stored config only single keys can be set, KEY=VALUE")
        if key not in known and not (override.is_add() or override.is_force_add()):
            raise BadInput(unknown_key(key, known))
        value = override.value()
        check_plain(value, key)
        OmegaConf.update(cfg, key, value, force_add=True)
    OmegaConf.set_struct(cfg, True)
    return cfg


def deciding(cfg: Any) -> dict[str, Any]:
    """Keep, by dotted key, what the result depends on."""
    leaves = _leaves(plain(cfg))
    return {key: value for key, value in leaves.items() if not _is_below(key, NOT_IDENTITY)}


def identity(cfg: Any) -> str:
    """Digest (SHA-256, hexadecimal) all that the result depends on."""
    return hashlib.sha256(json.dumps(deciding(cfg), sort_keys=True).encode()).hexdigest()


def setting(cfg: Any) -> str:
    """Digest what the result depends on, seeds apart: runs that differ by chance alone share it."""
    decides = deciding(cfg) | {"trainer.max_epochs": plain(cfg)["trainer"]["max_epochs"]}
    kept = {k: v for k, v in decides.items() if k.rpartition(".")[2] != "seed"}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def targets(cfg: Any) -> list[str]:
    """List every class that a config names, each once, sorted."""
    return sorted({node["_target_"] for _, node in described(plain(cfg), "")})


def flatten(tree: Any) -> dict[str, str | int | float]:
    """Lay a config out as dotted keys with numbers and text, secrets starred out."""
    leaves = _leaves(redact(plain(tree)))
    return {
        key: value if type(value) in (int, float) else shown(value) for key, value in leaves.items()
    }


def differences(old: Any, new: Any) -> list[str]:
    """Tell each key that differs in one line, `optimizer.lr: 0.1 -> 0.01`, secrets starred out."""
    before, after = _leaves(plain(old)), _leaves(plain(new))
    shown_before, shown_after = flatten(old), flatten(new)
    return [
        f"{key}: {shown_before.get(key, 'absent')} -> {shown_after.get(key, 'absent')}"
        for key in dict.fromkeys((*before, *after))
        if json.dumps(before.get(key, "absent")) != json.dumps(after.get(key, "absent"))
        or (key in before) != (key in after)
    ]


def _written(cfg: Any) -> dict[str, Any]:
    """Turn a config into dicts and lists, interpolations as they are written."""
    tree = OmegaConf.to_container(cfg) if OmegaConf.is_config(cfg) else cfg
    assert isinstance(tree, dict)
    return {str(key): value for key, value in tree.items()}


def _leaves(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in nodes(tree) if not isinstance(value, Mapping) or not value}


def _is_below(key: str, tops: Sequence[str]) -> bool:
    return any(key == top or key.startswith(f"{top}.") for top in tops)


def _check_preset(
    preset: str,
    cfg: DictConfig,
    bare: DictConfig,
    choices: Mapping[str, Any],
    overrides: Sequence[str],
) -> None:
    """Refuse keys that the preset sets where the chosen groups have none.

    Args:
        preset: Its name.
        cfg: The config with the preset.
        bare: The config of the same choices without it.
        choices: Group to chosen file.
        overrides: The command line's; what they add is wanted.
    """
    added = [word.lstrip("+").partition("=")[0] for word in overrides if word.startswith("+")]
    there, here = dict(nodes(_written(bare))), dict(nodes(_written(cfg)))
    for key in here:
        group = key.partition(".")[0]
        replaced = here.get(f"{group}._target_") != there.get(f"{group}._target_")
        if key in there or group == "callbacks" or replaced or _is_below(key, added):
            continue
        chosen = f"{group}={choices[group]}" if group in choices else "this config"
        raise BadInput(
            f"experiment={preset} sets {key}, which {chosen} does not have; "
            f"drop {chosen} or experiment={preset}, or the key from conf/experiment/{preset}.yaml"
        )
