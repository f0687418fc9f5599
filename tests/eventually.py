"""Waiting for something that another process does, without sleeping a fixed time."""

import threading
import time
from collections.abc import Callable
from typing import TypeVar

from mqtt_io.client import LoopClient, turn

POLL_S = 0.05
PATIENCE = 5
"""Limits are those of an idle machine; a slow one may take so many times as long. Only a test that fails takes it."""
T = TypeVar("T")


def eventually(condition: Callable[[], T | None], timeout_s: float = 10.0) -> T:
    """The condition's value once it is true; it may raise AssertionError or OSError until then.

    Raises:
        AssertionError: it did not come true in time.
    """
    deadline = time.monotonic() + PATIENCE * timeout_s
    last: object = None
    while time.monotonic() < deadline:
        try:
            value = condition()
            if value:
                return value
            last = value
        except (AssertionError, OSError) as error:
            last = error
        threading.Event().wait(POLL_S)
    message = f"not within {PATIENCE * timeout_s} s; last: {last!r}"
    raise AssertionError(message)


def turning(client: LoopClient, condition: Callable[[], T | None], timeout_s: float = 10.0) -> T:
    """The condition's value once it is true; until then the client takes what comes and sends what waits.

    Raises:
        AssertionError: it did not come true in time.
    """

    def turned() -> T | None:
        turn([client], POLL_S)
        return condition()

    return eventually(turned, timeout_s)
