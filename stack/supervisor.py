"""The supervisor's loop: starts dead parts again."""

import threading
import time
from collections.abc import Callable, Iterable

from schemas.errors import MeterstreamError
from stack.native import NativeStack
from stack.parts import in_order

LOOK_S = 1.0
SHORTEST_DELAY_S = 1.0
LONGEST_DELAY_S = 30.0
STABLE_AFTER_S = 60.0
"""A process that ran this long has its restart delay forgotten."""


def supervise(stack: NativeStack, names: Iterable[str], until: threading.Event, report: Callable[[str], None]) -> None:
    """Starts dead parts again, each after a delay that grows while it keeps dying.

    Args:
        stack: of the parts.
        names: of the parts.
        until: ends it.
        report: gets a line for people at each death and each start.
    """
    wanted = in_order(names)
    delays_s = dict.fromkeys(wanted, SHORTEST_DELAY_S)
    due = dict.fromkeys(wanted, 0.0)
    alive_since = dict.fromkeys(wanted, time.monotonic())
    while not until.wait(LOOK_S):
        for name in wanted:
            now = time.monotonic()
            if stack.is_running(name):
                due[name] = 0.0
                if now - alive_since[name] > STABLE_AFTER_S:
                    delays_s[name] = SHORTEST_DELAY_S
            elif not due[name]:
                due[name] = now + delays_s[name]
                report(f"{name} is dead; starting it again in {delays_s[name]:.0f} s")
            elif now >= due[name]:
                delays_s[name] = min(2 * delays_s[name], LONGEST_DELAY_S)
                try:
                    stack.start([name])
                    report(f"{name} runs again")
                except (MeterstreamError, OSError) as error:  # a full disk, no more processes: it may pass
                    report(str(error))
                due[name] = 0.0
                alive_since[name] = time.monotonic()
