"""The bench of the replay: what its sending costs, beside what others take for the same: `make bench`.

Four parts, each comparing within one run, its measurements in turn (A B A B …):

- encode: Arrow batch → framed Avro by `schemas.codec.encode_batch`, against fastavro record by record;
- kafka: `replay run --to kafka`, against Kafka's own ProducerPerformance and a plain loop of produce();
- mqtt: `replay run --to mqtt`, against mosquitto_pub;
- memory: the peak of `replay run` by the size of its fleet.

CPU time is that of a whole process tree, from its start to its end. Timing decides no exit code.
"""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import fastavro
import pyarrow as pa
import typer

from bench.downloads import java_program, producer_jars
from bench.plan import Plan, keyed_payloads, mean_size, readings_of, text_file
from bench.processes import ROOT, Took, own_stack, progress, replayed, timed
from bench.results import Part, Ratio, Row, console, json_of, machine, ratio_of, show, show_machine
from kafka_io.clients import PRODUCER
from replay.sinks import BATCHING
from replay.tape import has_tape, read_tape
from schemas.codec import FRAME, avro_schema, encode_batch, latest
from schemas.errors import ConfigError, ContractBroken, RetryLater, exits
from schemas.topics import READINGS, mqtt_topic

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
TARGET_ENCODE, TARGET_KAFKA, TARGET_BYTES = 10.0, 0.5, 2_000_000_000


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
            described = {**machine(), "tape": played.name}
            show_machine(described)
            done = {}
            for name in PARTS:
                if name in parts:
                    part = {"encode": encode, "kafka": kafka, "mqtt": mqtt, "memory": memory}[name](plan)
                    show(part)
                    done[name] = json_of(part)
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
    readings = readings_of(plan)
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
        ratio_of(rows[0], rows[1], TARGET_ENCODE),
        ratio_of(rows[0], rows[2]),
    ]
    size = readings.nbytes / len(readings)
    notes = [f"the same bytes from all three; {size:.0f} bytes a record in Arrow, {mean_size(ours()):.0f} in Avro"]
    return Part("encode", "Arrow → framed Avro, one process", rows, ratios, notes)


def kafka(plan: Plan) -> Part:
    """Records per second and per CPU-second into a broker of its own.

    Raises:
        RetryLater: a contender failed, or Kafka has another number of records than it claims.
    """
    from stack.proof import end_offsets

    jars = producer_jars()
    payloads = keyed_payloads(plan)
    texts = text_file(plan.folder / "kafka.txt", [key + value for key, value in payloads])
    one, perf, two, loop = (
        Row("replay run"), Row("ProducerPerformance"), Row("replay run --processes 2"), Row("plain loop of produce()"),
    )  # fmt: skip
    loop_records = min(LOOP_RECORDS, len(payloads))
    dicts = readings_of(plan).slice(0, loop_records).to_pylist()
    with own_stack(plan, "kafka") as (settings, environment, broker):

        def offsets() -> int:
            return sum(end_offsets(settings.kafka_bootstrap).values())

        def producer_performance(records: int) -> Took:
            return timed(plan, [
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
                    took, ledger = replayed(plan, environment, f"k{number}-{processes}", plan.meters, "kafka",
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
        ratio_of(one, perf, TARGET_KAFKA), ratio_of(one, perf, by_cpu=False),
        ratio_of(two, perf), ratio_of(two, perf, by_cpu=False),
        ratio_of(one, loop), ratio_of(perf, loop),
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
    payloads = [value for _, value in keyed_payloads(plan)]
    lines = plan.folder / "mqtt.txt"
    rows = {connections: Row(f"replay run --connections {connections}") for connections in (1, MQTT_CONNECTIONS)}
    tool, installed = Row("mosquitto_pub -l -q 1"), shutil.which("mosquitto_pub")
    notes = [
        "QoS 1; a session that is away holds every message, as for a bridge that is down; counted in the broker",
        "mosquitto_pub has 20 messages in flight, replay up to 1,000 and a topic a meter",
    ]
    with own_stack(plan, "nats") as (settings, environment, broker):
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
                took, ledger = replayed(plan, environment, f"m{number}-{connections}", meters, "mqtt",
                                       "--connections", str(connections))  # fmt: skip
                row.records = ledger["records"]
                row.sending_per_s.append(ledger["records_per_s"])
                row.broker_cpu_s.append(broker() - cpu)
                _note(row, took, "mqtt", number, plan.rounds)
                _check(row, held() - before)
            if installed:
                before, cpu = held(), broker()
                tool.records = min(rows[1].records, MOSQUITTO_LINES)
                texts = text_file(lines, [payloads[at % len(payloads)] for at in range(tool.records)])
                command = [installed, "-p", str(settings.mqtt_port), "-t", mqtt_topic("bench"), "-l", "-q", "1"]
                took = timed(plan, command, environment, lines)
                tool.broker_cpu_s.append(broker() - cpu)
                _note(tool, took, "mqtt", number, plan.rounds)
                _check(tool, held() - before)
                if number == 0:
                    notes.append(f"mosquitto_pub: {texts}; more than 65,535 it loses")
    if not installed:
        notes.append("mosquitto_pub: not installed (Debian, Ubuntu: apt install mosquitto-clients)")
        return Part("mqtt", "Into the MQTT broker", list(rows.values()), [], notes)
    ratios = [ratio_of(row, tool, by_cpu=by_cpu) for row in rows.values() for by_cpu in (False, True)]
    return Part("mqtt", "Into the MQTT broker", [*rows.values(), tool], ratios, notes)


def memory(plan: Plan) -> Part:
    """Peak resident size of a run by the size of its fleet."""
    rows = []
    environment = {**os.environ, "METERSTREAM_HOME": str(plan.folder / "memory")}
    for meters in (plan.meters // 100, plan.meters // 10, plan.meters):
        row = Row(f"{meters:,} meters --to null")
        took, ledger = replayed(plan, environment, f"n{meters}", meters, "null")
        row.records = ledger["records"]
        _note(row, took, "memory", 0, 1)
        rows.append(row)
    row = Row(f"{plan.meters:,} meters --to kafka")
    with own_stack(plan, "kafka") as (_, environment, _):
        took, ledger = replayed(plan, environment, "memory", plan.meters, "kafka")
        row.records = ledger["records"]
        _note(row, took, "memory", 0, 1)
        rows.append(row)
    peak = rows[-1].peak_bytes
    target = TARGET_BYTES / 1e9
    ratio = Ratio("peak of the last", peak / 1e9, unit="GB", target=target, is_met=peak < TARGET_BYTES)
    return Part("memory", "Peak resident size of replay run, one process", rows, [ratio])


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


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
