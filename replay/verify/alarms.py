"""Alarms against the events that raise, repeat and clear them."""

from pathlib import Path

import duckdb
import polars as pl

import schemas
from replay.outcomes import MAX_AHEAD, MAX_BEHIND
from replay.sent import PLACE
from replay.verify.findings import queried
from schemas.closed_lists import AlarmSource, AlarmState, Edge, EventAction, FaultOutcome

EVENT_KEY = "meter_id, observed_at, sent_at, seq, dialect, source_table, code, argument"
"""What is the same in all copies of an event."""


def check_alarms(lake: duckdb.DuckDBPyConnection) -> list[pl.DataFrame]:
    """Each change of an alarm again, from the events less what the stage kept apart.

    Tables `original_events` (is_coded, alarm_type, coded_edge as the table of codes has it, edge, event_at, is_apart,
    is_overtaken: a later one of its alarm came before) and `changes` (per event that changes an alarm: place, run_id,
    alarm_type, change).
    """
    codes = Path(schemas.__file__).parent / "events" / "codes.csv"
    ahead, behind = (round(limit.total_seconds()) for limit in (MAX_AHEAD, MAX_BEHIND))
    lake.execute(
        f"""CREATE TEMP TABLE original_events AS
        WITH codes AS (FROM read_csv('{codes}', all_varchar = true)),
        originals AS (
            SELECT * FROM events SEMI JOIN ledger_meters USING (meter_id)
            QUALIFY row_number() OVER (PARTITION BY {EVENT_KEY} ORDER BY partition, "offset") = 1)
        SELECT *, alarm_type IS NOT NULL AND coalesce(max(event_at) OVER (
                PARTITION BY meter_id, alarm_type ORDER BY partition, "offset"
                ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) > event_at, false) AS is_overtaken
        FROM (
            SELECT o.*, c.code IS NOT NULL AS is_coded, c.edge AS coded_edge,
                CASE WHEN c.action = '{EventAction.RAISE}' THEN c.alarm_type END AS alarm_type,
                CASE WHEN c.edge <> '{Edge.LEVEL}' THEN c.edge
                    WHEN argument = '1' THEN '{Edge.RAISE}' WHEN argument = '0' THEN '{Edge.CLEAR}' END AS edge,
                CASE WHEN epoch(observed_at) - epoch(arrival_at) BETWEEN -{behind} AND {ahead}
                    THEN observed_at ELSE arrival_at END AS event_at,
                ({PLACE}) IN (SELECT ({PLACE}) FROM late_events UNION ALL SELECT ({PLACE}) FROM quarantined_events)
                    AS is_apart
            FROM originals o LEFT JOIN codes c ON c.dialect = o.dialect AND c.source_table = o.source_table
                AND c.code = o.code AND c.dialect_version IN (o.dialect_version, '*')
            QUALIFY row_number() OVER (
                PARTITION BY o.topic, o.partition, o."offset" ORDER BY c.dialect_version = '*') = 1)"""
    )
    lake.execute(
        f"""CREATE TEMP TABLE changes AS
        WITH known AS (
            SELECT *, lag(edge, 1, '{Edge.CLEAR}') OVER alarm AS before, lead(edge) OVER alarm AS after,
                lead(event_at) OVER alarm AS after_at, lead("offset") OVER alarm AS after_offset
            FROM original_events WHERE alarm_type IS NOT NULL AND NOT is_apart
            WINDOW alarm AS (PARTITION BY meter_id, alarm_type ORDER BY event_at, partition, "offset")),
        placed AS (  -- a clear that closes nothing is that of the raise in its second
            SELECT *, CASE WHEN edge = '{Edge.CLEAR}' AND before = '{Edge.CLEAR}' AND after = '{Edge.RAISE}'
                AND after_at = event_at THEN after_offset + 0.5 ELSE "offset" END AS place
            FROM known),
        moves AS (
            SELECT * REPLACE (lag(edge, 1, '{Edge.CLEAR}') OVER alarm AS before) FROM placed
            WINDOW alarm AS (PARTITION BY meter_id, alarm_type ORDER BY event_at, partition, place)),
        named AS (
            SELECT *, CASE WHEN edge = '{Edge.RAISE}' AND before = '{Edge.RAISE}' THEN '{FaultOutcome.REPEATED}'
                WHEN edge = '{Edge.RAISE}' THEN '{FaultOutcome.RAISED}'
                WHEN before = '{Edge.RAISE}' THEN '{FaultOutcome.CLEARED}'
                ELSE '{FaultOutcome.STAYS_CLEARED}' END AS change
            FROM moves),
        numbered AS (
            SELECT *, count(*) FILTER (change = '{FaultOutcome.RAISED}') OVER (
                PARTITION BY meter_id, alarm_type ORDER BY event_at, partition, place) AS alarm_number
            FROM named)
        SELECT {PLACE}, run_id, meter_id, alarm_type, event_at, change, max(arrival_at) OVER (
            PARTITION BY meter_id, alarm_type, alarm_number ORDER BY event_at, partition, place) AS arrival_at
        FROM numbered"""
    )
    lake.execute(
        f"""CREATE TEMP TABLE alarm_rows AS
        SELECT meter_id, alarm_type, updated_at AS arrival_at, run_id,
            CASE WHEN state = '{AlarmState.CLEARED}' THEN '{FaultOutcome.CLEARED}'
                WHEN repeat_count = 0 THEN '{FaultOutcome.RAISED}' ELSE '{FaultOutcome.REPEATED}' END AS change,
            CASE WHEN state = '{AlarmState.CLEARED}' THEN cleared_at
                WHEN repeat_count = 0 THEN raised_at END AS changed_at
        FROM alarms SEMI JOIN ledger_meters USING (meter_id) WHERE source = '{AlarmSource.METER_EVENT}'"""
    )
    key = "meter_id, alarm_type, arrival_at, change, changed_at"
    differing = f"""WITH made AS (
            SELECT * REPLACE (CASE WHEN change <> '{FaultOutcome.REPEATED}' THEN changed_at END AS changed_at),
                count(*) AS n
            FROM (SELECT meter_id, alarm_type, arrival_at, change, event_at AS changed_at FROM changes
                WHERE change <> '{FaultOutcome.STAYS_CLEARED}') GROUP BY ALL),
        found AS (SELECT {key}, count(*) AS n FROM alarm_rows GROUP BY ALL),
        differing AS (
            SELECT coalesce(m.meter_id, f.meter_id) AS meter_id, coalesce(m.alarm_type, f.alarm_type) AS alarm_type,
                coalesce(m.change, f.change) AS change, coalesce(m.n, 0) AS made, coalesce(f.n, 0) AS found
            FROM made m FULL JOIN found f ON m.meter_id = f.meter_id AND m.alarm_type = f.alarm_type
                AND m.arrival_at = f.arrival_at AND m.change = f.change
                AND m.changed_at IS NOT DISTINCT FROM f.changed_at
            WHERE coalesce(m.n, 0) <> coalesce(f.n, 0))
        SELECT meter_id, string_agg(finding, '; ' ORDER BY finding) AS finding FROM (
            SELECT meter_id, alarm_type || ' ' || change || ': ' || CAST(sum(found) AS BIGINT) || ' rows for '
                || CAST(sum(made) AS BIGINT) || ' events' AS finding
            FROM differing GROUP BY meter_id, alarm_type, change) GROUP BY meter_id"""
    return [queried(lake, "alarms", differing)]
