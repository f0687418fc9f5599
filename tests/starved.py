"""Processes that get only a share of a core, as on a machine that is too busy or too slow."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

import psutil

LOOK_S = 0.01


@contextlib.contextmanager
def starved(pids: Callable[[], list[int]], share: float) -> Iterator[None]:
    """Stops the processes whenever they have used more than that share of a core, each by itself.

    Args:
        pids: of the processes, asked again and again: one that was killed may have come back.
        share: of a core.
    """
    ended = threading.Event()

    def starve() -> None:
        known: dict[int, tuple[psutil.Process, float, float]] = {}
        while not ended.wait(LOOK_S):
            for pid in pids():
                with contextlib.suppress(psutil.Error):
                    if pid not in known:
                        process = psutil.Process(pid)
                        known[pid] = (process, _used_s(process), time.monotonic())
                    process, used_s, since = known[pid]
                    if _used_s(process) - used_s > share * (time.monotonic() - since):
                        process.suspend()
                    else:
                        process.resume()
        for process, *_ in known.values():
            with contextlib.suppress(psutil.Error):
                process.resume()

    thread = threading.Thread(target=starve)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _used_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)
