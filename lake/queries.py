"""The lake by SQL: DuckDB over the files of each table's version, and reports; what must hold in any lake."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import duckdb
import pyarrow as pa

from lake.reading import Lake, newest_registry, over
from lake.reports import files_of, reports
from lake.store import store
from lake.tables import columns_of, partition_column
from schemas.closed_lists import ACCEPTED_DELTAS, DeltaReason
from schemas.tables import REPORTS, TABLES
from settings import home

ACCEPTED = f"({', '.join(repr(reason.value) for reason in ACCEPTED_DELTAS)})"
"""The reasons of accepted steps as a list in SQL."""


@dataclass(frozen=True)
class AccountingLine:
    """One stage's accounting, summed over batches."""

    stage: str
    received: int
    stored: int
    duplicate: int
    late: int
    quarantined: int
    invalid: int

    @property
    def balance(self) -> bool:
        """Received = stored + duplicate + late + quarantined + invalid."""
        return self.received == self.stored + self.duplicate + self.late + self.quarantined + self.invalid


def rows_of(files: Sequence[str], column: str) -> str:
    """The SQL that reads files of a table or report; a column that some of them were written before is null there.

    Args:
        files: paths.
        column: that of the folders `column=value`.
    """
    names = ", ".join("'" + file.replace("'", "''") + "'" for file in files)
    kind = "DATE" if column == "date" else "BIGINT"
    how = f"union_by_name = true, hive_partitioning = true, hive_types = {{'{column}': {kind}}}"
    return f"FROM read_parquet([{names}], {how})"


def connected(lake: Lake) -> duckdb.DuckDBPyConnection:
    """A connection with a view per table and report of a lake, and `newest_registry`, a row a meter.

    A report has its name with and without its version: the newest one. What nobody has written yet has no rows.
    """
    connection = duckdb.connect()
    connection.execute("SET TimeZone = 'UTC'")
    connection.execute(f"SET temp_directory = '{home() / 'tmp' / 'duckdb'}'")
    for table in TABLES:
        _add_view(connection, table, columns_of(table), lake.files(table), partition_column(table))
    for report in sorted({*REPORTS, *reports()}):
        columns = pa.schema([*REPORTS.get(report, []), pa.field("date", pa.date32())])
        if _add_view(connection, report, columns, files_of(report), "date"):
            connection.execute(f'CREATE OR REPLACE VIEW "{report.rpartition("_v")[0]}" AS FROM "{report}"')
    connection.register("newest_registry", newest_registry(tuple(lake.files("registry"))).to_arrow())
    return connection


def _add_view(lake: duckdb.DuckDBPyConnection, name: str, schema: pa.Schema, files: Sequence[str], column: str) -> bool:
    """A view of what these files have; its declared columns are there without any file, too."""
    parts = [rows_of(files, column)] if files and store().is_local else []
    if files and not parts:  # DuckDB reads no store by itself without an extension of its own host
        lake.register(f"files of {name}", over(files, column, schema))
        parts = [f'FROM "files of {name}"']
    if schema.names:
        lake.register(f"declared {name}", schema.empty_table())
        parts.insert(0, f'FROM "declared {name}"')
    if parts:
        lake.execute(f'CREATE VIEW "{name}" AS {" UNION ALL BY NAME ".join(parts)}')
    return bool(parts)


def accounting_lines(lake: duckdb.DuckDBPyConnection, run_id: str | None = None) -> list[AccountingLine]:
    """The accounting of every stage, of one run or of all; what cannot be decoded belongs to no run."""
    rows = lake.execute(
        """SELECT stage, sum(received), sum(stored), sum(duplicate), sum(late), sum(quarantined), sum(invalid)
        FROM accounting WHERE run_id = $run_id OR $run_id IS NULL GROUP BY stage ORDER BY stage""",
        {"run_id": run_id},
    ).fetchall()
    return [AccountingLine(stage, *map(int, numbers)) for stage, *numbers in rows]


def broken_segments(lake: duckdb.DuckDBPyConnection) -> list[tuple[Any, ...]]:
    """Segments whose deltas do not sum up to last − start; there must be none.

    A segment starts at its first accepted value, less what that had for energy: all of it after a reset near to 0; a
    rollover adds a full register.

    Returns:
        meter_id, register, segment_id, Wh of the deltas, Wh by the registers.
    """
    return lake.execute(
        f"""WITH accepted AS (
            SELECT *,
                CASE WHEN reason = '{DeltaReason.ROLLOVER}' THEN previous_wh + delta_wh - wh ELSE 0 END AS unrolled_wh
            FROM consumption_deltas WHERE reason IN {ACCEPTED})
        SELECT meter_id, register, segment_id, sum(delta_wh) AS deltas_wh,
            max_by(wh, observed_at) + sum(unrolled_wh)
                - min_by(wh, observed_at) + CASE WHEN min_by(reason, observed_at) = '{DeltaReason.RESET}'
                    THEN min_by(delta_wh, observed_at) ELSE 0 END AS registers_wh
        FROM accepted GROUP BY ALL HAVING deltas_wh <> registers_wh ORDER BY ALL"""
    ).fetchall()


def compared_energy(lake: duckdb.DuckDBPyConnection, truth: str) -> tuple[int, int, list[tuple[Any, ...]]]:
    """The energy of the deltas beside that of a run's truth.

    Args:
        lake: of `Lake.duckdb`.
        truth: path of the run's file.

    Returns:
        Wh on the tape, Wh in the deltas, and up to five of the meters and registers where they differ: meter_id,
        register, both in Wh.
    """
    total = lake.execute(f"SELECT sum(energy_wh) FROM read_parquet('{truth}')").fetchone()
    found = lake.execute("SELECT coalesce(sum(delta_wh), 0) FROM consumption_deltas").fetchone()
    differing = lake.execute(
        f"""WITH deltas AS (SELECT meter_id, register, sum(delta_wh) AS found_wh FROM consumption_deltas GROUP BY ALL)
        SELECT meter_id, register, energy_wh, found_wh
        FROM read_parquet('{truth}') FULL JOIN deltas USING (meter_id, register)
        WHERE energy_wh IS DISTINCT FROM found_wh AND NOT coalesce(begins_anew, false) ORDER BY ALL LIMIT 5"""
    ).fetchall()
    return int((total or (0,))[0]), int((found or (0,))[0]), differing
