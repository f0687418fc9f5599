"""Reading tables back: by plain globs, so that we see what everyone sees."""

from datetime import date, timedelta
from functools import lru_cache

import polars as pl
import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession, Window
from pyspark.sql import functions as F

from lake.decoding import spark_schema
from lake.session import uri
from schemas.tables import TABLES, polars_schema, table_path


def read_table(session: SparkSession, table: str, dates: list[date] | None = None) -> DataFrame:
    """Rows of a lake table; empty where nothing was written yet.

    Args:
        session: whose frame it will be.
        table: a name in `schemas.tables.TABLES`.
        dates: UTC days to read; all of them if None.
    """
    folders = (
        sorted(table_path(table).glob("date=*"))
        if dates is None
        else [table_path(table) / f"date={day.isoformat()}" for day in dates]
    )
    parts = [uri(part) for folder in folders for part in folder.glob("*.parquet")]
    schema = spark_schema(TABLES[table])
    if not parts:
        return session.createDataFrame([], schema)
    return session.read.schema(schema).parquet(*parts)


MOST = {"nominal_mv": 1_000_000_000, "fuse_a": 1_000_000, "interval_s": 366 * 86_400}
"""A number of the registry that is not above 0, or above this, is a slip: it counts as unknown."""
RegistryFiles = tuple[tuple[str, int], ...]
"""The registry's files, each with the time of its last change."""


def registry_files() -> RegistryFiles:
    """What `newest_registry` takes, as it is now."""
    parts = sorted(table_path("registry").glob("date=*/*.parquet"))
    return tuple((str(part), part.stat().st_mtime_ns) for part in parts)


@lru_cache(maxsize=1)
def newest_registry(files: RegistryFiles) -> pl.DataFrame:
    """`read_registry` without Spark; read once per process and change of the files."""
    schema = polars_schema(TABLES["registry"])
    if not files:
        return pl.DataFrame(schema=schema)
    can_be = [pl.when(pl.col(name).is_between(1, most)).then(name).alias(name) for name, most in MOST.items()]
    rows = pl.read_parquet([path for path, _ in files], columns=schema.names()).with_columns(can_be)
    order = ["meter_id", "valid_from", "usage_point_id"]
    newest = rows.sort(order, descending=[False, True, False], nulls_last=[True, True, False])
    return newest.unique("meter_id", keep="first", maintain_order=True)


def read_registry(session: SparkSession) -> DataFrame:
    """The newest row of each meter in the registry; numbers that cannot be are null (`MOST`)."""
    newest = Window.partitionBy("meter_id").orderBy(F.col("valid_from").desc_nulls_last(), "usage_point_id")
    ranked = read_table(session, "registry").withColumn("rank", F.row_number().over(newest))
    can_be = {name: F.when(F.col(name).between(1, most), F.col(name)) for name, most in MOST.items()}
    return ranked.where(F.col("rank") == 1).drop("rank").withColumns(can_be)


def busiest_day(stamps: pa.ChunkedArray, time_zone: str) -> date:
    """The local day with the most of these times; the first of equals."""
    local = pl.Series("at", stamps).dt.convert_time_zone(time_zone).dt.date()
    counts = local.value_counts().sort("count", "at", descending=[True, False])
    day: date = counts.get_column("at")[0]
    return day


def utc_days(local_day: date) -> list[date]:
    """The UTC days that a local day anywhere on earth can touch."""
    return [local_day + timedelta(days=shift) for shift in (-1, 0, 1)]
