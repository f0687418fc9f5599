"""The bridge between the real broker and the real Kafka: what it carries, refuses, and survives."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import paho.mqtt.client as mqtt
import pytest
from confluent_kafka import Consumer, TopicPartition
from paho.mqtt.enums import CallbackAPIVersion

from kafka_io.offsets import newest_offsets
from schemas.codec import decode, encode
from schemas.dsmr import with_crc
from schemas.topics import DEAD_LETTERS, EVENTS, READINGS, TOPICS, Topic, mqtt_topic
from stack.backlog import waiting_in_broker
from stack.native import NativeStack
from tests.brokers import WAY, kill, way
from tests.eventually import eventually

BEGIN = datetime(2024, 3, 4, tzinfo=UTC)
TELEGRAM = "/ISK5\\2M550T-1012\r\n\r\n1-3:0.2.8(50)\r\n0-0:1.0.0(240304120000W)\r\n1-0:1.8.1(000001.234*kWh)\r\n!"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NativeStack]:
    with way(tmp_path_factory.mktemp("stack"), METERSTREAM_POISON_SHARE="0.2") as stack:
        yield stack


@pytest.fixture
def stack(shared: NativeStack) -> NativeStack:
    """The same for all; a test looks at what came after its begin."""
    shared.start(WAY)
    HAD.update(newest_offsets(shared.settings.kafka_bootstrap, TOPICS))
    return shared


HAD: dict[tuple[str, int], int] = {}
"""Topic and partition → its end when the test began."""


def came(stack: NativeStack, topic: Topic) -> int:
    """Records that a topic has got since the test began."""
    ends = newest_offsets(stack.settings.kafka_bootstrap, [topic])
    return sum(end - HAD[place] for place, end in ends.items())


class Meters:
    """Publishes for meters over one connection that reconnects, QoS 1."""

    def __init__(self, stack: NativeStack) -> None:
        self.client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id="meters", clean_session=False)
        self.client.reconnect_delay_set(1, 1)
        self.client.connect("127.0.0.1", stack.settings.mqtt_port)
        self.client.loop_start()
        self.open: list[mqtt.MQTTMessageInfo] = []

    def say(self, topic: str, payload: bytes) -> None:
        self.open.append(self.client.publish(topic, payload, qos=1))

    def read(self, meter_id: str, seq: int) -> None:
        record = {
            "meter_id": meter_id,
            "observed_at": BEGIN + timedelta(seconds=seq),
            "dialect": "own",
            "run_id": "r",
            "seq": seq,
            "import_t1_wh": seq,
        }
        self.say(mqtt_topic(meter_id), encode("reading", record))

    def close(self) -> None:
        eventually(lambda: all(info.is_published() for info in self.open), 60)
        self.client.disconnect()
        self.client.loop_stop()


def in_topic(stack: NativeStack, topic: Topic) -> list[dict[str, object]]:
    """Every record of a topic, decoded, in the order of each partition."""
    consumer = Consumer({"bootstrap.servers": stack.settings.kafka_bootstrap, "group.id": "test"})
    places = [(topic.name, number) for number in range(topic.partitions)]
    consumer.assign([TopicPartition(*place, HAD[place]) for place in places])
    wanted = came(stack, topic)
    found: list[dict[str, object]] = []

    def all_read() -> bool:
        for message in consumer.consume(1_000, timeout=0.2):
            assert message.error() is None
            found.append(decode(message.value() or b"", topic.entity))
        return len(found) >= wanted

    try:
        eventually(all_read, 30)
    finally:
        consumer.close()
    return found


def carried(stack: NativeStack, topic: Topic, count: int) -> list[dict[str, object]]:
    eventually(lambda: came(stack, topic) >= count, 90)
    eventually(lambda: waiting_in_broker(stack.settings.nats_monitor_port) == 0, 60)
    return in_topic(stack, topic)


def test_avro_json_and_telegrams_arrive_as_the_same_kind_of_reading(stack: NativeStack) -> None:
    meters = Meters(stack)
    meters.read("m1", 7)
    said = {"meter_id": "m2", "observed_at": "2024-03-04T12:00:00+01:00", "dialect": "own", "import_t1_wh": 1234}
    meters.say(mqtt_topic("m2", encoding="json"), json.dumps(said).encode())
    meters.say(mqtt_topic("m3", encoding="dsmr"), with_crc(TELEGRAM))
    meters.close()
    readings = {reading["meter_id"]: reading for reading in carried(stack, READINGS, 3)}
    assert readings["m1"]["import_t1_wh"] == 7
    assert readings["m2"]["import_t1_wh"] == readings["m3"]["import_t1_wh"] == 1234
    assert readings["m2"]["observed_at"] == readings["m3"]["observed_at"] == datetime(2024, 3, 4, 11, tzinfo=UTC)
    assert all(isinstance(reading["received_at"], datetime) for reading in readings.values())


def test_a_telegram_is_carried_with_the_power_failure_that_it_tells_of(stack: NativeStack) -> None:
    now = datetime.now(UTC).replace(microsecond=0)
    stamp, ended = ((at + timedelta(hours=1)).strftime("%y%m%d%H%M%SW") for at in (now, now - timedelta(minutes=10)))
    lines = TELEGRAM.removesuffix("!").replace("240304120000W", stamp)
    telegram = with_crc(f"{lines}1-0:99.97.0(1)(0-0:96.7.19)({ended})(0000000600*s)\r\n!")
    meters = Meters(stack)
    for _ in range(3):
        meters.say(mqtt_topic("m1", encoding="dsmr"), telegram)
    meters.close()
    assert len(carried(stack, READINGS, 3)) == 3
    events = carried(stack, EVENTS, 2)
    assert [(event["meter_id"], event["code"], event["observed_at"]) for event in events] == [
        ("m1", "failed", now - timedelta(minutes=20)),
        ("m1", "returned", now - timedelta(minutes=10)),
    ]


def test_bad_messages_become_dead_letters_with_their_bytes_and_block_nothing(stack: NativeStack) -> None:
    said = {"meter_id": "m1", "observed_at": BEGIN, "dialect": "own"}
    good = encode("reading", said)
    bad = [
        ("meters/0/m1/readings/avro", good, "bad_topic"),
        ("meters/x", b"?", "bad_topic"),
        (mqtt_topic("m1", encoding="xml"), b"<a/>", "unknown_encoding"),
        (mqtt_topic("m1"), b"", "not_framed"),
        (mqtt_topic("m1"), b"\0\0\0\0\x63" + good[5:], "unknown_schema_id"),
        (mqtt_topic("m1", "events"), good, "wrong_entity"),
        (mqtt_topic("m1"), good[:-9], "undecodable"),
        (mqtt_topic("m1"), good + b"!", "trailing_bytes"),
        (mqtt_topic("m1", encoding="json"), b"{", "invalid_json"),
        (mqtt_topic("m1", encoding="dsmr"), with_crc(TELEGRAM).replace(b"1.234", b"1.#34"), "invalid_telegram"),
        (mqtt_topic("m2"), good, "meter_id_mismatch"),
        (mqtt_topic("m1"), encode("reading", {**said, "voltage_l1_mv": 2**63 - 1}), "undecodable"),
        (mqtt_topic("m1", encoding="json"), b'{"\\ud800": 1}', "invalid_json"),
        (mqtt_topic("m1"), b"\0" * 70_000, "too_large"),
        (mqtt_topic("m1"), b"\1" * 1_040_000, "too_large"),
    ]
    assert mqtt_topic("m1").startswith("meters/0/") is False
    meters = Meters(stack)
    for topic, payload, _ in bad:
        meters.say(topic, payload)
    meters.read("m9", 1)
    meters.close()
    letters = carried(stack, DEAD_LETTERS, len(bad))
    found = sorted((letter["mqtt_topic"], letter["payload"], letter["reason"]) for letter in letters)
    assert found == sorted(bad)
    assert [reading["meter_id"] for reading in carried(stack, READINGS, 1)] == ["m9"]


def test_a_killed_bridge_loses_nothing_and_keeps_the_order_of_every_meter(stack: NativeStack) -> None:
    meters = Meters(stack)
    for seq in range(3_000):
        meters.read(f"m{seq % 10}", seq // 10)
        if seq == 1_500:
            eventually(lambda: came(stack, READINGS) > 200, 30)
            kill(stack, "ingest")
    eventually(lambda: stack.dead(["ingest"]) == ["ingest"], 10)
    stack.start(["ingest"])
    meters.close()
    seen: dict[object, list[int]] = {}
    for reading in carried(stack, READINGS, 3_000):
        order = seen.setdefault(reading["meter_id"], [])
        if reading["seq"] not in order:
            order.append(int(str(reading["seq"])))
    assert seen == {f"m{number}": list(range(300)) for number in range(10)}


def test_a_killed_broker_loses_nothing_that_it_acknowledged(stack: NativeStack) -> None:
    meters = Meters(stack)
    for seq in range(1_000):
        meters.read("m1", seq)
        if seq == 500:
            kill(stack, "nats")
            eventually(lambda: stack.dead(["nats"]) == ["nats"], 10)
            stack.start(["nats"])
    meters.close()
    found = {reading["seq"] for reading in carried(stack, READINGS, 1_000)}
    assert found == set(range(1_000))


def test_while_kafka_is_away_the_broker_holds_and_then_all_is_carried(stack: NativeStack) -> None:
    meters = Meters(stack)
    meters.read("m1", 0)
    carried(stack, READINGS, 1)
    stack.stop_part("kafka")
    for seq in range(1, 500):
        meters.read("m1", seq)
    meters.close()
    assert waiting_in_broker(stack.settings.nats_monitor_port) >= 499
    stack.start(["kafka"])
    found = {reading["seq"] for reading in carried(stack, READINGS, 500)}
    assert found == set(range(500))


def test_too_much_poison_stops_the_bridge_before_it_empties_the_topic(stack: NativeStack) -> None:
    meters = Meters(stack)
    for _ in range(900):
        meters.say(mqtt_topic("m1"), b"?")
    meters.close()
    eventually(lambda: stack.dead(["ingest"]) == ["ingest"], 60)
    assert "poison" in stack.log_file("ingest").read_text()
    assert came(stack, DEAD_LETTERS) < 900
    assert waiting_in_broker(stack.settings.nats_monitor_port) > 0
