"""The two ways a run ends badly on purpose."""


class BadInput(ValueError):
    """The user asked for what cannot be; the message is the one line shown, exit code 2."""


class RunFailed(RuntimeError):
    """The run started and could not end well; the message is the one line shown, exit code 1."""
