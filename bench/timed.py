"""Runs a command and writes what it took: wall time, CPU time and peak memory of it and of all that it started.

    python timed.py RESULT.json COMMAND …

A program of its own, standard library only: a process's peak memory begins with that of the process that started it,
so that one has to be small.
"""

import contextlib
import ctypes
import json
import os
import resource
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

SAMPLE_S = 0.1
"""Time between two looks at the memory: it costs 0.1 ms a process."""
BECOME_REAPER = 36
"""prctl's PR_SET_CHILD_SUBREAPER: what the command leaves behind is waited for here, so its CPU time counts."""


def main() -> int:
    """Command line; its exit code is the command's."""
    result, *command = sys.argv[1:]
    ctypes.CDLL(None).prctl(BECOME_REAPER, 1)
    began = time.monotonic()
    child = subprocess.Popen(command)
    ended = select.poll()
    ended.register(os.pidfd_open(child.pid), select.POLLIN)
    largest = 0
    while not ended.poll(SAMPLE_S * 1000):
        largest = max(largest, sum(resident(pid) for pid in tree(child.pid)))
    wall_s = time.monotonic() - began
    code = child.wait()
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    took = {
        "wall_s": wall_s,
        "cpu_s": used.ru_utime + used.ru_stime,
        # The kernel's is exact, of the largest process; the sampled one is the sum over the tree.
        "peak_bytes": max(used.ru_maxrss * 1024, largest),
    }
    Path(result).write_text(json.dumps(took))
    return code if code >= 0 else 128 - code


def tree(pid: int) -> Iterator[int]:
    """A process and what it started."""
    yield pid
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield from tree(int(child))


def resident(pid: int) -> int:
    """Bytes that a process has in memory now."""
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()
    return 0


if __name__ == "__main__":
    sys.exit(main())
