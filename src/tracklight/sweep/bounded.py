"""Waiting for what may never answer."""

import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def bounded(call: Callable[[], T], limit_s: float) -> T:
    """Return the call's result; it runs in a thread that is left behind if it takes too long.

    Raises:
        TimeoutError: It took longer than the limit.
        Exception: What the call raised.
    """
    ended: list[tuple[bool, Any]] = []

    def run() -> None:
        try:
            ended.append((True, call()))
        except Exception as error:
            ended.append((False, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(limit_s)
    if not ended:
        raise TimeoutError
    succeeded, result = ended[0]
    if not succeeded:
        raise result
    return result
