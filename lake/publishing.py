"""Writing so that a plain glob gives exactly the committed rows: staging, then rename, keyed by batch.

A batch's files carry query, query id and batch id in their names. A retried batch has the same three and the same
rows, removes what an earlier attempt left, and renames its own files in: after a crash and a restart no row is missing
and none is there twice. Renames are atomic on a local or shared file system, not on an object store.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from lake.session import uri
from schemas.tables import home, report_path, table_path


@dataclass(frozen=True)
class BatchKey:
    """Identity of a micro-batch.

    Attributes:
        query: the job's module name.
        query_id: of the checkpoint; a new checkpoint is a new id.
        batch: number of the batch, with a suffix where it is not Spark's own (`12f`: what was closed after 12).
    """

    query: str
    query_id: str
    batch: str

    def __str__(self) -> str:
        return f"{self.query}-{self.query_id}-{self.batch}"

    @property
    def staging(self) -> Path:
        """Folder for files that are not published yet."""
        return home() / "staging" / str(self)


def remove_parts(key: BatchKey, tables: list[str]) -> None:
    """Removes what an earlier attempt at this batch has published."""
    for table in tables:
        for part in table_path(table).glob(f"date=*/{key}-*.parquet"):
            part.unlink()


def _rename_in(staged: Path, table: str, key: BatchKey) -> None:
    for number, part in enumerate(sorted(staged.glob("date=*/*.parquet"))):
        target = table_path(table) / part.parent.name
        target.mkdir(parents=True, exist_ok=True)
        part.rename(target / f"{key}-{number}.parquet")
    shutil.rmtree(staged, ignore_errors=True)


def publish(rows: DataFrame, table: str, key: BatchKey, dated_by: str) -> None:
    """Adds a batch's rows to a lake table, one file a day.

    Args:
        rows: the table's columns.
        table: name of the lake table.
        key: the batch; its earlier parts have been removed by `remove_parts`.
        dated_by: timestamp column whose UTC day is the partition.
    """
    staged = key.staging / table
    (
        rows.withColumn("date", F.to_date(dated_by))
        .coalesce(1)
        .write.partitionBy("date")
        .mode("overwrite")
        .parquet(uri(staged))
    )
    _rename_in(staged, table, key)


def publish_small(rows: pa.Table, table: str, key: BatchKey, date: str) -> None:
    """The same for a few rows that the driver holds."""
    staged = key.staging / table
    folder = staged / f"date={date}"
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(rows, folder / "part-0.parquet")
    _rename_in(staged, table, key)


def swap_file(rows: DataFrame, target: Path) -> None:
    """Replaces one Parquet file by a new version of it."""
    staged = home() / "staging" / f"swap-{target.parent.name}-{target.stem}"
    rows.coalesce(1).write.mode("overwrite").parquet(uri(staged))
    target.parent.mkdir(parents=True, exist_ok=True)
    next(staged.glob("part-*.parquet")).rename(target)
    shutil.rmtree(staged, ignore_errors=True)


def publish_report(rows: DataFrame, report: str, date: str) -> int:
    """Replaces a report's date by new rows, by renaming the folder; the same rows when run twice.

    Returns:
        The number of rows.
    """
    staged = home() / "staging" / f"{report}-{date}"
    retired = home() / "staging" / f"{report}-{date}-retired"
    target = report_path(report) / f"date={date}"
    if retired.exists() and not target.exists():
        retired.rename(target)  # an earlier run died between its two renames
    shutil.rmtree(retired, ignore_errors=True)
    rows.coalesce(1).write.mode("overwrite").parquet(uri(staged))
    for extra in [*staged.glob("_*"), *staged.glob(".*")]:
        extra.unlink()
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        target.rename(retired)
    staged.rename(target)
    shutil.rmtree(retired, ignore_errors=True)
    return sum(pq.ParquetFile(part).metadata.num_rows for part in target.glob("*.parquet"))
