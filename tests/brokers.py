"""What the MQTT broker and Kafka promise over their ports: one suite for processes and containers."""

import contextlib
import os
import signal
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import paho.mqtt.client as mqtt
import pytest
from confluent_kafka import Consumer, Producer
from confluent_kafka.admin import AdminClient
from paho.mqtt.enums import CallbackAPIVersion

from schemas.topics import READINGS, TOPICS
from stack.isolated import environment, own_settings
from stack.native import NativeStack
from stack.settings import StackSettings
from tests.eventually import eventually

TOPIC = "meters/0/m1/readings/avro"
WAY = ["nats", "kafka", "ingest"]
"""From MQTT to Kafka."""


@contextlib.contextmanager
def way(home: Path, **variables: str) -> Iterator[NativeStack]:
    """MQTT broker, Kafka and bridge in a home of their own, and the environment that leads there."""
    settings = own_settings(home)
    stack = NativeStack(settings)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (environment(settings) | variables).items():
            patch.setenv(name, value)
        try:
            stack.start(WAY)
            yield stack
        finally:
            stack.stop()


class Ports(Protocol):
    """A stack, of processes or of containers, by the ports at which its brokers answer."""

    settings: StackSettings


def pid_of(stack: NativeStack, name: str) -> int:
    """The number of a process that runs: none is not 0, by which a signal would go to the tests themselves."""
    pid = stack.pid(name)
    assert pid, f"{name} does not run"
    return pid


def kill(stack: NativeStack, name: str, number: int = signal.SIGKILL) -> int:
    """Sends a signal to a process that runs, and gives its number."""
    pid = pid_of(stack, name)
    os.kill(pid, number)
    return pid


def client(stack: Ports, name: str) -> mqtt.Client:
    client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id=name, clean_session=False)
    eventually(lambda: client.connect("127.0.0.1", stack.settings.mqtt_port) == mqtt.MQTT_ERR_SUCCESS)
    return client


def leave_subscribed(stack: Ports, name: str) -> None:
    subscriber = client(stack, name)
    subscribed = threading.Event()
    subscriber.on_subscribe = lambda *_: subscribed.set()
    subscriber.loop_start()
    subscriber.subscribe("meters/#", qos=1)
    assert subscribed.wait(5)
    subscriber.disconnect()
    subscriber.loop_stop()


def publish(stack: Ports, payload: bytes) -> None:
    publisher = client(stack, "publisher")
    publisher.loop_start()
    message = publisher.publish(TOPIC, payload, qos=1)
    message.wait_for_publish(5)
    assert message.is_published()
    publisher.disconnect()
    publisher.loop_stop()


def kept_for(stack: Ports, name: str) -> list[tuple[str, bytes]]:
    received: list[tuple[str, bytes]] = []
    again = mqtt.Client(CallbackAPIVersion.VERSION2, client_id=name, clean_session=False)
    again.on_message = lambda _client, _data, message: received.append((message.topic, bytes(message.payload)))
    eventually(lambda: again.connect("127.0.0.1", stack.settings.mqtt_port) == mqtt.MQTT_ERR_SUCCESS)
    again.loop_start()
    try:
        eventually(lambda: received, 10)
    finally:
        again.disconnect()
        again.loop_stop()
    return received


def produce(stack: Ports, value: bytes) -> None:
    producer = Producer({"bootstrap.servers": stack.settings.kafka_bootstrap, "acks": "all"})
    producer.produce(READINGS.name, key="m1", value=value)
    assert producer.flush(30) == 0


def consumed(stack: Ports) -> list[tuple[bytes | None, bytes | None]]:
    """Everything in the readings' topic that has the key m1."""
    settings = {"bootstrap.servers": stack.settings.kafka_bootstrap, "auto.offset.reset": "earliest"}
    consumer = Consumer({**settings, "group.id": uuid.uuid4().hex})
    found: list[tuple[bytes | None, bytes | None]] = []

    def arrived() -> list[tuple[bytes | None, bytes | None]] | None:
        message = consumer.poll(0.5)
        if message is None:
            return found
        if message.error() is None:
            found.append((message.key(), message.value()))
        return None

    try:
        consumer.subscribe([READINGS.name])
        return eventually(arrived, 30)
    finally:
        consumer.close()


class Brokers:
    """Needs fixtures: `stack` with settings; `killed_and_started`, which kills one of the two and starts it again."""

    def test_every_topic_of_the_contract_exists_with_its_partitions(self, stack: Ports) -> None:
        topics = AdminClient({"bootstrap.servers": stack.settings.kafka_bootstrap}).list_topics(timeout=10).topics
        assert {t.name: t.partitions for t in TOPICS} == {t.name: len(topics[t.name].partitions) for t in TOPICS}

    def test_what_is_produced_to_kafka_is_consumed(self, stack: Ports) -> None:
        produce(stack, b"hello")
        assert (b"m1", b"hello") in consumed(stack)

    def test_what_is_published_over_mqtt_is_kept_for_an_absent_subscriber(self, stack: Ports) -> None:
        leave_subscribed(stack, "absent")
        publish(stack, b"hello")
        assert kept_for(stack, "absent") == [(TOPIC, b"hello")]

    def test_what_the_mqtt_broker_acknowledged_survives_its_kill(
        self, stack: Ports, killed_and_started: Callable[[str], None]
    ) -> None:
        leave_subscribed(stack, "away")
        publish(stack, b"before the kill")
        killed_and_started("nats")
        assert kept_for(stack, "away") == [(TOPIC, b"before the kill")]

    def test_what_kafka_acknowledged_survives_its_kill(
        self, stack: Ports, killed_and_started: Callable[[str], None]
    ) -> None:
        produce(stack, b"before the kill")
        killed_and_started("kafka")
        assert (b"m1", b"before the kill") in consumed(stack)
