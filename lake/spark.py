"""Tables as Spark's frames."""

from collections.abc import Iterable, Sequence
from datetime import date

import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession, Window
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_schema
from pyspark.sql.types import StructType

from lake.reading import Lake
from lake.store import aws_variables
from metering.registry import MOST
from schemas.tables import TABLES
from settings import home

CHECKPOINTS_ON_S3 = "org.apache.spark.internal.io.cloud.AbortableStreamBasedCheckpointFileManager"
"""Spark's own checkpoints by uploads that are finished or dropped: there is no rename."""


def uri(path: str) -> str:
    """A path or URL as Spark takes it: a path has a scheme, and the = of `date=` stays as it is."""
    scheme, separator, rest = path.partition("://")
    if not separator:
        return f"file://{path}"
    return f"{'s3a' if scheme == 's3' else scheme}://{rest}"


def hadoop_options(url: str) -> dict[str, str]:
    """What Spark needs to read and write a store: options of the session, by AWS's variables for S3."""
    if not url.startswith("s3://"):
        return {}
    variables = aws_variables(url)
    found = {"fs.s3a.endpoint.region": variables["AWS_REGION"]}
    found["fs.s3a.buffer.dir"] = str(home() / "tmp" / "s3a")
    found |= {"fs.s3a.input.stream.type": "classic", "fs.s3a.audit.enabled": "false"}  # else a library more
    if endpoint := variables.get("AWS_ENDPOINT_URL"):
        found |= {"fs.s3a.endpoint": endpoint, "fs.s3a.path.style.access": "true"}
        found["fs.s3a.connection.ssl.enabled"] = str(not endpoint.startswith("http://")).lower()
    return {f"spark.hadoop.{name}": value for name, value in found.items()}


def checkpoint_options(url: str) -> dict[str, str]:
    """What Spark needs to keep a checkpoint of its own on a store, besides `hadoop_options`."""
    return {"spark.sql.streaming.checkpointFileManagerClass": CHECKPOINTS_ON_S3} if url.startswith("s3://") else {}


def spark_schema(schema: pa.Schema) -> StructType:
    """The Spark form of a table's columns."""
    return from_arrow_schema(schema)


def frame_of(session: SparkSession, files: Sequence[str], schema: pa.Schema) -> DataFrame:
    """Rows of Parquet files in these columns; empty where there is no file, null where one lacks a column."""
    if not files:
        return session.createDataFrame([], spark_schema(schema))
    return session.read.schema(spark_schema(schema)).parquet(*map(uri, files))


def read_table(session: SparkSession, lake: Lake, table: str, dates: Iterable[date] | None = None) -> DataFrame:
    """Rows of a lake table without its partition column; empty where nothing was written yet.

    Args:
        session: whose frame it will be.
        lake: whose table.
        table: a name in `schemas.tables.TABLES`.
        dates: UTC days to read; all of them if None.
    """
    return frame_of(session, lake.files(table, dates), TABLES[table])


def read_registry(session: SparkSession, lake: Lake) -> DataFrame:
    """The newest row of each meter in the registry; numbers that cannot be are null (`metering.registry.MOST`)."""
    order = Window.partitionBy("meter_id").orderBy(F.col("valid_from").desc_nulls_last(), "usage_point_id")
    ranked = read_table(session, lake, "registry").withColumn("rank", F.row_number().over(order))
    can_be = {name: F.when(F.col(name).between(1, most), F.col(name)) for name, most in MOST.items()}
    return ranked.where(F.col("rank") == 1).drop("rank").withColumns(can_be)
