"""Windows of voltage against the readings that they were made of."""

import duckdb
import polars as pl

from replay.sent import PLACE, VOLTAGE, VOLTAGE_LIST
from replay.tape import A_VOLTAGE_MV
from replay.verify.accounting import UNACCOUNTED
from replay.verify.apart import possible, rows_apart
from replay.verify.findings import named, queried
from schemas.closed_lists import Bucket


def check_windows(lake: duckdb.DuckDBPyConnection) -> list[pl.DataFrame]:
    """Each window again, from the readings less what the stage kept apart; meters of several runs are left out.

    Table `voltage_account`: the same as `delta_account`.
    """
    lake.execute(
        f"""CREATE TEMP TABLE all_voltages AS
        SELECT meter_id, observed_at, {VOLTAGE_LIST}, {PLACE}, row_number() OVER same AS turn,
            row({VOLTAGE_LIST}) IS NOT DISTINCT FROM first_value(row({VOLTAGE_LIST})) OVER same AS is_same
        FROM {possible(VOLTAGE)}
        WINDOW same AS (PARTITION BY meter_id, observed_at ORDER BY partition, "offset")"""
    )
    lake.execute(
        f"""CREATE TEMP TABLE placed AS
        FROM all_voltages
        ANTI JOIN (FROM apart WHERE stage = '{VOLTAGE}' AND bucket = '{Bucket.LATE}') USING ({PLACE})"""
    )
    lake.execute(
        f"""CREATE TEMP TABLE voltage_account AS
        SELECT meter_id, received, coalesce(stored, 0) AS stored, coalesce(duplicate, 0) AS duplicate,
            coalesce(late, 0) AS late, coalesce(quarantined, 0) AS quarantined
        FROM (SELECT meter_id, count(*) AS received FROM run_readings GROUP BY meter_id)
        LEFT JOIN (SELECT meter_id, count(*) FILTER (turn = 1) AS stored,
                count(*) FILTER (turn > 1 AND is_same) AS duplicate
            FROM placed GROUP BY meter_id) USING (meter_id)
        LEFT JOIN {rows_apart(VOLTAGE)} USING (meter_id)"""
    )
    lake.execute(
        f"""CREATE TEMP TABLE wrong_windows AS
        WITH made AS (
            {made_windows("placed")}),
        found AS (
            SELECT *, count(*) OVER (PARTITION BY meter_id, phase, window_start) AS times
            FROM run_windows ANTI JOIN shared USING (meter_id))
        SELECT meter_id, phase, window_start, m.n, f.sample_count
        FROM made m FULL JOIN found f USING (meter_id, phase, window_start)
        WHERE f.times > 1 OR f.sample_count IS DISTINCT FROM m.n OR f.min_mv IS DISTINCT FROM m.low
            OR f.max_mv IS DISTINCT FROM m.high OR abs(f.mean_mv - m.mean) > 1"""
    )
    at = "phase || ' ' || strftime(window_start, '%Y-%m-%d %H:%M')"
    differing = f"""SELECT meter_id, coalesce(CAST(sum(sample_count) AS BIGINT), 0) || ' samples for '
            || coalesce(CAST(sum(n) AS BIGINT), 0) || ' voltages: ' || {named(at)} AS finding
        FROM wrong_windows GROUP BY meter_id"""
    unaccounted = UNACCOUNTED.format("voltage_account")
    return [queried(lake, "voltage_windows", sql) for sql in (differing, unaccounted)]


def made_windows(voltages: str) -> str:
    """Windows of a table's first readings of each time, of phases that the registry has and that had a voltage by then.

    Meters of several runs are left out.
    """
    return f"""SELECT meter_id, phase, window_start, count(*) AS n, min(mv) AS low, max(mv) AS high,
            coalesce(sum(mv * (coalesce(gap, after) + coalesce(after, gap)))
                / sum(coalesce(gap, after) + coalesce(after, gap)), avg(mv)) AS mean
        FROM (
            SELECT *, time_bucket(INTERVAL 10 MINUTE, observed_at) AS window_start,
                CAST(epoch_us(observed_at) - epoch_us(lag(observed_at) OVER near) AS DOUBLE) AS gap,
                CAST(epoch_us(lead(observed_at) OVER near) - epoch_us(observed_at) AS DOUBLE) AS after
            FROM (SELECT meter_id, observed_at, upper(split_part(name, '_', 2)) AS phase, mv,
                min(observed_at) FILTER (mv >= {A_VOLTAGE_MV}) OVER (PARTITION BY meter_id, name) AS live_since
            FROM (UNPIVOT (FROM {voltages} ANTI JOIN shared USING (meter_id) WHERE turn = 1) ON {VOLTAGE_LIST}
                INTO NAME name VALUE mv))
            LEFT JOIN (SELECT meter_id, phases FROM newest_registry) USING (meter_id)
            WHERE observed_at >= live_since AND coalesce(contains(phases, phase), true)
            WINDOW near AS (PARTITION BY meter_id, phase, time_bucket(INTERVAL 10 MINUTE, observed_at)
                ORDER BY observed_at))
        GROUP BY ALL"""
