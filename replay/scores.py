"""How well a run's faults were recognised: precision and recall of each reason and alarm type against the truth.

What is due follows from the records as they were sent (the run's digest proves that the lake has them so), their places
in Kafka, the truth about the faults, and the registry. No code is shared with the jobs. One thing only is taken from
their tables: whether a record that came late shared a batch with those it should precede, which no truth can know; the
step of the record after it says so, and the two have to agree. What nothing decides is left out of both sides, counted
and named. docs/replay.md says the same in words.
"""

from dataclasses import dataclass

import duckdb
import polars as pl
from rich import box
from rich.table import Table

from replay.outcomes import (
    EXPECTED_LETTER,
    GAP_FACTOR,
    MAX_AHEAD,
    MAX_BEHIND,
    NEAR_WH,
    NEARLY_FULL_S,
    STEP_SLACK_WH,
)
from replay.sent import DELTAS, PLACE, REGISTER_LIST, VOLTAGE, VOLTAGE_LIST, Run
from schemas.closed_lists import DeltaReason, Edge, FaultKind, FaultOutcome, QuarantineReason
from schemas.tables import REGISTERS

LEAST = 0.99
"""A precision or recall below this does not hold."""
RECENT_RECORDS = 10_000  # offsets within which a record is known again; the jobs' settings have the same
UNDECIDED, LOG = "undecided", "log"
ALL = 1 << 62  # more rows than there are
VALUE = "meter_id, register, observed_at, wh"
NOT_SCORED = (DeltaReason.FIRST, DeltaReason.OK, DeltaReason.GLITCH)  # a glitch follows from an implausible one
SCORED = f"({', '.join(repr(each.value) for each in DeltaReason if each not in NOT_SCORED)})"
LIMIT_WH = "max_w * (epoch(observed_at) - epoch(previous_at)) / 3600"
NEARLY_FULL_WH = f"max_w * greatest({NEARLY_FULL_S}, coalesce(interval_s, 0)) / 3600"
WHY = {
    FaultKind.LATE: "came within a batch, in order after all: no reason is due",
    FaultKind.REORDER: "came within a batch, in order after all: no reason is due",
    FaultKind.CLOCK_JUMP: "what it and those after it become depends on which of them shared a batch",
    FaultKind.FROZEN: "an empty house looks the same: no reason says it",
    FaultKind.SPIKE: "no limit, little enough to be true, or two that agree: nothing after it can be decided",
    FaultKind.UNIT_SLIP: "no limit, little enough to be true, or two that agree: nothing after it can be decided",
    FaultKind.RESET: "the first value is above what the fuse lets through: nothing after it can be decided",
    FaultKind.ROLLOVER: "the step is above what the fuse lets through, or begins far from the end of the register",
}
"""Kinds of faults of which the truth cannot always say what is due, and why."""


@dataclass(frozen=True)
class Scores:
    """Precision and recall of a run.

    Attributes:
        table: a row per reason or alarm type that is due or found anywhere: place (the table), reason; expected, found
            and right, rows where the truth decides; precision = right / found, null where nothing is found; recall =
            right / expected, null where nothing is due; undecidable, rows found where it does not decide.
        undecidable: cause, records, why: of what the truth does not decide, most first.
    """

    table: pl.DataFrame
    undecidable: pl.DataFrame

    @property
    def low(self) -> pl.DataFrame:
        """Rows of the table with a figure below `LEAST`."""
        return self.table.filter((pl.col("precision") < LEAST) | (pl.col("recall") < LEAST))


def scores(lake: duckdb.DuckDBPyConnection, run: Run) -> Scores:
    """Scores a run; `lake` has the views of `Run.open_in` and what `replay.verify` made of the alarms."""
    _copies(lake)
    _series(lake)
    lake.register("due_letters", _due_letters(run).to_arrow())
    tallies = [_steps(), _quarantined_readings(), _quarantined_events(), _letters(run), _alarms()]
    found = lake.sql(
        f"""SELECT place, reason, CAST(sum(due) AS BIGINT) AS expected, CAST(sum(found - spared) AS BIGINT) AS found,
            CAST(sum(hit) AS BIGINT) AS "right", sum(hit) / nullif(sum(found - spared), 0) AS precision,
            sum(hit) / nullif(sum(due), 0) AS recall, CAST(sum(spared) AS BIGINT) AS undecidable
        FROM (SELECT *, least(due, found) AS hit, least(greatest(found - due, 0), spare) AS spared
            FROM ({" UNION ALL ".join(f"({each})" for each in tallies)}))
        GROUP BY ALL ORDER BY ALL"""
    )
    return Scores(pl.DataFrame(found.to_arrow_table()), _undecidable(lake))


def _copies(lake: duckdb.DuckDBPyConnection) -> None:
    """Table `copies`: the run's readings, with what their stamps and places alone decide; meters of several runs not.

    is_impossible; turn: which of the readings with one stamp it is, by arrival; is_same, is_same_voltage: as the first
    of these; is_known: it came soon enough after that one; is_redelivered: sent once, and there again; is_overtaken:
    one with a later stamp came before.
    """
    ahead, behind = (round(limit.total_seconds()) for limit in (MAX_AHEAD, MAX_BEHIND))
    lake.execute(
        f"""CREATE TEMP TABLE copies AS
        WITH clocked AS (
            SELECT r.*, partition << 40 | "offset" AS place,
                l.meter_id IS NOT NULL OR epoch(r.observed_at) - epoch(r.arrival_at) NOT BETWEEN -{behind} AND {ahead}
                    AS is_impossible
            FROM run_readings r
            LEFT JOIN (SELECT DISTINCT meter_id, seq FROM faults
                WHERE was_sent AND kind IN ('{FaultKind.CLOCK_1970}', '{FaultKind.CLOCK_2099}')) l
                ON l.meter_id = r.meter_id AND l.seq = r.seq
            ANTI JOIN shared ON shared.meter_id = r.meter_id),
        injected AS (SELECT meter_id, seq, count(*) AS copies FROM faults
            WHERE kind = '{FaultKind.DUPLICATE}' AND was_sent GROUP BY ALL)
        SELECT c.meter_id, c.seq, observed_at, {REGISTER_LIST}, {PLACE}, place, is_impossible,
            row_number() OVER same AS turn,
            row({REGISTER_LIST}, equipment_id) IS NOT DISTINCT FROM
                first_value(row({REGISTER_LIST}, equipment_id)) OVER same AS is_same,
            row({VOLTAGE_LIST}) IS NOT DISTINCT FROM first_value(row({VOLTAGE_LIST})) OVER same AS is_same_voltage,
            place - first_value(place) OVER same <= {RECENT_RECORDS} AS is_known,
            row_number() OVER (PARTITION BY c.meter_id, c.seq ORDER BY place) - 1 > coalesce(i.copies, 0)
                AS is_redelivered,
            coalesce(max(observed_at) OVER (PARTITION BY c.meter_id, is_impossible ORDER BY place
                ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) > observed_at, false) AS is_overtaken
        FROM clocked c LEFT JOIN injected i ON i.meter_id = c.meter_id AND i.seq = c.seq
        WINDOW same AS (PARTITION BY c.meter_id, observed_at, is_impossible ORDER BY place)"""
    )


def _series(lake: duckdb.DuckDBPyConnection) -> None:
    """Table `due_steps`: each register's steps with a reason that the truth decides.

    Also `undecided_since`: per meter and register the time since when it does not, and for which cause; `overtaken`:
    values before which one with a later stamp came, is_caught where both came within a batch.
    """
    lake.execute(
        f"""CREATE TEMP TABLE values_sent AS
        SELECT v.meter_id, replace(name, '_wh', '') AS register, v.observed_at, wh, place, is_overtaken, f.kind,
            f.amount,
            coalesce((f.kind = '{FaultKind.SPIKE}' AND f.detail = name)
                OR (f.kind = '{FaultKind.UNIT_SLIP}' AND wh > 0), false) AS is_wild,
            f.kind <> '{FaultKind.ROLLOVER}' OR f.detail = name AS is_labelled
        FROM (UNPIVOT (SELECT meter_id, seq, observed_at, place, is_overtaken, {REGISTER_LIST} FROM copies
                WHERE turn = 1 AND NOT is_impossible) ON {REGISTER_LIST} INTO NAME name VALUE wh) v
        LEFT JOIN (SELECT DISTINCT ON (meter_id, seq) * FROM faults
            WHERE topic = 'readings' AND was_sent AND kind <> '{FaultKind.DUPLICATE}') f
            ON f.meter_id = v.meter_id AND f.seq = v.seq"""
    )
    # of the values that came before it and are later, the first one's step begins after it, or at it
    lake.execute(
        f"""CREATE TEMP TABLE overtaken AS
        WITH late AS (
            SELECT o.meter_id, o.register, o.observed_at, o.wh, o.kind, min(s.observed_at) AS next_at
            FROM (FROM values_sent WHERE is_overtaken AND NOT is_wild) o
            JOIN (FROM values_sent WHERE NOT is_wild) s ON s.meter_id = o.meter_id AND s.register = o.register
                AND s.observed_at > o.observed_at AND s.place < o.place
            GROUP BY ALL)
        SELECT {VALUE}, kind, EXISTS (FROM run_deltas d WHERE d.meter_id = late.meter_id AND d.register = late.register
            AND d.observed_at = late.next_at AND d.previous_at >= late.observed_at) AS is_caught
        FROM late"""
    )
    lake.execute(
        """CREATE TEMP VIEW series AS FROM values_sent
        ANTI JOIN (FROM overtaken WHERE NOT is_caught) USING (meter_id, register, observed_at) WHERE NOT is_wild"""
    )
    lake.execute(
        f"""CREATE TEMP TABLE reasoned_steps AS
        WITH placed AS (
            SELECT s.*, max_w, interval_s,
                lag(observed_at) OVER place AS previous_at, lag(wh) OVER place AS previous_wh,
                lead(observed_at) OVER place IS NULL AS is_last
            FROM (SELECT *, coalesce(lead(is_wild) OVER (PARTITION BY meter_id, register ORDER BY observed_at), false)
                AS is_before_wild FROM values_sent) s
            SEMI JOIN series USING (meter_id, register, observed_at, wh)
            LEFT JOIN limits l ON l.meter_id = s.meter_id
            WINDOW place AS (PARTITION BY s.meter_id, register ORDER BY observed_at))
        SELECT {VALUE}, kind, is_last, CASE
                WHEN kind = '{FaultKind.METER_EXCHANGE}' THEN '{DeltaReason.METER_EXCHANGE}'
                WHEN kind = '{FaultKind.ROLLOVER}' AND is_labelled THEN CASE
                    WHEN wh < previous_wh AND amount - previous_wh + wh <= coalesce({LIMIT_WH}, {NEAR_WH})
                        AND amount - previous_wh <= coalesce({NEARLY_FULL_WH}, {NEAR_WH})
                    THEN '{DeltaReason.ROLLOVER}' ELSE '{UNDECIDED}' END
                WHEN kind = '{FaultKind.RESET}' AND wh < previous_wh THEN CASE
                    WHEN wh <= greatest(coalesce(max_w, 0), {NEAR_WH}) AND wh < previous_wh / 2 AND NOT is_before_wild
                    THEN '{DeltaReason.RESET}' ELSE '{UNDECIDED}' END
                WHEN wh < previous_wh OR wh - previous_wh > {LIMIT_WH} THEN '{UNDECIDED}'
                WHEN epoch(observed_at) - epoch(previous_at) > {GAP_FACTOR} * interval_s THEN '{DeltaReason.GAP}'
                END AS reason
        FROM placed WHERE previous_at IS NOT NULL AND reason IS NOT NULL"""
    )
    lake.execute(
        f"""CREATE TEMP TABLE wild AS
        SELECT w.*, coalesce(CASE w.kind WHEN '{FaultKind.UNIT_SLIP}' THEN w.wh - w.wh / w.amount ELSE w.amount END
                > max_w * (epoch(w.observed_at) - epoch(s.observed_at)) / 3600 + {STEP_SLACK_WH}, false) AS is_sure
        FROM (FROM values_sent WHERE is_wild) w LEFT JOIN limits l ON l.meter_id = w.meter_id
        ASOF LEFT JOIN series s ON s.meter_id = w.meter_id AND s.register = w.register
            AND s.observed_at < w.observed_at"""
    )
    registers = ", ".join(f"('{register}')" for register in REGISTERS)
    lake.execute(
        f"""CREATE TEMP TABLE undecided_since AS
        SELECT meter_id, register, min(observed_at) AS since, arg_min(cause, observed_at) AS cause FROM (
            SELECT meter_id, register, observed_at, coalesce(kind, '{LOG}') AS cause FROM reasoned_steps
            WHERE reason = '{UNDECIDED}'
            UNION ALL SELECT meter_id, register, observed_at, kind FROM wild WHERE NOT is_sure
            UNION ALL SELECT meter_id, register, before_at, kind FROM (
                SELECT *, lag(is_wild) OVER place AS is_after_wild, lag(observed_at) OVER place AS before_at
                FROM values_sent WINDOW place AS (PARTITION BY meter_id, register ORDER BY observed_at))
            WHERE is_wild AND is_after_wild
            UNION ALL SELECT meter_id, each, least(observed_at, observed_at - to_seconds(amount)), kind
                FROM faults, (VALUES {registers}) named (each) WHERE kind = '{FaultKind.CLOCK_JUMP}' AND was_sent
            UNION ALL SELECT meter_id, register, TIMESTAMPTZ '-infinity', '{LOG}' FROM truth WHERE begins_anew)
        GROUP BY ALL"""
    )
    lake.execute(
        f"""CREATE TEMP TABLE due_steps AS
        SELECT {VALUE}, reason FROM (
            SELECT {VALUE}, reason FROM reasoned_steps WHERE NOT (reason = '{DeltaReason.RESET}' AND is_last)
            UNION ALL SELECT {VALUE}, '{DeltaReason.IMPLAUSIBLE}' FROM reasoned_steps
            WHERE reason = '{DeltaReason.RESET}'
            UNION ALL SELECT {VALUE}, '{DeltaReason.IMPLAUSIBLE}' FROM wild
            UNION ALL SELECT {VALUE}, '{DeltaReason.OUT_OF_ORDER}' FROM overtaken WHERE NOT is_caught)
        LEFT JOIN undecided_since USING (meter_id, register)
        WHERE reason IN {SCORED} AND (since IS NULL OR observed_at < since)
        UNION ALL
        SELECT meter_id, replace(name, '_wh', ''), observed_at, wh,
            CASE WHEN is_same THEN '{DeltaReason.DUPLICATE}' ELSE '{DeltaReason.CONFLICT}' END
        FROM (UNPIVOT (FROM copies WHERE turn > 1 AND is_known AND NOT is_redelivered AND NOT is_impossible)
            ON {REGISTER_LIST} INTO NAME name VALUE wh)"""
    )


def _steps() -> str:
    """Steps by reason; what came again from the broker may have any, and so may what follows an undecided step."""
    by_identity = f"('{DeltaReason.DUPLICATE}', '{DeltaReason.CONFLICT}')"
    return f"""WITH due AS (SELECT {VALUE}, reason, count(*) AS due FROM due_steps GROUP BY ALL),
        made AS (SELECT {VALUE}, reason, count(*) AS found FROM run_deltas ANTI JOIN shared USING (meter_id)
            WHERE reason IN {SCORED} GROUP BY ALL),
        again AS (SELECT meter_id, replace(name, '_wh', '') AS register, observed_at, wh, count(*) AS again
            FROM (UNPIVOT (FROM copies WHERE turn > 1 AND (is_redelivered OR NOT is_known)) ON {REGISTER_LIST}
                INTO NAME name VALUE wh) GROUP BY ALL)
        SELECT 'consumption_deltas' AS place, reason, coalesce(due, 0) AS due, coalesce(found, 0) AS found,
            CASE WHEN observed_at >= since AND reason NOT IN {by_identity} THEN {ALL} ELSE coalesce(again, 0) END
                AS spare
        FROM due FULL JOIN made USING ({VALUE}, reason) LEFT JOIN again USING ({VALUE})
        LEFT JOIN undecided_since USING (meter_id, register)"""


def _quarantined_readings() -> str:
    """Readings that are kept apart, by reason, of both stages; a record is wild where one of its registers is."""
    conflicts = f"""SELECT '{{stage}}' AS stage, '{QuarantineReason.CONFLICT}' AS reason, {PLACE} FROM copies
        WHERE turn > 1 AND is_known AND NOT is_impossible AND NOT is_redelivered AND NOT {{same}}"""
    return f"""WITH due AS (
            SELECT stage, '{QuarantineReason.IMPOSSIBLE_CLOCK}' AS reason, {PLACE}
            FROM copies, (VALUES ('{DELTAS}'), ('{VOLTAGE}')) stages (stage)
            WHERE is_impossible AND NOT is_redelivered
            UNION ALL {conflicts.format(stage=DELTAS, same="is_same")}
            UNION ALL {conflicts.format(stage=VOLTAGE, same="is_same_voltage")}
            UNION ALL SELECT DISTINCT '{DELTAS}', '{QuarantineReason.IMPLAUSIBLE}', {PLACE}
            FROM copies SEMI JOIN (FROM due_steps WHERE reason = '{DeltaReason.IMPLAUSIBLE}')
                USING (meter_id, observed_at) WHERE turn = 1 AND NOT is_impossible),
        made AS (SELECT stage, reason, {PLACE}, count(*) AS found FROM apart ANTI JOIN shared USING (meter_id)
            WHERE kept_in = 'quarantined_readings' AND stage IN ('{DELTAS}', '{VOLTAGE}') GROUP BY ALL),
        spared AS (
            SELECT {PLACE}, NULL AS reason FROM copies WHERE is_redelivered OR (turn > 1 AND NOT is_known)
            UNION SELECT {PLACE}, '{QuarantineReason.IMPLAUSIBLE}' FROM copies
            JOIN (SELECT meter_id, min(since) AS since FROM undecided_since GROUP BY ALL) USING (meter_id)
            WHERE turn = 1 AND observed_at >= since),
        joined AS (SELECT reason, {PLACE}, coalesce(due, 0) AS due, coalesce(found, 0) AS found
            FROM (SELECT *, 1 AS due FROM due) FULL JOIN made USING (stage, reason, {PLACE}))
        SELECT 'quarantined_readings' AS place, j.reason, due, found,
            CASE WHEN EXISTS (FROM spared s WHERE s.topic = j.topic AND s.partition = j.partition
                AND s."offset" = j."offset" AND coalesce(s.reason, j.reason) = j.reason) THEN {ALL} ELSE 0 END AS spare
        FROM joined j"""


def _quarantined_events() -> str:
    """Events that are kept apart, by reason: no table has their code, or their level is none."""
    return f"""WITH due AS (
            SELECT {PLACE}, CASE WHEN is_coded THEN '{QuarantineReason.UNKNOWN_ARGUMENT}'
                ELSE '{QuarantineReason.UNKNOWN_CODE}' END AS reason
            FROM original_events ANTI JOIN shared USING (meter_id)
            WHERE NOT is_coded OR (coded_edge = '{Edge.LEVEL}' AND edge IS NULL)),
        made AS (SELECT reason, {PLACE}, count(*) AS found FROM apart ANTI JOIN shared USING (meter_id)
            WHERE kept_in = 'quarantined_events' GROUP BY ALL)
        SELECT 'quarantined_events' AS place, reason, coalesce(due, 0) AS due, coalesce(found, 0) AS found, 0 AS spare
        FROM (SELECT *, 1 AS due FROM due) FULL JOIN made USING (reason, {PLACE})"""


def _due_letters(run: Run) -> pl.DataFrame:
    """The dead letters that the run's poison leads to: payload, whose (null past the bridge), reason."""
    poison = run.faults.filter((pl.col("kind") == FaultKind.POISON.value) & pl.col("was_sent"))
    whose = pl.col("meter_id") if run.ledger.to == "mqtt" else pl.lit(None, pl.String)
    return poison.with_columns(to=pl.lit(run.ledger.to)).select("payload", whose=whose, reason=EXPECTED_LETTER)


def _letters(run: Run) -> str:
    """Dead letters of the run's time by reason; the same bytes once more were redelivered.

    Others than the run's poison are wrong, unless the lake has records of others, whose they may be.
    """
    run_id = run.ledger.run_id.replace("'", "''")
    return f"""WITH due AS (SELECT payload, whose, reason, count(*) AS due FROM due_letters GROUP BY ALL),
        made AS (SELECT payload, whose, reason, count(*) AS found FROM run_letters GROUP BY ALL),
        others AS (SELECT EXISTS (FROM readings WHERE run_id IS DISTINCT FROM '{run_id}') AS has_others)
        SELECT 'dead_letters' AS place, coalesce(d.reason, m.reason) AS reason, coalesce(due, 0) AS due,
            coalesce(found, 0) AS found, CASE WHEN due > 0 OR has_others THEN {ALL} ELSE 0 END AS spare
        FROM due d FULL JOIN made m ON m.payload = d.payload AND m.whose IS NOT DISTINCT FROM d.whose
            AND m.reason = d.reason, others"""


def _alarms() -> str:
    """Rows of alarms by type; an event that no later one came before is never late, whatever the stage says."""
    key = "meter_id, alarm_type, arrival_at, change, changed_at"
    return f"""WITH due AS (
            SELECT {key}, count(*) AS due FROM (
                SELECT meter_id, alarm_type, arrival_at, change,
                    CASE WHEN change <> '{FaultOutcome.REPEATED}' THEN event_at END AS changed_at
                FROM changes WHERE change <> '{FaultOutcome.STAYS_CLEARED}'
                UNION ALL SELECT meter_id, alarm_type, arrival_at, '{UNDECIDED}', event_at FROM original_events
                WHERE is_apart AND NOT is_overtaken AND alarm_type IS NOT NULL AND edge IS NOT NULL)
            ANTI JOIN shared USING (meter_id) GROUP BY ALL),
        made AS (SELECT {key}, count(*) AS found FROM alarm_rows ANTI JOIN shared USING (meter_id) GROUP BY ALL)
        SELECT 'alarms' AS place, coalesce(d.alarm_type, m.alarm_type) AS reason, coalesce(due, 0) AS due,
            coalesce(found, 0) AS found, 0 AS spare
        FROM due d FULL JOIN made m ON m.meter_id = d.meter_id AND m.alarm_type = d.alarm_type
            AND m.arrival_at = d.arrival_at AND m.change = d.change
            AND m.changed_at IS NOT DISTINCT FROM d.changed_at"""


def _undecidable(lake: duckdb.DuckDBPyConnection) -> pl.DataFrame:
    """Why the truth does not decide, and of how many records."""
    why = " ".join(f"WHEN '{kind}' THEN '{text}'" for kind, text in WHY.items())
    found = lake.sql(
        f"""WITH named AS (
            SELECT DISTINCT meter_id, observed_at, kind AS cause FROM overtaken
            WHERE is_caught AND kind IN ('{FaultKind.LATE}', '{FaultKind.REORDER}')
            UNION ALL SELECT meter_id, observed_at, kind FROM faults
            WHERE was_sent AND kind IN ('{FaultKind.FROZEN}', '{FaultKind.CLOCK_JUMP}')
            UNION ALL SELECT DISTINCT meter_id, since, cause FROM undecided_since
            WHERE cause <> '{FaultKind.CLOCK_JUMP}'),
        each AS (
            SELECT cause, CASE cause {why} ELSE 'steps as no fault does: nothing after it can be decided' END AS why
            FROM named
            UNION ALL SELECT 'redelivered', 'sent once, brought again by the broker' FROM copies WHERE is_redelivered
            UNION ALL SELECT 'distant', 'came more than {RECENT_RECORDS:,} records after the first with its stamp'
            FROM copies WHERE turn > 1 AND NOT is_known
            UNION ALL SELECT 'several runs', 'of meters that other runs played too'
            FROM run_readings SEMI JOIN shared USING (meter_id))
        SELECT cause, count(*) AS records, any_value(why) AS why FROM each GROUP BY cause ORDER BY cause"""
    )
    return pl.DataFrame(found.to_arrow_table())


def rendered_scores(scored: Scores) -> list[Table | str]:
    """For people: the table, what is too low, and what the truth does not decide."""
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    for name in ("table", "reason"):
        table.add_column(name, no_wrap=True)
    for name in ("expected", "found", "right", "precis.", "recall", "undec."):
        table.add_column(name, justify="right")
    for row in scored.table.iter_rows(named=True):
        numbers = [f"{row[name]:,}" for name in ("expected", "found", "right")]
        parts = ["–" if row[name] is None else f"{row[name]:.4f}" for name in ("precision", "recall")]
        table.add_row(row["place"], row["reason"], *numbers, *parts, f"{row['undecidable']:,}")
    lines: list[Table | str] = [table] if len(scored.table) else []
    for row in scored.low.iter_rows(named=True):
        lines.append(f"[red]✗[/] {row['place']} {row['reason']}: precision or recall is below {LEAST}")
    for row in scored.undecidable.iter_rows(named=True):
        lines.append(f"  undecidable: {row['records']:,} of {row['cause']}: {row['why']}")
    return lines
