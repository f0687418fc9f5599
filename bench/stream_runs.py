"""Runs of a contestant in the bench of streams: measured to its end, or killed in the middle and started again."""

import contextlib
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from glob import glob  # of folders that come and go: pathlib's fails over one that is gone
from pathlib import Path
from typing import IO

import lake
from bench.contestants import ROOT, Contestant, Run
from bench.timed import resident, tree
from lake.store import used
from schemas.errors import ContractBroken, RetryLater

SAMPLE_S = 0.1
"""A process that ends takes what it used since the last look with it."""
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
LONGEST_S = 1_800
LAST_LINES = 25


@dataclass
class Measured:
    """What a run took.

    Attributes:
        name: the contestant's.
        work: one of `WORKS`.
        shape: of the topic.
        records: of the whole run.
        after: records after the warm-up; the next two are of these alone.
        cpu_s: CPU time of the process tree.
        wall_s: time.
        whole_cpu_s: of the whole run, with start and warm-up.
        peak_bytes: largest sum of resident memory over the tree.
        load: load average before.
    """

    name: str
    work: str
    shape: str
    records: int
    after: int
    cpu_s: float
    wall_s: float
    whole_cpu_s: float
    peak_bytes: int
    load: float

    @property
    def per_cpu_s(self) -> float:
        """Records per CPU-second after the warm-up."""
        return self.after / max(self.cpu_s, 1e-9)

    @property
    def per_s(self) -> float:
        """Records per second after the warm-up."""
        return self.after / max(self.wall_s, 1e-9)


class TreeClock:
    """CPU time of a process and of all that it started, kept for those that have ended."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.peak_bytes = 0
        self.used_s: dict[int, float] = {}

    def look(self) -> float:
        """Seconds so far; pyspark's workers are in no other account, their parent waits for nobody."""
        alive = list(tree(self.pid))
        for pid in alive:
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                self.used_s[pid] = (int(fields[11]) + int(fields[12])) / TICKS_PER_S
        self.peak_bytes = max(self.peak_bytes, sum(resident(pid) for pid in alive))
        return sum(self.used_s.values())


@dataclass
class Started:
    """A contestant's process.

    Attributes:
        process: it leads a session of its own.
        listener: reads its output.
        lines: what it has told and nobody has heard yet.
        done: records that it has told of.
        said: file of what it complained of.
    """

    process: subprocess.Popen[str]
    listener: threading.Thread
    lines: "queue.SimpleQueue[int]"
    said: Path
    done: int = 0

    def listen(self, timeout_s: float) -> None:
        """Waits for its next line."""
        with contextlib.suppress(queue.Empty):
            self.done = max(self.done, self.lines.get(timeout=timeout_s))

    def kill(self) -> None:
        """SIGKILL for it and all that it started."""
        running = list(tree(self.process.pid)) if self.process.poll() is None else []
        for pid in running:  # the number of one that has ended may be another's by now
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def problem(self, text: str) -> RetryLater:
        """An error with the last lines of its complaints."""
        return RetryLater("\n".join([text, *self.said.read_text().splitlines()[-LAST_LINES:]]))


@contextmanager
def started(contestant: Contestant, run: Run) -> Iterator[Started]:
    """Runs a contestant; nothing of it is left behind.

    Raises:
        RetryLater: it takes too long or failed.
    """
    environment = {
        **os.environ, "METERSTREAM_HOME": str(run.out / "home"), "METERSTREAM_KAFKA_BOOTSTRAP": run.bootstrap,
        "METERSTREAM_MAX_OFFSETS_PER_TRIGGER": str(run.batch), "METERSTREAM_TRIGGER_S": "0",
        "PYTHONPATH": str(ROOT),  # Spark's workers import bench.peers.core
    }  # fmt: skip
    (run.out / "home" / "tmp").mkdir(parents=True, exist_ok=True)
    said = run.out / "problems.txt"
    with said.open("w") as problems:
        process = subprocess.Popen(
            contestant.command(run), cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=problems, text=True,
            start_new_session=True,
        )  # fmt: skip
        assert process.stdout
        lines: queue.SimpleQueue[int] = queue.SimpleQueue()
        listener = threading.Thread(target=_listen, args=(process.stdout, lines), daemon=True)
        listener.start()
        one = Started(process, listener, lines, said)
        try:
            yield one
        finally:
            one.kill()


def _listen(output: IO[str], lines: "queue.SimpleQueue[int]") -> None:
    for line in output:
        if line.startswith("records "):
            lines.put(int(line.removeprefix("records ")))


def measure(contestant: Contestant, run: Run, warm_up: float) -> Measured:
    """Runs a contestant to its end.

    Raises:
        RetryLater: it failed or did not see all records.
    """
    load, total = os.getloadavg()[0], run.records * contestant.passes
    began = time.monotonic()
    with started(contestant, run) as one:
        clock = TreeClock(one.process.pid)
        used = clock.look()
        mark: tuple[int, float, float] | None = None
        while one.process.poll() is None:
            if time.monotonic() - began > LONGEST_S:
                msg = f"{contestant.name} takes longer than {LONGEST_S} s"
                raise RetryLater(msg)
            one.listen(SAMPLE_S)
            used = clock.look()
            if mark is None and one.done >= warm_up * total:
                mark = (one.done, used, time.monotonic())
        ended = time.monotonic()
        one.listener.join()
        while not one.lines.empty():
            one.listen(0)
        if one.process.returncode or mark is None or one.done != total:
            code = one.process.returncode
            msg = f"{contestant.name} ended with {code} after {one.done:,} of {total:,} records:"
            raise one.problem(msg)
    return Measured(
        contestant.name, run.work, run.shape.name, run.records, total - mark[0], used - mark[1], ended - mark[2], used,
        clock.peak_bytes, load,
    )  # fmt: skip


def kill_and_restart(contestant: Contestant, run: Run) -> tuple[int, int]:
    """Kills one of ours (SIGKILL, the whole tree) inside a batch past the middle, starts it again, lets it end.

    Returns:
        The newest batch that was begun and the newest that was committed at the kill.

    Raises:
        RetryLater: it ended before the kill, or failed after it.
        ContractBroken: the accounting does not have each record once.
    """
    with started(contestant, run) as one:
        while one.done < run.records / 2:
            one.listen(SAMPLE_S)
            if one.process.poll() is not None:
                msg = f"{contestant.name} ended before it was killed:"
                raise one.problem(msg)
        while True:
            begun, committed = newest(run, "state/*.zip"), newest(run, "intents/*.json")
            if begun > committed:
                break  # tasks have written, and nobody has said that it counts
            if one.process.poll() is not None:
                msg = f"{contestant.name} ended before it was killed:"
                raise one.problem(msg)
    begun, committed = newest(run, "state/*.zip"), newest(run, "intents/*.json")
    with started(contestant, run) as one:
        if one.process.wait(LONGEST_S):
            msg = f"{contestant.name} ended with {one.process.returncode} after it was killed:"
            raise one.problem(msg)
    with used(f"file://{run.out / 'home'}"):
        accounting = lake.open().polars("accounting").collect()
    if (received := accounting.get_column("received").sum()) != run.records:
        msg = f"{contestant.name}: the accounting has {received:,} of {run.records:,} records after a kill"
        raise ContractBroken(msg)
    return begun, committed


def newest(run: Run, pattern: str) -> int:
    """Newest batch that has an object of this pattern among the job's, −1 where there is none."""
    files = glob(f"{run.out}/home/state/*/*/{pattern}")
    return max((int(Path(file).name[:8]) for file in files), default=-1)
