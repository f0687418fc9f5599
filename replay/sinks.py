"""Where a replay sends: MQTT, Kafka or nowhere. What `acknowledged` counts is safe on the other side."""

import contextlib
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import paho.mqtt.client as mqtt
from confluent_kafka import KafkaError, KafkaException, Message

from kafka_io.clients import producer
from mqtt_io.client import LoopClient, turn
from schemas.errors import ConfigError, RetryLater
from schemas.topics import KINDS, mqtt_topic

QUEUED = 1_000  # messages handed to paho and not acknowledged, all connections together: more is not faster
KAFKA_QUEUED = 20_000
"""Records handed to librdkafka and not acknowledged: few enough to stay in the processor's cache, which a third of the
CPU time hangs on, and twice what fills a batch for each partition."""
BATCHING: dict[str, Any] = {"linger.ms": 50, "batch.size": 250_000}
"""How a fast producer fills its batches."""
CHUNK = 500  # records handed to librdkafka at a time, few for the cache's sake too
CONNECT_S = 10.0
RECONNECT_S = 0.2
DRAIN_S = 60.0


class Sink(Protocol):
    """Where records go."""

    @property
    def acknowledged(self) -> int:
        """Records that are safe on the other side."""

    @property
    def waited_s(self) -> float:
        """Seconds that `send` was blocked because the other side was behind."""

    def send(self, kind: str, meter_ids: Sequence[str], payloads: Sequence[bytes], encoding: str = "avro") -> None:
        """Hands payloads over, each in the name of its meter; blocks while the other side is behind."""

    def close(self) -> None:
        """Waits until all is acknowledged."""


class NullSink:
    """Everything but the sending."""

    def __init__(self) -> None:
        self.acknowledged = 0
        self.waited_s = 0.0

    def send(self, kind: str, meter_ids: Sequence[str], payloads: Sequence[bytes], encoding: str = "avro") -> None:
        """Counts."""
        self.acknowledged += len(payloads)

    def close(self) -> None:
        """Nothing to wait for."""


class KafkaSink:
    """Straight into Kafka, past the broker and the bridge."""

    def __init__(self, bootstrap: str) -> None:
        self.waited_s = 0.0
        self._sent = self._failed = 0
        self._failure: KafkaError | None = None
        self._producer = producer(
            bootstrap,
            {
                **BATCHING,
                "queue.buffering.max.messages": KAFKA_QUEUED + CHUNK,
                "delivery.report.only.error": True,
                "log_level": 3,
            },
        )
        try:
            self._producer.list_topics(timeout=CONNECT_S)
        except KafkaException as error:
            msg = f"no Kafka at {bootstrap} ({error.args[0].str()}): make up starts it"
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
            messages: list[dict[str, Any]] = [
                {"key": key, "value": value}
                for key, value in zip(meter_ids[start:stop], payloads[start:stop], strict=True)
            ]
            while messages:
                began = time.monotonic()
                while len(self._producer) > KAFKA_QUEUED and not self._failure:
                    self._producer.poll(0.01)
                self.waited_s += time.monotonic() - began
                self._check()
                messages = self._left(topic, messages)
                self._producer.poll(0.01 if messages else 0)

    def _left(self, topic: str, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Hands records over. Returns those for whose bytes the queue has no room.

        From the first of those on the client takes none, so each meter's order stays.
        """
        taken = self._producer.produce_batch(topic, messages, on_delivery=self._delivered)
        self._sent += taken
        if taken == len(messages):
            return []
        left = [message for message in messages if "_error" in message]
        errors = [message.pop("_error") for message in left]
        refusals = [error for error in errors if error.code() != KafkaError._QUEUE_FULL]
        if refusals:
            msg = f"Kafka's client did not take {len(left)} records: {refusals[0]}"
            raise RetryLater(msg)
        return left

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
    """Each meter's own topic, QoS 1, over one or several connections; a meter stays on its connection.

    Without a thread: connections live while something is sent or closed. In between what was sent is on its way, a
    connection has no keepalive to miss, and one that is lost comes back with the next call, which sends again what was
    not acknowledged.
    """

    def __init__(self, host: str, port: int, connections: int = 1) -> None:
        if connections < 1:
            msg = f"--connections is 1 or more, not {connections}"
            raise ConfigError(msg)
        self.acknowledged = self._published = 0
        self.waited_s = 0.0
        problem = f"no MQTT broker at {host}:{port}, which make up starts"
        try:
            self._clients = [self._connected(host, port, number) for number in range(connections)]
        except OSError as error:
            msg = f"{problem}: {error}"
            raise RetryLater(msg) from error
        self._drive(self._is_up, problem, CONNECT_S)

    def _connected(self, host: str, port: int, number: int) -> LoopClient:
        client = LoopClient(f"replay-{time.time_ns()}-{number}")
        client.max_inflight_messages_set(0)  # all at once: else paho goes through all of them at each acknowledgement
        client.on_publish = self._taken
        client.connect(host, port, keepalive=0)
        return client

    def send(self, kind: str, meter_ids: Sequence[str], payloads: Sequence[bytes], encoding: str = "avro") -> None:
        """Publishes to the meters' topics; waits while too many are not acknowledged, or a connection is lost."""
        for meter_id, payload in zip(meter_ids, payloads, strict=True):
            if self._open >= QUEUED:
                # what a lost connection sends again goes before anything new, or its meters' order would be lost
                began = time.monotonic()
                self._drive(lambda: self._is_up() and self._open <= QUEUED // 2, "the MQTT broker is behind")
                self.waited_s += time.monotonic() - began
            client = self._clients[zlib.crc32(meter_id.encode()) % len(self._clients)]
            topic = mqtt_topic(meter_id, kind, encoding)
            while client.publish(topic, payload, qos=1).rc == mqtt.MQTT_ERR_QUEUE_SIZE:
                pass  # an old message has this id of 16 bits: another one is free
            self._published += 1
        self._drive(lambda: self._is_up() and not self._has_unwritten(), "the MQTT broker takes nothing")

    @property
    def _open(self) -> int:
        return self._published - self.acknowledged

    def _is_up(self) -> bool:
        return all(client.socket() is not None and client.is_connected() for client in self._clients)

    def _has_unwritten(self) -> bool:
        return any(client.want_write() for client in self._clients)

    def _taken(self, *_: Any) -> None:
        self.acknowledged += 1

    def _drive(self, is_done: Callable[[], bool], problem: str, timeout_s: float | None = None) -> None:
        """Writes, reads and connects again until then.

        Raises:
            RetryLater: nothing was acknowledged for so long, by default `DRAIN_S`.
        """
        timeout_s = DRAIN_S if timeout_s is None else timeout_s
        before, since = self.acknowledged, time.monotonic()
        while not is_done():
            if self.acknowledged != before:
                before, since = self.acknowledged, time.monotonic()
            elif time.monotonic() - since > timeout_s:
                msg = f"{problem}: nothing within {timeout_s:.0f} s, {self._open} records not acknowledged"
                raise RetryLater(msg)
            self._turn()

    def _turn(self) -> None:
        """Handles what the connections have now, and waits a little where they have nothing."""
        for client in self._clients:
            if client.socket() is None:
                time.sleep(RECONNECT_S)
                with contextlib.suppress(OSError):
                    client.reconnect()
        turn(self._clients, RECONNECT_S)

    def close(self) -> None:
        """Waits for every acknowledgement."""
        try:
            self._drive(lambda: not self._open, "the MQTT broker did not acknowledge all")
        finally:
            for client in self._clients:
                client.leave()
