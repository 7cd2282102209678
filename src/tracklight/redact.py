"""Passwords are starred out of whatever is shown, logged or stored."""

import os
import re
from collections.abc import Mapping
from typing import Any

MIN_SECRET_CHARS = 6  # a shorter value would star out words that are no secret
_WORDS = r"pass(?:word|wd|phrase)|secret|api_?key|private_?key|credential"
_SECRET_KEY = re.compile(_WORDS, re.IGNORECASE)
_TOKEN_KEY = re.compile("token", re.IGNORECASE)
_SHORT_WORDS = r"\b(?:pwd|key)"  # as parts of longer words they say nothing
_PAIR_IN_TEXT = re.compile(
    rf"((?:[\w-]*(?:{_WORDS}|token)[\w-]*|{_SHORT_WORDS})=)[^\s&;,'\"]+", re.IGNORECASE
)
_USER_IN_URI = re.compile(r"(://)[^\s/@:]*(?::\S*)?@")


def redact(tree: Any) -> Any:
    """Star out secrets: of a text in URIs and `name=value` pairs, of a tree under telling keys.

    What an environment variable of a telling name holds is starred out wherever it stands: a config
    may have read it by `oc.env`, under whatever key.
    """
    values = [
        value
        for name, value in os.environ.items()
        if len(value) >= MIN_SECRET_CHARS and (_SECRET_KEY.search(name) or _TOKEN_KEY.search(name))
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
    if _TOKEN_KEY.search(key):
        return not isinstance(value, int | float)  # max_tokens counts something
    return _SECRET_KEY.search(key) is not None
