"""Clients of Kafka: the one place that opens them, and what all of ours agree on."""

from collections.abc import Mapping
from typing import Any

from confluent_kafka import Consumer, Producer
from confluent_kafka.admin import AdminClient

PRODUCER = {
    "acks": "all",
    "enable.idempotence": True,
    "compression.type": "lz4",
    "partitioner": "murmur2_random",  # as Spark's sink: all writers put a meter into the same partition
}
CONSUMER = {
    "group.id": "meterstream",  # asked for by the client: partitions are assigned, nothing is committed
    "enable.auto.commit": False,
    "enable.auto.offset.store": False,
}
SILENT: dict[str, Any] = {"log_level": 0}
"""The client writes nothing to the terminal of each refused connection: whoever asks gets the error."""


def producer(bootstrap: str, options: Mapping[str, Any] | None = None) -> Producer:
    """A producer whose records Kafka has once and in order when it acknowledges them.

    Args:
        bootstrap: host:port of a Kafka broker.
        options: of librdkafka, over `PRODUCER`.
    """
    return Producer({"bootstrap.servers": bootstrap, **PRODUCER, **(options or {})})


def consumer(bootstrap: str, options: Mapping[str, Any] | None = None) -> Consumer:
    """A consumer of partitions that its caller assigns.

    Args:
        bootstrap: host:port of a Kafka broker.
        options: of librdkafka, over `CONSUMER`.
    """
    return Consumer({"bootstrap.servers": bootstrap, **CONSUMER, **(options or {})})


def admin(bootstrap: str) -> AdminClient:
    """A client that asks for topics and offsets, and makes topics."""
    return AdminClient({"bootstrap.servers": bootstrap, **SILENT})
