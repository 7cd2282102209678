"""Redact secrets in whatever is shown, logged or stored.

Structure comes first: the keys of a mapping, the words of a command line. Text comes last: URLs,
`name=value` in its many spellings, headers, and the shapes that well-known services give their keys
(gitleaks and detect-secrets look for the same). What an environment variable with the name of a
secret holds is redacted anywhere.
"""

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

STARS = "***"
MIN_SECRET_CHARS = 6  # a shorter value of the environment may be part of any word

# Words of a key whose value is secret. `tokens` is not one of them: it counts something.
WORDS = {
    *("password", "passwords", "passwd", "passphrase", "passcode", "pwd", "pw", "secret", "secrets"),
    *("token", "credential", "credentials", "auth", "authorization", "bearer", "cookie", "cookies"),
    *("sas", "apikey", "accesskey", "jwt"),
}
KEYS_OF = {"api", "access", "account", "private", "secret", "signing", "encryption", "ssh"}
URL_ONLY = {"key", "sig", "signature"}  # secret as parameters of a URL, plain words elsewhere

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_QUOTED = r"\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'"
_NAME = r"[A-Za-z_][\w.\-]*"
_USER_IN_URL = re.compile(r"(?<=://)[^\s'\"<>]*@")
_USER_AT_HOST = re.compile(r"(?<![\w/.])[\w.+-]+:[^\s@/:'\"]+@(?=[\w-])")
_PARAMETER = re.compile(rf"([?&;]({_NAME})=)[^\s&;'\"<>]+")
_PAIR = re.compile(
    rf"((?P<quote>[\"']?)(?P<name>{_NAME})(?P=quote)\s*(?:=|:(?!//))\s*)"
    rf"(?P<value>{_QUOTED}|\{{[^{{}}]*\}}|\[[^\[\]]*\]|[^\s,;&'\"{{}}\[\]()]+)"
)
_OPTION = re.compile(rf"(--?(?P<name>{_NAME})[ =])(?P<value>{_QUOTED}|[^\s'\"]+)")
_SCHEME = re.compile(r"\b(Bearer|Basic|Digest|Token) +[\w.~+/=:\-]{4,}")
_SHAPES = re.compile(
    r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|\bgh[pousr]_\w{30,}|\bgithub_pat_\w{30,}|\bglpat-[\w-]{20,}|\bhf_\w{30,}"
    r"|\bsk-[\w-]{20,}|\bxox[abeoprs]-[\w-]{10,}|\bAIza[\w-]{35}|\bdapi[0-9a-f]{32}\b|\bnpm_\w{36}"
    r"|\beyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]+"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"
)


def redact(tree: Any) -> Any:
    """Return a text, or a tree of mappings, lists and texts, with `***` in place of every secret."""
    return _redact(tree, _secrets_of_environment())


def redact_command(argv: Sequence[str]) -> str:
    """Return a command line as one would type it, secrets redacted: `argv` are its words."""
    values, words, is_secret_next = _secrets_of_environment(), [], False
    for word in argv:
        name, equals, _ = word.partition("=")
        if is_secret_next and not word.startswith("-"):
            words.append(STARS)
        elif equals and is_secret(name.lstrip("+~-")):
            words.append(f"{name}={STARS}")
        else:
            words.append(_redact(word, values))
        is_secret_next = not equals and word.startswith("-") and is_secret(word.lstrip("-"))
    return shlex.join(words).replace(shlex.quote(STARS), STARS)


def is_secret(key: str, value: Any = "") -> bool:
    """Return whether a key names a secret, as `db_password` and `apiKey` do and `monkey` does not."""
    if value is None or isinstance(value, bool):
        return False
    words = [word.lower() for word in _WORD.findall(key.rpartition(".")[2])]
    if words and words[-1] == "token" and isinstance(value, int | float):
        return False  # it counts something
    pairs = zip(words, words[1:], strict=False)
    return any(word in WORDS or word.endswith(("password", "passwd", "passphrase")) for word in words) or any(
        second in ("key", "keys") and first in KEYS_OF for first, second in pairs
    )


def _secrets_of_environment() -> list[str]:
    """Return the values to redact anywhere; where a secret lies (`SSH_AUTH_SOCK`) and `PWD` are none."""
    named = ((k, v) for k, v in os.environ.items() if len(v) >= MIN_SECRET_CHARS and is_secret(k))
    return [v for k, v in named if k not in ("PWD", "OLDPWD") and not (v[0] == "/" and Path(v).exists())]


def _redact(tree: Any, values: Sequence[str]) -> Any:
    if isinstance(tree, str):
        return redact_text(tree, values)
    if isinstance(tree, Mapping):
        return {
            key: STARS if is_secret(str(key), value) else _redact(value, values)
            for key, value in tree.items()
        }
    return [_redact(value, values) for value in tree] if isinstance(tree, list | tuple) else tree


def redact_text(text: str, values: Sequence[str] = ()) -> str:
    """Redact a text alike in every environment; `values` are redacted, too."""
    for value in values:
        text = text.replace(value, STARS)
    text = _SHAPES.sub(STARS, _USER_IN_URL.sub(f"{STARS}@", text))
    text = _SCHEME.sub(rf"\1 {STARS}", _USER_AT_HOST.sub(f"{STARS}@", text))
    text = _PARAMETER.sub(_star_parameter, text)
    return _OPTION.sub(_star_pair, _PAIR.sub(_star_pair, text))


def _star_parameter(found: re.Match[str]) -> str:
    words = {word.lower() for word in _WORD.findall(found[2])}
    return f"{found[1]}{STARS}" if words & URL_ONLY or is_secret(found[2]) else found[0]


def _star_pair(found: re.Match[str]) -> str:
    value = found["value"]
    number = float(value) if re.fullmatch(r"\d+(\.\d+)?", value) else value
    if value in ("null", "None", "true", "false", STARS):
        return found[0]
    if not is_secret(found["name"], number):  # something in it may be
        inner = _PAIR.sub(_star_pair, value[1:-1]) if value[0] in "{[\"'" else value[1:-1]
        return f"{found[1]}{value[0]}{inner}{value[-1]}" if len(value) > 1 else found[0]
    quote = value[0] if value[0] in "\"'" else ""
    return f"{found[1]}{quote}{STARS}{quote}"
