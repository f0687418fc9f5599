"""Tables as Spark's frames."""

from collections.abc import Iterable, Sequence
from datetime import date

import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession, Window
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_schema
from pyspark.sql.types import StructType

from lake.reading import Lake
from metering.registry import MOST
from schemas.tables import TABLES


def uri(path: str) -> str:
    """A path or URL as Spark takes it: a path has a scheme, and the = of `date=` stays as it is."""
    scheme, separator, rest = path.partition("://")
    if not separator:
        return f"file://{path}"
    return f"{'s3a' if scheme == 's3' else scheme}://{rest}"


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
