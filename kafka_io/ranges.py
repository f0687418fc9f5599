"""The records of a batch, fetched from Kafka by the tasks that work on them.

Spark plans a batch and writes its offsets to the checkpoint before it begins; what lies between them is the same
however often the batch is tried. The tasks fetch it themselves, by librdkafka: no record goes through the JVM, which
needs more CPU time to hand a record to Python than Python does to work on it (docs/bench.md, docs/decisions/0009).
"""

import gc
import time
from collections import deque
from functools import cache
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import structlog
from confluent_kafka import OFFSET_INVALID, Consumer, KafkaError, KafkaException, Message, TopicPartition

from kafka_io import clients
from kafka_io.offsets import kept
from schemas.codec import TIMESTAMP
from schemas.errors import RetryLater, StateLost
from schemas.tables import STRING

KAFKA = pa.schema(
    [
        pa.field("key", pa.binary()),
        pa.field("value", pa.binary()),
        pa.field("topic", STRING),
        pa.field("partition", pa.int32()),
        pa.field("offset", pa.int64()),
        pa.field("timestamp", TIMESTAMP),
    ]
)
"""What a job reads of a Kafka record: columns of Spark's Kafka source."""
RANGES = pa.schema(
    [
        pa.field("topic", pa.string()),
        pa.field("partition", pa.int32()),
        pa.field("start_offset", pa.int64()),
        pa.field("end_offset", pa.int64()),
    ]
)
AT_ONCE = 500
"""Records that are taken over together: few enough for the processor's cache (10,000 cost 1.5 times as much)."""
LOOK_S = 0.1
SILENT_S = 60.0  # Kafka restarts within that
CONSUMER = {
    "auto.offset.reset": "error",
    "enable.partition.eof": True,
    "isolation.level": "read_uncommitted",  # as Spark plans
    "check.crcs": True,
    "queued.min.messages": 2_000,  # little, since what is fetched past the end of a range is fetched in vain
    "fetch.message.max.bytes": 131_072,
    "fetch.queue.backoff.ms": 1,
    "fetch.wait.max.ms": 5,  # at its end a topic lets a client wait so long, and the next range waits for that answer
    "log_level": 2,
}
GONE = {KafkaError._AUTO_OFFSET_RESET, KafkaError.OFFSET_OUT_OF_RANGE}
DAMAGED = {KafkaError._BAD_MSG, KafkaError._BAD_COMPRESSION, KafkaError._NOT_IMPLEMENTED}
"""After these the client goes on behind what it could not read."""
log = structlog.get_logger()


class Range(NamedTuple):
    """What a batch takes of one Kafka partition: from `start_offset`, up to `end_offset` without it."""

    topic: str
    partition: int
    start_offset: int
    end_offset: int

    @property
    def records(self) -> int:
        """How many there are, where no offset is left out."""
        return self.end_offset - self.start_offset


def fetched(place: Range, bootstrap: str, accept_loss: bool) -> pa.Table:
    """The records of a range, columns `KAFKA`, in the order of their offsets.

    Args:
        place: where they lie.
        bootstrap: host:port of a Kafka broker.
        accept_loss: where the first of them are gone, take those that are left.

    Raises:
        StateLost: Kafka no longer has all of them.
        RetryLater: Kafka does not answer, or what it answers is damaged.
    """
    consumer, complaints = _consumer(bootstrap)
    start = place.start_offset
    try:
        return _read(consumer, complaints, place, start)
    except StateLost:
        if not accept_loss:
            raise
        low, high = _kept(consumer, place)
        left = place._replace(end_offset=min(place.end_offset, high))
        begin = max(low, min(start, high))
        records = _read(consumer, complaints, left, begin)
        log.warning("records are gone", range=place._asdict(), read_from=begin, to=left.end_offset)
        return records


@cache
def _consumer(bootstrap: str) -> tuple[Consumer, deque[str]]:
    """One for each worker, which has one task at a time; a new one would ask for metadata first. And its last words."""
    complaints: deque[str] = deque(["it says nothing"], maxlen=1)
    reported = {"error_cb": lambda error: complaints.append(error.str())}
    return clients.consumer(bootstrap, {**CONSUMER, **reported}), complaints


def _kept(consumer: Consumer, place: Range) -> tuple[int, int]:
    """First offset that Kafka has of a partition, and the one that comes next.

    Raises:
        RetryLater: it does not say.
    """
    try:
        return kept(consumer, place.topic, place.partition, SILENT_S)
    except KafkaException as error:
        msg = f"Kafka does not say what it has of {place.topic}-{place.partition}: {error.args[0].str()}"
        raise RetryLater(msg) from error


def _read(consumer: Consumer, complaints: deque[str], place: Range, start: int) -> pa.Table:
    pieces = [KAFKA.empty_table()]
    heard, ends_at = time.monotonic(), None
    complaints.append("it says nothing")
    consumer.assign([TopicPartition(place.topic, place.partition, start)])
    gc.disable()  # nothing here refers to itself, and looking for it takes a quarter of the time
    try:
        while start < place.end_offset:
            messages = consumer.consume(min(AT_ONCE, place.end_offset - start), LOOK_S)
            errors = [message for message in messages if message.error() is not None]
            records = [message for message in messages if message.error() is None] if errors else messages
            if records:
                table = _table(records, place)
                start, heard, ends_at = table.column("offset")[-1].as_py() + 1, time.monotonic(), None
                pieces.append(table)
            for message in errors:
                error, offset = message.error(), message.offset()
                assert error
                if message.topic() is not None and (message.topic(), message.partition()) != place[:2]:
                    continue  # of the range before
                if error.code() in DAMAGED:
                    msg = f"Kafka's records of {place.topic}-{place.partition} from offset {start} on are damaged: "
                    msg += f"{error.str()}. Where that stays so: docs/operations.md"
                    raise RetryLater(msg)
                if error.code() in GONE:
                    msg = f"KAFKA_DATA_LOSS {place.topic}-{place.partition} at offset {start}: {error.str()}"
                    raise StateLost(msg)
                if error.code() == KafkaError._PARTITION_EOF and offset not in (None, OFFSET_INVALID):
                    if offset >= start:
                        start = ends_at = offset  # what a transaction has left there is no record
                else:
                    complaints.append(error.str())
            if time.monotonic() - heard > SILENT_S:
                if ends_at is not None and _kept(consumer, place)[1] < place.end_offset:
                    msg = f"KAFKA_DATA_LOSS {place.topic}-{place.partition} ends at offset {ends_at}"
                    raise StateLost(msg)
                msg = f"Kafka gives nothing of {place.topic}-{place.partition} from offset {start} on: {complaints[-1]}"
                raise RetryLater(msg)
    finally:
        gc.enable()
        consumer.unassign()
    records_read = pa.concat_tables(pieces)
    return records_read.filter(pc.field("offset") < place.end_offset) if start > place.end_offset else records_read


def _table(records: list[Message], place: Range) -> pa.Table:
    count = len(records)
    first, last = int(records[0].offset() or 0), int(records[-1].offset() or 0)
    is_whole = last - first == count - 1
    offsets = np.arange(first, first + count) if is_whole else [record.offset() for record in records]
    stamps = pa.array([record.timestamp()[1] for record in records], pa.timestamp("ms", "UTC"))
    columns = {
        "key": pa.array([record.key() for record in records], pa.binary()),
        "value": pa.array([record.value() for record in records], pa.binary()),
        "topic": pa.repeat(place.topic, count),
        "partition": pa.repeat(pa.scalar(place.partition, pa.int32()), count),
        "offset": pa.array(offsets, pa.int64()),
        "timestamp": stamps.cast(KAFKA.field("timestamp").type),
    }
    return pa.table([columns[name] for name in KAFKA.names], schema=KAFKA)
