"""Redact secrets in everything that is shown, logged or stored.

Structure comes first: the keys of a mapping, the words of a list (`config.overrides` parses a command
line). Text comes last: URLs, `name=value` in its many spellings, headers, and the shapes that well-known
services give their keys (gitleaks and detect-secrets look for the same). What an environment variable
with the name of a secret holds is redacted anywhere.
"""

import logging
import os
import re
import traceback
import warnings
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

STARS = "***"
CONTROL = re.compile("[^\\n\\t -~\\xa0-\\U0010ffff]")  # characters that steer a terminal
MIN_SECRET_CHARS = 6  # a shorter value of the environment may be part of any word
PACKAGE = Path(__file__).resolve().parent

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+|\.")
# In a dotted key, its words in lower case with underscores between: what says that the value is secret.
_SECRET = re.compile(
    r"(?:\b|_)(?:passwords|passcode|pwd|pw|secrets|credentials?|creds|auth|authorization|bearer|cookies?"
    r"|sas|jwt)(?:_|\b)|(?:password|passwd|passphrase|secret)(?:_|\b)"
    r"|(?<!(?:bos|eos|pad|unk|sep|cls)_)(?<!mask_)token(?:_|\b)"  # those of a vocabulary are none
    r"|(?:api|access|account|private|secret|signing|encryption|ssh|storage|master|license|deploy|auth|hf|aws"
    r"|azure|openai|anthropic|wandb|comet|neptune)[._]*(?:keys?|signature|tokens)(?:_|\b)"
    r"|(?:\b|_)(?:db|user|root|admin|my|pg|sql|ssh|ftp|smtp|mail|proxy)_?pass\b|\b(?:pass|tokens)$"
)
_COUNTED = re.compile(r"(?:_|\b)(?:tokens?|pass)$")  # of these, a number counts something
URL_ONLY = {"key", "sig", "signature"}  # secret as parameters of a URL, plain words elsewhere
LINES = {"authorization", "cookie", "cookies"}  # headers, whose value is the rest of the line

_NAME = r"\w[\w.\-]{0,200}"
_QUOTED = r"\\\".*?\\\"|\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'"
_USER_IN_URL = re.compile(  # in bounded time for each of many URLs
    r"(?<=://)(?:[^\s'\"<>]{,2000}|[^\s/:@'\"<>]+:(?!\d+[\s/])[^\n@'\"<>]{,2000})@"
)
_USER_AT_HOST = re.compile(r"(?<![\w/.])[\w.+-]{1,64}:(?!//)[^\s@'\"]{1,256}@(?=[\w-])")
_PARAMETER = re.compile(rf"([?&;]({_NAME})=)[^\s&;'\"<>]+")
_NAMED = re.compile(
    rf"(?<![\w.])(?:[\"']?name[\"']?[:=] *[\"']?(?P<told>{_NAME})[\"']?(?:,|\n[+-]?) *[\"']?value[\"']?[:=] *"
    rf"|(?P<quote>\\?[\"'])?(?P<name>{_NAME})(?(quote)(?P=quote)]?)[ \t]*(?:=>|:=|=|(?P<colon>:)(?!//))[ \t]*"
    rf"|--?(?P<option>{_NAME})(?: |[\"'], *))"
)
_VALUE = re.compile(rf"{_QUOTED}|[^\s;&]*[^\s;&,)}}\]\"']")
_VALUE_IN_BRACES = re.compile(rf"{_QUOTED}|[^,}}\]\n]+")
_BRACKET = re.compile(rf"{_QUOTED}|[{{}}\[\]()]")
_SCHEME = re.compile(r"\b(Bearer|Basic|Digest|Token) +[\w.~+/=:\-]{4,}")
_SHAPES = re.compile(
    r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|\bgh[pousr]_\w{30,}|\bgithub_pat_\w{30,}|\bglpat-[\w-]{20,}|\bhf_\w{30,}"
    r"|\bsk-[\w-]{20,}|\bxox[abeoprs]-[\w-]{10,}|\bAIza[\w-]{35}|\bdapi[0-9a-f]{32}\b|\bnpm_\w{36}"
    r"|\b[rs]k_(?:live|test)_\w{10,}|\bSG\.[\w-]{10,}\.[\w-]{10,}|\bya29\.[\w-]{10,}|\bpypi-[\w-]{16,}"
    r"|\bhttps://(?:hooks\.slack\.com/services|discord(?:app)?\.com/api/webhooks)/[^\s'\"]+"
    r"|\beyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]+"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"
)


def redact(tree: Any) -> Any:
    """Return a text, or a tree of mappings, lists and texts, with `***` in place of every secret."""
    named = ((k, v) for k in os.environ if is_secret(k) and len(v := os.environ[k]) >= MIN_SECRET_CHARS)
    # Where a secret lies (`SSH_AUTH_SOCK`) is none, nor is `PWD`.
    values = [v for k, v in named if k not in ("PWD", "OLDPWD") and not (v[0] == "/" and Path(v).exists())]
    return _redact(tree, values)


def redact_messages() -> None:
    """Redact whatever is warned of or logged in this process, by libraries too."""
    logging.setLogRecordFactory(_make_record)
    warnings.formatwarning = _format_warning


def is_secret(key: str, value: Any = "") -> bool:
    """Return whether a dotted key names a secret, as `db_password` and `auth.x` do, `monkey` not."""
    if value is None or isinstance(value, bool):
        return False
    names_secret, names_count = _read_name(key)
    numbers = value if isinstance(value, list | tuple) and value else [value]
    return names_secret and not (names_count and all(isinstance(each, int | float) for each in numbers))


@lru_cache(4096)  # of a sweep, thousands of runs have the same keys
def _read_name(key: str) -> tuple[bool, bool]:
    words = "_".join(_WORD.findall(key)).lower().replace("_._", ".")
    return _SECRET.search(words) is not None, _COUNTED.search(words) is not None


def _redact(tree: Any, values: Sequence[str]) -> Any:
    if isinstance(tree, str):
        return redact_text(tree, values)
    if isinstance(tree, Mapping):
        name, safe = tree.get("name"), {}  # as in {name: password, value: ...}
        for key, value in tree.items():
            hides = is_secret(str(name if key == "value" else key), value) or is_secret(str(key), value)
            shown = redact_text(key, values) if isinstance(key, str) else key
            safe[shown] = STARS if hides else _redact(value, values)
        return safe
    if not isinstance(tree, list | tuple):
        return tree
    before = ["", *map(str, tree)]  # as in [--password, ...]
    options = [word[:1] == "-" and "=" not in word and is_secret(word) for word in before]
    return [STARS if hides else _redact(each, values) for hides, each in zip(options, tree, strict=False)]


def redact_text(text: str, values: Sequence[str] = ()) -> str:
    """Redact a text alike in every environment; `values` are redacted, too."""
    for value in values:
        text = text.replace(value, STARS)
    text = _SHAPES.sub(STARS, _USER_IN_URL.sub(f"{STARS}@", text))
    text = _SCHEME.sub(rf"\1 {STARS}", _USER_AT_HOST.sub(f"{STARS}@", text))
    text = _PARAMETER.sub(_star_parameter, text)
    parts, done = list[str](), 0
    for found in _NAMED.finditer(text):
        start = found.end()
        name = found["told"] or found["name"] or found["option"]
        if start < done or not is_secret(name):
            continue
        end = _end_of_value(text, found)
        value = text[start:end]
        number = 0 if re.fullmatch(r"[\d., \[\]]+", value) else value
        if value not in ("", "null", "None", "true", "false", STARS) and is_secret(name, number):
            quote = (re.match(r"\\?[\"']", value) or [""])[0]
            parts += text[done:start], quote, STARS, quote
            done = end
    return "".join([*parts, text[done:]])


def _star_parameter(found: re.Match[str]) -> str:
    words = {word.lower() for word in _WORD.findall(found[2])}
    return f"{found[1]}{STARS}" if words & URL_ONLY or is_secret(found[2]) else found[0]


def _end_of_value(text: str, found: re.Match[str]) -> int:
    """Return where the value ends whose name is found: at its quote or bracket, of its line or its word."""
    start, depth = found.end(), 0
    if text[start : start + 1] in ("{", "[", "("):
        for bracket in _BRACKET.finditer(text, start):
            depth += (bracket[0] in "{[(") - (bracket[0] in ")]}")
            if depth == 0:
                return bracket.end()
        return len(text)  # cut off
    before = text[text.rfind("\n", 0, found.start()) + 1 : found.start()]
    end_of_line = _end_of_line(text, start)
    line = text[start:end_of_line]
    is_yaml = found["colon"] and not before.strip(" +-") and "\n" in text
    if is_yaml and re.fullmatch(r"[|>]?[\d+-]*\s*", line):  # a block: lines indented more, or a list
        while end_of_line < len(text):
            end = _end_of_line(text, end_of_line + 1)
            line = text[end_of_line + 1 : end]
            if line.strip() and len(line) - len(line.lstrip(" +-")) <= len(before):
                break
            end_of_line = end
        return end_of_line
    is_inside = found["colon"] and before.rstrip()[-1:] in ("{", ",")
    is_header = found["colon"] and not is_inside and LINES & {*_WORD.findall(str(found["name"]).lower())}
    if line[:1] not in ("'", '"', "\\") and (is_yaml or is_header):
        return end_of_line
    value = (_VALUE_IN_BRACES if is_inside else _VALUE).match(text, start)
    return value.end() if value else start


def _end_of_line(text: str, start: int) -> int:
    end = text.find("\n", start)
    return len(text) if end < 0 else end


def _make_record(*args: Any, **kwargs: Any) -> logging.LogRecord:
    record = logging.LogRecord(*args, **kwargs)
    try:
        record.msg, record.args = redact(record.getMessage()), ()
    except (TypeError, ValueError):  # arguments that do not fit: logging says so
        return record
    if record.exc_info and record.exc_info[0]:
        record.exc_text = redact("".join(traceback.format_exception(*record.exc_info))).rstrip()
    return record


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: Any = None
) -> str:
    """Format a warning as one line; ours speak to the user, and need no place in the code."""
    ours = Path(filename).resolve().is_relative_to(PACKAGE)
    place = "" if ours else f" ({category.__name__} at {filename}:{lineno})"
    return redact(f"warning: {message}{place}\n")
