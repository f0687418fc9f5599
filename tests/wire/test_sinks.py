"""What a sink says is safe is there, on the real Kafka and the real MQTT broker: full, stopped, killed, restarted."""

import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence

import paho.mqtt.client as mqtt
import pytest
from confluent_kafka import Consumer, TopicPartition
from paho.mqtt.enums import CallbackAPIVersion

from replay.sinks import BATCHING, QUEUED, KafkaSink, MqttSink
from schemas.errors import RetryLater
from schemas.topics import READINGS
from stack import proof
from stack.isolated import environment, own_settings
from stack.native import NativeStack
from tests.brokers import kill
from tests.eventually import eventually

METERS = [f"m{number}" for number in range(7)]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NativeStack]:
    settings = own_settings(tmp_path_factory.mktemp("sinks"))
    stack = NativeStack(settings)
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, value in environment(settings).items():
            monkeypatch.setenv(name, value)
        try:
            stack.start(["nats", "kafka"])
            yield stack
        finally:
            stack.stop()


def said(name: str, count: int, size: int = 0) -> tuple[list[str], list[bytes]]:
    """Meters in turn, and payloads that name the test, the meter and a number that grows."""
    ids = [METERS[number % len(METERS)] for number in range(count)]
    return ids, [f"{name} {meter} {number:06}".encode().ljust(size) for number, meter in enumerate(ids)]


def in_order(name: str, arrived: Sequence[bytes], sent: Sequence[bytes]) -> bool:
    """Whether all arrived, each meter's in its order; copies of what arrived before do not count."""
    found = list(dict.fromkeys(payload for payload in arrived if payload.startswith(name.encode() + b" ")))
    return all(
        [each for each in found if each.split()[1] == meter.encode()]
        == [each for each in sent if each.split()[1] == meter.encode()]
        for meter in METERS
    )


def in_kafka(stack: NativeStack) -> list[bytes]:
    """Every reading, in the order of each partition."""
    consumer = Consumer({"bootstrap.servers": stack.settings.kafka_bootstrap, "group.id": "test"})
    consumer.assign([TopicPartition(READINGS.name, number, 0) for number in range(READINGS.partitions)])
    wanted = stored(stack)
    found: list[bytes] = []

    def all_read() -> bool:
        found.extend(message.value() or b"" for message in consumer.consume(10_000, timeout=0.2))
        return len(found) >= wanted

    try:
        eventually(all_read, 30)
    finally:
        consumer.close()
    return found


def stored(stack: NativeStack) -> int:
    """Readings that Kafka has."""
    return proof.end_offsets(stack.settings.kafka_bootstrap)[READINGS.name]


def test_kafkas_client_without_room_is_waited_for_and_every_meter_keeps_its_order(
    stack: NativeStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BATCHING, "queue.buffering.max.kbytes", "64")
    sink, before = KafkaSink(stack.settings.kafka_bootstrap), stored(stack)
    ids, payloads = said("full", 3_000, size=500)
    for start in range(0, len(ids), 1_000):
        sink.send("readings", ids[start : start + 1_000], payloads[start : start + 1_000])
        safe = sink.acknowledged
        assert start + 500 < safe <= stored(stack) - before, "64 kB are some 130 records"
    sink.close()
    assert sink.acknowledged == stored(stack) - before == 3_000
    assert in_order("full", in_kafka(stack), payloads)


def test_what_kafkas_client_still_holds_is_not_acknowledged(stack: NativeStack) -> None:
    sink = KafkaSink(stack.settings.kafka_bootstrap)
    ids, payloads = said("held", 600)
    sink.send("readings", ids[:100], payloads[:100])
    sink.close()  # which only waits
    stack.stop_part("kafka")
    sink.send("readings", ids[100:], payloads[100:])
    assert sink.acknowledged == 100
    stack.start(["kafka"])
    sink.close()
    assert sink.acknowledged == 600
    assert in_order("held", in_kafka(stack), payloads)


def test_what_kafka_did_not_take_in_time_is_told_and_not_acknowledged(
    stack: NativeStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BATCHING, "message.timeout.ms", "1000")
    sink = KafkaSink(stack.settings.kafka_bootstrap)
    kill(stack, "kafka", signal.SIGSTOP)
    try:
        sink.send("readings", *said("late", 600))
        with pytest.raises(RetryLater, match="did not take 600 records"):
            sink.close()
        assert sink.acknowledged == 0
    finally:
        kill(stack, "kafka", signal.SIGCONT)


class Away:
    """A session of the broker that is away, so that the broker keeps all for it."""

    def __init__(self, stack: NativeStack) -> None:
        self.port = stack.settings.mqtt_port
        client = self._connected()
        client.on_connect = lambda client, *_: client.subscribe("meters/#", qos=1)
        client.on_subscribe = lambda client, *_: client.disconnect()
        client.loop_forever()

    def _connected(self) -> mqtt.Client:
        client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id="away", clean_session=False)
        client.connect("127.0.0.1", self.port)
        return client

    def held(self, *until: bytes) -> list[bytes]:
        """What came, in the broker's order, until these payloads have: two connections' messages meet in any order."""
        found: list[bytes] = []
        client = self._connected()
        client.on_message = lambda _, __, message: found.append(bytes(message.payload))
        client.loop_start()
        try:
            eventually(lambda: set(until) <= set(found), 30)
        finally:
            client.disconnect()
            client.loop_stop()
        return found


@pytest.fixture
def away(stack: NativeStack) -> Away:
    return Away(stack)


@pytest.mark.parametrize("connections", [1, 3])
def test_a_killed_mqtt_broker_gets_all_that_it_did_not_acknowledge_and_every_meters_order_stays(
    stack: NativeStack, away: Away, connections: int
) -> None:
    name = f"killed{connections}"
    sink = MqttSink("127.0.0.1", stack.settings.mqtt_port, connections)
    ids, payloads = said(name, 20_000)
    is_under_way = threading.Event()

    def kill_and_start() -> None:
        is_under_way.wait(60)
        kill(stack, "nats")
        eventually(lambda: stack.dead(["nats"]) == ["nats"], 10)
        stack.start(["nats"])

    killer = threading.Thread(target=kill_and_start)
    killer.start()
    for start in range(0, len(ids), 1_000):
        sink.send("readings", ids[start : start + 1_000], payloads[start : start + 1_000])
        if start == 3_000:
            is_under_way.set()
    killer.join()
    sink.send("readings", ids[:1], [f"{name} last".encode()])
    sink.close()
    assert sink.acknowledged == len(ids) + 1
    assert in_order(name, [each for each in away.held(f"{name} last".encode()) if b"last" not in each], payloads)


def test_after_a_pause_in_which_the_broker_was_restarted_the_next_records_go_out_at_once(
    stack: NativeStack, away: Away
) -> None:
    sink = MqttSink("127.0.0.1", stack.settings.mqtt_port, 2)
    ids, payloads = said("pause", 20)
    sink.send("readings", ids[:10], payloads[:10])
    stack.restart("nats")
    sink.send("readings", ids[10:], payloads[10:])
    assert in_order("pause", away.held(*payloads), payloads), "without another call"
    sink.close()
    assert sink.acknowledged == 20


def test_a_broker_that_acknowledges_nothing_is_waited_for_with_a_bounded_number_open_then_told(
    stack: NativeStack, away: Away, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("replay.sinks.DRAIN_S", 1.0)
    sink = MqttSink("127.0.0.1", stack.settings.mqtt_port, 2)
    ids, payloads = said("silent", 3_000)
    kill(stack, "nats", signal.SIGSTOP)
    try:
        acts: list[Callable[[], None]] = [lambda: sink.send("readings", ids, payloads), sink.close]
        for act in acts:
            with pytest.raises(RetryLater, match=f"nothing within 1 s, {QUEUED} records"):
                act()
        assert sink.acknowledged == 0
    finally:
        kill(stack, "nats", signal.SIGCONT)


def test_where_nobody_or_nobody_who_speaks_mqtt_listens_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("replay.sinks.CONNECT_S", 0.5)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        port = silent.getsockname()[1]
        for _ in ("nobody", "silent"):
            with pytest.raises(RetryLater, match=f"no MQTT broker at 127.0.0.1:{port}"):
                MqttSink("127.0.0.1", port)
            silent.listen()
