"""Compares the lakes and reports of two homes, row for row: `python -m tools.same_lake HOME HOME`.

Left out is what may differ between two runs of the same tape: names of runs and batches, places in Kafka, and when
things happened by the wall clock or by the run's. Exit 0 where all rows are the same, 1 where some differ.
"""

import sys
from pathlib import Path

import duckdb

import lake
from lake.reports import reports
from lake.store import used
from schemas.tables import TABLES

OF_A_RUN = {
    "run_id", "batch", "topic", "partition", "offset", "kafka_topic", "kafka_partition", "kafka_offset", "received_at",
    "sent_at", "arrival_at", "updated_at", "closed_at", "computed_at", "date", "outage_id", "revision",
    "registered_by",
}  # fmt: skip
"""Columns that two runs of one tape do not have in common."""
COUNTED = ("received", "stored", "duplicate", "late", "quarantined", "invalid")


def tables_of(home: Path) -> list[str]:
    """Names of all tables and reports that have rows."""
    with used(f"file://{home.resolve()}"):
        tables = lake.open()
        return sorted([*[table for table in TABLES if tables.files(table)], *reports()])


def rows_of(home: duckdb.DuckDBPyConnection, table: str) -> duckdb.DuckDBPyRelation:
    """The rows of a table that do not depend on the run; of the accounting the sums by stage."""
    known = home.sql(f"FROM {table}").columns
    if table == "accounting":
        return home.sql(f"SELECT stage, {', '.join(f'sum({name})' for name in COUNTED)} FROM accounting GROUP BY ALL")
    newest = ""
    if table == "outages":  # a row per batch in which one changed; the highest revision is its state
        newest = " QUALIFY row_number() OVER (PARTITION BY outage_id ORDER BY revision DESC) = 1"
    kept = ", ".join(f'"{name}"' for name in known if name not in OF_A_RUN)
    return home.sql(f"SELECT {kept} FROM {table}{newest}")


def differing(one: Path, other: Path) -> list[str]:
    """A sentence for each table whose rows differ."""
    found: list[str] = []
    homes = {}
    for home in (one, other):
        with used(f"file://{home.resolve()}"):
            homes[home] = lake.open().duckdb()
    both = duckdb.connect()
    for table in sorted({*tables_of(one), *tables_of(other)}):
        for side, home in (("left_rows", one), ("right_rows", other)):
            both.register(side, rows_of(homes[home], table).to_arrow_table())
        for side, rest, place in (("left_rows", "right_rows", one), ("right_rows", "left_rows", other)):
            rows = both.execute(f"FROM {side} EXCEPT ALL FROM {rest}").fetchall()
            if rows:
                count = (both.execute(f"SELECT count(*) FROM {side}").fetchone() or (0,))[0]
                found.append(f"{table}: {len(rows):,} of {count:,} rows only in {place}: {rows[0]}")
    return found


def main() -> int:
    """Prints what differs."""
    if len(sys.argv) != 3:
        sys.stderr.write(f"{__doc__}\n")
        return 2
    one, other = map(Path, sys.argv[1:])
    found = differing(one, other)
    for line in found:
        sys.stdout.write(line + "\n")
    if not found:
        sys.stdout.write(f"the same rows in {len(tables_of(one))} tables and reports\n")
    return bool(found)


if __name__ == "__main__":
    raise SystemExit(main())
