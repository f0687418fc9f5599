"""The run's clock, and what it waits for.

A steady run slows its clock down to what the way carries: where it comes late to a slice of its time, the clock slips
by that much, so that sent_at says what the simulated meters meant, however slow the machine. An open run keeps its
clock and says how late each record was: for load tests.

Where the way is slow shows in what was waited for: the sender's window (the MQTT broker, or Kafka where records go
there directly), and, behind the broker, what has not come through the bridge yet.
"""

import contextlib
import socket
import time
from collections.abc import Callable
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from kafka_io.clients import admin
from kafka_io.offsets import received
from replay.arrays import SECOND
from schemas.errors import RetryLater
from schemas.topics import INGESTED

TOLERANCE_S = 0.1  # lateness in wall time that a steady run lets pass: a tick
TOLERANCE_US = 5 * 60 * 1_000_000  # and on its own clock, at any speed: a sixth of what the jobs allow
LOOK_S = 0.05
ON_THE_WAY = 4_000
"""Records between MQTT broker and Kafka at which a steady run waits until half of them are left: several windows of the
bridge, so that it never runs dry, and a few seconds of its work."""
STALLED_S = 300.0  # a bridge that is killed on a slow machine is back long before
CONNECT_S = 1.0


class Pace(StrEnum):
    """How a run takes a way that is slower than its clock."""

    STEADY = "steady"
    OPEN = "open"


class RunClock:
    """What time it is for the simulated meters.

    Attributes:
        speed: run clock per wall clock; None is flat out: the clock is where the records are.
        is_steady: whether it waits for the way.
        slip_s: seconds of wall time that it has waited.
    """

    def __init__(self, speed: float | None, is_steady: bool) -> None:
        self.speed = speed
        self.is_steady = is_steady
        self.slip_s = 0.0
        self.start()
        self._tolerance_s = min(TOLERANCE_S, TOLERANCE_US / SECOND / speed) if speed else 0.0

    def start(self) -> None:
        """Begins now."""
        self._began = time.monotonic()

    @property
    def played_s(self) -> float:
        """Wall time since the begin."""
        return time.monotonic() - self._began

    def wait_for(self, due_us: int, is_stopped: Callable[[], bool]) -> None:
        """Waits until it is time for what is due then; a steady clock that is past it goes back to it.

        Args:
            due_us: microseconds of the run.
            is_stopped: ends the waiting.
        """
        if not self.speed:
            return
        while (left_s := -self._past_s(due_us)) > 0 and not is_stopped():
            time.sleep(min(left_s, 0.25))
        if self.is_steady and -left_s > self._tolerance_s:
            self.slip_s -= left_s

    def late_s(self, due_us: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """By how many seconds of wall time records are late now; nobody is before the time, or flat out."""
        if not self.speed:
            return np.zeros(len(due_us))
        return np.maximum(0.0, self._past_s(0) - due_us / (SECOND * self.speed))

    def _past_s(self, due_us: int) -> float:
        assert self.speed is not None
        return time.monotonic() - self._began - self.slip_s - due_us / (SECOND * self.speed)


class Way:
    """What lies between the MQTT broker and Kafka, by Kafka's end offsets; with any broker, and any number of bridges.

    Records of others that come in meanwhile, or that are delivered again, count as ours: then it waits less.
    """

    def __init__(self, bootstrap: str, most: int = ON_THE_WAY) -> None:
        self.waited_s = 0.0
        self._most = most
        self._admin = admin(bootstrap)
        self._begin = received(self._admin, INGESTED)
        self._carried = 0

    def _look(self) -> None:
        """Asks Kafka; one that is away has carried nothing meanwhile."""
        with contextlib.suppress(RetryLater):
            self._carried = received(self._admin, INGESTED, patience_s=0.0) - self._begin

    def wait(self, acknowledged: Callable[[], int], is_stopped: Callable[[], bool]) -> None:
        """Waits while too much is on the way.

        Args:
            acknowledged: how many records of the run the MQTT broker has.
            is_stopped: ends the waiting.

        Raises:
            RetryLater: for minutes nothing came through.
        """
        if acknowledged() - self._carried <= self._most // 2:
            return
        began = carried_at = time.monotonic()
        self._look()
        if acknowledged() - self._carried <= self._most:
            return
        while (left := acknowledged() - self._carried) > self._most // 2 and not is_stopped():
            if time.monotonic() - carried_at > STALLED_S:
                msg = (
                    f"nothing has come through broker and bridge to Kafka for {STALLED_S:.0f} s, {left:,} records are "
                    "on their way: see make status and make logs; --pace open does not wait for them"
                )
                raise RetryLater(msg)
            time.sleep(LOOK_S)
            before = self._carried
            self._look()
            if self._carried != before:
                carried_at = time.monotonic()
        self.waited_s += time.monotonic() - began


def answers(bootstrap: str) -> bool:
    """Whether something listens there."""
    host, _, port = bootstrap.partition(",")[0].rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
    except (OSError, ValueError):
        return False
    return True
