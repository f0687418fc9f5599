"""How soon a critical event is told: Spark's real-time mode beside micro-batches, in one run: `make bench-latency`.

Power failures go into Kafka at a steady rate (open loop); a consumer takes what comes out. Latency is from Kafka's
append of the event to the consumer's receipt, for every event after the warm-up. Both contenders run the same transform
of streaming_jobs.critical_events, one after the other, in turn, each in a process of its own. Timing decides no exit
code.
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
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from confluent_kafka import Consumer, Producer
from rich import box
from rich.console import Console
from rich.table import Table

from schemas.codec import decode, encode
from schemas.errors import RetryLater, exits
from schemas.topics import CRITICAL_EVENTS, EVENTS
from stack.isolated import environment, own_settings
from stack.native import NativeStack

ROOT = Path(__file__).resolve().parent.parent
METERS = 1_000
START_S = 120.0
DRAIN_S = 15.0
WAYS = {
    "real-time mode": [sys.executable, "-m", "streaming_jobs.critical_events"],
    "micro-batches": [sys.executable, "-m", "streaming_jobs.critical_events", "--micro-batch"],
}
console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
progress = Console(stderr=True, highlight=False)


@dataclass
class Measured:
    """One round of one contender.

    Attributes:
        way: one of `WAYS`.
        sent: events after the warm-up.
        received: how many of them came out.
        p50_ms: median latency; the others the same way.
        load: load average at the round's begin: what else the machine did.
    """

    way: str
    sent: int
    received: int
    p50_ms: float
    p99_ms: float
    max_ms: float
    load: float


@contextmanager
def _job(way: str, variables: dict[str, str], home: Path) -> Iterator[None]:
    """A contender, ready; with a home of its own it begins at the end of the topics."""
    home.mkdir()
    ready = home / "run" / "critical_events.ready"
    log_file = home / "critical.log"
    with log_file.open("ab") as log:
        own = {**variables, "METERSTREAM_HOME": str(home)}
        process = subprocess.Popen(WAYS[way], env=own, stdout=log, stderr=log, cwd=ROOT)
        try:
            until = time.monotonic() + START_S
            while not ready.exists():
                if process.poll() is not None or time.monotonic() > until:
                    msg = f"{way} did not start:\n{log_file.read_text()[-2_000:]}"
                    raise RetryLater(msg)
                time.sleep(0.1)
            yield
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _round(way: str, bootstrap: str, rate: int, seconds: int, warm_up_s: int) -> Measured:
    """Sends and receives; see the module."""
    consumer = Consumer(
        {"bootstrap.servers": bootstrap, "group.id": f"latency-{time.time()}", "auto.offset.reset": "latest",
         "fetch.wait.max.ms": 5}
    )  # fmt: skip
    producer = Producer({"bootstrap.servers": bootstrap, "linger.ms": 0, "acks": "all"})
    consumer.subscribe([CRITICAL_EVENTS.name])
    until = time.monotonic() + START_S
    while not consumer.assignment():
        consumer.poll(0.1)
        if time.monotonic() > until:
            msg = f"Kafka at {bootstrap} gives no partition"
            raise RetryLater(msg)
    load = os.getloadavg()[0]
    late_ms: list[float] = []
    first = rate * warm_up_s

    def take(wait_s: float) -> None:
        message = consumer.poll(wait_s)
        while message is not None:
            if error := message.error():
                raise RetryLater(error.str())
            now = time.time()
            record = decode(message.value() or b"", CRITICAL_EVENTS.entity)
            if int(record["run_id"]) >= first:
                late_ms.append(1_000 * (now - record["appended_at"].timestamp()))
            message = consumer.poll(0)

    total, number, began = rate * (warm_up_s + seconds), 0, time.monotonic()
    while number < total:
        while number < min(total, (time.monotonic() - began) * rate):
            meter_id = f"m{number % METERS}"
            event = {"meter_id": meter_id, "observed_at": datetime.now(UTC), "dialect": "c12.19", "seq": number}
            value = encode("event", {**event, "dialect_version": "1", "source_table": "ST76", "code": "AE1",
                                     "run_id": str(number)})  # fmt: skip
            producer.produce(EVENTS.name, value, meter_id)
            number += 1
        producer.poll(0)
        take(0.0005)
    producer.flush(10)
    until = time.monotonic() + DRAIN_S
    while len(late_ms) < rate * seconds and time.monotonic() < until:
        take(0.1)
    consumer.close()
    p50, p99 = np.quantile(late_ms or [np.nan], [0.5, 0.99]).tolist()
    return Measured(way, rate * seconds, len(late_ms), p50, p99, max(late_ms, default=np.nan), load)


def main(
    rate: Annotated[int, typer.Option(help="Events a second.", min=1)] = 1_000,
    seconds: Annotated[
        int, typer.Option(help="How long, after the warm-up: a checkpoint's time or more.", min=1)
    ] = 310,
    warm_up: Annotated[int, typer.Option(help="Seconds that do not count.", min=0)] = 60,
    rounds: Annotated[int, typer.Option(help="Of each contender, in turn.", min=1)] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON.")] = False,
) -> None:
    """Latency of critical events in real-time mode and in micro-batches: make bench-latency ARGS="--rounds 1"."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # what it started ends with it
    with exits():
        folder = Path(tempfile.mkdtemp(prefix="latency-", dir=ROOT / "data" / "tmp"))
        stack = NativeStack(own_settings(folder), on_progress=lambda line: progress.print(f"  {line}"))
        done: list[Measured] = []
        try:
            stack.start(["kafka"])
            variables = {**os.environ, **environment(stack.settings)}
            for number in range(rounds):
                for way in WAYS:
                    progress.print(f"{way}, round {number + 1}")
                    with _job(way, variables, folder / f"job{len(done)}"):
                        done.append(_round(way, stack.settings.kafka_bootstrap, rate, seconds, warm_up))
        finally:
            stack.stop()
            shutil.rmtree(folder, ignore_errors=True)
        if as_json:
            sys.stdout.write(json.dumps([asdict(one) for one in done]) + "\n")
            return
        table = Table(box=box.SIMPLE, title=f"{rate:,} events/s for {seconds} s, from append to receipt")
        table.add_column("contender")
        for name in ("received", "p50 ms", "p99 ms", "max ms", "load before"):
            table.add_column(name, justify="right")
        for one in done:
            figures = [f"{one.p50_ms:.1f}", f"{one.p99_ms:.1f}", f"{one.max_ms:.1f}", f"{one.load:.1f}"]
            table.add_row(one.way, f"{one.received:,} of {one.sent:,}", *figures)
        console.print(table)


if __name__ == "__main__":
    typer.run(main)
