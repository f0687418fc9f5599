"""Order per meter from MQTT to Kafka, whatever bridge and Kafka get of the machine."""

import contextlib
import threading
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pytest
from confluent_kafka import Consumer, TopicPartition

from ingest.bridge import SESSION
from ingest.subscription import CLEAN, OPEN, QUIET_S
from kafka_io.offsets import newest_offsets
from mqtt_io.client import LoopClient
from replay.sinks import MqttSink
from schemas.codec import decode, encode
from schemas.topics import READINGS
from stack import proof
from stack.backlog import waiting_in_broker
from stack.native import NativeStack
from tests.brokers import kill, pid_of, way
from tests.eventually import eventually, turning
from tests.starved import starved

BEGIN = datetime(2024, 3, 4, tzinfo=UTC)
METERS = 20
"""The broker's window holds several readings of each, so one that is overtaken in it is seen."""


@dataclass
class Arrived:
    distinct: int
    redelivered: int
    reordered: int


class Order:
    """Meters of one test, on brokers that others may have used before: what it sends, and what of it Kafka has."""

    def __init__(self, stack: NativeStack, name: str) -> None:
        self.stack = stack
        self.name = name
        self.since = [0] * READINGS.partitions
        self._log = 0

    def begin(self) -> None:
        """What Kafka and the bridge's log have now is another test's."""
        ends = newest_offsets(self.stack.settings.kafka_bootstrap, [READINGS])
        self.since = [ends[READINGS.name, number] for number in range(READINGS.partitions)]
        self._log = len(self.stack.log_file("ingest").read_text())

    @property
    def said(self) -> str:
        """What the bridge has said."""
        return self.stack.log_file("ingest").read_text()[self._log :]

    def in_kafka(self) -> int:
        """Records of the test that Kafka has."""
        return proof.end_offsets(self.stack.settings.kafka_bootstrap)[READINGS.name] - sum(self.since)

    def publish(self, count: int, begin: int = 0, per_s: float | None = None) -> None:
        """Readings of the meters in turn, each with its number: from `begin` to `count` − 1; at a rate, or at once."""
        sink = MqttSink("127.0.0.1", self.stack.settings.mqtt_port)
        pause, together = threading.Event(), 1_000 if per_s is None else 1
        for start in range(begin, count, together):
            pause.wait(1 / per_s if per_s else 0)
            numbers = range(start, min(start + together, count))
            ids = [f"{self.name}-m{number % METERS:03d}" for number in numbers]
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

    def arrived(self, timeout_s: float) -> Arrived:
        """What Kafka has once the MQTT broker has nothing more; a first copy behind a later record is reordered."""
        eventually(lambda: waiting_in_broker(self.stack.settings.nats_monitor_port) == 0, timeout_s)
        consumer = Consumer({"bootstrap.servers": self.stack.settings.kafka_bootstrap, "group.id": "test"})
        consumer.assign([TopicPartition(READINGS.name, number, offset) for number, offset in enumerate(self.since)])
        wanted = self.in_kafka()
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

    @contextlib.contextmanager
    def kafka_away(self) -> Iterator[None]:
        """Kafka takes nothing, and comes back as it was."""
        kafka = psutil.Process(pid_of(self.stack, "kafka"))
        kafka.suspend()
        try:
            yield
        finally:
            kafka.resume()

    def kill_bridge(self) -> None:
        """Ends it without a word."""
        kill(self.stack, "ingest")
        eventually(lambda: self.stack.dead(["ingest"]) == ["ingest"], 30)

    def busy(self) -> list[int]:
        """Processes that are starved."""
        return [pid for name in ("ingest", "kafka") if (pid := self.stack.pid(name))]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NativeStack]:
    """Brokers and bridge for tests that take seconds and leave them as they were."""
    with way(tmp_path_factory.mktemp("way")) as stack:
        yield stack


@pytest.fixture
def order(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Order]:
    """With brokers of its own for what takes minutes, or for a bridge that owns shards."""
    shards = getattr(request, "param", "")
    if shards or request.node.get_closest_marker("long"):
        with way(tmp_path, METERSTREAM_SHARDS=shards) as stack:
            yield Order(stack, "own")
        return
    order = Order(request.getfixturevalue("shared"), tmp_path.name)
    order.begin()
    yield order


@pytest.mark.parametrize(
    ("count", "share"),
    [(5_000, 0.05), pytest.param(100_000, 0.1, marks=[pytest.mark.long, pytest.mark.timeout(7_200)])],
    ids=["short", "long"],
)
def test_starved_of_cpu_nothing_overtakes_and_hardly_anything_comes_again(
    order: Order, count: int, share: float
) -> None:
    with starved(order.busy, share):
        order.publish(count)
        found = order.arrived(800)
    assert (found.distinct, found.reordered) == (count, 0)
    assert found.redelivered < 0.01 * count


@pytest.mark.parametrize("order", ["0123456789abcdef"], indirect=True)
def test_of_a_bridge_that_owns_many_shards_nothing_overtakes(order: Order) -> None:
    order.publish(20_000)
    assert order.arrived(120) == Arrived(20_000, 0, 0)


@pytest.mark.long
@pytest.mark.timeout(7_200)
@pytest.mark.parametrize(("count", "share"), [(40_000, 2.0), (100_000, 0.1)], ids=["idle", "starved"])
def test_ten_kills_of_the_bridge_lose_nothing_and_keep_the_order(order: Order, count: int, share: float) -> None:
    publishing = threading.Thread(target=order.publish, args=(count,))
    with starved(order.busy, share):
        publishing.start()
        for turn in range(1, 11):
            carried = 0.09 * turn * count
            eventually(lambda: order.in_kafka() > carried, 400)  # noqa: B023
            order.kill_bridge()
            order.stack.start(["ingest"])
        found = order.arrived(800)
        publishing.join()
    assert (found.distinct, found.reordered) == (count, 0)
    assert found.redelivered <= 10 * 250, "more than the broker's window at each kill"


def test_a_bridge_that_is_stopped_while_meters_go_on_keeps_the_order(order: Order) -> None:
    publishing = threading.Thread(target=order.publish, args=(20_000,))
    publishing.start()
    eventually(lambda: order.in_kafka() > 3_000, 60)
    order.stack.stop_part("ingest")
    order.stack.start(["ingest"])
    publishing.join()
    found = order.arrived(120)
    assert (found.distinct, found.reordered) == (20_000, 0)


@pytest.mark.long
def test_the_session_of_an_earlier_release_brings_what_it_has_and_is_removed(order: Order) -> None:
    order.stack.stop_part("ingest")

    def session(is_new: bool) -> LoopClient:
        connected: list[bool] = []
        client = LoopClient("meterstream-bridge-all", clean_session=False)
        client.on_connect = lambda _client, _data, flags, *_: connected.append(not flags.session_present)
        client.connect("127.0.0.1", order.stack.settings.mqtt_port)
        turning(client, lambda: connected)
        assert connected == [is_new]
        return client

    old, subscribed = session(is_new=True), threading.Event()
    old.on_subscribe = lambda *_: subscribed.set()
    old.subscribe("meters/#", 1)
    turning(old, subscribed.is_set)
    old.leave()
    order.publish(5_000)
    order.stack.start(["ingest"])
    with order.kafka_away():  # an outage in the middle of it, longer than ack_wait, and meters that go on
        order.publish(6_000, begin=5_000)
        threading.Event().wait(15)
    eventually(lambda: "removed the session" in order.said, 60)
    assert order.arrived(60).distinct == 6_000
    session(is_new=True)


def test_an_end_while_what_comes_again_is_still_due_is_no_clean_one(order: Order) -> None:
    with order.kafka_away():
        order.publish(100)
        eventually(lambda: "Kafka takes longer" in order.said, 30)
    order.stack.stop_part("ingest")
    assert (order.stack.home / "run" / f"{SESSION}-all.session").read_text() == OPEN
    order.stack.start(["ingest"])
    assert (found := order.arrived(60)).distinct == 100
    assert found.reordered == 0


@pytest.mark.parametrize(
    ("away_s", "down_s"),
    [(8, 4), pytest.param(16, 0, marks=pytest.mark.long)],
    ids=["ack_wait has run out for some", "the bridge has left before"],
)
def test_a_bridge_killed_while_kafka_is_away_and_meters_send_slowly_keeps_the_order(
    order: Order, away_s: float, down_s: float
) -> None:
    publishing = threading.Thread(target=order.publish, args=(500,), kwargs={"per_s": 15})
    with order.kafka_away():
        publishing.start()
        threading.Event().wait(away_s)
        order.kill_bridge()
    threading.Event().wait(down_s)
    order.stack.start(["ingest"])
    publishing.join()
    found = order.arrived(60)
    assert (found.distinct, found.reordered) == (500, 0)


def test_what_kafka_took_late_is_acknowledged_when_it_comes_again_and_not_sent_twice(order: Order) -> None:
    with order.kafka_away():
        order.publish(2_000)
        eventually(lambda: "Kafka takes longer" in order.said, 30)
    assert order.arrived(60) == Arrived(2_000, 0, 0)


@pytest.mark.long
def test_a_bridge_that_believes_in_a_shorter_ack_wait_finds_one_that_is_long_enough(
    order: Order, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("METERSTREAM_ACK_WAIT_S", "2")
    with order.kafka_away():
        order.publish(1_000)
        order.kill_bridge()
    order.stack.start(["ingest"])
    assert order.arrived(120).distinct == 1_000


@pytest.mark.long
@pytest.mark.parametrize("order", ["0123456789abcdef"], indirect=True)
def test_of_a_bridge_that_owns_many_shards_nothing_overtakes_while_kafka_is_killed(order: Order) -> None:
    publishing = threading.Thread(target=order.publish, args=(10_000,))
    publishing.start()
    kill(order.stack, "kafka")
    threading.Event().wait(19)
    order.stack.start(["kafka"])
    publishing.join()
    found = order.arrived(300)
    assert (found.distinct, found.reordered) == (10_000, 0)


def test_a_bridge_that_was_stopped_goes_on_at_once(order: Order) -> None:
    order.publish(1_000)
    order.arrived(60)
    threading.Event().wait(QUIET_S)  # what comes in its last second may be on its way
    order.stack.stop_part("ingest")
    order.publish(1_000)
    assert waiting_in_broker(order.stack.settings.nats_monitor_port) == 1_000
    mark = order.stack.home / "run" / f"{SESSION}-all.session"
    assert mark.read_text() == CLEAN
    order.stack.start(["ingest"])
    assert mark.read_text() == OPEN, "a kill from here on is no clean end"
    assert order.arrived(60) == Arrived(1_000, 1_000, 0), "the same readings twice"
    assert "waits until" not in order.said
