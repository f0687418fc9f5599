"""Tables of the lake: Delta tables, each commit of a batch once.

Whoever writes puts Parquet files under names that nobody uses again, and then adds them to the table's log in one
commit that carries who wrote (`app`) and the number of the batch: one that is tried again is seen there and skipped.
A file that no commit names is not there for any reader; upkeep removes it some days later (`lake/upkeep.py`).
"""

import io
import json
import threading
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, NamedTuple

import polars as pl
import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, PostCommitHookProperties, Schema, Transaction
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError
from deltalake.transaction import AddAction

from lake.store import store
from schemas.errors import ConfigError, RetryLater
from schemas.tables import CURRENT, TABLES, polars_schema

NO_DATE = "__HIVE_DEFAULT_PARTITION__"
COMPRESSION: Literal["snappy"] = "snappy"
DATE = "date"
AT_ONCE = 8
"""Tables that are committed at the same time: most of a commit is waiting for the store."""
RETRIES = 100
"""Tries of a commit while others commit to the same table; with the default of 15, two of four writers gave up."""
REOPENED_S = 600.0
"""A handle that was not used for so long is opened anew: the log that it would go on from may have been cleaned."""
REOPENED_COMMITS = 50
"""And one whose table has had so many commits since: it holds all of them."""
PROPERTIES = {
    "delta.checkpointInterval": "1000000",  # upkeep writes them
    "delta.logRetentionDuration": "interval 1 hours",  # who commits lists the log: at a trigger of 5 s a day is 17,000
    "delta.deletedFileRetentionDuration": "interval 1 days",  # so long the log knows what vacuum removes
}
NO_HOOKS = PostCommitHookProperties(create_checkpoint=False, cleanup_expired_logs=False)


class Part(NamedTuple):
    """A file of a table that is written, and in no commit yet.

    Attributes:
        table: its name.
        path: of the file, from the table's folder.
        size: bytes.
        rows: how many it has.
        partition: value of the table's partition column, as text; None is null.
    """

    table: str
    path: str
    size: int
    rows: int
    partition: str | None


class Commit(NamedTuple):
    """Who commits, and the how manieth time.

    Attributes:
        app: name of the writer, one for its life.
        version: number of the commit; greater than that of any before it.
    """

    app: str
    version: int


def folder_of(table: str) -> str:
    """Where a table lies in the store."""
    return f"lake/{table}"


def partition_column(table: str) -> str:
    """The column by which a table is partitioned: the UTC day, or the Kafka partition where it has newest rows only."""
    return CURRENT.get(table, DATE)


def columns_of(table: str) -> pa.Schema:
    """All columns of a table, the partition column last."""
    kind = pa.int64() if table in CURRENT else pa.date32()
    return TABLES[table].append(pa.field(partition_column(table), kind))


def put_part(table: str, rows: pl.DataFrame, name: str, partition: str | None) -> Part:
    """Writes a file of rows: no reader sees it before its commit.

    Args:
        table: whose.
        rows: in the table's declared columns; the partition is in the path and the log alone.
        name: what the file's name begins with; it gets one that is not there.
        partition: of the rows.
    """
    column = partition_column(table)
    value = NO_DATE if partition is None else partition
    path = f"{column}={value}/{name}-{uuid.uuid4().hex[:12]}.parquet"
    with store().writing(f"{folder_of(table)}/{path}") as file:
        try:
            rows.write_parquet(file, compression=COMPRESSION)
        except pl.exceptions.ComputeError as error:  # what Polars makes of a full disk
            msg = f"a file of {table} could not be written: {error}"
            raise RetryLater(msg) from error
        size = file.seek(0, io.SEEK_END)
    return Part(table, path, size, len(rows), partition)


def read_parts(table: str, parts: Iterable[Part]) -> pl.DataFrame:
    """The rows of those of these files that are of a table, in its columns of today.

    Raises:
        FileNotFoundError: one is gone.
        RetryLater: the store does not answer.
    """
    schema = polars_schema(TABLES[table])
    contents = [store().get(f"{folder_of(table)}/{part.path}") for part in parts if part.table == table]
    frames = [pl.read_parquet(io.BytesIO(content), schema=schema, missing_columns="insert") for content in contents]
    return pl.concat([schema.to_frame(), *frames])


class Writer:
    """Adds files to tables; it knows how far each one's log was when it last looked."""

    def __init__(self) -> None:
        self._handles: dict[tuple[str, bool], tuple[float, int, DeltaTable]] = {}
        self._done: dict[tuple[str, bool], dict[str, int | None]] = {}  # by app, as the handle's version has it
        self._turns: dict[str, threading.Lock] = {}

    def add(self, parts: Iterable[Part], commit: Commit) -> None:
        """Adds files to their tables; see `add_all`."""
        self.add_all([(commit, tuple(parts))])

    def add_all(self, batches: Iterable[tuple[Commit, Sequence[Part]]]) -> None:
        """Adds files of several writers, each table in one commit; what a table has already is left out.

        Raises:
            RetryLater: the store did not take a commit; those of other tables may be done.
        """
        tables: dict[str, dict[Commit, list[Part]]] = {}
        for commit, parts in batches:
            for part in parts:
                tables.setdefault(part.table, {}).setdefault(commit, []).append(part)
        if len(tables) == 1:
            table, of_table = tables.popitem()
            self._commit(table, of_table)
            return
        with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="commit") as pool:
            list(pool.map(self._commit, tables.keys(), tables.values()))

    def replace(self, table: str, parts: Sequence[Part], commit: Commit) -> None:
        """Replaces the files of the partitions that these are of, in one commit.

        Raises:
            RetryLater: the store did not take the commit.
        """
        self._commit(table, {commit: parts}, is_replaced=True)

    def newest(self, tables: Iterable[str], app: str) -> int | None:
        """Number of the newest commit of a writer in any of these tables; None where there is none.

        Raises:
            RetryLater: the store does not answer.
        """
        found = []
        for table in tables:
            try:
                handle = DeltaTable(store().uri(folder_of(table)), without_files=True)
            except TableNotFoundError:
                continue
            except (DeltaError, OSError) as error:
                msg = f"table {table} cannot be read now: {error}"
                raise RetryLater(msg) from error
            self._handles[table, False], self._done[table, False] = (time.monotonic(), handle.version(), handle), {}
            found.append(handle.transaction_version(app))
        return max((version for version in found if version is not None), default=None)

    def delete(self, table: str, where: str) -> None:
        """Removes rows of a table: files that have some of them are written anew.

        Args:
            table: its name; nothing is done where nobody has written to it yet.
            where: which, an SQL condition.

        Raises:
            RetryLater: the store did not take it.
        """
        try:
            DeltaTable(store().uri(folder_of(table)), without_files=True)
            _, handle = self._handle(table, with_files=True)  # has all columns that it is declared with
            handle.delete(where, post_commithook_properties=NO_HOOKS)
        except TableNotFoundError:
            return
        except (DeltaError, OSError) as error:
            msg = f"rows of {table} were not removed: {error}"
            raise RetryLater(msg) from error

    def _commit(self, table: str, batches: Mapping[Commit, Sequence[Part]], is_replaced: bool = False) -> None:
        """Commits to a table what it has not yet.

        A handle that is behind is no harm: a commit of the same writer that it does not know makes this one fail, and
        then it is looked at anew.
        """
        with self._turns.setdefault(table, threading.Lock()):
            try:
                opened_at, handle = self._handle(table, is_replaced)
                before = handle.version()
                try:
                    written = self._write(handle, table, batches, is_replaced)
                except CommitFailedError:
                    self._handles.pop((table, is_replaced), None)
                    opened_at, handle = self._handle(table, is_replaced)
                    before = handle.version()
                    written = self._write(handle, table, batches, is_replaced)
                handle.update_incremental()
            except (DeltaError, OSError) as error:
                self._handles.pop((table, is_replaced), None)
                names = ", ".join(f"{commit.version} of {commit.app}" for commit in batches)
                msg = f"table {table} did not take commit {names}: {error}"
                raise RetryLater(msg) from error
            self._handles[table, is_replaced] = time.monotonic(), opened_at, handle
            if handle.version() == before + bool(written):
                self._done[table, is_replaced].update(written)
            else:  # others have committed, perhaps for the same app
                self._done[table, is_replaced] = {}

    def _write(
        self, handle: DeltaTable, table: str, batches: Mapping[Commit, Sequence[Part]], is_replaced: bool
    ) -> dict[str, int]:
        """Commits what the handle's version has not. Returns app → version of what it has written.

        An app's newest version is asked for once: the answer reads every commit since the last checkpoint.
        """
        left, known = {}, self._done[table, is_replaced]
        for commit, parts in batches.items():
            if commit.app not in known:
                known[commit.app] = handle.transaction_version(commit.app)
            done = known[commit.app]
            if done is None or done < commit.version:
                left[commit] = parts
        if not left:
            return {}
        column, at = partition_column(table), int(time.time() * 1000)
        actions = [
            AddAction(part.path, part.size, {column: part.partition}, at, True, json.dumps({"numRecords": part.rows}))
            for parts in left.values()
            for part in parts
        ]
        partitions = sorted({str(part.partition) for parts in left.values() for part in parts})
        handle.create_write_transaction(
            actions,
            "overwrite" if is_replaced else "append",
            handle.schema(),
            [column],
            [(column, "in", partitions)] if is_replaced else None,
            commit_properties=CommitProperties(
                app_transactions=[Transaction(commit.app, commit.version) for commit in left],
                max_commit_retries=RETRIES,
            ),
            post_commithook_properties=NO_HOOKS,
        )
        return {commit.app: commit.version for commit in left}

    def _handle(self, table: str, with_files: bool) -> tuple[int, DeltaTable]:
        """A table's handle, and the version that it was opened at."""
        seen, opened_at, handle = self._handles.get((table, with_files), (0.0, 0, None))
        if handle is not None and time.monotonic() - seen < REOPENED_S:
            if handle.version() - opened_at < REOPENED_COMMITS:
                return opened_at, handle
        uri = store().uri(folder_of(table))
        self._done[table, with_files] = {}
        try:
            handle = DeltaTable(uri, without_files=not with_files)
        except TableNotFoundError:
            if "checkpoints" in store().folders("state"):
                msg = f"{store().url} is of an earlier release: stop all, copy it, then python -m stack migrate"
                raise ConfigError(msg) from None
            DeltaTable.create(
                uri, columns_of(table), mode="ignore", partition_by=[partition_column(table)], configuration=PROPERTIES
            )
            handle = DeltaTable(uri, without_files=not with_files)
        known = {field.name for field in handle.schema().fields}
        if added := [field for field in columns_of(table) if field.name not in known]:
            handle.alter.add_columns(Schema.from_arrow(pa.schema(added)).fields)
            handle = DeltaTable(uri, without_files=not with_files)
        return handle.version(), handle
