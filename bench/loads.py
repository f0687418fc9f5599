"""A load on the streaming jobs: the demo's tape as the stream of so many meters, and how far the jobs are behind it."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from replay.__main__ import simulated
from schemas.errors import RetryLater
from stack.demo import DAY, GRID_TAPE, SEED
from stack.jobs import JobMetrics, jobs, metrics_text
from stack.native import NativeStack

ROOT = Path(__file__).resolve().parent.parent
STEP_S = 300  # of the tape: a meter's reading
SETTLED_S = 900.0
ENDING_S = 60.0
FAILED = "the replay failed: see above"


def tape() -> None:
    """Sees to it that the demo's tape is there."""
    if not GRID_TAPE.exists():
        simulated(GRID_TAPE, DAY, STEP_S, SEED)


@contextmanager
def playing(meters: int, to: str, *how: str) -> Iterator[subprocess.Popen[bytes]]:
    """A replay of the tape to the stack of the environment; where it still runs at the end, it is ended.

    Args:
        meters: how many.
        to: mqtt or kafka.
        how: further options of `replay run`.
    """
    command = [sys.executable, "-m", "replay", "run", "--tape", str(GRID_TAPE), "--to", to, "--seed", f"{SEED}"]
    command += ["--meters", f"{meters}", *how]
    replay = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        yield replay
    finally:
        if replay.poll() is None:
            replay.terminate()
            replay.wait(ENDING_S)


def played(meters: int, to: str, *how: str) -> None:
    """A replay to its end.

    Raises:
        RetryLater: it failed.
    """
    with playing(meters, to, *how) as replay:
        if replay.wait():
            raise RetryLater(FAILED)


def metrics(stack: NativeStack) -> list[JobMetrics]:
    """What the jobs of a stack export now."""
    return jobs(metrics_text(stack.settings.metrics_port) or "")


def lag(found: list[JobMetrics]) -> int | None:
    """The longest lag, records; None while a job has not said."""
    lags = [job.lag_records for job in found]
    return None if not lags or None in lags else max(lag for lag in lags if lag is not None)


def taken(found: list[JobMetrics]) -> int:
    """Readings that every job of readings has taken since the driver's start."""
    return min((job.records for job in found if job.job != "alarms"), default=0)


def wait_for_no_lag(stack: NativeStack, readings: int = 0) -> None:
    """Waits until every job of readings has taken so many and none lags.

    Raises:
        RetryLater: they do not come to the end.
    """
    until = time.monotonic() + SETTLED_S
    while lag(found := metrics(stack)) != 0 or taken(found) < readings:
        time.sleep(0.2)
        if time.monotonic() > until:
            msg = f"the jobs still lag after {SETTLED_S:.0f} s: see {stack.home / 'logs'}"
            raise RetryLater(msg)
