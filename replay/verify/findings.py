"""What does not hold: sentences, each with its meter and its place, as queries find them."""

import duckdb
import polars as pl

FINDINGS = pl.Schema({"meter_id": pl.String(), "place": pl.String(), "finding": pl.String()})
"""What does not hold: whose (null: the run's), in which table or stage, and a sentence."""
NAMED_SEQS = 20  # missing records of one meter that are named


def queried(lake: duckdb.DuckDBPyConnection, place: str, sql: str) -> pl.DataFrame:
    """Findings, columns `FINDINGS`, of a query that gives meter_id and finding."""
    return frame(lake, f"SELECT meter_id, '{place}' AS place, finding FROM ({sql})").cast(FINDINGS)


def frame(lake: duckdb.DuckDBPyConnection, sql: str) -> pl.DataFrame:
    """Rows of a query."""
    return pl.DataFrame(lake.sql(sql).to_arrow_table())


def number(lake: duckdb.DuckDBPyConnection, sql: str) -> int:
    """What a query gives that has one row of one number."""
    return int((lake.execute(sql).fetchone() or (0,))[0])


def finding(place: str, sentence: str) -> pl.DataFrame:
    """One finding of the whole run, columns `FINDINGS`."""
    return pl.DataFrame([{"meter_id": None, "place": place, "finding": sentence}], schema=FINDINGS)


def named(values: str) -> str:
    """The first values of a group as text in SQL, sorted, and how many more there are."""
    return (
        f"array_to_string(list_sort(list({values}))[:{NAMED_SEQS}], ', ') "
        f"|| CASE WHEN count(*) > {NAMED_SEQS} THEN ' and ' || (count(*) - {NAMED_SEQS}) || ' more' ELSE '' END"
    )
