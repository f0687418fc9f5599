"""How far Kafka's topics have come."""

import time
from collections.abc import Iterable

from confluent_kafka import KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec  # type: ignore[attr-defined]

from schemas.errors import RetryLater
from schemas.topics import Topic

NO_LEADER_S = 30.0


def newest_offsets(
    kafka: str | AdminClient, topics: Iterable[Topic], patience_s: float | None = None
) -> dict[tuple[str, int], int]:
    """Topic and partition → the offset that its next record gets.

    Args:
        kafka: host:port of a broker, or a client to ask by, for those who ask often.
        topics: of which.
        patience_s: how long it is asked again; half a minute if None.

    Raises:
        RetryLater: Kafka does not say. Just started, it may not know a partition's leader: it is asked for a while.
    """
    admin = AdminClient({"bootstrap.servers": kafka, "log_level": 0}) if isinstance(kafka, str) else kafka
    until = time.monotonic() + (NO_LEADER_S if patience_s is None else patience_s)
    names = {topic.name for topic in topics}
    while True:
        try:
            known = admin.list_topics(timeout=10).topics
            places = [TopicPartition(name, number) for name in names & set(known) for number in known[name].partitions]
            asked = admin.list_offsets({place: OffsetSpec.latest() for place in places}, request_timeout=10.0)  # type: ignore[no-untyped-call]
            return {(place.topic, place.partition): answer.result().offset for place, answer in asked.items()}
        except KafkaException as error:
            if time.monotonic() > until:
                where = f" at {kafka}" if isinstance(kafka, str) else ""
                msg = f"Kafka{where} does not say what it has: {error.args[0].str()}"
                raise RetryLater(msg) from error
        time.sleep(0.2)


def received(kafka: str | AdminClient, topics: Iterable[Topic], patience_s: float | None = None) -> int:
    """Records that these topics have received since they were made; arguments and errors of `newest_offsets`."""
    return sum(newest_offsets(kafka, topics, patience_s).values())
