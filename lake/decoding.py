"""Kafka's rows → typed rows, by the same codec as the bridge's."""

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_schema
from pyspark.sql.types import StructType

from schemas.closed_lists import DeadLetterReason
from schemas.codec import arrow_schema, decode_batch
from schemas.tables import KAFKA_PLACE
from schemas.topics import Topic

KAFKA_COLUMNS = ("key", "value", "topic", "partition", "offset", "timestamp")
"""What a transform takes: the columns of Spark's Kafka source; a static frame with these will do."""


def spark_schema(schema: pa.Schema) -> StructType:
    """The Spark form of a table's columns."""
    return from_arrow_schema(schema)


def decoded(records: DataFrame, topic: Topic) -> DataFrame:
    """Rows of one topic, typed.

    Args:
        records: columns `KAFKA_COLUMNS`.
        topic: rows of other topics are left out.

    Returns:
        The entity's columns, topic, partition, offset, `kafka_at` (Kafka's time of the record), `arrival_at` (design,
        section 3a: sent_at of a replay, else received_at, else Kafka's time). Where a record was refused all these but
        its place are null, and `refused_because` (DeadLetterReason), `refused_detail` and `refused_payload` (the
        original bytes) are set.
    """
    entity = topic.entity
    has_meter = topic.dead_letters is not None  # a dead letter may come from nobody that is known
    columns = [field.with_nullable(True) for field in arrow_schema(entity)]
    judged = [
        pa.field("refused_because", pa.string()),
        pa.field("refused_detail", pa.string()),
        pa.field("refused_payload", pa.binary()),
    ]
    kafka_time = pa.field("kafka_at", pa.timestamp("us", "UTC"))
    out = pa.schema([*columns, *KAFKA_PLACE, *judged, kafka_time])

    def decode(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            rows = decode_batch(batch.column("value").to_pylist(), entity)
            meter_ids = rows.records.column("meter_id").cast(pa.binary())
            other_key = pc.fill_null(pc.not_equal(batch.column("key"), meter_ids), has_meter)
            foreign = pc.and_(pc.is_null(rows.reasons), other_key)
            reasons = pc.if_else(foreign, DeadLetterReason.METER_ID_MISMATCH.value, rows.reasons)
            details = pc.if_else(foreign, "Kafka's key is another meter than the body's", rows.details)
            bad = pc.is_valid(reasons)
            arrays = [
                pc.if_else(bad, pa.scalar(None, field.type), rows.records.column(field.name)) for field in columns
            ]
            place = [batch.column(field.name).cast(field.type) for field in KAFKA_PLACE]
            payload = pc.if_else(bad, batch.column("value").cast(pa.binary()), pa.scalar(None, pa.binary()))
            stamps = batch.column("timestamp").cast(kafka_time.type)
            table = pa.table([*arrays, *place, reasons, details, payload, stamps], schema=out)
            yield from table.combine_chunks().to_batches()

    stamp = F.coalesce(F.when(F.col("run_id").isNotNull(), F.col("sent_at")), F.col("received_at"), F.col("kafka_at"))
    return (
        records.where(F.col("topic") == topic.name)
        .select(F.col("key").cast("binary").alias("key"), *KAFKA_COLUMNS[1:])
        .mapInArrow(decode, spark_schema(out))
        .withColumn("arrival_at", stamp if "run_id" in out.names else F.col("received_at"))
    )


def only_valid(rows: DataFrame) -> DataFrame:
    """Rows that were decoded, without the columns that say why others were not."""
    return rows.where(F.col("refused_because").isNull()).drop(
        "refused_because", "refused_detail", "refused_payload", "kafka_at"
    )


def impossible_clock(max_ahead_s: int, max_behind_s: int) -> Column:
    """True where the meter's clock cannot be right against the arrival: 1970, 2099."""
    seconds = F.col("observed_at").cast("double") - F.col("arrival_at").cast("double")
    return (seconds > max_ahead_s) | (seconds < -max_behind_s)
