"""The lake as its readers have it: each table as it was when somebody first asked, by its log, for whatever tool.

`docs/storage.md` has an example of each; `lake.open()` is the way in.
"""

import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, date, datetime
from functools import lru_cache
from typing import TYPE_CHECKING

import polars as pl
import pyarrow as pa
import pyarrow.dataset as ds
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError, TableNotFoundError
from deltalake.fs import DeltaStorageHandler
from pyarrow.fs import PyFileSystem

from lake.store import Store, store
from lake.tables import DATE, NO_DATE, REOPENED_S, columns_of, folder_of, partition_column
from metering.registry import is_among, newest, usable
from schemas.errors import ConfigError, RetryLater
from schemas.tables import REGISTRY, TABLES, polars_schema

if TYPE_CHECKING:
    import duckdb
    import pandas as pd
    from pyspark.sql import DataFrame, SparkSession

Version = int | datetime


class Lake:
    """The tables of a store, each as it was when it was first asked for: later commits are not seen.

    Compaction and vacuum leave the files of a version for an hour at least: who reads for longer opens it again.
    """

    def __init__(self, versions: Mapping[str, Version] | Version | None = None) -> None:
        """Reads nothing yet.

        Args:
            versions: table → number of a version of it, or a time: as it was then; a time alone is of all tables. What
                is not there is as it is now.
        """
        self._store: Store = store()
        self._versions = versions
        self._tables: dict[str, DeltaTable | None] = {}
        self._turn = threading.Lock()

    def _table(self, table: str) -> DeltaTable | None:
        """A table's log; None where nobody has written to it yet.

        Raises:
            ConfigError: there is no table of that name, or it has no such version.
            RetryLater: the store does not answer.
        """
        if table not in TABLES:
            msg = f"the lake has no table {table}; it has {', '.join(TABLES)}"
            raise ConfigError(msg)
        with self._turn:
            if table not in self._tables:
                self._tables[table] = self._opened(table)
            return self._tables[table]

    def _opened(self, table: str) -> DeltaTable | None:
        version = self._versions.get(table) if isinstance(self._versions, Mapping) else self._versions
        try:
            found = DeltaTable(self._store.uri(folder_of(table)))
        except TableNotFoundError:
            return None
        except (DeltaError, OSError) as error:
            msg = f"table {table} cannot be read now: {error}"
            raise RetryLater(msg) from error
        if version is None:
            return found
        try:
            times_ms = {each["version"]: each["timestamp"] for each in found.history()}  # right before the load only
            found.load_as_version(version)
            at_ms = times_ms[found.version()] if isinstance(version, datetime) else 0
        except (DeltaError, OSError, LookupError) as error:
            msg = f"table {table} has no version {version} any more: {error}"
            raise ConfigError(msg) from error
        if isinstance(version, datetime) and at_ms > version.timestamp() * 1000:
            if found.version() == 0:
                return None  # nobody had written to it then
            oldest = datetime.fromtimestamp(at_ms / 1000, UTC)
            msg = f"table {table} has no version of {version} any more: its oldest one is of {oldest}"
            raise ConfigError(msg)
        return found

    def version(self, table: str) -> int | None:
        """The version that is read; None where nobody has written to the table yet."""
        found = self._table(table)
        return None if found is None else found.version()

    def files(self, table: str, dates: Iterable[date] | None = None) -> list[str]:
        """Paths or URLs of a table's files, all of the version's rows and no others.

        Args:
            table: its name.
            dates: UTC days; all of them if None.
        """
        found = self._table(table)
        if found is None:
            return []
        if dates is None:
            return sorted(found.file_uris())
        days = [day.isoformat() for day in dates]
        return sorted(found.file_uris([("date", "in", days)])) if days else []

    def dates(self, table: str) -> list[date]:
        """The UTC days of which a table has rows."""
        found = self._table(table)
        days = {each["date"] for each in found.partitions()} if found else set()
        return sorted(date.fromisoformat(day) for day in days if day not in (None, NO_DATE))

    def polars(self, table: str, dates: Iterable[date] | None = None) -> pl.LazyFrame:
        """A table's rows for Polars; a column that a file was written before is null there."""
        return _scanned(self.files(table, dates), columns_of(table), partition_column(table))

    def arrow(self, table: str) -> ds.Dataset:
        """A table as an Arrow dataset."""
        found = self._table(table)
        if found is None:
            return ds.dataset(columns_of(table).empty_table())
        return found.to_pyarrow_dataset(filesystem=self._store.arrow(folder_of(table)))

    def pandas(self, table: str, dates: Iterable[date] | None = None) -> "pd.DataFrame":
        """A table's rows for pandas."""
        return self.polars(table, dates).collect().to_pandas()

    def duckdb(self) -> "duckdb.DuckDBPyConnection":
        """A connection with a view per table and report, and `newest_registry`; see `lake.queries`."""
        from lake.queries import connected

        return connected(self)

    def spark(self, session: "SparkSession", table: str, dates: Iterable[date] | None = None) -> "DataFrame":
        """A table's rows for Spark, without its partition column; see `lake.spark`."""
        from lake.spark import read_table

        return read_table(session, self, table, dates)


UNREADABLE = (pl.exceptions.PolarsError, pa.ArrowException, OSError)
RegistryFiles = tuple[str, ...]
"""The registry's files."""


class _Registry:
    """The registry's log, which is asked again and again: only what came to it is read."""

    def __init__(self) -> None:
        self._url, self._seen = "", 0.0
        self._table: DeltaTable | None = None
        self._turn = threading.Lock()

    def files(self) -> RegistryFiles:
        uri, now = store().uri(folder_of("registry")), time.monotonic()
        with self._turn:
            try:
                if self._table is None or uri != self._url or now - self._seen > REOPENED_S:
                    self._table, self._url = DeltaTable(uri), uri
                else:
                    self._table.update_incremental()
                self._seen = now
                return tuple(sorted(self._table.file_uris()))
            except TableNotFoundError:
                self._table = None
                return ()
            except (DeltaError, OSError) as error:
                self._table = None
                msg = f"the registry cannot be read now: {error}"
                raise RetryLater(msg) from error


_registry = _Registry()


def registry_files() -> RegistryFiles:
    """What `newest_registry` takes, as it is now.

    Raises:
        RetryLater: the store does not answer.
    """
    return _registry.files()


@lru_cache(maxsize=1)
def newest_registry(files: RegistryFiles) -> pl.DataFrame:
    """The newest row of each meter, numbers that cannot be are null; read once per process and change of the files.

    Raises:
        ConfigError: a file is no registry; it names it.
    """
    try:
        return usable(newest(_scanned(files, REGISTRY).collect()))
    except UNREADABLE:
        for file in files:
            try:
                _scanned([file], REGISTRY).collect()
            except UNREADABLE as error:
                msg = f"{file} is no file of the registry, mend or remove it: {str(error).splitlines()[0]}"
                raise ConfigError(msg) from error
        raise


def all_registered(meter_ids: pl.Series) -> pl.DataFrame:
    """All rows of each of these meters as they were registered, the newest first."""
    rows = Lake().polars("registry").filter(is_among(meter_ids)).collect()
    return rows.sort("meter_id", "valid_from", descending=[False, True], nulls_last=[True, True], maintain_order=True)


def registered(meter_ids: pl.Series) -> pl.DataFrame:
    """The newest row of each of these meters as it was registered."""
    return newest(all_registered(meter_ids))


def over(files: Sequence[str], partition: str | None, columns: pa.Schema) -> ds.Dataset:
    """Files on a store that is not local as one Arrow dataset; a column that some were written before is null there.

    Args:
        files: URLs.
        partition: the column that is in the path, if one is.
        columns: that they have; where none are known each file is asked.
    """
    place, options = store(), ds.FileSystemFactoryOptions()
    system = place.arrow("") or PyFileSystem(DeltaStorageHandler(place.url))
    if partition:
        kind = pa.date32() if partition == DATE else pa.int64()
        options.partitioning = ds.partitioning(pa.schema({partition: kind}), flavor="hive")
    paths = [file.removeprefix(f"{place.url}/") for file in files]
    factory = ds.FileSystemDatasetFactory(system, paths, ds.ParquetFileFormat(), options)
    if columns.names and set(columns.names) != {partition}:
        return factory.finish(columns)
    return factory.finish(factory.inspect(promote_options="permissive", fragments=None))


def _scanned(files: Sequence[str], columns: pa.Schema, partition: str | None = None) -> pl.LazyFrame:
    """The rows of files in these columns; a column that a file was written before is null there.

    Args:
        files: paths or URLs; without any there are no rows.
        columns: of the table.
        partition: the one among them that is in the path.
    """
    schema = polars_schema(columns)
    if not files:
        return pl.LazyFrame(schema=schema)
    if files[0].startswith("hdfs://"):  # Polars has no client of it
        return pl.scan_pyarrow_dataset(over(files, partition, columns))
    return pl.scan_parquet(
        list(files),
        schema=schema,
        hive_partitioning=partition is not None,
        hive_schema={partition: schema[partition]} if partition else None,
        missing_columns="insert",
        extra_columns="ignore",
        cast_options=pl.ScanCastOptions(integer_cast="upcast"),
    )
