"""The only place that builds objects from a config, Hydra's own nodes included.

A `_target_` names a class that is defined in an allowed module, or nothing is instantiated.
"""

import importlib
import inspect
import re
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial as bind
from operator import attrgetter
from types import ModuleType
from typing import Any

from omegaconf import DictConfig, OmegaConf

from tracklight.config.hydra_internals import full_key
from tracklight.config.overrides import BUILT
from tracklight.config.rules import format_value
from tracklight.config.types import describe, fits, misfit
from tracklight.errors import BadInput
from tracklight.paths import ALLOW_LIST, PACKAGE
from tracklight.redact import CONTROL

_KINDS = {"_args_": list, "_partial_": bool, "_recursive_": bool}
DIRECTIVES = ("_target_", "_args_", "_partial_", "_recursive_", "_convert_")
PLUGINS = ("hydra_plugins", "hydra._internal.core_plugins", "hydra.experimental.callbacks")
HYDRA_INSTANTIATES = ("callbacks", "launcher", "sweeper")
LOGGING = ("job_logging", "hydra_logging")  # nodes that Hydra gives to logging.config.dictConfig
FACTORIES = ("class", "()")  # keys by which those name what is called
STREAMS = ("ext://sys.stdout", "ext://sys.stderr")


def instantiate(
    node: Any,
    allowed: Sequence[str],  # modules: a class defined in one of them or below may be instantiated
    kind: type = object,  # a base of the outermost class
    partial: bool = False,  # return a callable that takes the arguments still missing
    where: str = "",  # key of a node that is a plain mapping, for messages
    **kwargs: Any,  # further arguments of the outermost class; they win over the node's
) -> Any:
    """Instantiate the class that a config node names, the nodes inside it first; without one, give a dict.

    Raises:
        BadInput: A target is not allowed, not found or of another kind, or arguments do not fit.
    """
    where = full_key(node) if isinstance(node, DictConfig) else where
    tree: Any = OmegaConf.to_container(node) if OmegaConf.is_config(node) else node
    check_plain(tree, where)
    check_targets(tree, allowed, where)  # all of them before the first import
    factories: dict[str, bind] = {
        key: bind(find_class(target, allowed, _join(key, "_target_")))
        for key, target in iter_targets(tree, where)
    }
    if where in factories:
        found: Any = factories[where].func
        if not issubclass(found, kind):
            key, base = _join(where, "_target_"), f"{kind.__module__}.{kind.__qualname__}"
            raise BadInput(f"{key}={tree['_target_']} is no {base}")
        factories[where] = bind(found, **kwargs)
        tree = {name: value for name, value in tree.items() if name not in kwargs}
        tree["_partial_"] = partial
    elif kind is not object:
        raise BadInput(f"{where or 'it'} names no class; set {_join(where, '_target_')}=MODULE.CLASS")
    return _construct(tree, factories, where)


def check_plain(tree: Any, where: str = "") -> None:
    """Refuse text with control characters, and text that OmegaConf would resolve if it read it again.

    What is checked must be what is instantiated: a value that was resolved once is text for good.
    """
    text = repr(tree)  # in which a control character is escaped
    if "\\" not in text and "${" not in text:
        return
    for key, value in iter_values(tree, where):
        if isinstance(value, str) and len(value) > 1 and CONTROL.search(value):  # alone: a delimiter
            raise BadInput(f"{key}={value[:80]!r} holds a control character; leave it out")
        if isinstance(value, str) and "${" in value:
            problem = f"{key}={value[:80]}: '${{' is refused in a value that is resolved already"
            raise BadInput(f"{problem}; write the value itself")


def check_targets(tree: Any, allowed: Sequence[str], where: str = "") -> None:
    """Refuse every `_target_` that is not below an allowed module; nothing is imported for that."""
    for key, target in iter_targets(tree, where):
        _check_target(target, allowed, _join(key, "_target_"))
    for key, value in iter_values(tree, where):
        kind = _KINDS.get(key.rpartition(".")[2])
        if kind is not None and not isinstance(value, kind):
            raise BadInput(f"{key}={value} must be a {kind.__name__}")


def check_hydra_nodes(hydra: DictConfig, allowed: list[str]) -> None:
    """Refuse a composed node `hydra` that would call what is neither Hydra's plugin nor allowed."""
    trusted = [*PLUGINS, *allowed]
    for name in HYDRA_INSTANTIATES + LOGGING:
        tree = OmegaConf.to_container(hydra.get(name) or OmegaConf.create(), resolve=True)
        where = f"hydra.{name}"
        check_plain(tree, where)
        if name in LOGGING:
            _check_logging(tree, ["logging", *allowed], where)
        check_targets(tree, trusted, where)
        for key, target in iter_targets(tree, where):
            if key != where:  # of plugins, Hydra itself takes only those that it has discovered
                find_class(target, trusted, f"{key}._target_")


def _check_logging(tree: Any, allowed: Sequence[str], where: str) -> None:
    """Refuse what `logging.config.dictConfig` would import, call or follow."""
    for key, value in iter_values(tree, where):
        if isinstance(value, Mapping):
            for name in FACTORIES:
                if name in value:
                    find_class(value[name], allowed, f"{key}.{name}")
        elif isinstance(value, str) and "://" in value and value not in STREAMS:
            raise BadInput(f"{key}={value} is refused; it can be {' or '.join(STREAMS)}")


def find_class(target: Any, allowed: Sequence[str], key: str) -> type:
    """Import the class that an allowed name means; it must be defined in an allowed module too."""
    _check_target(target, allowed, key)
    found = _import(target, key)
    if not inspect.isclass(found):
        raise BadInput(f"{key}={target} must be a class, not a {type(found).__name__}")
    home = f"{found.__module__}.{found.__qualname__}"
    _check_allowed(f"{key}={target}, which is {home},", home, allowed)
    return found


def iter_targets(tree: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the key of every node with a `_target_` and that target, outermost first."""
    for key, node in iter_values(tree, where):
        if isinstance(node, Mapping) and node.get("_target_") is not None:
            yield key, node["_target_"]


def iter_values(tree: Any, where: str) -> Iterator[tuple[str, Any]]:
    """Yield every value with its key, and every name in a mapping with the mapping's key."""
    yield where, tree
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            yield where, name
            yield from iter_values(value, _join(where, str(name)))
    elif isinstance(tree, list | tuple):
        for index, value in enumerate(tree):
            yield from iter_values(value, f"{where}[{index}]")


def _check_target(target: Any, allowed: Sequence[str], key: str) -> None:
    if not isinstance(target, str) or not all(map(str.isidentifier, target.split("."))):
        raise BadInput(f"{key}={target} must be the dotted name of a class")
    _check_allowed(f"{key}={target}", re.sub(r"^lightning\.pytorch\.", "pytorch_lightning.", target), allowed)


def _alias_lightning() -> None:
    """Let `lightning` be pytorch_lightning: the same code in two packages, whose classes do not mix."""
    importlib.import_module("pytorch_lightning.demos")  # which Lightning's examples take as L.pytorch.demos
    for real, alias in (("pytorch_lightning", "lightning.pytorch"), ("lightning_fabric", "lightning.fabric")):
        for name in [each for each in sys.modules if each.partition(".")[0] == real]:
            sys.modules[name.replace(real, alias, 1)] = sys.modules[name]
    pytorch, fabric = sys.modules["pytorch_lightning"], sys.modules["lightning_fabric"]
    sys.modules["lightning"] = package = ModuleType("lightning")
    vars(package).update({**vars(fabric), **vars(pytorch), "pytorch": pytorch, "fabric": fabric})


def _import(target: str, key: str) -> Any:
    if "pytorch_lightning" in sys.modules and "lightning" not in sys.modules:
        _alias_lightning()
    parts = target.split(".")
    for length in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:length])
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is not None and f"{name}.".startswith(f"{error.name}."):
                continue  # the target lies in the module above, or nowhere
            raise BadInput(f"{key}={target} needs {error.name}, which is not installed") from error
        try:
            return attrgetter(".".join(parts[length:]))(module)
        except AttributeError as error:
            raise BadInput(f"{key}={target}: {error}") from error
    raise BadInput(f"{key}={target}: there is no module {parts[0]}")


def _construct(tree: Any, factories: Mapping[str, bind], where: str) -> Any:
    """Instantiate the nodes of a plain tree from the inside out; constructors get plain values."""
    if isinstance(tree, list | tuple):
        return [_construct(each, factories, f"{where}[{i}]") for i, each in enumerate(tree)]
    if not isinstance(tree, Mapping):
        return tree
    is_deep = where not in factories or tree.get("_recursive_", True)
    values = {
        name: _construct(value, factories, _join(where, str(name))) if is_deep else value
        for name, value in tree.items()
    }
    kwargs = {name: value for name, value in values.items() if name not in DIRECTIVES}
    if where not in factories:
        return kwargs
    names = {str(name): value for name, value in kwargs.items()}
    factory = bind(factories[where], *values.get("_args_", ()), **names)
    return build(factory, where, is_partial=bool(tree.get("_partial_")))


def build(factory: bind, where: str, is_partial: bool = False) -> Any:
    """Check the arguments of a class against its signature; return its object, or what makes it.

    Raises:
        BadInput: They do not fit, or the class refuses them.
    """
    _check_arguments(factory, is_partial, where)
    with naming(where or factory.func.__name__):
        return factory if is_partial else factory()  # a partial can be pickled, as Lightning asks


@contextmanager
def naming(where: str) -> Iterator[None]:
    """Turn whatever a library raises for its values into bad input, named with their key."""
    try:
        yield
    except BadInput:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0].strip()
        if " " not in reason:  # such as the key of a KeyError
            reason = f"{type(error).__name__} {reason}".rstrip()
        *_, last = traceback.extract_tb(error.__traceback__)
        is_ours = last.filename.startswith(str(PACKAGE)) or "lib/python" in last.filename
        place = "" if is_ours else f" ({last.filename}, line {last.lineno})"
        raise BadInput(f"{where}: {reason}{place}") from error


def _check_arguments(factory: bind, is_partial: bool, where: str) -> None:
    wrong = misfit(factory.func, factory.keywords)
    if wrong is not None:
        key, value = _join(where, wrong.name), factory.keywords[wrong.name]
        quoted = (str(value), f"'\"{value}\"'"), ([value], f"[{format_value(value)}]")
        cures = [text for other, text in quoted if fits(other, wrong.annotation)]
        hint = f"; try {key}={cures[0]}" if cures and not isinstance(value, list | dict | bool) else ""
        raise BadInput(f"{key}={format_value(value)} must be {describe(wrong.annotation)}{hint}")
    try:
        signature = inspect.signature(factory.func)
    except ValueError:  # a class in C without a signature
        return
    try:
        fit = signature.bind_partial if is_partial else signature.bind
        fit(*factory.args, **factory.keywords)
    except TypeError as error:
        name, parameters = factory.func.__name__, ", ".join(signature.parameters)
        own = f"; write those to conf/{where}/NAME.yaml, its _target_ too, and choose {where}=NAME"
        hint = own if where in BUILT and not factory.func.__module__.startswith("tracklight.") else ""
        raise BadInput(f"{where or name}: {error}; {name} takes {parameters}{hint}") from error


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _check_allowed(got: str, name: str, allowed: Sequence[str]) -> None:
    if not any(name.startswith(f"{prefix.rstrip('.')}.") for prefix in allowed if prefix):
        cure = f"if you trust it, list {name.rpartition('.')[0]} under allowed_targets in {ALLOW_LIST}"
        raise BadInput(f"{got} is not on the allow-list; {cure}")
