"""The books: received = stored + duplicate + late + quarantined + invalid, per run, stage and batch."""

import polars as pl
import pyarrow as pa
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from lake.seen_before import PLACE
from schemas import tables
from schemas.closed_lists import Bucket, QuarantineReason

BOOKS = pa.schema([("run_id", pa.string()), ("bucket", pa.string()), ("records", pa.int64())])
REFUSED = pa.schema(
    [
        pa.field("meter_id", pa.string()),
        *tables.KAFKA_PLACE,
        pa.field("bucket", pa.string()),
        pa.field("reason", pa.string()),
    ]
)


def count(records: pl.DataFrame) -> pl.DataFrame:
    """Lines of the books from records with run_id and bucket."""
    return records.group_by("run_id", "bucket").agg(records=pl.len().cast(pl.Int64))


def impossible(records: pl.DataFrame) -> pl.DataFrame:
    """The records whose clock cannot be right, quarantined before they touch any state."""
    return records.filter("is_impossible").with_columns(
        why=pl.lit(QuarantineReason.IMPOSSIBLE_CLOCK.value), bucket=pl.lit(Bucket.QUARANTINED.value)
    )


def refused(judged: pl.DataFrame) -> pl.DataFrame:
    """Which records are kept apart and why, columns `REFUSED`: their rows are with Spark, `rows_refused` finds them.

    Args:
        judged: records with their place, bucket and why.
    """
    apart = pl.col("bucket").is_in([Bucket.QUARANTINED.value, Bucket.LATE.value])
    return judged.filter(apart).select("meter_id", *PLACE, "bucket", reason="why")


def rows_refused(rows: DataFrame, refused: DataFrame, bucket: Bucket, stage: str, columns: list[str]) -> DataFrame:
    """Whole rows of the refused records of one bucket.

    Args:
        rows: decoded rows.
        refused: columns `REFUSED`; few.
        bucket: which of them.
        stage: name of the job that refused them.
        columns: of the table.
    """
    places = refused.where(F.col("bucket") == bucket.value).select(*PLACE, "reason")
    return rows.join(F.broadcast(places), PLACE).withColumn("stage", F.lit(stage)).select(*columns)


def invalid(rows: DataFrame) -> DataFrame:
    """Lines of the books for decoded rows that were refused."""
    refused = rows.where(F.col("refused_because").isNotNull())
    return (
        refused.groupBy()
        .agg(F.count("*").alias("records"))
        .where("records > 0")
        .select(F.lit(None).cast("string").alias("run_id"), F.lit(Bucket.INVALID.value).alias("bucket"), "records")
    )
