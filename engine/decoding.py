"""Kafka's rows → typed rows, by the same codec as the bridge's."""

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from schemas.closed_lists import DeadLetterReason
from schemas.codec import TIMESTAMP, arrow_schema, decode_batch
from schemas.tables import KAFKA_PLACE, STRING
from schemas.topics import Topic

REFUSED = [pa.field("refused_because", STRING), pa.field("refused_detail", STRING)]


def decoded(records: pa.Table, topic: Topic) -> pl.DataFrame:
    """Rows of one topic, typed.

    Args:
        records: columns `KAFKA`, all of that topic.
        topic: says what their values are.

    Returns:
        The entity's columns, topic, partition, offset, `kafka_at` (Kafka's time of the record), `arrival_at`
        (docs/domain.md, Arrival: sent_at of a replay, else received_at, else Kafka's time). Where a record was refused
        all these but its place are null, and `refused_because` (DeadLetterReason), `refused_detail` and
        `refused_payload` (the original bytes) are set.
    """
    columns = [field.with_nullable(True) for field in arrow_schema(topic.entity)]
    rows = decode_batch(records.column("value").combine_chunks(), topic.entity)
    reasons, details = rows.reasons, rows.details
    arrays = [rows.records.column(field.name) for field in columns]
    if topic.dead_letters is not None:  # a dead letter may come from nobody that is known
        meter_ids = rows.records.column("meter_id").cast(pa.binary())
        other_key = pc.fill_null(pc.not_equal(records.column("key").cast(pa.binary()), meter_ids), True)
        foreign = pc.and_(pc.is_null(reasons), other_key)
        reasons = pc.if_else(foreign, DeadLetterReason.METER_ID_MISMATCH.value, reasons)
        details = pc.if_else(foreign, "Kafka's key is another meter than the body's", details)
    payload: pa.ChunkedArray | pa.Array = pa.nulls(len(records), pa.binary())
    if pc.any(pc.is_valid(reasons)).as_py():
        bad = pc.is_valid(reasons)
        arrays = [
            pc.if_else(bad, pa.scalar(None, field.type), array) for field, array in zip(columns, arrays, strict=True)
        ]
        payload = pc.if_else(bad, records.column("value").cast(pa.binary()), pa.scalar(None, pa.binary()))
    place = [records.column(field.name).cast(field.type) for field in KAFKA_PLACE]
    schema = pa.schema(
        [*columns, *KAFKA_PLACE, *REFUSED, pa.field("refused_payload", pa.binary()), pa.field("kafka_at", TIMESTAMP)]
    )
    table = pa.table([*arrays, *place, reasons, details, payload, records.column("timestamp")], schema=schema)
    frame = pl.from_arrow(table, rechunk=True)
    assert isinstance(frame, pl.DataFrame)
    stamps = [name for name in ("received_at", "kafka_at") if name in schema.names]
    sent = (
        [pl.when(pl.col("run_id").is_not_null()).then(pl.col("sent_at"))]
        if {"run_id", "sent_at"} <= set(schema.names)
        else []
    )
    return frame.with_columns(arrival_at=pl.coalesce(*sent, *stamps))
