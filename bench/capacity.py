"""Capacity of the streaming jobs: cores at a steady rate, the greatest rate, CPU per reading by process; checked.

Three parts, each on a stack of its own, as `make up` starts it:

- price: cores of each process at so many readings a second over MQTT, after a while, without a backlog. A
  micro-batch costs even when it carries little.
- drain: readings flat out into Kafka, then until no job lags: the greatest rate with a bounded lag, and CPU per
  reading.
- way: readings over MQTT as fast as the whole way takes them (the run's clock waits).

`--beside CHECKOUT` measures another checkout of ours, too, cell by cell in turn. Each cell is a process of that
checkout, and ends with `replay verify`: a figure of rows that are not right counts for nothing.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from bench.loads import ENDING_S, ROOT, STEP_S, lag, metrics, played, playing, taken, tape, wait_for_no_lag
from bench.stream_runs import TreeClock
from replay.run.ledger import read_ledger
from replay.verify import verify
from schemas.errors import ConfigError, RetryLater, exits
from stack.isolated import environment, own_settings
from stack.jobs import JobMetrics
from stack.native import NativeStack

PARTS = {"price": ["nats", "kafka", "ingest", "streaming"], "drain": ["kafka", "streaming"]}
PARTS["way"] = PARTS["price"]
RUN = "run"
WARM_METERS = 1_000
BROKERS = ("nats", "kafka")
console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
progress = Console(stderr=True, highlight=False)


@dataclass
class Cell:
    """What one measurement found.

    Attributes:
        part: of `PARTS`.
        meters: registered, and sending.
        asked_per_s: readings a second that were asked for; 0 where they go as fast as they can.
        seconds: measured.
        readings: that came meanwhile.
        cores: mean, by process: the driver's own, its JVM, its Python workers, bridge, brokers.
        batches: micro-batches of all jobs meanwhile.
        batch_s: of the last micro-batch of the slowest job.
        lag: records that the furthest job was behind at the end.
        is_right: `replay verify` found every row.
        load: load average before.
    """

    part: str
    meters: int
    asked_per_s: float
    seconds: float = 0.0
    readings: int = 0
    cores: dict[str, float] = field(default_factory=dict)
    batches: int = 0
    batch_s: float = 0.0
    lag: int | None = None
    is_right: bool = False
    load: float = 0.0

    @property
    def own_cores(self) -> float:
        """Cores of all processes but the brokers."""
        return sum(cores for name, cores in self.cores.items() if name not in BROKERS)

    @property
    def per_s(self) -> float:
        """Readings a second."""
        return self.readings / max(self.seconds, 1e-9)

    @property
    def micros(self) -> float:
        """CPU of our processes per reading, µs."""
        return self.own_cores * self.seconds * 1e6 / max(self.readings, 1)


class Clocks:
    """CPU seconds of a stack by process."""

    def __init__(self, stack: NativeStack, parts: list[str]) -> None:
        self._trees = {part: TreeClock(pid) for part in parts if (pid := stack.pid(part))}

    def look(self) -> dict[str, float]:
        """Seconds so far; the driver's tree by what each of its processes is."""
        used: dict[str, float] = {}
        for part, clock in self._trees.items():
            clock.look()
            for pid, seconds in clock.used_s.items():
                name = part if part != "streaming" else _kind(pid, clock.pid)
                used[name] = used.get(name, 0.0) + seconds
        return used


def _kind(pid: int, driver: int) -> str:
    """What a process of the driver's tree is; one that has ended was a worker."""
    if pid == driver:
        return "driver"
    try:
        return "JVM" if Path(f"/proc/{pid}/comm").read_text().strip() == "java" else "workers"
    except OSError:
        return "workers"


def _batches(found: list[JobMetrics]) -> int:
    return sum(job.batch + 1 for job in found if job.batch is not None)


@contextmanager
def _stack(part: str) -> Iterator[NativeStack]:
    """A stack of its own with a part's processes; nothing of it is left behind."""
    (ROOT / "data" / "tmp").mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="capacity-", dir=ROOT / "data" / "tmp"))
    stack = NativeStack(own_settings(folder), on_progress=lambda line: progress.print(f"    {line}"))
    os.environ |= environment(stack.settings)
    del os.environ["SPARK_SUBMIT_OPTS"]  # the JVM as it runs for good
    try:
        stack.start(PARTS[part])
        yield stack
    finally:
        stack.stop()
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _looked_at(cell: Cell, stack: NativeStack) -> Iterator[int]:
    """Fills the cell by what happens meanwhile; gives the readings that every job had taken before."""
    clocks, found = Clocks(stack, PARTS[cell.part]), metrics(stack)
    first, batches = taken(found), _batches(found)
    before, began = clocks.look(), time.monotonic()
    yield first
    cell.seconds, after, found = time.monotonic() - began, clocks.look(), metrics(stack)
    cell.cores = {name: (used - before.get(name, 0.0)) / cell.seconds for name, used in sorted(after.items())}
    cell.readings, cell.batches = taken(found) - first, _batches(found) - batches
    cell.batch_s = max((job.batch_seconds or 0.0 for job in found), default=0.0)
    cell.lag = lag(found)


def at_rate(cell: Cell, seconds: float, settle_s: float) -> None:
    """Fills a cell of the price.

    Args:
        cell: says how many meters, and readings a second; 0 are none.
        seconds: how long it is measured.
        settle_s: how long it runs before.
    """
    with _stack(cell.part) as stack, contextlib.ExitStack() as load:
        replay: subprocess.Popen[bytes] | None = None
        if cell.asked_per_s:
            speed = cell.asked_per_s * STEP_S / cell.meters
            how = ("--speed", f"{speed:.4f}", "--duration", f"{(settle_s + seconds + 30) * speed:.0f}s")
            replay = load.enter_context(playing(cell.meters, "mqtt", "--run-id", RUN, *how, "--loop", "--pace", "open"))
        time.sleep(settle_s)
        with _looked_at(cell, stack):
            time.sleep(seconds)
        if replay is not None:
            replay.send_signal(signal.SIGINT)  # an early end with a ledger that is right
            replay.wait(ENDING_S)
        stack.stop(flush=True)  # what the MQTT broker holds comes first
        cell.is_right = replay is None or verify(RUN).is_balanced


def flat_out(cell: Cell, records: int) -> None:
    """Fills a cell of drain or way.

    Args:
        cell: says how many meters.
        records: readings to send, or as many as make each meter send as often.

    Raises:
        RetryLater: something did not come to its end.
    """
    to = "kafka" if cell.part == "drain" else "mqtt"
    with _stack(cell.part) as stack:
        warm = ("--run-id", "warm", "--meter-prefix", "w", "--duration", "30m", "--speed", "max")
        played(WARM_METERS, to, *warm)  # the jobs are awake then
        wait_for_no_lag(stack, read_ledger("warm").readings)
        with _looked_at(cell, stack) as first:
            length = f"{max(1, round(records / cell.meters)) * STEP_S}s"
            played(cell.meters, to, "--run-id", RUN, "--duration", length, "--speed", "max")
            wait_for_no_lag(stack, first + read_ledger(RUN).readings)
        stack.stop(flush=True)
        cell.is_right = verify(RUN).is_balanced


def in_checkout(checkout: Path, cell: Cell, options: list[str]) -> Cell:
    """A cell measured by another process: the bench of a checkout, on its own code.

    Raises:
        RetryLater: it failed.
    """
    command = [str(ROOT / ".venv/bin/python"), "-m", "bench.capacity", "--cell", cell.part]
    command += ["--meters", f"{cell.meters}", "--rates", f"{cell.asked_per_s:g}", *options]
    variables = {**os.environ, "PYTHONPATH": str(checkout)}
    process = subprocess.Popen(command, cwd=checkout, env=variables, stdout=subprocess.PIPE, text=True)
    try:
        said, _ = process.communicate()
    except BaseException:
        process.terminate()  # it stops its own stack; a kill would leave that behind
        process.wait()
        raise
    if process.returncode:
        msg = f"{cell.part} with {cell.meters:,} meters failed in {checkout}: see above"
        raise RetryLater(msg)
    return Cell(**json.loads(said.splitlines()[-1]))


def show(found: list[tuple[str, Cell]]) -> None:
    """One line per cell."""
    names = sorted({name for _, cell in found for name in cell.cores})
    table = Table(box=box.SIMPLE, title="cores by process; ours are all but the brokers")
    columns = ["part", "of", "meters", "readings/s", *names, "ours", "µs a reading", "batches", "batch s", "lag"]
    columns.append("right")
    for column in columns:
        table.add_column(column, justify="left" if column in ("part", "of") else "right", no_wrap=True)
    for checkout, cell in found:
        table.add_row(
            cell.part, checkout, f"{cell.meters:,}", f"{cell.per_s:,.0f}",
            *[f"{cell.cores.get(name, 0.0):.2f}" for name in names], f"{cell.own_cores:.2f}",
            f"{cell.micros:,.1f}" if cell.readings else "", f"{cell.batches}", f"{cell.batch_s:.1f}",
            "?" if cell.lag is None else f"{cell.lag:,}", "✓" if cell.is_right else "✗",
        )  # fmt: skip
    console.print(table)


def numbers(text: str, option: str) -> list[float]:
    """Numbers with commas between.

    Raises:
        ConfigError: one is none.
    """
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        msg = f"{option} is numbers with commas between, such as 1000,10000, not {text}"
        raise ConfigError(msg) from error


def main(
    parts: Annotated[str, typer.Option(help="price, drain, way, with commas between.")] = "price,drain,way",
    meters: Annotated[str, typer.Option(help="How many, with commas between.")] = "1000,10000",
    rates: Annotated[str, typer.Option(help="For the price: readings a second, with commas between.")] = "0,100,1000",
    seconds: Annotated[float, typer.Option(help="For the price: how long it is measured.", min=5)] = 60.0,
    settle_s: Annotated[float, typer.Option("--settle", help="For the price: how long it runs before.", min=1)] = 60.0,
    records: Annotated[int, typer.Option(help="For drain and way: readings.", min=1_000)] = 1_000_000,
    beside: Annotated[Path | None, typer.Option(help="Another checkout, measured in turn.")] = None,
    cell: Annotated[str | None, typer.Option(help="One part, one number of meters: one line of JSON.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="End with one line of JSON.")] = False,
) -> None:
    """Capacity of the streaming jobs.

    Examples: make bench-capacity; make bench-capacity ARGS="--parts price --meters 1000 --rates 100 --beside ../before"
    """
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # what it started ends with it
    with exits():
        if unknown := sorted({*parts.split(","), *([cell] if cell else [])} - set(PARTS)):
            msg = f"--parts has {', '.join(unknown)}: there are {', '.join(PARTS)}"
            raise ConfigError(msg)
        fleets, speeds = [int(number) for number in numbers(meters, "--meters")], numbers(rates, "--rates")
        tape()
        if cell:
            one = Cell(cell, fleets[0], speeds[0], load=os.getloadavg()[0])
            if cell == "price":
                at_rate(one, seconds, settle_s)
            else:
                flat_out(one, records)
            sys.stdout.write(json.dumps(asdict(one)) + "\n")
            return
        wanted = [
            Cell(part, fleet, rate)
            for part in parts.split(",")
            for fleet in fleets
            for rate in (speeds if part == "price" else [0.0])
        ]
        options = ["--seconds", f"{seconds:g}", "--settle", f"{settle_s:g}", "--records", f"{records}"]
        checkouts = {"now": ROOT, **({"beside": beside.resolve()} if beside else {})}
        found: list[tuple[str, Cell]] = []
        for number, each in enumerate(wanted, 1):
            for name, checkout in checkouts.items():
                asked = f" at {each.asked_per_s:g}/s" if each.part == "price" else ""
                progress.print(f"{number} of {len(wanted)}: {each.part}, {each.meters:,} meters{asked}, {name}")
                found.append((name, in_checkout(checkout, each, options)))
        show(found)
        if as_json:
            sys.stdout.write(json.dumps([{"of": name, **asdict(one)} for name, one in found]) + "\n")


if __name__ == "__main__":
    typer.run(main)
