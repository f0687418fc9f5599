"""Where a replay sends: MQTT, Kafka or nowhere. What `acknowledged` counts is safe on the other side."""

import threading
import time
import zlib
from collections.abc import Sequence
from typing import Any, Protocol

import paho.mqtt.client as mqtt
from confluent_kafka import KafkaError, KafkaException, Message, Producer
from paho.mqtt.enums import CallbackAPIVersion

from schemas.errors import ConfigError, RetryLater
from schemas.topics import KINDS, mqtt_topic

IN_FLIGHT = 20  # paho publishes fastest with a small window
QUEUED = 2_000  # messages handed to paho and not acknowledged, all connections together: bounds memory
KAFKA_QUEUED = 100_000  # records handed to librdkafka and not acknowledged: some 20 MB
PRODUCER = {
    "acks": "all",
    "enable.idempotence": "true",
    "compression.type": "lz4",
    "linger.ms": "50",
    "batch.size": "1000000",
}
"""How Kafka is written to; every Kafka producer has settings of these names."""
CHUNK = 10_000  # records handed to librdkafka at a time
DRAIN_S = 60.0


class Sink(Protocol):
    """Where records go."""

    @property
    def acknowledged(self) -> int:
        """Records that are safe on the other side."""

    def send(self, kind: str, meter_ids: Sequence[str], payloads: Sequence[bytes], encoding: str = "avro") -> None:
        """Hands payloads over, each in the name of its meter; blocks while the other side is behind."""

    def close(self) -> None:
        """Waits until all is acknowledged."""


class NullSink:
    """Everything but the sending."""

    def __init__(self) -> None:
        self.acknowledged = 0

    def send(self, kind: str, meter_ids: Sequence[str], payloads: Sequence[bytes], encoding: str = "avro") -> None:
        """Counts."""
        self.acknowledged += len(payloads)

    def close(self) -> None:
        """Nothing to wait for."""


class KafkaSink:
    """Straight into Kafka, past the broker and the bridge."""

    def __init__(self, bootstrap: str) -> None:
        self._sent = self._failed = 0
        self._failure: KafkaError | None = None
        self._producer = Producer(
            {
                "bootstrap.servers": bootstrap,
                **PRODUCER,
                "partitioner": "murmur2_random",
                "queue.buffering.max.messages": KAFKA_QUEUED + CHUNK,
                "delivery.report.only.error": True,
                "log_level": 3,
            }
        )
        try:
            self._producer.list_topics(timeout=10)
        except KafkaException as error:
            msg = f"no Kafka at {bootstrap}: {error.args[0].str()}"
            raise RetryLater(msg) from error

    @property
    def acknowledged(self) -> int:
        """Records that Kafka has."""
        return self._sent - len(self._producer) - self._failed

    def send(self, kind: str, meter_ids: Sequence[str], payloads: Sequence[bytes], encoding: str = "avro") -> None:
        """Queues records; a full queue is waited for. Kafka takes any bytes: only Avro will be understood."""
        topic = KINDS[kind].name
        for start in range(0, len(payloads), CHUNK):
            stop = start + CHUNK
            while len(self._producer) > KAFKA_QUEUED and not self._failure:
                self._producer.poll(0.01)
            self._check()
            messages = [
                {"key": key, "value": value}
                for key, value in zip(meter_ids[start:stop], payloads[start:stop], strict=True)
            ]
            taken = self._producer.produce_batch(topic, messages, on_delivery=self._delivered)
            self._sent += taken
            if taken < len(messages):
                refused = next(message["_error"] for message in messages if "_error" in message)
                msg = f"Kafka's client did not take {len(messages) - taken} records: {refused}"
                raise RetryLater(msg)
            self._producer.poll(0)

    def _delivered(self, error: KafkaError | None, _: Message) -> None:
        if error is not None:
            self._failed += 1
            self._failure = error

    def _check(self) -> None:
        if self._failure:
            msg = f"Kafka did not take {self._failed} records: {self._failure.str()}"
            raise RetryLater(msg)

    def close(self) -> None:
        """Waits until Kafka has every record."""
        left = self._producer.flush(DRAIN_S)
        self._check()
        if left:
            msg = f"Kafka did not take {left} records within {DRAIN_S:.0f} s"
            raise RetryLater(msg)


class MqttSink:
    """Each meter's own topic, QoS 1, over one or several connections; a meter stays on its connection."""

    def __init__(self, host: str, port: int, connections: int = 1) -> None:
        if connections < 1:
            msg = f"--connections is 1 or more, not {connections}"
            raise ConfigError(msg)
        self.acknowledged = self._published = 0
        self._changed = threading.Condition()
        self._clients = [self._connected(host, port, number) for number in range(connections)]

    def _connected(self, host: str, port: int, number: int) -> mqtt.Client:
        client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id=f"replay-{time.time_ns()}-{number}")
        client.max_inflight_messages_set(IN_FLIGHT)
        client.on_publish = self._taken
        try:
            client.connect(host, port)
        except OSError as error:
            msg = f"no MQTT broker at {host}:{port}: {error}"
            raise RetryLater(msg) from error
        client.loop_start()
        return client

    def send(self, kind: str, meter_ids: Sequence[str], payloads: Sequence[bytes], encoding: str = "avro") -> None:
        """Publishes to the meters' topics; waits while too many are not acknowledged."""
        for meter_id, payload in zip(meter_ids, payloads, strict=True):
            client = self._clients[zlib.crc32(meter_id.encode()) % len(self._clients)]
            # without a connection paho keeps the message and sends it when the broker is back
            client.publish(mqtt_topic(meter_id, kind, encoding), payload, qos=1)
            self._published += 1
            if self._published - self.acknowledged > QUEUED:
                self._wait(QUEUED)

    def _taken(self, *_: Any) -> None:
        with self._changed:
            self.acknowledged += 1
            self._changed.notify()

    def _wait(self, open_messages: int) -> None:
        """Waits until at most so many messages are not acknowledged; as long as any of them is in time."""
        with self._changed:
            while (left := self._published - self.acknowledged) > open_messages:
                before = self.acknowledged
                self._changed.wait(DRAIN_S)
                if self.acknowledged == before:
                    msg = f"the MQTT broker did not acknowledge {left} records: nothing within {DRAIN_S:.0f} s"
                    raise RetryLater(msg)

    def close(self) -> None:
        """Waits for every acknowledgement."""
        try:
            self._wait(0)
        finally:
            for client in self._clients:
                client.disconnect()
                client.loop_stop()
