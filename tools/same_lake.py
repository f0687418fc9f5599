"""Compares the lakes and reports of two homes, row for row: `python tools/same_lake.py HOME HOME`.

Left out is what may differ between two runs of the same tape: names of runs and batches, places in Kafka, and when
things happened by the wall clock or by the run's. Exit 0 where all rows are the same, 1 where some differ.
"""

import sys
from pathlib import Path

import duckdb

OF_A_RUN = {
    "run_id", "batch", "topic", "partition", "offset", "kafka_topic", "kafka_partition", "kafka_offset", "received_at",
    "sent_at", "arrival_at", "updated_at", "closed_at", "computed_at", "date", "outage_id", "revision",
}  # fmt: skip
"""Columns that two runs of one tape do not have in common."""
COUNTED = ("received", "stored", "duplicate", "late", "quarantined", "invalid")


def tables_of(home: Path) -> dict[str, str]:
    """Name → glob of every table and report that has files."""
    found = {}
    for folder in (*(home / "lake").glob("*"), *(home / "reports").glob("*")):
        for pattern in ("date=*/*.parquet", "*.parquet"):
            if next(folder.glob(pattern), None):
                found[folder.name] = str(folder / pattern)
                break
    return found


def rows_of(lake: duckdb.DuckDBPyConnection, table: str, glob: str) -> str:
    """A query for the rows of a table that do not depend on the run; of the accounting the sums by stage."""
    known = [row[0] for row in lake.execute(f"DESCRIBE FROM read_parquet('{glob}', union_by_name = true)").fetchall()]
    if table == "accounting":
        return f"SELECT stage, {', '.join(f'sum({name})' for name in COUNTED)} FROM read_parquet('{glob}') GROUP BY ALL"
    newest = ""
    if table == "outages":  # a row per batch in which one changed; the highest revision is its state
        newest = " QUALIFY row_number() OVER (PARTITION BY outage_id ORDER BY revision DESC) = 1"
    kept = ", ".join(f'"{name}"' for name in known if name not in OF_A_RUN)
    return f"SELECT {kept} FROM read_parquet('{glob}', union_by_name = true){newest}"


def differing(one: Path, other: Path) -> list[str]:
    """A sentence for each table whose rows differ."""
    found, lake = [], duckdb.connect()
    ones, others = tables_of(one), tables_of(other)
    for table in sorted(ones.keys() | others.keys()):
        if table not in ones or table not in others:
            found.append(f"{table}: only in {one if table in ones else other}")
            continue
        left, right = rows_of(lake, table, ones[table]), rows_of(lake, table, others[table])
        counts = [lake.execute(f"SELECT count(*) FROM ({sql})").fetchall() for sql in (left, right)]
        for sql, place in ((f"{left} EXCEPT ALL {right}", one), (f"{right} EXCEPT ALL {left}", other)):
            rows = lake.execute(sql).fetchall()
            if rows:
                found.append(
                    f"{table}: {len(rows):,} of {counts[place == other][0][0]:,} rows only in {place}: {rows[0]}"
                )
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
