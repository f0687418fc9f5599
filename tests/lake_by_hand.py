"""Rows in the lake's tables without any job."""

import uuid
from collections.abc import Iterable
from typing import Any

import polars as pl

from lake.tables import Commit, Writer, put_part
from schemas.tables import TABLES, polars_schema


def add(table: str, rows: pl.DataFrame, partition: str | None) -> None:
    """Adds rows to a table; those of its columns that they lack are null."""
    schema = polars_schema(TABLES[table])
    missing = [pl.lit(None, kind).alias(name) for name, kind in schema.items() if name not in rows.columns]
    whole = rows.with_columns(missing).select(schema.names()).cast(schema)
    Writer().add([put_part(table, whole, "by-hand", partition)], Commit(f"by-hand-{uuid.uuid4()}", 0))


def add_rows(table: str, rows: Iterable[dict[str, Any]], partition: str | None) -> None:
    """Adds rows to a table; those of its columns that they lack are null."""
    add(table, pl.DataFrame(list(rows), schema=polars_schema(TABLES[table])), partition)
