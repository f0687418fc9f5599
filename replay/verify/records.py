"""Records: what was sent and what the lake has, by seq, copy and order, and byte by byte by the run's digest."""

from typing import Any

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa

from replay.dirt.poison import encoding_of
from replay.run.digest import UNSTAMPED, digest_of, digest_text, raw_bytes
from replay.sent import Run
from replay.verify.findings import finding, frame, named, queried
from schemas.closed_lists import FaultKind, Poison
from schemas.codec import arrow_schema, encode_batch
from schemas.topics import KINDS

DIGEST_ROWS = 100_000  # records that are encoded at once


def make_arrived(lake: duckdb.DuckDBPyConnection) -> None:
    """Table `arrived`: a row per record of the run that the lake has.

    topic, meter_id, seq, copies; `place`, where its first copy lies in Kafka: it grows with the arrival, since all of a
    meter's records are in one partition; `is_reordered`, whether a record with a higher seq arrived before it.
    """
    lake.execute(
        """CREATE TEMP TABLE arrived AS
        SELECT *, coalesce(seq < max(seq) OVER (
            PARTITION BY topic, meter_id ORDER BY place ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING
        ), false) AS is_reordered
        FROM (
            SELECT 'readings' AS topic, meter_id, seq, count(*) AS copies, min(partition << 40 | "offset") AS place
            FROM run_readings GROUP BY ALL
            UNION ALL
            SELECT 'events', meter_id, seq, count(*), min(partition << 40 | "offset") FROM run_events GROUP BY ALL)"""
    )


def check_records(lake: duckdb.DuckDBPyConnection, run: Run) -> tuple[pl.DataFrame, list[pl.DataFrame]]:
    """Per topic and meter: sent, copies, rows, records, lost, surplus, reordered; and what does not hold."""
    lake.execute(
        """CREATE TEMP TABLE surplus AS
        SELECT a.topic, a.meter_id, a.seq FROM arrived a
        LEFT JOIN sent s ON s.topic = a.topic AND s.meter_id = a.meter_id
        LEFT JOIN holes h ON h.topic = a.topic AND h.meter_id = a.meter_id AND h.seq = a.seq
        WHERE s.meter_id IS NULL OR a.seq < 0 OR a.seq >= s."end" OR h.seq IS NOT NULL"""
    )
    counts = frame(
        lake,
        """WITH found AS (
            SELECT topic, meter_id, count(*) AS records, sum(copies) AS rows,
                count(*) FILTER (is_reordered) AS reordered
            FROM arrived GROUP BY ALL),
        more AS (SELECT topic, meter_id, count(*) AS surplus FROM surplus GROUP BY ALL)
        SELECT coalesce(s.topic, f.topic) AS topic, coalesce(s.meter_id, f.meter_id) AS meter_id,
            CAST(coalesce(sent, 0) AS BIGINT) AS sent, CAST(coalesce(s.copies, 0) AS BIGINT) AS copies,
            CAST(coalesce(rows, 0) AS BIGINT) AS rows, CAST(coalesce(records, 0) AS BIGINT) AS records,
            coalesce(reordered, 0) AS reordered, coalesce(surplus, 0) AS surplus,
            CAST(coalesce(sent, 0) - coalesce(s.copies, 0) - (coalesce(records, 0) - coalesce(surplus, 0)) AS BIGINT)
                AS lost
        FROM sent s FULL JOIN found f ON f.topic = s.topic AND f.meter_id = s.meter_id
        LEFT JOIN more m ON m.topic = coalesce(s.topic, f.topic) AND m.meter_id = coalesce(s.meter_id, f.meter_id)""",
    )
    lake.register("counts", counts.to_arrow())
    missing = """SELECT meter_id, count(*) || ' of ' || any_value(sent) || ' lost: seq ' || {named} AS finding FROM (
            SELECT topic, meter_id, sent, unnest(range("end")) AS seq FROM sent
            SEMI JOIN (FROM counts WHERE lost <> 0) USING (topic, meter_id))
        ANTI JOIN arrived USING (topic, meter_id, seq) ANTI JOIN holes USING (topic, meter_id, seq)
        WHERE topic = '{kind}' GROUP BY meter_id"""
    never = "SELECT meter_id, 'never sent by the run: seq ' || {named} AS finding FROM surplus WHERE topic = '{kind}' \
        GROUP BY meter_id"
    torn = """SELECT meter_id, 'not in the order they were sent in: seq ' || {named} AS finding FROM arrived
        ANTI JOIN (SELECT topic, meter_id, seq FROM faults WHERE kind IN ('late', 'reorder'))
            USING (topic, meter_id, seq)
        WHERE is_reordered AND topic = '{kind}' GROUP BY meter_id"""
    fewer = """SELECT c.meter_id, count(*) || ' injected copies lost: seq ' || {named} AS finding FROM (
            SELECT topic, meter_id, seq, count(*) AS copies FROM faults
            WHERE kind = 'duplicate' AND was_sent GROUP BY ALL) c
        JOIN arrived a ON a.topic = c.topic AND a.meter_id = c.meter_id AND a.seq = c.seq
        WHERE a.copies <= c.copies AND c.topic = '{kind}' GROUP BY c.meter_id"""
    findings = [
        queried(lake, kind, sql.format(kind=kind, named=named("c.seq" if sql is fewer else "seq")))
        for sql in (missing, never, torn, fewer)
        for kind in KINDS
    ]
    return counts, findings


def check_digest(lake: duckdb.DuckDBPyConnection, run: Run, counts: pl.DataFrame) -> list[pl.DataFrame]:
    """The lake's records have the very bytes that were sent: the run's digest, summed again; where none is missing."""
    if counts.select((pl.col("lost") != 0).any() | (pl.col("surplus") > 0).any()).item():
        return []
    total = np.zeros(2, np.uint64)
    for kind, topic in KINDS.items():
        schema = arrow_schema(topic.entity)
        names = [name for name in schema.names if name not in UNSTAMPED]

        def lanes(sql: str, schema: pa.Schema = schema, entity: str = topic.entity) -> Any:
            """Sum of the hashes of a query's records, each as often as `n` says."""
            found = np.zeros(2, np.uint64)
            for batch in lake.sql(sql).to_arrow_reader(DIGEST_ROWS):
                arrays = [
                    pa.nulls(len(batch), field.type)
                    if field.name in UNSTAMPED
                    else batch.column(field.name).cast(field.type)
                    for field in schema
                ]
                payloads = encode_batch(entity, pa.table(arrays, schema=schema))
                times = batch.column("n").to_pylist()
                found += digest_of([each for each, n in zip(payloads, times, strict=True) for _ in range(n)])
            return found

        columns = ", ".join(names)
        total += lanes(f"SELECT {columns}, 1 AS n FROM run_{kind}")
        again = f"""SELECT {", ".join(f"any_value(r.{name}) AS {name}" for name in names)},
                any_value(a.copies - 1 - coalesce(i.copies, 0)) AS n
            FROM run_{kind} r JOIN arrived a ON a.topic = '{kind}' AND a.meter_id = r.meter_id AND a.seq = r.seq
            LEFT JOIN (SELECT topic, meter_id, seq, count(*) AS copies FROM faults
                WHERE kind = '{FaultKind.DUPLICATE}' AND was_sent GROUP BY ALL) i
                ON i.topic = a.topic AND i.meter_id = a.meter_id AND i.seq = a.seq
            WHERE a.copies - 1 > coalesce(i.copies, 0) GROUP BY a.meter_id, a.seq"""
        total -= lanes(again)  # redelivered copies: sent once
    poison = run.faults.filter((pl.col("kind") == FaultKind.POISON) & pl.col("was_sent"))
    for meter_id, detail, payload in poison.select("meter_id", "detail", "payload").iter_rows():
        total += digest_of([raw_bytes(meter_id, encoding_of(Poison(detail)), payload)])
    digest = digest_text(total)
    if digest == run.ledger.digest:
        return []
    sentence = f"records differ from what was sent: digest {digest} in the lake, {run.ledger.digest} sent"
    return [finding("readings", sentence)]
