"""Making the topics of the contract."""

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.cimpl import NewTopic

from kafka_io.clients import admin
from schemas.topics import TOPICS


def create_topics(bootstrap: str) -> None:
    """Makes the topics that are not there yet.

    Raises:
        KafkaException: the broker does not answer, or refuses one.
    """
    wanted = [
        NewTopic(
            topic.name,
            num_partitions=topic.partitions,
            replication_factor=1,
            config={"retention.ms": str(topic.retention_ms), **topic.config},
        )
        for topic in TOPICS
    ]
    client = admin(bootstrap)  # kept: its answers end with it
    for created in client.create_topics(wanted, operation_timeout=30.0).values():
        try:
            created.result()
        except KafkaException as error:
            if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                raise
