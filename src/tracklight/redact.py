"""Redact secrets in whatever is shown, logged or stored."""

import os
import re
from collections.abc import Mapping
from typing import Any

MIN_SECRET_CHARS = 6  # a shorter value would redact words that are no secret
_WORDS = r"pass(?:word|wd|phrase)|secret|api_?key|private_?key|credential"
_SECRET_KEY = re.compile(_WORDS, re.IGNORECASE)
_TOKEN_KEY = re.compile("token", re.IGNORECASE)
_SHORT_WORDS = r"\bpwd|(?<=[?&;])key"  # KEY=VALUE in a message is no secret, ?key= in a URI is
_PAIR_IN_TEXT = re.compile(
    rf"((?:[\w-]*(?:{_WORDS}|token)[\w-]*|{_SHORT_WORDS})=)[^\s&;,'\"]+", re.IGNORECASE
)
_USER_IN_URI = re.compile(r"(://)[^\s/@:]*(?::\S*)?@")


def redact(tree: Any) -> Any:
    """Replace secrets by ***: in URIs and `name=value` pairs of text, under telling keys of a tree.

    The value of an environment variable of a telling name is replaced everywhere: a config may have
    read it by `oc.env`, under any key.
    """
    values = [
        value
        for name, value in os.environ.items()
        if len(value) >= MIN_SECRET_CHARS and _is_secret(name, value)
    ]
    return _redact(tree, values)


def _redact(tree: Any, values: list[str]) -> Any:
    if isinstance(tree, str):
        for value in values:
            tree = tree.replace(value, "***")
        return _PAIR_IN_TEXT.sub(r"\1***", _USER_IN_URI.sub(r"\1***@", tree))
    if isinstance(tree, Mapping):
        return {
            key: "***" if _is_secret(str(key), value) else _redact(value, values)
            for key, value in tree.items()
        }
    return [_redact(value, values) for value in tree] if isinstance(tree, list | tuple) else tree


def _is_secret(key: str, value: Any) -> bool:
    if value is None or isinstance(value, Mapping | bool):
        return False
    counts = isinstance(value, int | float)  # max_tokens, not a token
    return bool(_SECRET_KEY.search(key) or (_TOKEN_KEY.search(key) and not counts))
