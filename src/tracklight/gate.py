"""The one gate from config to objects.

A `_target_` names a class that is defined in an allowed module, or nothing is built.
"""

import importlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from functools import partial as bind
from typing import Any

from omegaconf import DictConfig, OmegaConf

from tracklight.errors import BadInput

DIRECTIVES = ("_target_", "_args_", "_partial_", "_recursive_", "_convert_")


def build(
    node: Any,
    allowed: Sequence[str],
    kind: type | None = None,
    partial: bool = False,
    **kwargs: Any,
) -> Any:
    """Build what a config node describes, the nodes inside it first.

    Args:
        node: A mapping with a `_target_`, or a mapping of such.
        allowed: Modules; what is defined in one of them or below may be built.
        kind: What the class must derive from.
        partial: Return a callable that takes the arguments still missing.
        **kwargs: Further arguments of the outermost class; they win over the node's.

    Returns:
        The object; for `partial` its factory; for a node without `_target_` a plain dict.

    Raises:
        BadInput: A target is not allowed, not there, of another kind, or given what it lacks.
    """
    where = (node._get_full_key(None) or "") if isinstance(node, DictConfig) else ""
    tree: Any = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    check_targets(tree, allowed, where)
    outermost = None
    for key, inner in described(tree, where):
        found = find_class(inner["_target_"], allowed, _join(key, "_target_"))
        if key != where:
            _check_arguments(found, inner, bool(inner.get("_partial_")), key)
            continue
        outermost = found
        if kind is not None and not issubclass(found, kind):
            wanted = f"{kind.__module__}.{kind.__qualname__}"
            raise BadInput(f"{_join(key, '_target_')}={inner['_target_']} is no {wanted}")
        _check_arguments(found, {**inner, **kwargs}, partial, key)
    if outermost is None:
        return _instantiate(tree, where)
    factory = _instantiate({**tree, "_partial_": True}, where)
    if partial:
        return bind(factory, **kwargs)
    try:
        return factory(**kwargs)
    except ValueError as error:
        raise _told_where(error, where) from error


def check_targets(tree: Any, allowed: Sequence[str], where: str = "") -> None:
    """Refuse names outside the allow-list; nothing is imported for that.

    Raises:
        BadInput: A `_target_` is no dotted name, or in none of the allowed modules.
    """
    for key, node in described(tree, where):
        target, key = node["_target_"], _join(key, "_target_")
        if not isinstance(target, str) or not all(map(str.isidentifier, target.split("."))):
            raise BadInput(f"{key}={target} must be the dotted name of a class")
        if not _within(target, allowed):
            raise _refused(key, target, target)


def find_class(target: str, allowed: Sequence[str], key: str) -> type:
    """Import what an allowed name means, and see that it is a class defined in an allowed module.

    Raises:
        BadInput: It is not there, is no class, or is merely reached through an allowed module.
    """
    found = _import(target, key)
    if not inspect.isclass(found):
        raise BadInput(f"{key}={target} must be a class, not a {type(found).__name__}")
    home = f"{found.__module__}.{found.__qualname__}"
    if not _within(home, allowed):
        raise _refused(key, target, home)
    return found


def described(tree: Any, where: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield every node with a `_target_`, outermost first; null is how a group says none."""
    if isinstance(tree, Mapping):
        if tree.get("_target_") is not None:
            yield where, tree
        for name, value in tree.items():
            yield from described(value, _join(where, str(name)))
    elif isinstance(tree, list | tuple):
        for index, value in enumerate(tree):
            yield from described(value, f"{where}[{index}]")


def _import(target: str, key: str) -> Any:
    parts = target.split(".")
    for length in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:length])
        try:
            found = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is not None and f"{name}.".startswith(f"{error.name}."):
                continue  # what is named lies in the module above, or nowhere
            raise BadInput(f"{key}={target} needs {error.name}, which is not installed") from error
        for attribute in parts[length:]:
            if not hasattr(found, attribute):
                raise BadInput(f"{key}={target}: {name} has no {attribute}")
            found = getattr(found, attribute)
        return found
    raise BadInput(f"{key}={target}: there is no module {parts[0]}")


def _check_arguments(found: type, given: Mapping[str, Any], partial: bool, where: str) -> None:
    try:
        signature = inspect.signature(found)
    except ValueError:  # a class of C code that does not tell
        return
    names = {name: None for name in given if name not in DIRECTIVES}
    fit = signature.bind_partial if partial else signature.bind
    try:
        fit(*given.get("_args_", ()), **names)
    except TypeError as error:
        taken = ", ".join(signature.parameters)
        raise BadInput(
            f"{where or found.__name__}: {error}; {found.__name__} takes {taken}"
        ) from error


def _instantiate(tree: Any, where: str) -> Any:
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    try:
        return instantiate(_without_conversions(tree), _convert_="all")
    except InstantiationException as error:
        if isinstance(error.__cause__, ValueError):
            raise _told_where(error.__cause__, where) from error
        raise error.__cause__ or error from None


def _without_conversions(tree: Any) -> Any:
    """Drop `_convert_`, so that every constructor gets plain lists and dicts, and null targets."""
    if isinstance(tree, Mapping):
        return {
            name: _without_conversions(value)
            for name, value in tree.items()
            if name != "_convert_" and (name, value) != ("_target_", None)
        }
    return [_without_conversions(value) for value in tree] if isinstance(tree, list) else tree


def _told_where(error: ValueError, where: str) -> BadInput:
    return error if isinstance(error, BadInput) else BadInput(f"{where}: {error}".lstrip(": "))


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _within(name: str, allowed: Sequence[str]) -> bool:
    return any(name.startswith(f"{prefix.rstrip('.')}.") for prefix in allowed if prefix)


def _refused(key: str, target: str, home: str) -> BadInput:
    hop = "" if home == target else f", which is {home},"
    return BadInput(
        f"{key}={target}{hop} is not on the allow-list; if you trust it, list "
        f"{home.rpartition('.')[0]} under allowed_targets in conf/config.yaml"
    )
