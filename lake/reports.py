"""Reports: plain Parquet, `reports/<name>_v<N>/date=…/*.parquet`, right under a plain glob on every store.

A date has a fixed number of files, each with the rows of some meters, and each is replaced in one step. So a reader
that lists and opens them at any time finds of each meter the rows of one run.
"""

import io
import re
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyspark.sql import DataFrame
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import to_arrow_schema

from lake.store import store, used
from lake.tables import COMPRESSION

METERS_A_FILE = 50_000
"""So many meters' rows are in a file: it is made in the memory of one task."""
NAME = re.compile(r"(\d{4})-of-(\d{4})\.parquet")


def folder_of(report: str, date: str | None = None) -> str:
    """Where a report, or a date of it, lies in the store; `report` with its version: `daily_consumption_v1`."""
    return f"reports/{report}" if date is None else f"reports/{report}/date={date}"


def glob_of(report: str) -> str:
    """The glob that gives a report's rows to any reader."""
    return store().uri(f"{folder_of(report)}/date=*/*.parquet")


def files_of(report: str, dates: list[str] | None = None) -> list[str]:
    """Paths or URLs of a report's files; none where nobody has written it."""
    folders = [folder_of(report)] if dates is None else [folder_of(report, date) for date in dates]
    return [store().uri(path) for folder in folders for path in store().paths(folder) if path.endswith(".parquet")]


def reports() -> list[str]:
    """Names of all reports that somebody has written."""
    return store().folders("reports")


def publish_report(rows: DataFrame, report: str, date: str, meters: int) -> int:
    """Replaces a report's date by new rows; the same rows when run twice.

    Args:
        rows: the first column is the meter, or what else the report has rows of.
        report: its name with its version.
        date: the local day.
        meters: about how many there are: so many files has a date that nobody has written before.

    Returns:
        The number of rows.

    Raises:
        RetryLater: the store does not answer.
    """
    folder = folder_of(report, date)
    there = [found for path in store().paths(folder) if (found := NAME.fullmatch(path.rpartition("/")[2]))]
    shards = int(there[0][2]) if there else 1 + meters // METERS_A_FILE
    key, shard, url = F.col(rows.columns[0]).cast("string"), "shard of the file", store().url

    def put(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        found = list(batches)
        table = pa.Table.from_batches(found) if found else pa.table({shard: pa.array([], pa.int64())})
        with used(url):
            for number in table[shard].unique().to_pylist():
                those = table.filter(pc.equal(table[shard], number)).drop_columns([shard])
                put_shard(those, report, date, number, shards)
                yield pa.RecordBatch.from_pydict({"shard": [number], "rows": [len(those)]})

    sharded = rows.withColumn(shard, F.crc32(F.coalesce(key, F.lit("")).cast("binary")) % shards)
    placed = sharded.coalesce(1) if shards == 1 else sharded.repartition(shards, shard)
    written = {row["shard"]: row["rows"] for row in placed.mapInArrow(put, "shard long, rows long").collect()}
    empty = to_arrow_schema(rows.schema, timezone="UTC").empty_table()
    for number in set(range(shards)) - set(written):
        put_shard(empty, report, date, number, shards)
    return sum(written.values())


def put_shard(rows: pa.Table, report: str, date: str, shard: int, shards: int) -> None:
    """Replaces one of the files of a report's date.

    Raises:
        RetryLater: the store does not take it.
    """
    content = io.BytesIO()
    pq.write_table(rows, content, compression=COMPRESSION)
    store().put(f"{folder_of(report, date)}/{shard:04d}-of-{shards:04d}.parquet", content.getvalue())
