"""The words of the command line, read before Hydra does; and Hydra's objections in one line."""

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Sweep
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from tracklight.config.rules import OWNED, nodes
from tracklight.errors import BadInput
from tracklight.paths import CONF

FUNCTIONS = ("interval", "range", "choice", "tag", "glob", "shuffle", "sort")  # of Hydra's grammar
RUN_KEYS = ("resume", "init_from")  # 1234e567 is a run id, not a number


def read(words: Sequence[str], *, many: bool) -> list[str]:
    """Check the overrides of a command line one by one and against each other.

    Args:
        words: As typed.
        many: Whether lists of values are wanted (-m).

    Returns:
        The overrides for Hydra, run ids quoted.

    Raises:
        BadInput: One of them is empty, twice there, a list, or not ours to set.
    """
    quoted = [_quote_run_id(word) for word in words]
    seen: dict[str, str] = {}
    for word, override in zip(words, parse(quoted), strict=True):
        if override.is_hydra_override():
            continue
        key = override.get_key_element().lstrip("+~")
        if key in seen:
            raise BadInput(f"{key} is given twice, as {seen[key]} and as {word}; keep one of them")
        seen[key] = word
        _check_word(word, override, key, many)
    return quoted


def _check_word(word: str, override: Override, key: str, many: bool) -> None:
    if override.is_delete():
        return
    if word.endswith("=") and "=" not in word[:-1]:
        raise BadInput(f"{word} has no value; write {key}=null for none, '{key}=\"\"' for no text")
    owned = key.removeprefix("trainer.")
    if owned != key and owned in OWNED:
        raise BadInput(f"{word}: tracklight sets {key} itself; use {OWNED[owned]}")
    if not many and key.partition(".")[0] == "sweep":
        raise BadInput(f"{word} is of sweeps, and this is a single run; add -m, or drop it")
    check_alone(word, override)
    if override.is_sweep_override():
        if not many and override.is_interval_sweep():
            raise BadInput(f"{word} is an interval; add -m to search it")
        if not many:
            listed = word.partition("=")[2]
            raise BadInput(
                f"{word} is a list of values; add -m to run each of them, "
                f"or write '{key}=[{listed}]' for one value that is a list"
            )
    elif (CONF / key).is_dir() and not isinstance(override.value(), str | dict):
        choices = sorted(file.stem for file in (CONF / key).glob("*.yaml"))
        raise BadInput(f"{word} names no file of conf/{key}; {key} can be {', '.join(choices)}")


def check_alone(word: str, override: Override) -> None:
    """Refuse an interval or a range within a list: Hydra reads it, and can do nothing with it.

    Raises:
        BadInput: There is one.
    """
    values = override.value()
    inside = getattr(values, "list", values)  # of a choice, or of a plain list
    if isinstance(inside, list) and any(isinstance(each, Sweep) for each in inside):
        raise BadInput(f"{word}: an interval or a range stands alone, as in KEY=interval(1,2)")


def parse(words: Iterable[str]) -> list[Override]:
    """Parse overrides by Hydra's grammar.

    Raises:
        BadInput: One of them is no override.
    """
    parser = OverridesParser.create()
    parsed = []
    for word in words:
        try:
            parsed += parser.parse_overrides([word])
        except HydraException as error:
            raise BadInput(told(error)) from error
    return parsed


def split_for_resume(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Part the overrides into those to compose with and those for the stored config of a run.

    Returns:
        All and none, unless `resume=RUN_ID`: then what is of this command, and all the rest.

    Raises:
        BadInput: A group is chosen beside `resume=RUN_ID`.
    """
    parsed = {
        word: override.key_or_group for word, override in zip(words, parse(words), strict=True)
    }
    resume = [
        word.partition("=")[2].strip("'\"") for word, key in parsed.items() if key == "resume"
    ]
    if not resume or resume[0] in ("auto", "null"):
        return list(words), []
    for word, key in parsed.items():
        if (CONF / key.partition("@")[0]).is_dir():
            raise BadInput(
                f"{word} chooses a group, but resume={resume[0]} takes the run's own config; "
                f"set single keys of it, {key}.KEY=VALUE, or start a new run without resume"
            )
    of_command = ("resume", "allow_changes", "allowed_targets", "tracking", "hydra")
    now = [word for word, key in parsed.items() if key.partition(".")[0] in of_command]
    for word in parsed:
        if "${" in word and word not in now:
            raise BadInput(f"{word}: a stored config is plain text; write the value itself")
    return now, [word for word, key in parsed.items() if key != "resume" and key[:6] != "hydra."]


def told(error: Exception) -> str:
    """Say in one line what Hydra or OmegaConf objects to, and what would work."""
    if isinstance(error, OverrideParseException):
        reason = _misread_call(str(error.override)) or (
            _first_line(str(error).removeprefix("LexerNoViableAltException: "))
            + "; write key=value, text 'key=\"a, b\"'"
        )
        return f"cannot read {error.override}: {reason}"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        options = list(error.options or [])
        listed = ", ".join(sorted(options))
        return f"{group}={choice} is not there; {group} can be {listed}{_nearest(choice, options)}"
    message = str(error)
    cause = error.__cause__
    if (match := re.match(r"Could not override '([^']+)'", message)) and cause is not None:
        root = getattr(cause, "parent_node", None)
        root = root._get_root() if root is not None else {}
        return unknown_key(
            match[1], dict(nodes({k: v for k, v in _unresolved(root).items() if k != "hydra"}))
        )
    if match := re.match(r"Could not override '(\w+)@", message):
        return f"{_first_line(message)} Write {match[1]}=CHOICE, without @"
    if isinstance(cause, OmegaConfBaseException):
        return f"{_first_line(message)}: {_first_line(str(cause))}".lstrip(": ")
    return _first_line(message)


def _misread_call(word: str) -> str:
    """Say what is wrong with a function of the grammar; nothing where that is not what is wrong."""
    call = re.search(r"=\s*(\w+)\(\s*(\))?", word)
    if call is None:
        return ""
    name, is_empty = call.groups()
    if name not in FUNCTIONS and (hint := _nearest(name, FUNCTIONS)):
        return f"no function {name}{hint}"
    if is_empty:
        return f"{name}() is empty; it takes values: (A,B)"
    return "an interval lies between two numbers: interval(0.1,1)" if "interval(" in word else ""


def unknown_key(key: str, known: Iterable[str]) -> str:
    """Say that a key is not there, which one may be meant, and how to add it."""
    hint = _nearest(key, [name for name in known if "_target_" not in name])
    return f"unknown key {key}{hint}; `python train.py --cfg job` shows all, +{key}=VALUE adds it"


def _nearest(word: str, candidates: Sequence[str]) -> str:
    """Suggest by the whole name, else by its last part: `lr` means `optimizer.lr`."""
    found = difflib.get_close_matches(word, candidates, n=1)
    if not found:
        last = {name.rpartition(".")[2]: name for name in reversed(list(candidates))}
        found = [
            last[name] for name in difflib.get_close_matches(word.rpartition(".")[2], last, n=1)
        ]
    return f"; did you mean {found[0]}?" if found else ""


def _unresolved(root: Any) -> dict[str, Any]:
    from omegaconf import OmegaConf

    return OmegaConf.to_container(root) if OmegaConf.is_config(root) else {}  # pyright: ignore[reportReturnType]


def _quote_run_id(word: str) -> str:
    key, _, value = word.partition("=")
    return f"{key}='{value}'" if key in RUN_KEYS and re.fullmatch(r"[0-9a-f]+", value) else word


def _first_line(text: str) -> str:
    return " ".join(text.strip().split("\n")[0].split())
