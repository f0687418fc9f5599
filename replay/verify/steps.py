"""Steps of registers against the readings that they were made of, segments, and energy against the truth."""

import duckdb
import polars as pl

from lake.queries import ACCEPTED, broken_segments
from replay.outcomes import GAP_FACTOR, NEAR_WH, STEP_SLACK_WH
from replay.sent import DELTAS, PLACE, REGISTER_LIST, Run
from replay.verify.accounting import UNACCOUNTED
from replay.verify.apart import possible, rows_apart
from replay.verify.findings import FINDINGS, frame, named, queried
from schemas.closed_lists import DeltaReason, FaultKind, FaultOutcome


def check_steps(lake: duckdb.DuckDBPyConnection) -> list[pl.DataFrame]:
    """A step for each register value that was received, and each reading in one bucket.

    Table `delta_account`: per meter received, stored, duplicate, late, quarantined.
    """
    lake.execute(
        f"""CREATE TEMP TABLE delta_account AS
        WITH accepted AS (
            SELECT meter_id, count(*) AS stored FROM (
                SELECT meter_id, bool_or(reason IN {ACCEPTED}) AND NOT bool_or(reason = '{DeltaReason.IMPLAUSIBLE}')
                    AS is_stored
                FROM run_deltas GROUP BY meter_id, observed_at) WHERE is_stored GROUP BY meter_id),
        again AS (
            SELECT meter_id, sum(copies) AS duplicate FROM (
                SELECT meter_id, observed_at, max(copies) AS copies FROM (
                    SELECT meter_id, observed_at, register, count(*) AS copies FROM run_deltas
                    WHERE reason = '{DeltaReason.DUPLICATE}' GROUP BY ALL) GROUP BY ALL) GROUP BY meter_id),
        bare AS (
            SELECT meter_id, count(DISTINCT observed_at) AS stored, count(*) - count(DISTINCT observed_at) AS duplicate
            FROM {possible(DELTAS)} ANTI JOIN apart USING ({PLACE})
            WHERE coalesce({REGISTER_LIST}) IS NULL GROUP BY meter_id),
        received AS (SELECT meter_id, count(*) AS received FROM run_readings GROUP BY meter_id)
        SELECT meter_id, received,
            CAST(coalesce(accepted.stored, 0) + coalesce(bare.stored, 0) AS BIGINT) AS stored,
            CAST(coalesce(again.duplicate, 0) + coalesce(bare.duplicate, 0) AS BIGINT) AS duplicate,
            coalesce(late, 0) AS late, coalesce(quarantined, 0) AS quarantined
        FROM received LEFT JOIN accepted USING (meter_id) LEFT JOIN again USING (meter_id)
        LEFT JOIN bare USING (meter_id) LEFT JOIN {rows_apart(DELTAS)} USING (meter_id)"""
    )
    values = f"""SELECT meter_id, replace(name, '_wh', '') AS register, count(*) AS n,
            sum(hash(observed_at, wh)) AS print
        FROM (UNPIVOT (SELECT meter_id, observed_at, {REGISTER_LIST} FROM {possible(DELTAS)})
            ON {REGISTER_LIST} INTO NAME name VALUE wh) GROUP BY ALL"""
    steps = """SELECT meter_id, register, count(*) AS n, sum(hash(observed_at, wh)) AS print FROM run_deltas
        WHERE inferred IS NOT TRUE GROUP BY ALL"""
    differing = f"""SELECT meter_id, string_agg(register || ': ' || coalesce(s.n, 0) || ' steps for '
            || coalesce(v.n, 0) || ' values'
            || CASE WHEN s.n = v.n THEN ', of other times or values' ELSE '' END, '; ' ORDER BY register) AS finding
        FROM ({values}) v FULL JOIN ({steps}) s USING (meter_id, register)
        WHERE s.n IS DISTINCT FROM v.n OR s.print IS DISTINCT FROM v.print GROUP BY meter_id"""
    unaccounted = UNACCOUNTED.format("delta_account")
    found = (differing, unaccounted, _wrong_steps(), _undecided_steps())
    return [queried(lake, "consumption_deltas", sql) for sql in found]


def _wrong_steps() -> str:
    """Accepted steps that do not follow from the one before: its time and value, the energy, the reason.

    The rules are those of docs/domain.md, Register steps, written down once more: no code is shared with the stream.
    """
    at = "register || ' ' || strftime(observed_at, '%Y-%m-%d %H:%M:%S')"
    wh_max = f"max_w * (epoch(observed_at) - epoch(previous_at)) / 3600 + {STEP_SLACK_WH}"
    full = "coalesce(wraps_wh, CAST(power(10, greatest(length(CAST(previous_wh AS VARCHAR)), 6)) AS BIGINT))"
    return f"""WITH accepted AS (
            SELECT d.*, l.max_w, l.interval_s, l.wraps_wh,
                coalesce(lag(observed_at) OVER segment, lag(observed_at) OVER series) AS before_at,
                coalesce(lag(wh) OVER segment, lag(wh) OVER series) AS before_wh,
                coalesce(last_value(nullif(equipment_id, '') IGNORE NULLS) OVER segment_before,
                    last_value(nullif(equipment_id, '') IGNORE NULLS) OVER series_before) AS known_equipment_id
            FROM (FROM run_deltas ANTI JOIN shared USING (meter_id)) d LEFT JOIN limits l ON l.meter_id = d.meter_id
            WHERE reason IN {ACCEPTED}
            WINDOW series AS (PARTITION BY d.meter_id, register ORDER BY observed_at),
                segment AS (PARTITION BY d.meter_id, register, segment_id ORDER BY observed_at),
                series_before AS (PARTITION BY d.meter_id, register ORDER BY observed_at
                    ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING),
                segment_before AS (PARTITION BY d.meter_id, register, segment_id ORDER BY observed_at
                    ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING)),
        followed AS (
            SELECT *, CASE
                    WHEN previous_at IS NULL THEN '{DeltaReason.FIRST}'
                    WHEN inferred AND wh < previous_wh / 2 AND wh <= greatest(coalesce(max_w, 0), {NEAR_WH})
                        THEN '{DeltaReason.RESET}'
                    WHEN inferred AND reason = '{DeltaReason.RESET}' AND wh <= max_w + {STEP_SLACK_WH} THEN reason
                    WHEN inferred THEN '{DeltaReason.METER_EXCHANGE}'
                    WHEN equipment_id <> '' AND equipment_id <> known_equipment_id
                        THEN '{DeltaReason.METER_EXCHANGE}'
                    WHEN wh < previous_wh AND reason = '{DeltaReason.ROLLOVER}' THEN reason
                    WHEN epoch(observed_at) - epoch(previous_at) > {GAP_FACTOR} * interval_s THEN '{DeltaReason.GAP}'
                    ELSE '{DeltaReason.OK}' END AS made_reason,
                CASE reason WHEN '{DeltaReason.FIRST}' THEN 0 WHEN '{DeltaReason.METER_EXCHANGE}' THEN 0
                    WHEN '{DeltaReason.RESET}' THEN CASE WHEN wh <= coalesce(max_w, {NEAR_WH}) THEN wh
                        WHEN wh > max_w + {STEP_SLACK_WH} THEN 0 ELSE delta_wh END
                    WHEN '{DeltaReason.ROLLOVER}' THEN {full} - previous_wh + wh
                    ELSE wh - previous_wh END AS made_wh
            FROM accepted)
        SELECT meter_id, 'steps that do not follow from the one before: ' || {named(at)} AS finding
        FROM followed
        WHERE (NOT (coalesce(inferred, false) AND reason = '{DeltaReason.FIRST}')
                AND (previous_at IS DISTINCT FROM before_at OR previous_wh IS DISTINCT FROM before_wh))
            OR delta_wh IS DISTINCT FROM made_wh OR reason <> made_reason
            OR coalesce(reason NOT IN ('{DeltaReason.METER_EXCHANGE}', '{DeltaReason.RESET}')
                AND delta_wh > {wh_max}, false)
        GROUP BY meter_id"""


def _undecided_steps() -> str:
    """Values that were held, and of which it was not said once what they were though a later one was taken."""
    at = "register || ' ' || strftime(observed_at, '%Y-%m-%d %H:%M:%S')"
    return f"""WITH mine AS (FROM run_deltas ANTI JOIN shared USING (meter_id)),
        values_held AS (
            SELECT meter_id, register, observed_at, count(*) FILTER (inferred IS NOT TRUE) AS held,
                count(*) FILTER (inferred) AS decided
            FROM mine WHERE inferred OR reason = '{DeltaReason.IMPLAUSIBLE}' GROUP BY ALL),
        newest AS (
            SELECT meter_id, register, max(observed_at) AS newest_at FROM mine WHERE reason IN {ACCEPTED} GROUP BY ALL)
        SELECT meter_id, 'values of which it was not said once what they were: ' || {named(at)} AS finding
        FROM values_held LEFT JOIN newest USING (meter_id, register)
        WHERE decided > held OR (decided < held AND observed_at < newest_at) GROUP BY meter_id"""


def check_segments(lake: duckdb.DuckDBPyConnection) -> pl.DataFrame:
    """Meters of the run with a segment whose deltas do not sum up."""
    rows = [
        {
            "meter_id": meter,
            "place": "consumption_deltas",
            "finding": f"segment {name}: {made} Wh, registers {shown} Wh",
        }
        for meter, _, name, made, shown in broken_segments(lake)
    ]
    mine = pl.DataFrame(rows, schema=FINDINGS)
    return mine.filter(pl.col("meter_id").is_in(frame(lake, "FROM ledger_meters").get_column("meter_id").implode()))


def check_energy(lake: duckdb.DuckDBPyConnection, run: Run, faults: pl.DataFrame) -> list[pl.DataFrame]:
    """Per meter and register the energy of the deltas is what went through the meter.

    An exchange costs the energy between the old equipment's last reading and the new one's first, which is the first
    value less what the new equipment began with. Left out: meters of several runs, those with wild values that nothing
    distinguishes from true ones, of which two that agree are taken for a new segment, those whose registers begin anew
    in the log itself, and those whose readings come out of order there.
    """
    if not run.ledger.is_whole:
        return []
    undistinguished = faults.filter(
        (pl.col("outcome") == FaultOutcome.PLAUSIBLE.value)
        | ((pl.col("outcome") == FaultOutcome.IMPLAUSIBLE.value) & pl.col("kind").is_in(["reset", "rollover"]))
    )
    lake.register("undistinguished", undistinguished.select("meter_id").unique().to_arrow())
    lake.execute(
        f"""CREATE TEMP TABLE uncompared AS FROM shared UNION FROM undistinguished UNION
        SELECT meter_id FROM truth WHERE begins_anew UNION
        SELECT meter_id FROM run_deltas
        WHERE inferred AND reason IN ('{DeltaReason.METER_EXCHANGE}', '{DeltaReason.FIRST}') UNION
        SELECT meter_id FROM (FROM run_deltas ANTI JOIN faults USING (meter_id))
        WHERE {run.ledger.clock == "original"} AND reason IN (
            '{DeltaReason.OUT_OF_ORDER}', '{DeltaReason.IMPLAUSIBLE}', '{DeltaReason.CONFLICT}')"""
    )
    lost = f"""SELECT d.meter_id, d.register,
            sum(d.wh - CASE WHEN d.previous_wh > 0 THEN f.amount ELSE 0 END) AS lost_wh
        FROM run_deltas d JOIN faults f ON f.meter_id = d.meter_id AND f.observed_at = d.observed_at
        WHERE f.kind = '{FaultKind.METER_EXCHANGE}' AND d.reason = '{DeltaReason.METER_EXCHANGE}' GROUP BY ALL"""
    differing = f"""SELECT meter_id, string_agg(
            register || ': ' || energy_wh || ' Wh went through, the deltas have ' || coalesce(found_wh, 0), '; '
            ORDER BY register) AS finding
        FROM (FROM truth ANTI JOIN uncompared USING (meter_id))
        LEFT JOIN (SELECT meter_id, register, CAST(sum(delta_wh) AS BIGINT) AS found_wh FROM run_deltas GROUP BY ALL)
            USING (meter_id, register)
        LEFT JOIN ({lost}) USING (meter_id, register)
        WHERE energy_wh <> coalesce(found_wh, 0) + coalesce(lost_wh, 0) GROUP BY meter_id"""
    return [queried(lake, "consumption_deltas", differing)]
