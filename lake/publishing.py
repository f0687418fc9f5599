"""Writing so that a plain glob gives exactly the committed rows: staging, then rename, keyed by batch.

A batch's files carry query, query id and batch id in their names. A retried batch has the same three and the same
rows, removes what an earlier attempt left, and renames its own files in: after a crash and a restart no row is missing
and none is there twice. Renames are atomic on a local or shared file system, not on an object store.
"""

import ctypes
import errno
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from pyspark.sql import DataFrame

from lake.locks import files_kept, report_run
from lake.paths import report_path, table_path
from lake.reading import uri
from schemas.errors import RetryLater
from settings import home

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # fcntl.h, linux/fs.h
COMPRESSION: Literal["snappy"] = "snappy"


@dataclass(frozen=True)
class BatchKey:
    """Identity of a micro-batch.

    Attributes:
        query: the job's module name.
        query_id: of the checkpoint; a new checkpoint is a new id.
        batch: number of the batch, with a suffix where it is not Spark's own (`12f`: what was closed after 12).
        attempt: of it: what an earlier one still writes lies elsewhere.
    """

    query: str
    query_id: str
    batch: str
    attempt: str = ""

    def __str__(self) -> str:
        return f"{self.query}-{self.query_id}-{self.batch}"

    @property
    def number(self) -> int:
        """Spark's number of the batch."""
        return int(self.batch.rstrip("f"))

    @property
    def staging(self) -> Path:
        """Folder for files that are not published yet."""
        return home() / "staging" / f"{self}{self.attempt}"


def remove_parts(key: BatchKey, tables: list[str]) -> None:
    """Removes what an earlier attempt at this batch has published."""
    with files_kept(*tables):
        for table in tables:
            for part in table_path(table).glob(f"date=*/{key}-*.parquet"):
                part.unlink()


def rename_in(table: str, key: BatchKey) -> list[Path]:
    """Adds what a batch has staged to a lake table: a file a task and day. Returns their folders.

    Args:
        table: name of the lake table; its rows lie under the batch's staging folder in `date=…` folders.
        key: the batch; its earlier parts have been removed by `remove_parts`.
    """
    staged, folders = key.staging / table, list[Path]()
    if not staged.exists():
        return folders
    with files_kept(table):
        for day in sorted(staged.glob("date=*")):
            target = table_path(table) / day.name
            target.mkdir(parents=True, exist_ok=True)
            for part in sorted(day.glob("*.parquet")):
                part.rename(target / f"{key}-{len(folders)}.parquet")
                folders.append(target)
    shutil.rmtree(staged, ignore_errors=True)
    return folders


def publish_small(rows: pa.Table, table: str, key: BatchKey, date: str) -> list[Path]:
    """Adds a few rows that the driver holds. Returns the folder of their file."""
    folder = key.staging / table / f"date={date}"
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(rows, folder / "part-0.parquet")
    return rename_in(table, key)


def replace(table: str, name: str, rows: pl.DataFrame) -> None:
    """Replaces a file of a table that has its newest version only, in one step."""
    written(rows, table_path(table) / name)


def written(rows: pl.DataFrame, path: Path) -> None:
    """Writes a file of rows: whoever looks for it finds all of it, or what was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    rows.write_parquet(part, compression=COMPRESSION)
    part.rename(path)


def exchange(one: Path, other: Path) -> None:
    """Two folders change places, in one step for whoever looks on.

    Raises:
        OSError: the file system cannot do that; nothing has changed.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), str(one))
    if libc.renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(one))


def publish_report(rows: DataFrame, report: str, date: str) -> int:
    """Replaces a report's date by new rows, by an exchange of folders; the same rows when run twice.

    Where the file system cannot exchange folders, the date is away for the moment between two renames.

    Returns:
        The number of rows.

    Raises:
        RetryLater: another process writes the same report of the same date.
    """
    with report_run(report, date) as is_alone:
        if not is_alone:
            msg = f"another process writes {report} of {date}"
            raise RetryLater(msg)
        return _publish_report(rows, report, date)


def _publish_report(rows: DataFrame, report: str, date: str) -> int:
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
    try:
        exchange(staged, target)
    except OSError:
        if target.exists():
            target.rename(retired)
        staged.rename(target)
    for old in (staged, retired):
        shutil.rmtree(old, ignore_errors=True)
    return sum(pq.ParquetFile(part).metadata.num_rows for part in target.glob("*.parquet"))
