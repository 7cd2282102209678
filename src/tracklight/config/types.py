"""The types of config values: those of the files in conf/, and those that a class's signature declares.

A value of another type often passes for one: `nesterov=no` is text, and any text counts as true.
"""

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePath
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml

from tracklight.paths import CONF

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
SHIPPED = ("tracklight.", "torch.", "pytorch_lightning.")  # classes whose arguments in conf/ are ours
LARGEST = 2**63 - 1  # what a 64-bit integer holds
NAMES = {
    **{bool: "true or false", int: "a whole number", float: "a number", str: "text"},
    **{list: "a list", tuple: "a list", dict: "a mapping", NoneType: "null"},
}
PLAIN = tuple(NAMES)


def fits(value: Any, kind: Any) -> bool:
    """Return whether a value is what an annotation declares; what is no plain value fits any."""
    base, inner = get_origin(kind) or kind, get_args(kind)
    if base in (Union, UnionType):
        return any(fits(value, each) for each in inner)
    if base in (Literal, Annotated):
        return value in inner if base is Literal else fits(value, inner[0])
    if not isinstance(base, type) or not isinstance(value, PLAIN):
        return base is not None or value is None
    if base in (bool, int, float, str):
        return type(value) is base or (base is float and type(value) is int)
    if isinstance(value, list) and (issubclass(list, base) or issubclass(base, tuple | set)):
        fixed = base is tuple and inner[1:] != (...,)
        kinds = inner if fixed else inner[:1] * len(value)
        return not inner or (len(kinds) == len(value) and all(map(fits, value, kinds)))
    try:
        return isinstance(value, base) or (isinstance(value, str) and issubclass(base, PurePath))
    except TypeError:  # a protocol, or a typed dictionary
        return True


def describe(kind: Any) -> str:
    """Describe the plain values that fit an annotation."""
    base, inner = get_origin(kind) or kind, get_args(kind)
    if base in (Union, UnionType):
        plain = [each for each in inner if (get_origin(each) or each) in (*PLAIN, Literal)]
        return " or ".join(dict.fromkeys(map(describe, plain or inner)))
    if base is Literal:
        return " or ".join(map(str, inner))
    if base is tuple and inner and inner[-1] is not ...:
        return f"a list of {len(inner)}, each {describe(inner[0])}"
    return NAMES.get(base) or ("a list" if base not in PLAIN and fits([], base) else f"of {kind}")


def misfit(function: Callable[..., Any], arguments: Mapping[str, Any]) -> inspect.Parameter | None:
    """Return the parameter of the first argument that is not of the type it declares."""
    try:
        parameters = inspect.signature(function, eval_str=True).parameters
    except (NameError, TypeError, ValueError, AttributeError):  # names that only type checkers know
        return None
    for name in arguments.keys() & parameters.keys():
        known, value = parameters[name], arguments[name]
        is_judged = known.annotation is not known.empty and known.kind is not known.VAR_KEYWORD
        if is_judged and not fits(value, known.annotation) and value is not known.default:
            return known
    return None


def value_in_conf(key: str, target: Any) -> Any:
    """Return the value that conf/ gives a key, or an argument of the class `target`; None if none."""
    return _conf().get(key if target is None else f"{target}:{key.rpartition('.')[2]}")


def is_number(value: Any) -> bool:
    """Return whether a value is a finite number; whole ones have 64 bits."""
    return type(value) in (int, float) and abs(value) < (LARGEST if type(value) is int else math.inf)


def is_like(value: Any, example: Any) -> bool:
    """Return whether a value is of the type that the one in conf/ has; only switches are never null."""
    if value is None:
        return type(example) is not bool
    if type(example) in (int, float):
        return is_number(value)
    return fits(value, type(example)) or isinstance(value, Mapping)


def read_conf(*folders: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield the config files of folders, each with its values under their whole keys."""
    for folder in folders:
        for path in (*sorted(folder.glob("*/*.yaml")), *folder.glob("config.yaml")):
            text = path.read_text(encoding="utf-8")
            tree = yaml.load(text, LOADER) or {}
            is_whole = path.parent == folder or text.startswith("# @package _global_")
            yield path, tree if is_whole else {path.parent.name: tree}


@functools.cache
def _conf() -> Mapping[str, Any]:
    """The values in conf/, by key, or by class and argument."""
    return {key: value for _, tree in read_conf(CONF) for key, value in _leaves(tree, "")}


def _leaves(tree: Mapping[str, Any], above: str) -> Iterator[tuple[str, Any]]:
    target = tree.get("_target_")
    for name, value in tree.items():
        key = f"{above}{name}"
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{key}.")
        elif value is not None and "${" not in str(value):
            if target is None:
                yield key, value
            elif str(target).startswith(SHIPPED):
                yield f"{target}:{name}", value
