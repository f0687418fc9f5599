"""Reading tables back: by plain globs, so that we see what everyone sees."""

from datetime import date
from functools import lru_cache
from pathlib import Path

import polars as pl
import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession, Window
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_schema
from pyspark.sql.types import StructType

from lake.paths import table_path
from metering.registry import MOST, is_among, newest, usable
from schemas.errors import ConfigError
from schemas.tables import TABLES, polars_schema


def uri(path: Path) -> str:
    """A local path as Spark takes it: `Path.as_uri` would turn the = of `date=` into %3D, which Spark keeps."""
    return f"file://{path}"


def spark_schema(schema: pa.Schema) -> StructType:
    """The Spark form of a table's columns."""
    return from_arrow_schema(schema)


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


UNREADABLE = (pl.exceptions.PolarsError, OSError)
RegistryFiles = tuple[tuple[str, int], ...]
"""The registry's files, each with the time of its last change."""


def registry_files() -> RegistryFiles:
    """What `newest_registry` takes, as it is now."""
    parts = sorted(table_path("registry").glob("date=*/*.parquet"))
    return tuple((str(part), part.stat().st_mtime_ns) for part in parts)


@lru_cache(maxsize=1)
def newest_registry(files: RegistryFiles) -> pl.DataFrame:
    """`read_registry` without Spark; read once per process and change of the files.

    Raises:
        ConfigError: a file is no registry; it names it.
    """
    try:
        return usable(newest(_registry(files).collect()))
    except UNREADABLE:
        for file in files:
            try:
                _registry((file,)).collect()
            except UNREADABLE as error:
                msg = f"{file[0]} is no file of the registry, mend or remove it: {str(error).splitlines()[0]}"
                raise ConfigError(msg) from error
        raise


def all_registered(meter_ids: pl.Series) -> pl.DataFrame:
    """All rows of each of these meters as they were registered, with the `file` that has them, the newest first."""
    rows = _registry(registry_files(), with_file=True).filter(is_among(meter_ids)).collect()
    return rows.sort("meter_id", "valid_from", descending=[False, True], nulls_last=[True, True], maintain_order=True)


def registered(meter_ids: pl.Series) -> pl.DataFrame:
    """The newest row of each of these meters as it was registered, with the `file` that has it."""
    return newest(all_registered(meter_ids))


def registered_in(file: Path) -> pl.DataFrame:
    """The rows of one file of the registry, in its columns of today."""
    return _registry(((str(file), 0),)).collect()


def _registry(files: RegistryFiles, with_file: bool = False) -> pl.LazyFrame:
    """All rows of the registry; a column that a file was written before is null there."""
    schema = polars_schema(TABLES["registry"])
    if not files:
        return pl.LazyFrame(schema={**schema, "file": pl.String()} if with_file else schema)
    return pl.scan_parquet(
        [path for path, _ in files],
        schema=schema,
        hive_partitioning=False,
        missing_columns="insert",
        extra_columns="ignore",
        cast_options=pl.ScanCastOptions(integer_cast="upcast"),
        include_file_paths="file" if with_file else None,
    )


def read_registry(session: SparkSession) -> DataFrame:
    """The newest row of each meter in the registry; numbers that cannot be are null (`metering.registry.MOST`)."""
    order = Window.partitionBy("meter_id").orderBy(F.col("valid_from").desc_nulls_last(), "usage_point_id")
    ranked = read_table(session, "registry").withColumn("rank", F.row_number().over(order))
    can_be = {name: F.when(F.col(name).between(1, most), F.col(name)) for name, most in MOST.items()}
    return ranked.where(F.col("rank") == 1).drop("rank").withColumns(can_be)
