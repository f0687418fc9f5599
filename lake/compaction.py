"""Many small files of a table's day become one, while the stream goes on.

Each batch adds a file to each day and table that it has rows of. Where a query has left many small ones, those of
batches that can no longer be tried again are written as one file into a copy of the folder (the others are hard links),
and folder and copy change places in one step. So a reader finds the same rows before and after, and never both: one
that has listed the old files and opens them later finds that they are gone, and lists again. The old folder keeps
its files for a minute, for who is just listing it. After a kill either folder is whole; what it left under staging is
removed by the next one.
"""

import os
import re
import shutil
import time
from collections import Counter, deque
from pathlib import Path

import polars as pl
import structlog

from lake.locks import files_replaced
from lake.paths import table_path
from lake.publishing import COMPRESSION, exchange
from schemas.tables import TABLES, polars_schema
from settings import home

LARGE_BYTES = 32_000_000
"""A file of that size stays as it is: it holds a million readings or so, and a scan has nothing to gain."""
KEPT_S = 60.0
log = structlog.get_logger()


class Merger:
    """Merges the files of one query.

    Attributes:
        prefix: what the names of its files begin with: query and query id.
        files: how many small ones of a day and table are too many.
    """

    def __init__(self, prefix: str, tables: list[str], files: int) -> None:
        self.prefix = prefix
        self.files = files
        self._name = re.compile(rf"{re.escape(prefix)}-\d+(f|_\d+)?-\d+\.parquet")  # others are left alone
        self._staging = home() / "staging" / f"{prefix}-merge"
        self._is_possible = can_exchange(self._staging)
        if not self._is_possible:
            log.warning("small files stay: this system cannot let two folders change places", query=prefix)
        self._copies = 0
        self._left = deque[tuple[float, Path]]()  # when they were made, and folders that nobody needs any more
        self._small: Counter[Path] = Counter()
        for table in tables:
            self._small.update(part.parent for part in table_path(table).glob(f"date=*/{prefix}-*.parquet"))

    def added(self, folders: list[Path]) -> None:
        """Tells it of files: the folder of each."""
        self._small.update(folders)

    def merge(self, before: int) -> None:
        """Merges where there are too many; what cannot be merged is logged and stays.

        Args:
            before: files of this batch and of later ones stay: they may be written again.
        """
        while self._left and time.monotonic() - self._left[0][0] > KEPT_S:
            shutil.rmtree(self._left.popleft()[1], ignore_errors=True)
        for folder in [folder for folder, number in self._small.items() if number >= self.files and self._is_possible]:
            with files_replaced(folder.parent.name) as is_alone:
                if not is_alone:
                    continue
                try:
                    self._small[folder] = self._merged(folder, before)
                except (OSError, pl.exceptions.PolarsError) as error:
                    self._small[folder] = 0  # tried again when there are as many more
                    log.warning("not merged", table=folder.parent.name, day=folder.name, error=str(error)[:500])

    def _merged(self, folder: Path, before: int) -> int:
        """Merges a table's day. Returns how many small files it has then."""
        ours = [part for part in sorted(folder.iterdir()) if self._name.fullmatch(part.name)]
        small = [part for part in ours if part.stat().st_size < LARGE_BYTES]
        done = [part for part in small if self._batches(part)[1] < before]
        if len(done) < max(2, self.files // 2):
            return len(small)
        self._copies += 1
        copy = self._staging / f"{self._copies}"
        copy.mkdir(parents=True)
        self._left.append((time.monotonic(), copy))
        first, last = self._batches(done[0])[0], max(self._batches(part)[1] for part in done)
        whole = copy / f"{self.prefix}-{first:08d}_{last:08d}-0.parquet"
        schema = polars_schema(TABLES[folder.parent.name])
        rows = pl.scan_parquet(done, schema=schema, missing_columns="insert", hive_partitioning=False)
        rows.sink_parquet(whole, compression=COMPRESSION, sync_on_close="all")
        for part in set(folder.iterdir()) - set(done):
            os.link(part, copy / part.name)
        exchange(copy, folder)
        log.info("merged", table=folder.parent.name, day=folder.name, files=len(done))
        return len(small) - len(done) + ((folder / whole.name).stat().st_size < LARGE_BYTES)

    def _batches(self, part: Path) -> tuple[int, int]:
        """First and last batch of a file, by its name: `…-00000012-0`, `…-00000012f-0` or `…-00000000_00000063-0`."""
        first, _, last = part.stem.removeprefix(f"{self.prefix}-").partition("-")[0].partition("_")
        return int(first.rstrip("f")), int((last or first).rstrip("f"))


def can_exchange(folder: Path) -> bool:
    """Whether two folders in this one, which is removed, can change places: on Linux, but not on every file system."""
    one, other = folder / "one", folder / "other"
    for each in (one, other):
        each.mkdir(parents=True, exist_ok=True)
    try:
        exchange(one, other)
    except OSError:
        return False
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return True
