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

from bench.stream_runs import TreeClock
from replay.__main__ import simulated
from replay.run.ledger import read_ledger
from replay.verify import verify
from schemas.errors import ConfigError, RetryLater, exits
from stack.backlog import left_on_the_way
from stack.demo import DAY, GRID_TAPE, SEED
from stack.isolated import environment, own_settings
from stack.jobs import JobMetrics, jobs, metrics_text
from stack.native import NativeStack

ROOT = Path(__file__).resolve().parent.parent
STEP_S = 300  # of the tape: a meter's reading
PARTS = {"price": ["nats", "kafka", "ingest", "streaming"], "drain": ["kafka", "streaming"]}
PARTS["way"] = PARTS["price"]
SETTLED_S = 900.0
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


def _metrics(stack: NativeStack) -> list[JobMetrics]:
    return jobs(metrics_text(stack.settings.metrics_port) or "")


def _lag(found: list[JobMetrics]) -> int | None:
    """The longest lag; None while a job has not said."""
    lags = [job.lag_records for job in found]
    return None if not lags or None in lags else max(lag for lag in lags if lag is not None)


def _wait_for_no_lag(stack: NativeStack, records: int) -> None:
    """Waits until the jobs of readings have taken so many records and none lags.

    Raises:
        RetryLater: they do not come to the end.
    """
    until = time.monotonic() + SETTLED_S
    while _lag(_metrics(stack)) != 0 or _taken(_metrics(stack)) < records:
        time.sleep(0.2)
        if time.monotonic() > until:
            msg = f"the jobs still lag after {SETTLED_S:.0f} s: see {stack.home / 'logs'}"
            raise RetryLater(msg)


def _taken(found: list[JobMetrics]) -> int:
    """Readings that every job of readings has taken."""
    return min((job.records for job in found if job.job != "alarms"), default=0)


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


def _replay(part: str, meters: int, run_id: str, *how: str) -> subprocess.Popen[bytes]:
    """Starts a replay of the grid's tape."""
    to = "kafka" if part == "drain" else "mqtt"
    command = [sys.executable, "-m", "replay", "run", "--tape", str(GRID_TAPE), "--to", to, "--seed", f"{SEED}"]
    command += ["--meters", f"{meters}", "--run-id", run_id, *how]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)


def _ended(replay: subprocess.Popen[bytes]) -> None:
    if replay.wait():
        msg = "the replay failed: see above"
        raise RetryLater(msg)


def measured(part: str, meters: int, asked_per_s: float, seconds: float, settle_s: float, records: int) -> Cell:
    """One cell.

    Args:
        part: of `PARTS`.
        meters: how many.
        asked_per_s: for the price: readings a second.
        seconds: for the price: how long it is measured.
        settle_s: for the price: how long it runs before.
        records: for drain and way: how many.

    Raises:
        RetryLater: something did not come to its end.
    """
    cell = Cell(part, meters, asked_per_s, load=os.getloadavg()[0])
    with _stack(part) as stack:
        clocks = Clocks(stack, PARTS[part])
        if part != "price":  # the jobs are awake then
            how = ("--duration", "30m", "--speed", "max", "--meter-prefix", "w")
            _ended(_replay(part, WARM_METERS, "warm", *how))
            _wait_for_no_lag(stack, read_ledger("warm").readings)
        replay: subprocess.Popen[bytes] | None = None
        if part == "price" and asked_per_s:
            speed = asked_per_s * STEP_S / meters
            length = f"{(settle_s + seconds + 30) * speed:.0f}s"
            at_rate = ("--speed", f"{speed:.4f}", "--duration", length, "--loop", "--pace", "open")
            replay = _replay(part, meters, "run", *at_rate)
        if part == "price":
            time.sleep(settle_s)
        before, began, found = clocks.look(), time.monotonic(), _metrics(stack)
        first, batches = _taken(found), _batches(found)
        if part == "price":
            time.sleep(seconds)
        else:
            steps = max(1, round(records / meters))
            _ended(_replay(part, meters, "run", "--duration", f"{steps * STEP_S}s", "--speed", "max"))
            _wait_for_no_lag(stack, first + read_ledger("run").readings)
        cell.seconds, after, found = time.monotonic() - began, clocks.look(), _metrics(stack)
        cell.cores = {name: (used - before.get(name, 0.0)) / cell.seconds for name, used in sorted(after.items())}
        cell.readings, cell.batches = _taken(found) - first, _batches(found) - batches
        cell.batch_s = max((job.batch_seconds or 0.0 for job in found), default=0.0)
        cell.lag = _lag(found)
        if replay is not None:
            replay.send_signal(signal.SIGINT)  # an early end with a ledger that is right
            replay.wait(60)
            while left_on_the_way(stack.settings, read_ledger("run").records) != (0, 0):
                time.sleep(0.2)
        stack.stop(flush=True)
        cell.is_right = (part == "price" and not asked_per_s) or verify("run").is_balanced
    return cell


def in_checkout(checkout: Path, cell: Cell, options: list[str]) -> Cell:
    """A cell measured by another process: the bench of a checkout, on its own code.

    Raises:
        RetryLater: it failed.
    """
    command = [str(ROOT / ".venv/bin/python"), "-m", "bench.capacity", "--cell", cell.part]
    command += ["--meters", f"{cell.meters}", "--rates", f"{cell.asked_per_s:g}", *options]
    variables = {**os.environ, "PYTHONPATH": str(checkout)}
    ran = subprocess.run(command, cwd=checkout, env=variables, stdout=subprocess.PIPE, text=True, check=False)
    if ran.returncode:
        msg = f"{cell.part} with {cell.meters:,} meters failed in {checkout}: see above"
        raise RetryLater(msg)
    return Cell(**json.loads(ran.stdout.splitlines()[-1]))


def show(found: list[tuple[str, Cell]]) -> None:
    """One line per cell."""
    names = sorted({name for _, cell in found for name in cell.cores})
    table = Table(box=box.SIMPLE, title="cores by process; ours are all but the brokers")
    columns = [
        "part",
        "of",
        "meters",
        "readings/s",
        *names,
        "ours",
        "µs a reading",
        "batches",
        "batch s",
        "lag",
        "right",
    ]
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
        if not GRID_TAPE.exists():
            simulated(GRID_TAPE, DAY, STEP_S, SEED)
        if cell:
            one = measured(cell, fleets[0], speeds[0], seconds, settle_s, records)
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
