"""The two errors that are shown to the user as one line."""


class BadInput(ValueError):
    """The user's input is invalid; the message is the one line shown, exit code 2."""


class RunFailed(RuntimeError):
    """A run started and failed; the message is the one line shown, exit code 1."""
