"""Order per meter from MQTT to Kafka, whatever bridge and Kafka get of the machine."""

import os
import signal
import threading
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from confluent_kafka import Consumer, TopicPartition

from replay.sinks import MqttSink
from schemas.codec import decode, encode
from schemas.topics import READINGS
from stack import proof
from stack.demo import environment, own_settings
from stack.native import NativeStack
from tests.eventually import eventually
from tests.starved import starved

BEGIN = datetime(2024, 3, 4, tzinfo=UTC)
METERS = 500
PARTS = ["nats", "kafka", "ingest"]


@pytest.fixture
def stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[NativeStack]:
    settings = own_settings(tmp_path)
    for name, value in environment(settings).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("METERSTREAM_SHARDS", getattr(request, "param", ""))
    stack = NativeStack(settings)
    try:
        stack.start(PARTS)
        yield stack
    finally:
        stack.stop()


def publish(stack: NativeStack, count: int) -> None:
    """Readings of the meters in turn, each with its number."""
    sink = MqttSink("127.0.0.1", stack.settings.mqtt_port)
    for start in range(0, count, 1_000):
        numbers = range(start, min(start + 1_000, count))
        ids = [f"m{number % METERS:03d}" for number in numbers]
        records = [
            {
                "meter_id": meter_id,
                "observed_at": BEGIN + timedelta(seconds=number // METERS),
                "dialect": "own",
                "run_id": "r",
                "seq": number // METERS,
                "import_t1_wh": number,
            }
            for meter_id, number in zip(ids, numbers, strict=True)
        ]
        sink.send("readings", ids, [encode("reading", record) for record in records])
    sink.close()


@dataclass
class Arrived:
    distinct: int
    redelivered: int
    reordered: int


def arrived(stack: NativeStack, timeout_s: float) -> Arrived:
    """What Kafka has once the MQTT broker has nothing more; a first copy behind a later record is reordered."""
    eventually(lambda: proof.waiting_in_broker(stack.settings.nats_monitor_port) == 0, timeout_s)
    consumer = Consumer({"bootstrap.servers": stack.settings.kafka_bootstrap, "group.id": "test"})
    consumer.assign([TopicPartition(READINGS.name, number, 0) for number in range(READINGS.partitions)])
    wanted = proof.end_offsets(stack.settings.kafka_bootstrap)[READINGS.name]
    seen: set[tuple[str, int]] = set()
    newest: dict[str, int] = defaultdict(lambda: -1)
    found = Arrived(0, 0, 0)

    def all_read() -> bool:
        for message in consumer.consume(1_000, timeout=0.2):
            assert message.error() is None
            reading = decode(message.value() or b"", "reading")
            place = (reading["meter_id"], reading["seq"])
            if place in seen:
                found.redelivered += 1
                continue
            seen.add(place)
            found.reordered += place[1] < newest[place[0]]
            newest[place[0]] = max(newest[place[0]], place[1])
        return len(seen) + found.redelivered >= wanted

    try:
        eventually(all_read, 120)
    finally:
        consumer.close()
    found.distinct = len(seen)
    return found


def busy(stack: NativeStack) -> list[int]:
    return [pid for name in ("ingest", "kafka") if (pid := stack.pid(name))]


@pytest.mark.parametrize(
    ("count", "share"),
    [(5_000, 0.05), pytest.param(100_000, 0.1, marks=[pytest.mark.long, pytest.mark.timeout(7_200)])],
    ids=["short", "long"],
)
def test_starved_of_cpu_nothing_overtakes_and_hardly_anything_comes_again(
    stack: NativeStack, count: int, share: float
) -> None:
    with starved(lambda: busy(stack), share):
        publish(stack, count)
        found = arrived(stack, 800)
    assert (found.distinct, found.reordered) == (count, 0)
    assert found.redelivered < 0.01 * count


@pytest.mark.parametrize("stack", ["0123456789abcdef"], indirect=True)
def test_of_a_bridge_that_owns_many_shards_nothing_overtakes(stack: NativeStack) -> None:
    publish(stack, 20_000)
    assert arrived(stack, 120) == Arrived(20_000, 0, 0)


@pytest.mark.long
@pytest.mark.timeout(7_200)
def test_ten_kills_of_a_starved_bridge_lose_nothing_and_keep_the_order(stack: NativeStack) -> None:
    count = 100_000
    publishing = threading.Thread(target=publish, args=(stack, count))
    with starved(lambda: busy(stack), 0.1):
        publishing.start()
        for turn in range(1, 11):
            carried = 0.09 * turn * count
            eventually(lambda: proof.end_offsets(stack.settings.kafka_bootstrap)[READINGS.name] > carried, 400)  # noqa: B023
            os.kill(stack.pid("ingest") or 0, signal.SIGKILL)
            eventually(lambda: stack.dead(["ingest"]) == ["ingest"], 30)
            stack.start(["ingest"])
        found = arrived(stack, 800)
        publishing.join()
    assert (found.distinct, found.reordered) == (count, 0)
    assert found.redelivered <= 10 * 1_000, "more than the broker's window at each kill"


def test_a_bridge_that_was_stopped_goes_on_at_once(stack: NativeStack) -> None:
    publish(stack, 1_000)
    arrived(stack, 60)
    stack.stop_part("ingest")
    publish(stack, 1_000)
    assert proof.waiting_in_broker(stack.settings.nats_monitor_port) == 1_000
    assert (stack.home / "run" / "meterstream-bridge-all.clean").exists()
    stack.start(["ingest"])
    assert not (stack.home / "run" / "meterstream-bridge-all.clean").exists(), "a kill from here on is no clean end"
    assert arrived(stack, 60) == Arrived(1_000, 1_000, 0), "the same readings twice"
    assert "session taken up" not in stack.log_file("ingest").read_text()
