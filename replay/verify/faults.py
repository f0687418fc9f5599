"""Faults: what the lake says of each record that one touched, and what became of each fault."""

import duckdb
import polars as pl

from lake.queries import ACCEPTED
from replay.sent import DELTAS, REGISTER_LIST, VOLTAGE, Run
from replay.verify.findings import frame
from schemas.closed_lists import Bucket, DeltaReason, FaultOutcome
from schemas.tables import REGISTERS


def facts(lake: duckdb.DuckDBPyConnection, run: Run) -> pl.DataFrame:
    """What the lake says of each record that a fault touched: the columns that `RULES` speak of."""
    lake.execute(
        f"""CREATE TEMP TABLE fault_steps AS
        SELECT meter_id, register, observed_at, wh, previous_at, previous_wh, delta_wh, reason,
            CASE WHEN reason IN {ACCEPTED} THEN 0 WHEN reason = '{DeltaReason.IMPLAUSIBLE}' THEN 1 ELSE 2 END AS rank,
            inferred, segment_id
        FROM run_deltas SEMI JOIN (SELECT meter_id FROM faults WHERE topic = 'readings') USING (meter_id)"""
    )
    lake.execute("CREATE TEMP TABLE accepted_steps AS FROM fault_steps WHERE rank = 0")
    lake.execute(
        """CREATE TEMP TABLE inferred_steps AS
        SELECT meter_id, register, observed_at, wh, any_value(reason) AS became, any_value(delta_wh) AS became_wh
        FROM fault_steps WHERE inferred GROUP BY ALL"""
    )
    lake.execute(
        f"""CREATE TEMP TABLE touched AS
        SELECT f.row, any_value(f.meter_id) AS meter_id, any_value(f.register) AS labelled_register,
            arg_min(r.observed_at, r."offset") AS observed_at, {_each('arg_min(r.{0}_wh, r."offset") AS {0}_wh')},
            any_value(d.reason) FILTER (d.bucket = '{Bucket.LATE}') IS NOT NULL AS is_late,
            any_value(d.reason) FILTER (d.bucket = '{Bucket.QUARANTINED}') AS quarantine,
            any_value(v.reason) FILTER (v.bucket = '{Bucket.QUARANTINED}') AS quarantine_voltage
        FROM faults f JOIN run_readings r ON r.meter_id = f.meter_id AND r.seq = f.seq
        LEFT JOIN (FROM apart WHERE stage = '{DELTAS}') d
            ON d.topic = r.topic AND d.partition = r.partition AND d."offset" = r."offset"
        LEFT JOIN (FROM apart WHERE stage = '{VOLTAGE}') v
            ON v.topic = r.topic AND v.partition = r.partition AND v."offset" = r."offset"
        WHERE f.topic = 'readings' GROUP BY f.row"""
    )
    lake.execute(
        f"""CREATE TEMP TABLE own AS
        WITH each AS (
            SELECT v.row, v.labelled_register, s.*,
                s.register = v.labelled_register AND v.is_labelled AS is_named,
                s.reason = '{DeltaReason.IMPLAUSIBLE}' AND v.quarantine = '{DeltaReason.IMPLAUSIBLE}' AS is_wild,
                count(*) FILTER (s.reason = '{DeltaReason.DUPLICATE}') OVER (PARTITION BY v.row, v.register)
                    AS duplicates
            FROM (SELECT *, replace(name, '_wh', '') AS register FROM (
                UNPIVOT (FROM touched JOIN (SELECT row, detail IS NOT NULL AS is_labelled FROM faults) USING (row))
                ON {REGISTER_LIST} INTO NAME name VALUE wh)) v
            JOIN (FROM fault_steps WHERE inferred IS NOT TRUE) s ON s.meter_id = v.meter_id AND s.register = v.register
                AND s.observed_at = v.observed_at AND s.wh = v.wh)
        SELECT row, register, wh, reason, delta_wh, previous_wh, previous_at, duplicates, became, became_wh, segment_id
        FROM each LEFT JOIN inferred_steps USING (meter_id, register, observed_at, wh)
        QUALIFY row_number() OVER (
            PARTITION BY row
            ORDER BY is_named DESC, is_wild DESC, register = labelled_register DESC, register, rank) = 1"""
    )
    changed = """SELECT f.row, c.change, c.alarm_type,
            bool_or(a.change IS NOT NULL OR c.change = 'stays_cleared') AS is_found
        FROM faults f JOIN run_events e ON e.meter_id = f.meter_id AND e.seq = f.seq
        JOIN changes c ON c.topic = e.topic AND c.partition = e.partition AND c."offset" = e."offset"
        LEFT JOIN alarm_rows a ON a.meter_id = c.meter_id AND a.alarm_type = c.alarm_type
            AND a.arrival_at = c.arrival_at AND a.change = c.change
        WHERE f.topic = 'events' GROUP BY ALL"""
    found = frame(
        lake,
        f"""SELECT f.* EXCLUDE (register), coalesce(o.register, f.register) AS register,
            coalesce(a.copies, 0) AS copies, coalesce(a.is_reordered, false) AS is_reordered,
            f.meter_id IN (FROM shared) AS is_shared, l.max_w, l.interval_s, o.wh, t.observed_at AS stamped_at,
            coalesce(t.is_late, false) AS is_late, t.quarantine, t.quarantine_voltage,
            o.reason, o.delta_wh, o.previous_wh, o.previous_at, o.became, o.became_wh,
            coalesce(o.duplicates, 0) AS duplicates, begins.segment_id IS NOT NULL AS is_of_inferred,
            before.observed_at AS before_at, before.wh AS before_wh,
            after.observed_at AS next_at, after.wh AS next_wh, after.delta_wh AS next_delta_wh,
            after.reason AS next_reason, after.previous_at AS next_previous_at, after.previous_wh AS next_previous_wh,
            last.seq > f.seq AS has_later, coalesce(letters.letters, 0) AS letters, letters.reason AS letter_reason,
            changed.change, changed.alarm_type, coalesce(changed.is_found, false) AS is_found
        FROM faults f
        LEFT JOIN arrived a ON a.topic = f.topic AND a.meter_id = f.meter_id AND a.seq = f.seq
        LEFT JOIN limits l ON l.meter_id = f.meter_id
        LEFT JOIN touched t ON t.row = f.row
        LEFT JOIN own o ON o.row = f.row
        LEFT JOIN (SELECT DISTINCT meter_id, register, segment_id FROM accepted_steps WHERE inferred) begins
            ON begins.meter_id = f.meter_id AND begins.register = o.register AND begins.segment_id = o.segment_id
        ASOF LEFT JOIN accepted_steps before ON before.meter_id = f.meter_id AND before.register = f.register
            AND before.observed_at < f.observed_at
        ASOF LEFT JOIN accepted_steps after ON after.meter_id = f.meter_id AND after.register = f.register
            AND after.observed_at > f.observed_at
        LEFT JOIN (SELECT topic, meter_id, max(seq) AS seq FROM arrived GROUP BY ALL) last
            ON last.topic = f.topic AND last.meter_id = f.meter_id
        LEFT JOIN letters ON letters.row = f.row
        LEFT JOIN ({changed}) changed ON changed.row = f.row
        ORDER BY f.row""",
    )
    return found.with_columns(to=pl.lit(run.ledger.to))


def _each(column: str) -> str:
    """Columns in SQL, one a register."""
    return ", ".join(column.format(register) for register in REGISTERS)


def per_fault(faults: pl.DataFrame) -> pl.DataFrame:
    """One row a fault: what became of its records, and of the first unexplained one what is known."""
    if not len(faults):
        schema = {
            "fault_id": pl.Int64, "kind": pl.String, "meter_id": pl.String, "records": pl.Int64,
            "outcome": pl.String, "outcomes": pl.String, "is_explained": pl.Boolean, "detail": pl.String,
        }  # fmt: skip
        return pl.DataFrame(schema=schema)
    known = [
        "topic", "seq", "copies", "is_reordered", "is_late", "quarantine", "quarantine_voltage", "reason", "wh",
        "previous_wh", "delta_wh", "became", "next_reason", "next_delta_wh", "letters", "letter_reason", "change",
        "is_found",
    ]  # fmt: skip
    is_wrong = pl.col("outcome") == FaultOutcome.UNEXPLAINED.value
    sentence = pl.concat_str(
        pl.col("meter_id"),
        *[
            pl.when(pl.col(name).is_not_null()).then(pl.format(" {}={}", pl.lit(name), pl.col(name).cast(pl.String)))
            for name in known
        ],
        ignore_nulls=True,
    )
    counted = (
        faults.group_by("fault_id", "outcome")
        .len()
        .sort("fault_id", "outcome")
        .group_by("fault_id", maintain_order=True)
        .agg(
            outcomes=pl.concat_str(
                pl.lit("{"),
                pl.format('"{}": {}', "outcome", "len").str.join(", "),
                pl.lit("}"),
            ),
            outcome=pl.col("outcome").str.join(" + "),
        )
    )
    return (
        faults.sort("fault_id", "row")
        .group_by("fault_id", maintain_order=True)
        .agg(
            pl.col("kind").first(),
            pl.col("meter_id").first(),
            records=pl.len().cast(pl.Int64),
            is_explained=~is_wrong.any(),
            detail=sentence.filter(is_wrong).first(),
        )
        .join(counted, on="fault_id", how="left", maintain_order="left")
        .select("fault_id", "kind", "meter_id", "records", "outcome", "outcomes", "is_explained", "detail")
    )
