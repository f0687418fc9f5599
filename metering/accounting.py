"""The books: received = stored + duplicate + late + quarantined + invalid, per run, stage and batch."""

import polars as pl

from schemas.closed_lists import Bucket, QuarantineReason
from schemas.tables import TABLES, polars_schema

BOOKS = pl.Schema({"run_id": pl.String(), "bucket": pl.String(), "records": pl.Int64()})


def only_valid(rows: pl.DataFrame) -> pl.DataFrame:
    """Rows that were decoded."""
    refused = rows.get_column("refused_because")
    return rows.filter(refused.is_null()) if refused.null_count() < len(rows) else rows


def count(records: pl.DataFrame) -> pl.DataFrame:
    """Lines of the books, columns `BOOKS`, from records with run_id and bucket."""
    return records.group_by("run_id", "bucket").agg(records=pl.len().cast(pl.Int64)).select(BOOKS.names())


def invalid(rows: pl.DataFrame) -> pl.DataFrame:
    """Lines of the books for decoded rows that were refused."""
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


def impossible(records: pl.DataFrame) -> pl.DataFrame:
    """The records whose clock cannot be right, quarantined before they touch any state."""
    return records.filter("is_impossible").with_columns(
        why=pl.lit(QuarantineReason.IMPOSSIBLE_CLOCK.value), bucket=pl.lit(Bucket.QUARANTINED.value)
    )


def kept_apart(rows: pl.DataFrame, judged: pl.DataFrame, bucket: Bucket, stage: str, table: str) -> pl.DataFrame:
    """Whole rows of the records of one bucket, with reason and stage.

    Args:
        rows: decoded rows of one Kafka partition.
        judged: its records with offset, bucket and why.
        bucket: which of them.
        stage: name of the job that refused them.
        table: whose columns they get.
    """
    apart = judged.filter(pl.col("bucket") == bucket.value).select("offset", reason="why")
    return rows.join(apart, on="offset").with_columns(stage=pl.lit(stage)).select(polars_schema(TABLES[table]).names())
