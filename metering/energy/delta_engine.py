"""Cumulative registers → energy, step by step: the rules of docs/domain.md, Register steps.

Pure functions over Polars frames, the same for the stream, the night and the tests. Records that were seen before are
marked already (`metering/deduplication.py`). Where a whole series is plain (times rise, values do not fall, no step is
too large, the equipment stays) it is differenced by columns; the others go through `walk`, one reading at a time, which
is the definition.

The invariant, under every fault: over the accepted readings of a segment, rollovers unrolled, the sum of delta_wh is
the last value minus the segment's start.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

import polars as pl

from metering.accounting import BUCKETS
from metering.deduplication import FIRST
from schemas.closed_lists import ACCEPTED_DELTAS, DeltaReason
from schemas.tables import CONFLICTS, CONSUMPTION_DELTAS, REGISTERS, polars_schema

STAMP = pl.Datetime("us", "UTC")
PHASE_VOLTAGE_V = 230  # the plausible maximum takes the nominal voltage where the registry has none
GAP_FACTOR = 1.5  # a span of one and a half expected intervals has lost a reading; jitter stays below
UNKNOWN_LIMIT_WH = 1_000  # how near to 0 or to a rollover counts as near, where no fuse is known
NEARLY_FULL_S = 3_600  # a register rolls over from so near to its end: after a long silence a reset is not mistaken
QUANTA_WH = {"pv-home": 100, "nem13": 1_000}  # dialects whose registers do not count single Wh
MIN_REGISTER_DIGITS = 6  # no register in Wh is smaller than 1,000 kWh

BASELINE = pl.Schema(
    {
        "meter_id": pl.String(),
        "register": pl.String(),
        "previous_at": STAMP,
        "previous_wh": pl.Int64(),
        "segment_id": pl.String(),
        "equipment_id": pl.String(),
        "run_id": pl.String(),
    }
)
"""State: the last accepted value of each register."""
STEPS = pl.Schema({**polars_schema(CONSUMPTION_DELTAS), "partition": pl.Int64(), "offset": pl.Int64()})
NUMBER = pl.Schema({"series": pl.UInt32()})
"""Numbers the registers of the meters of a batch, so that nobody need compare two strings."""
CONFLICT_ROWS = polars_schema(CONFLICTS)
KEY = ["meter_id", "register"]
NUMBERS = {register: number for number, register in enumerate(REGISTERS)}
UNPLACED = (DeltaReason.DUPLICATE, DeltaReason.CONFLICT, DeltaReason.OUT_OF_ORDER)
"""Reasons of records that have no place in their series: what stood before them depends on how batches were cut."""


class Result(NamedTuple):
    """What `steps` returns.

    Attributes:
        steps: one row per reading and register with a value, columns `STEPS`, `NUMBER`.
        baseline: the new state, columns `BASELINE`, `NUMBER`: null where no reading was of the meter.
    """

    steps: pl.DataFrame
    baseline: pl.DataFrame


@dataclass(frozen=True)
class Limits:
    """What is known of one meter.

    Attributes:
        max_w: the most power that its fuses let through, W; null is unknown, then no step is too large.
        interval_s: seconds between readings; null is unknown, then no step is a gap.
        quantum_wh: the register's step: in 0.1 kWh steps it jumps 100 Wh in a moment.
    """

    max_w: int | None
    interval_s: int | None
    quantum_wh: int

    def step_wh(self, span_s: float) -> float | None:
        """The largest plausible step over a span, Wh."""
        return None if self.max_w is None else self.max_w * span_s / 3600 + self.quantum_wh


def fuses_w() -> pl.Expr:
    """The most power by the registry: fuse A × phases × V (docs/domain.md, Register steps); null where not known."""
    phases = pl.col("phases").str.split(",").list.len()
    volts = pl.coalesce(pl.col("nominal_mv") / 1000, pl.lit(PHASE_VOLTAGE_V))
    return pl.col("fuse_a") * phases * volts


def with_limits(readings: pl.DataFrame) -> pl.DataFrame:
    """Adds `max_w` from the registry's columns, null where they are absent, and `quantum_wh` by the dialect."""
    return readings.with_columns(
        max_w=fuses_w().cast(pl.Int64),
        quantum_wh=pl.col("dialect").replace_strict(QUANTA_WH, default=1, return_dtype=pl.Int64),
    )


def segment_id(meter_id: str, register: str, start: datetime) -> str:
    """Name of a segment: its meter, register and begin, so that reprocessing gives the same."""
    return f"{meter_id}/{register}/{start:%Y%m%dT%H%M%S.%fZ}"


def walk(baseline: dict[str, Any] | None, rows: list[dict[str, Any]], limits: Limits) -> list[dict[str, Any]]:
    """The definition: one register of one meter, originals in the order of observed_at.

    Args:
        baseline: `BASELINE` columns, or None where the register has no accepted value.
        rows: meter_id, register, observed_at, wh, equipment_id.
        limits: what is known of the meter.

    Returns:
        For each row previous_at, previous_wh, delta_wh, reason, segment_id; accepted rows become the baseline of the
        next, the others leave it as it is.
    """
    out = []
    last = dict(baseline) if baseline else None
    for row in rows:
        delta, segment = None, None
        if last is None:
            reason, delta = DeltaReason.FIRST, 0
            segment = segment_id(row["meter_id"], row["register"], row["observed_at"])
        elif row["observed_at"] < last["previous_at"]:
            reason = DeltaReason.OUT_OF_ORDER
        elif row["observed_at"] == last["previous_at"]:
            reason = DeltaReason.DUPLICATE if row["wh"] == last["previous_wh"] else DeltaReason.CONFLICT
        else:
            reason, delta = _step(last, row, limits)
            new_segment = reason in (DeltaReason.METER_EXCHANGE, DeltaReason.RESET)
            segment = (
                segment_id(row["meter_id"], row["register"], row["observed_at"]) if new_segment else last["segment_id"]
            )
        before = last if last and reason not in UNPLACED else {}  # a record without a place has no step
        out.append(
            {
                "previous_at": before.get("previous_at"),
                "previous_wh": before.get("previous_wh"),
                "delta_wh": delta,
                "reason": reason.value,
                "segment_id": segment or before.get("segment_id"),
            }
        )
        if reason in ACCEPTED_DELTAS:
            last = {
                "previous_at": row["observed_at"],
                "previous_wh": row["wh"],
                "segment_id": segment,
                "equipment_id": row["equipment_id"] or (last or {}).get("equipment_id"),
            }
    return out


def _step(last: dict[str, Any], row: dict[str, Any], limits: Limits) -> tuple[DeltaReason, int | None]:
    """Reason and energy of a step forward in time."""
    if row["equipment_id"] and last["equipment_id"] and row["equipment_id"] != last["equipment_id"]:
        return DeltaReason.METER_EXCHANGE, 0
    span_s = (row["observed_at"] - last["previous_at"]).total_seconds()
    before, value = last["previous_wh"], row["wh"]
    limit = limits.step_wh(span_s)
    if value >= before:
        if limit is not None and value - before > limit:
            return DeltaReason.IMPLAUSIBLE, None
        is_gap = limits.interval_s is not None and span_s > GAP_FACTOR * limits.interval_s
        return (DeltaReason.GAP if is_gap else DeltaReason.OK), value - before
    near = UNKNOWN_LIMIT_WH if limit is None else limit
    nearly = limits.step_wh(max(NEARLY_FULL_S, limits.interval_s or 0))
    full = 10 ** max(len(str(before)), MIN_REGISTER_DIGITS)
    if value >= 0 and full - before + value <= near and full - before <= (near if nearly is None else nearly):
        return DeltaReason.ROLLOVER, full - before + value
    if 0 <= value <= near and value < before / 2:
        return DeltaReason.RESET, value
    return DeltaReason.IMPLAUSIBLE, None


def steps(readings: pl.DataFrame, baseline: pl.DataFrame) -> Result:
    """Steps of all registers of all meters.

    Args:
        readings: of `with_limits`: meter_id, observed_at, run_id, equipment_id, partition, offset, seen, max_w,
            interval_s, quantum_wh and `<register>_wh` of each register.
        baseline: the state so far, columns `BASELINE`.
    """
    meters = readings.select(pl.col("meter_id").unique(maintain_order=True)).with_row_index("meter")
    known = baseline.join(meters, on="meter_id", how="left", maintain_order="left").with_columns(
        series=_series(pl.col("register").replace_strict(NUMBERS, return_dtype=pl.UInt32))
    )
    long = _long(readings.join(meters, on="meter_id", how="left", maintain_order="left")).join(
        known.select("series", "previous_at", "previous_wh", "segment_id", known_equipment="equipment_id"),
        on="series",
        how="left",
        maintain_order="left",
    )
    at, wh, is_next = pl.col("observed_at"), pl.col("wh"), pl.col("series") == pl.col("series").shift(1)
    is_unplaced = pl.col("seen").is_not_null() | (at <= pl.col("previous_at")).fill_null(False)
    is_same_time = at == pl.col("previous_at")
    unplaced = long.filter(is_unplaced).with_columns(
        reason=pl.when(pl.col("seen").is_not_null())
        .then(pl.col("seen"))
        .when(is_same_time & (wh == pl.col("previous_wh")))
        .then(pl.lit(DeltaReason.DUPLICATE.value))
        .when(is_same_time)
        .then(pl.lit(DeltaReason.CONFLICT.value))
        .otherwise(pl.lit(DeltaReason.OUT_OF_ORDER.value)),
        delta_wh=pl.lit(None, pl.Int64),
        previous_at=pl.lit(None, STAMP),
        previous_wh=pl.lit(None, pl.Int64),
        segment_id=pl.lit(None, pl.String),
    )
    ordered = (
        long.filter(~is_unplaced)
        .sort("series", "observed_at")
        .with_columns(
            before_at=pl.when(is_next).then(at.shift(1)).otherwise("previous_at"),
            before_wh=pl.when(is_next).then(wh.shift(1)).otherwise("previous_wh"),
            before_equipment=pl.coalesce(pl.when(is_next).then(pl.col("equipment_id").shift(1)), "known_equipment"),
        )
        .with_columns(span_s=(at - pl.col("before_at")).dt.total_microseconds() / 1e6)
    )
    too_much = (wh - pl.col("before_wh")) > pl.col("max_w") * pl.col("span_s") / 3600 + pl.col("quantum_wh")
    plain = (
        pl.col("before_at").is_null()
        | (
            (at > pl.col("before_at"))
            & (wh >= pl.col("before_wh"))
            & ~too_much.fill_null(False)
            & ~(pl.col("equipment_id") != pl.col("before_equipment")).fill_null(False)
            & (pl.col("equipment_id").is_null() == pl.col("before_equipment").is_null())
        )
    )  # fmt: skip
    broken = ordered.filter(~plain).get_column("series").unique()
    whole, walked = ordered, []
    if len(broken):
        is_broken = ordered.get_column("series").is_in(broken.implode())
        whole = ordered.filter(~is_broken)
        walked = [_walked(group) for group in ordered.filter(is_broken).partition_by("series", maintain_order=True)]
    easy = _easy(whole)
    last_of_series = (pl.col("series") != pl.col("series").shift(-1)).fill_null(True)
    ends = pl.concat([easy.filter(last_of_series), *[_end(group) for group in walked]], how="diagonal")
    newest = ends.select(
        *KEY,
        "segment_id",
        "run_id",
        "series",
        previous_at="observed_at",
        previous_wh="wh",
        equipment_id=pl.coalesce("equipment_id", "known_equipment"),
    ).select(*BASELINE.keys(), "series")
    is_new = pl.col("series").is_in(ends.get_column("series").implode()).fill_null(False)
    kept_baseline = known.filter(~is_new).select(*BASELINE.keys(), "series")
    done = [frame.select(*STEPS.keys(), "series").cast(STEPS | NUMBER) for frame in [easy, unplaced, *walked]]
    return Result(pl.concat(done), pl.concat([kept_baseline, newest]).cast(BASELINE | NUMBER))


def _series(register: pl.Expr) -> pl.Expr:
    """Number of a register of a meter, by the meter's number and the register's."""
    return pl.col("meter") * len(REGISTERS) + register


def _long(readings: pl.DataFrame) -> pl.DataFrame:
    """One row per reading and register with a value, with the number of its series."""
    kept = ["meter_id", "observed_at", "run_id", "partition", "offset", "seen", "max_w", "interval_s", "quantum_wh"]
    return pl.concat(
        [
            readings.filter(pl.col(f"{register}_wh").is_not_null()).select(
                *kept,
                equipment_id=pl.when(pl.col("equipment_id") != "").then("equipment_id"),
                register=pl.lit(register),
                wh=pl.col(f"{register}_wh"),
                series=_series(pl.lit(number, pl.UInt32)),
            )
            for register, number in NUMBERS.items()
        ]
    )


def _easy(ordered: pl.DataFrame) -> pl.DataFrame:
    """Steps of series in which every reading goes on from the one before."""
    is_first = pl.col("before_at").is_null()
    is_gap = (pl.col("span_s") > GAP_FACTOR * pl.col("interval_s")).fill_null(False)
    start = pl.format("{}/{}/{}", "meter_id", "register", pl.col("observed_at").dt.strftime("%Y%m%dT%H%M%S%.6fZ"))
    begun = ordered.filter(is_first).select("series", start=start)  # as segment_id()
    named = (
        ordered.join(begun, on="series", how="left", maintain_order="left")
        if len(begun)
        else ordered.with_columns(start=pl.lit(None, pl.String))
    )
    return named.with_columns(
        reason=pl.when(is_first)
        .then(pl.lit(DeltaReason.FIRST.value))
        .when(is_gap)
        .then(pl.lit(DeltaReason.GAP.value))
        .otherwise(pl.lit(DeltaReason.OK.value)),
        delta_wh=(pl.col("wh") - pl.col("before_wh")).fill_null(0),
        segment_id=pl.coalesce("segment_id", "start"),
        previous_at=pl.col("before_at"),
        previous_wh=pl.col("before_wh"),
    )


def _end(walked: pl.DataFrame) -> pl.DataFrame:
    """The last accepted row of a series, with the equipment that was named last; none where none is."""
    accepted = walked.filter(pl.col("reason").is_in([reason.value for reason in ACCEPTED_DELTAS]))
    return accepted.with_columns(pl.col("equipment_id").forward_fill()).tail(1)


def _walked(group: pl.DataFrame) -> pl.DataFrame:
    rows = group.to_dicts()
    first = rows[0]
    baseline = {**first, "equipment_id": first["known_equipment"]} if first["previous_at"] else None
    limits = Limits(first["max_w"], first["interval_s"], first["quantum_wh"])
    walked = [{**row, **step} for row, step in zip(rows, walk(baseline, rows, limits), strict=True)]
    return pl.DataFrame(walked, schema=group.schema | STEPS)


def conflicts(done: pl.DataFrame, readings: pl.DataFrame, baseline: pl.DataFrame) -> pl.DataFrame:
    """Both values of a conflict, columns `CONFLICT_ROWS`; registers in which the two records agree have none.

    Args:
        done: of `steps`.
        readings: with partition, offset, and `first_<register>_wh` of the original.
        baseline: the state before the steps: a value that is older than what is remembered.
    """
    refused = done.filter(pl.col("reason") == DeltaReason.CONFLICT.value)
    if refused.is_empty():
        return pl.DataFrame(schema=CONFLICT_ROWS)
    place = ["partition", "offset"]
    accepted = (
        readings.join(refused.select(place).unique(), on=place, how="semi")
        .select(*place, *[pl.col(f"{FIRST}{register}_wh").alias(register) for register in REGISTERS])
        .unpivot(on=list(REGISTERS), index=place, variable_name="register", value_name="first_wh")
    )
    held = baseline.select(*KEY, observed_at="previous_at", held_wh="previous_wh")
    return (
        refused.join(accepted, on=[*place, "register"], how="left")
        .join(held, on=[*KEY, "observed_at"], how="left")
        .with_columns(accepted_wh=pl.coalesce("first_wh", "held_wh"), refused_wh="wh")
        .filter(pl.col("accepted_wh").ne_missing(pl.col("refused_wh")))
        .select(CONFLICT_ROWS.keys())
        .cast(CONFLICT_ROWS)
    )


def with_why(readings: pl.DataFrame, done: pl.DataFrame) -> pl.DataFrame:
    """Says of each record why it was not stored, by the reasons of its registers.

    A duplicate or conflict is one as a whole. A record with a wild register is quarantined, one that is too old or
    known to all its registers is late; the rest, also one without any register, is stored.

    Args:
        readings: with partition, offset, seen.
        done: steps of them.

    Returns:
        The readings with `why` (a DeltaReason, null where stored).
    """
    place = ["partition", "offset"]
    wild = pl.col("reason").is_in([DeltaReason.IMPLAUSIBLE.value, DeltaReason.CONFLICT.value])
    doubtful = done.filter(pl.col("reason").is_in(list(BUCKETS))).select(place).unique()
    if doubtful.is_empty():
        return readings.with_columns(why="seen")
    each = (
        done.join(doubtful, on=place, how="semi", maintain_order="left")
        .group_by(place)
        .agg(
            wild=pl.col("reason").filter(wild).first(),
            old=pl.col("reason").is_in([DeltaReason.OUT_OF_ORDER.value, DeltaReason.DUPLICATE.value]).all(),
            same=(pl.col("reason") == DeltaReason.DUPLICATE.value).all(),
        )
    )
    why = (
        pl.when(pl.col("seen").is_not_null())
        .then(pl.col("seen"))
        .when(pl.col("wild").is_not_null())
        .then(pl.col("wild"))
        .when(pl.col("same").fill_null(False))
        .then(pl.lit(DeltaReason.DUPLICATE.value))
        .when(pl.col("old").fill_null(False))
        .then(pl.lit(DeltaReason.OUT_OF_ORDER.value))
    )
    return readings.join(each, on=place, how="left").with_columns(why=why).drop("wild", "old", "same")
