"""Where a replay sends: MQTT, Kafka or nowhere. What `acknowledged` counts is safe on the other side."""

import threading
import time
from collections import deque
from typing import Any, Protocol

import paho.mqtt.client as mqtt
from confluent_kafka import KafkaError, Message, Producer
from paho.mqtt.enums import CallbackAPIVersion

from schemas.errors import RetryLater
from schemas.topics import KINDS, mqtt_topic

IN_FLIGHT = 20  # paho publishes fastest with a small window
QUEUED = 2_000  # messages handed to paho and not acknowledged: bounds memory
DRAIN_S = 60.0


class Sink(Protocol):
    """Where records go."""

    acknowledged: int

    def send(self, meter_id: str, kind: str, payload: bytes, encoding: str = "avro") -> None:
        """Hands a framed record over; blocks while the other side is behind."""

    def close(self) -> None:
        """Waits until all is acknowledged."""


class NullSink:
    """Everything but the sending."""

    def __init__(self) -> None:
        self.acknowledged = 0

    def send(self, meter_id: str, kind: str, payload: bytes, encoding: str = "avro") -> None:
        """Counts."""
        self.acknowledged += 1

    def close(self) -> None:
        """Nothing to wait for."""


class KafkaSink:
    """Straight into Kafka, past the broker and the bridge."""

    def __init__(self, bootstrap: str) -> None:
        self.acknowledged = 0
        self._failure: KafkaError | None = None
        self._producer = Producer(
            {
                "bootstrap.servers": bootstrap,
                "enable.idempotence": True,
                "acks": "all",
                "compression.type": "lz4",
                "linger.ms": 20,
                "partitioner": "murmur2_random",
                "queue.buffering.max.messages": 200_000,
            }
        )

    def send(self, meter_id: str, kind: str, payload: bytes, encoding: str = "avro") -> None:
        """Queues a record; a full queue is waited for."""
        while True:
            try:
                self._producer.produce(KINDS[kind].name, payload, meter_id.encode(), on_delivery=self._delivered)
                self._producer.poll(0)
            except BufferError:
                self._producer.poll(0.05)
            else:
                return

    def _delivered(self, error: KafkaError | None, _: Message) -> None:
        if error is None:
            self.acknowledged += 1
        else:
            self._failure = error

    def close(self) -> None:
        """Waits for every delivery report."""
        left = self._producer.flush(DRAIN_S)
        if left or self._failure:
            msg = f"Kafka did not take {left} records: {self._failure}"
            raise RetryLater(msg)


class MqttSink:
    """Each meter's own topic, QoS 1, over one connection."""

    def __init__(self, host: str, port: int) -> None:
        self._lock = threading.Lock()
        self.acknowledged = 0
        self._open: deque[mqtt.MQTTMessageInfo] = deque()
        self._client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id=f"replay-{time.time_ns()}")
        self._client.max_inflight_messages_set(IN_FLIGHT)
        self._client.on_publish = self._published
        try:
            self._client.connect(host, port)
        except OSError as error:
            msg = f"no MQTT broker at {host}:{port}: {error}"
            raise RetryLater(msg) from error
        self._client.loop_start()

    def send(self, meter_id: str, kind: str, payload: bytes, encoding: str = "avro") -> None:
        """Publishes to the meter's topic; waits while too many are not acknowledged."""
        self._open.append(self._client.publish(mqtt_topic(meter_id, kind, encoding), payload, qos=1))
        while len(self._open) > QUEUED:
            self._open.popleft().wait_for_publish(DRAIN_S)

    def _published(self, *_: Any) -> None:
        with self._lock:
            self.acknowledged += 1

    def close(self) -> None:
        """Waits for every acknowledgement."""
        deadline = time.monotonic() + DRAIN_S
        while self._open:
            info = self._open.popleft()
            info.wait_for_publish(max(0.0, deadline - time.monotonic()))
            if not info.is_published():
                msg = f"the MQTT broker did not acknowledge {len(self._open) + 1} records"
                raise RetryLater(msg)
        self._client.disconnect()
        self._client.loop_stop()
