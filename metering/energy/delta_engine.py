"""Cumulative registers → energy, step by step: the rules of docs/domain.md, Register steps.

Pure functions over Polars frames, the same for the stream, the night and the tests. Records that were seen before are
marked already (`metering/deduplication.py`). Where a whole series is plain (times rise, values do not fall, no step is
too large, the equipment stays) it is differenced by columns; the others are judged one reading at a time, by `walk` in
the stream, which knows what came before, and by `metering/energy/agreement.py` in the night, which sees both sides.

The invariant, under every fault: over the accepted readings of a segment, rollovers unrolled, the sum of delta_wh is
the last value minus the segment's start.
"""

from typing import NamedTuple

import polars as pl

from metering.accounting import BUCKETS
from metering.deduplication import FIRST
from metering.energy.walk import COARSE_WH, GAP_FACTOR, HELD, Judge, Limits, walk
from metering.voltage.windows import highest_pct
from schemas.closed_lists import DeltaReason
from schemas.tables import CONFLICTS, CONSUMPTION_DELTAS, REGISTERS, polars_schema

STAMP = pl.Datetime("us", "UTC")
PHASE_VOLTAGE_V = 230  # the plausible maximum takes the nominal voltage where the registry has none
DEFAULT_FUSE_A, DEFAULT_PHASES = 100, 3  # of a connection whose fuse is not known, where no setting says otherwise
FUSE_FACTOR = 1.1  # a fuse carries a little more than its rating for hours
QUANTA_WH = {"pv-home": 100, "nem13": 1_000}  # dialects whose registers do not count single Wh
SUMMED = ["nem12"]  # dialects whose registers an importer summed from intervals: they began at 0 with the log

BASELINE = pl.Schema(
    {
        "meter_id": pl.String(),
        "register": pl.String(),
        "previous_at": STAMP,
        "previous_wh": pl.Int64(),
        "segment_id": pl.String(),
        "equipment_id": pl.String(),
        "run_id": pl.String(),
        "is_alone": pl.Boolean(),
        "held_at": STAMP,
        "held_wh": pl.Int64(),
        "held_equipment": pl.String(),
        "held_run": pl.String(),
        "held_segment": pl.String(),
    }
)
"""State: the last accepted value of each register; whether it is its first and none has followed from it; and what is
held until the next one decides: a value that came after it and did not follow from it; or, after an exchange, the last
value of the equipment before, with its segment."""
STEPS = pl.Schema({**polars_schema(CONSUMPTION_DELTAS), "partition": pl.Int64(), "offset": pl.Int64()})
NUMBER = pl.Schema({"series": pl.UInt32()})
"""Numbers the registers of the meters of a batch, so that nobody need compare two strings."""
STEPS_NUMBER, BASELINE_NUMBER = (pl.Schema({**columns, **NUMBER}) for columns in (STEPS, BASELINE))
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


def fuses_w() -> pl.Expr:
    """The power of a connection by the registry: fuse A × phases × nominal V; null where not known."""
    phases = pl.col("phases").str.split(",").list.len()
    return pl.col("fuse_a") * phases * _nominal_v()


def _nominal_v() -> pl.Expr:
    return pl.coalesce(pl.col("nominal_mv") / 1000, pl.lit(PHASE_VOLTAGE_V))


def with_limits(readings: pl.DataFrame) -> pl.DataFrame:
    """Adds `max_w`, the most power that is plausible, and `quantum_wh` by the dialect.

    A fuse carries a little more than its rating for hours, and that at the highest legal voltage. Where no fuse is
    known it is the setting's, three times; null, no limit, only where the registry says so.

    Args:
        readings: dialect, of the registry phases, nominal_mv, fuse_a, jurisdiction, is_unlimited, and default_fuse_a.
    """
    set_a = pl.col("default_fuse_a").max()  # of the others, for a meter that the registry has not
    default_a = pl.coalesce("default_fuse_a", set_a, pl.lit(DEFAULT_FUSE_A))
    known_w = pl.coalesce(fuses_w(), pl.coalesce("fuse_a", default_a) * DEFAULT_PHASES * _nominal_v())
    highest = 1 + highest_pct() / 100
    return readings.with_columns(
        max_w=pl.when(~pl.col("is_unlimited").fill_null(False)).then((known_w * highest * FUSE_FACTOR).cast(pl.Int64)),
        quantum_wh=pl.col("dialect").replace_strict(QUANTA_WH, default=1, return_dtype=pl.Int64),
    )


def steps(readings: pl.DataFrame, baseline: pl.DataFrame, judge: Judge = walk) -> Result:
    """Steps of all registers of all meters.

    Args:
        readings: of `with_limits`: meter_id, observed_at, run_id, equipment_id, partition, offset, seen, max_w,
            interval_s, quantum_wh, wraps_wh and `<register>_wh` of each register.
        baseline: the state so far, columns `BASELINE`.
        judge: of series that are disputed.
    """
    meters = readings.select(pl.col("meter_id").unique(maintain_order=True)).with_row_index("meter")
    known = baseline.join(meters, on="meter_id", how="left", maintain_order="left").with_columns(
        series=_series(pl.col("register").replace_strict(NUMBERS, return_dtype=pl.UInt32))
    )
    long = _long(readings.join(meters, on="meter_id", how="left", maintain_order="left")).join(
        known.select(
            "series", "previous_at", "previous_wh", "segment_id", "is_alone", *HELD, known_equipment="equipment_id"
        ),
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
        inferred=pl.lit(False),
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
    quantum = pl.max_horizontal("quantum_wh", coarse_wh(pl.col("before_wh"), wh))
    too_much = (wh - pl.col("before_wh")) > pl.col("max_w") * pl.col("span_s") / 3600 + quantum
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
    disputed = ordered.filter(~plain | pl.col("held_at").is_not_null()).get_column("series").unique()
    whole, judged = ordered, []
    if len(disputed):
        is_disputed = ordered.get_column("series").is_in(disputed.implode())
        whole = ordered.filter(~is_disputed)
        judged = [
            _judged(group, judge) for group in ordered.filter(is_disputed).partition_by("series", maintain_order=True)
        ]
    easy = _easy(whole)
    last_of_series = (pl.col("series") != pl.col("series").shift(-1)).fill_null(True)
    newest = (
        easy.filter(last_of_series)
        .with_columns(
            previous_at="observed_at",
            previous_wh="wh",
            equipment_id=pl.coalesce("equipment_id", "known_equipment"),
            is_alone=pl.col("reason") == DeltaReason.FIRST.value,
            **{name: pl.lit(None, BASELINE[name]) for name in HELD},
        )
        .select(BASELINE_NUMBER.keys())
    )
    ends = pl.concat([newest, *[end for _, end in judged]])
    is_new = pl.col("series").is_in(ends.get_column("series").implode()).fill_null(False)
    kept_baseline = known.filter(~is_new).select(BASELINE_NUMBER.keys())
    done = [
        frame.select(STEPS_NUMBER.keys()).cast(STEPS_NUMBER)
        for frame in [easy, unplaced, *[each for each, _ in judged]]
    ]
    return Result(pl.concat(done), pl.concat([kept_baseline, ends]).cast(BASELINE_NUMBER))


def _series(register: pl.Expr) -> pl.Expr:
    """Number of a register of a meter, by the meter's number and the register's."""
    return pl.col("meter") * len(REGISTERS) + register


def _long(readings: pl.DataFrame) -> pl.DataFrame:
    """One row per reading and register with a value, with the number of its series."""
    limits = ["max_w", "interval_s", "quantum_wh", "wraps_wh"]
    kept = ["meter_id", "observed_at", "run_id", "partition", "offset", "seen", *limits]
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


def coarse_wh(before: pl.Expr, after: pl.Expr) -> pl.Expr:
    """The coarsest step of a register that both values can be of; as `metering.energy.walk.coarseness_wh`."""
    coarse = pl.lit(1)
    for step in reversed(COARSE_WH[:-1]):
        coarse = pl.when((after % step == 0) & (before % step == 0)).then(step).otherwise(coarse)
    return coarse


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
        inferred=pl.lit(False),
        segment_id=pl.coalesce("segment_id", "start"),
        previous_at=pl.col("before_at"),
        previous_wh=pl.col("before_wh"),
    )


def _judged(series: pl.DataFrame, judge: Judge) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Steps of a series by its readings one by one, and its new baseline."""
    rows = series.to_dicts()
    first = rows[0]
    baseline = {**first, "equipment_id": first["known_equipment"]} if first["previous_at"] else None
    walked = judge(baseline, rows, Limits(first["max_w"], first["interval_s"], first["quantum_wh"], first["wraps_wh"]))
    nowhere = {**first, "partition": None, "offset": None}
    done = [{**(nowhere if step["row"] is None else rows[step["row"]]), **step} for step in walked.steps]
    end = [{**first, **walked.baseline}] if walked.baseline else []
    return pl.DataFrame(done, schema=STEPS_NUMBER), pl.DataFrame(end, schema=BASELINE_NUMBER)


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
