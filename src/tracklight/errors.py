"""The two errors that are shown to the user as one line, and numbers in it."""


class BadInput(ValueError):
    """The user's input is invalid; the message is the one line shown, exit code 2."""


class RunFailed(RuntimeError):
    """A run started and failed; the message is the one line shown, exit code 1."""


def count(num: int, noun: str) -> str:
    """Return a number with its noun for a message, in the plural unless there is one."""
    return f"{num:,} {noun}{'' if num == 1 else 's'}"
