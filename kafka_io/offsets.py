"""How far Kafka's topics have come."""

import time
from collections.abc import Iterable

from confluent_kafka import Consumer, KafkaException, TopicCollection, TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec  # type: ignore[attr-defined]

from kafka_io.clients import admin
from schemas.errors import RetryLater
from schemas.topics import Topic

NO_LEADER_S = 30.0
ANSWER_S = 10.0
OLDEST, NEWEST = OffsetSpec.earliest(), OffsetSpec.latest()  # type: ignore[no-untyped-call]
Offsets = dict[tuple[str, int], int]
"""Topic and partition → the offset that its next record gets."""


def newest_offsets(kafka: str | AdminClient, topics: Iterable[Topic], patience_s: float | None = None) -> Offsets:
    """The end of every partition of these topics.

    Args:
        kafka: host:port of a broker, or a client to ask by, for those who ask often.
        topics: of which.
        patience_s: how long it is asked again; half a minute if None.

    Raises:
        RetryLater: Kafka does not say. Just started, it may not know a partition's leader: it is asked for a while.
    """
    return _asked(kafka, topics, patience_s, NEWEST)


def oldest_offsets(kafka: str | AdminClient, topics: Iterable[Topic], patience_s: float | None = None) -> Offsets:
    """The first offset that Kafka still has of every partition; arguments and errors of `newest_offsets`."""
    return _asked(kafka, topics, patience_s, OLDEST)


def _asked(kafka: str | AdminClient, topics: Iterable[Topic], patience_s: float | None, spec: OffsetSpec) -> Offsets:
    client = admin(kafka) if isinstance(kafka, str) else kafka
    until = time.monotonic() + (NO_LEADER_S if patience_s is None else patience_s)
    names = {topic.name for topic in topics}
    while True:
        try:
            known = client.list_topics(timeout=ANSWER_S).topics
            places = [(name, number) for name in names & set(known) for number in known[name].partitions]
            return _offsets(client, places, spec, ANSWER_S)
        except KafkaException as error:
            if time.monotonic() > until:
                where = f" at {kafka}" if isinstance(kafka, str) else ""
                msg = f"Kafka{where} does not say what it has: {error.args[0].str()}"
                raise RetryLater(msg) from error
        time.sleep(0.2)


def topic_ids(kafka: str, topics: Iterable[Topic]) -> dict[str, str]:
    """Topic → Kafka's id of it, another where it was made anew; a topic that is not there has none.

    Raises:
        RetryLater: Kafka does not say.
    """
    client = admin(kafka)
    try:
        there = client.list_topics(timeout=ANSWER_S).topics
        names = TopicCollection([topic.name for topic in topics if topic.name in there])
        asked = client.describe_topics(names, request_timeout=ANSWER_S)
        return {name: str(answer.result().topic_id) for name, answer in asked.items()}
    except KafkaException as error:
        msg = f"Kafka at {kafka} does not say which topics it has: {error.args[0].str()}"
        raise RetryLater(msg) from error


def ends_of(client: AdminClient, places: Iterable[tuple[str, int]], timeout_s: float = ANSWER_S) -> Offsets:
    """The end of each of these partitions, asked once.

    Args:
        client: to ask by.
        places: topic and partition.
        timeout_s: how long Kafka may take.

    Raises:
        KafkaException: Kafka does not say.
    """
    return _offsets(client, places, NEWEST, timeout_s)


def _offsets(client: AdminClient, places: Iterable[tuple[str, int]], spec: OffsetSpec, timeout_s: float) -> Offsets:
    asked = client.list_offsets({TopicPartition(*place): spec for place in places}, request_timeout=timeout_s)
    return {(place.topic, place.partition): answer.result().offset for place, answer in asked.items()}


def kept(consumer: Consumer, topic: str, partition: int, timeout_s: float) -> tuple[int, int]:
    """The first offset that Kafka still has of a partition, and the one that comes next.

    Raises:
        KafkaException: Kafka does not say.
    """
    low, high = consumer.get_watermark_offsets(TopicPartition(topic, partition), timeout=timeout_s)
    return int(low), int(high)


def received(kafka: str | AdminClient, topics: Iterable[Topic], patience_s: float | None = None) -> int:
    """Records that these topics have received since they were made; arguments and errors of `newest_offsets`."""
    return sum(newest_offsets(kafka, topics, patience_s).values())
