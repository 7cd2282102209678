"""The one gate from config to objects.

A `_target_` names a class that is defined in an allowed module, or nothing is built.
"""

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    tree: Any = OmegaConf.to_container(node) if OmegaConf.is_config(node) else node
    check_plain(tree, where)
    check_targets(tree, allowed, where)
    classes: dict[str, type] = {}
    for key, inner in described(tree, where):
        found = classes[key] = find_class(inner["_target_"], allowed, _join(key, "_target_"))
        is_outermost = key == where
        if is_outermost and kind is not None and not issubclass(found, kind):
            wanted = f"{kind.__module__}.{kind.__qualname__}"
            raise BadInput(f"{_join(key, '_target_')}={inner['_target_']} is no {wanted}")
        given = {**inner, **kwargs} if is_outermost else inner
        is_partial = partial if is_outermost else bool(inner.get("_partial_"))
        _check_arguments(found, given, is_partial, key)
    if where not in classes:
        return _construct(tree, classes, where)
    factory = _construct({**tree, "_partial_": True}, classes, where)
    if partial:
        return bind(factory, **kwargs)
    return _call(factory, where, **kwargs)


def check_plain(tree: Any, where: str = "") -> None:
    """Refuse text that OmegaConf would take for an interpolation if it read it again.

    What is checked must be what is built: a value that was resolved once is text for good.

    Raises:
        BadInput: There is some; the message names its key.
    """
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            check_plain(str(name), where)
            check_plain(value, _join(where, str(name)))
    elif isinstance(tree, list | tuple):
        for index, value in enumerate(tree):
            check_plain(value, f"{where}[{index}]")
    elif isinstance(tree, str) and "${" in tree:
        raise BadInput(
            f"{where}={tree[:80]}: '${{' is refused in a value that is resolved already; write the "
            "value itself"
        )


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


def targets_of(tree: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """Yield the key of every node with a `_target_`, and that target."""
    return ((key, node["_target_"]) for key, node in described(tree, where))


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


def _construct(tree: Any, classes: Mapping[str, type], where: str) -> Any:
    """Build the nodes of a plain tree from the inside out; constructors get lists and dicts."""
    if isinstance(tree, list | tuple):
        return [_construct(each, classes, f"{where}[{i}]") for i, each in enumerate(tree)]
    if not isinstance(tree, Mapping):
        return tree
    is_deep = where not in classes or tree.get("_recursive_", True)
    inner = {
        name: _construct(value, classes, _join(where, str(name))) if is_deep else value
        for name, value in tree.items()
        if name not in DIRECTIVES
    }
    if where not in classes:
        return inner
    positional = tree.get("_args_", [])
    if is_deep:
        positional = _construct(positional, classes, _join(where, "_args_"))
    if tree.get("_partial_"):
        return bind(classes[where], *positional, **inner)
    return _call(classes[where], where, *positional, **inner)


def _call(factory: Callable[..., Any], where: str, *args: Any, **kwargs: Any) -> Any:
    try:
        return factory(*args, **kwargs)
    except BadInput:
        raise
    except ValueError as error:
        raise BadInput(f"{where}: {error}".lstrip(": ")) from error


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
