"""The accounting: received = stored + duplicate + late + quarantined + invalid, per run, stage and batch."""

import polars as pl

from schemas.closed_lists import Bucket, DeadLetterReason, DeltaReason, QuarantineReason

LINES = pl.Schema({"run_id": pl.String(), "bucket": pl.String(), "records": pl.Int64()})
"""Where records went."""
VERDICTS = pl.Schema({"partition": pl.Int64(), "offset": pl.Int64(), "reason": pl.String()})
"""Records of a topic that were not stored, and why."""
BUCKETS = {
    DeltaReason.DUPLICATE.value: Bucket.DUPLICATE.value,
    DeltaReason.OUT_OF_ORDER.value: Bucket.LATE.value,
    DeltaReason.CONFLICT.value: Bucket.QUARANTINED.value,
    DeltaReason.IMPLAUSIBLE.value: Bucket.QUARANTINED.value,
    **{reason.value: Bucket.QUARANTINED.value for reason in QuarantineReason},
    **{reason.value: Bucket.INVALID.value for reason in DeadLetterReason},
}
"""Bucket of a record that was not stored, by its reason."""


def bucket_of(reason: pl.Expr) -> pl.Expr:
    """Bucket by the reason why a record was not stored: null was stored, a reason that nobody knows is invalid."""
    known = reason.replace_strict(BUCKETS, default=Bucket.INVALID.value, return_dtype=pl.String)
    return pl.when(reason.is_null()).then(pl.lit(Bucket.STORED.value)).otherwise(known)


def verdicts(records: pl.DataFrame, reason: pl.Expr) -> pl.DataFrame:
    """Verdicts, columns `VERDICTS`, of the records that have a reason."""
    return records.select("partition", "offset", reason=reason).filter(pl.col("reason").is_not_null())


def only_valid(rows: pl.DataFrame) -> pl.DataFrame:
    """Rows that were decoded."""
    refused = rows.get_column("refused_because")
    return rows.filter(refused.is_null()) if refused.null_count() < len(rows) else rows


def count(records: pl.DataFrame) -> pl.DataFrame:
    """Lines of the accounting, columns `LINES`, from records with run_id and bucket."""
    return records.group_by("run_id", "bucket").agg(records=pl.len().cast(pl.Int64)).select(LINES.names())


def invalid(rows: pl.DataFrame) -> pl.DataFrame:
    """Lines of the accounting for decoded rows that were refused."""
    refused = rows.filter(pl.col("refused_because").is_not_null())
    return count(refused.with_columns(run_id=pl.lit(None, pl.String), bucket=pl.lit(Bucket.INVALID.value)))


def refused(rows: pl.DataFrame) -> pl.DataFrame:
    """Dead letters of what reached Kafka another way than through the bridge, from decoded rows that were refused."""
    nobody = pl.lit(None, pl.String)
    return rows.filter(pl.col("refused_because").is_not_null()).select(
        payload="refused_payload",
        reason="refused_because",
        detail="refused_detail",
        received_at="kafka_at",
        meter_id=nobody,
        mqtt_topic=nobody,
        kafka_topic="topic",
        kafka_partition="partition",
        kafka_offset="offset",
    )


def kept_apart(rows: pl.DataFrame, judged: pl.DataFrame, bucket: Bucket, stage: str) -> pl.DataFrame:
    """Whole rows of the records of one bucket, with reason and stage.

    Args:
        rows: decoded rows of a topic.
        judged: its records with partition, offset, bucket and reason.
        bucket: which of them.
        stage: name of the job that refused them.
    """
    apart = judged.filter(pl.col("bucket") == bucket.value).select("partition", "offset", "reason")
    return rows.join(apart, on=["partition", "offset"]).with_columns(stage=pl.lit(stage))
