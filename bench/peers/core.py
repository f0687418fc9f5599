"""The peers' work alone, on our engine: the same runner, source, decoding, state by batch and Parquet as our jobs.

`deltas` and `windows` take a job's place in `engine.runner.Runner`. They write the columns that the peers write; the
others of the table are null. No conflicts, no plausibility, no quarter hours, no counters, no roll-ups.
"""

import polars as pl

from engine.job import BatchContext, Frames, Output, Source, StreamingJob
from metering.accounting import verdicts
from metering.energy.delta_engine import STAMP
from metering.voltage.windows import VOLTAGES, WINDOW, window_start
from schemas.closed_lists import DeltaReason
from schemas.tables import PHASES, TABLES
from schemas.topics import READINGS

REGISTER = "import_t1"
LAST = pl.Schema({"meter_id": pl.String(), "previous_at": STAMP, "previous_wh": pl.Int64()})
SAMPLE = pl.Schema({"meter_id": pl.String(), "observed_at": STAMP, **dict.fromkeys(VOLTAGES, pl.Int64())})


def deltas(rows: pl.DataFrame, registry: pl.DataFrame, state: Frames, context: BatchContext) -> Output:
    """Energy of each step of one register; within a batch readings are sorted, older ones are out of order."""
    at, wh, meter = pl.col("observed_at"), pl.col("wh"), pl.col("meter")
    readings = rows.select("meter_id", "observed_at", "partition", "offset", wh=f"{REGISTER}_wh")
    known = readings.select(pl.col("meter_id").unique()).join(state["last"], on="meter_id", how="left")
    ordered = (
        readings.join(known.with_row_index("meter"), on="meter_id", how="left", maintain_order="left")
        .sort("meter", "observed_at", "offset")
        .with_columns(
            refused=pl.when(((meter == meter.shift(1)) & (at == at.shift(1))) | (at == pl.col("previous_at")))
            .then(pl.lit(DeltaReason.DUPLICATE.value))
            .when(at < pl.col("previous_at"))
            .then(pl.lit(DeltaReason.OUT_OF_ORDER.value))
        )
    )
    is_next = meter == meter.shift(1)
    accepted = (
        ordered.filter(pl.col("refused").is_null())
        .with_columns(
            previous_at=pl.when(is_next).then(at.shift(1)).otherwise("previous_at"),
            previous_wh=pl.when(is_next).then(wh.shift(1)).otherwise("previous_wh"),
        )
        .with_columns(
            delta_wh=(wh - pl.col("previous_wh")).fill_null(0),
            reason=pl.when(pl.col("previous_at").is_null())
            .then(pl.lit(DeltaReason.FIRST.value))
            .otherwise(pl.lit(DeltaReason.OK.value)),
        )
    )
    refused = ordered.filter(pl.col("refused").is_not_null()).with_columns(reason="refused")
    newest = accepted.filter((meter != meter.shift(-1)).fill_null(True)).select(
        "meter_id", previous_at="observed_at", previous_wh="wh"
    )
    rest = state["last"].join(newest, on="meter_id", how="anti")
    placed = refused.select("meter_id", "observed_at", "wh", "reason")
    steps = pl.concat([accepted, placed], how="diagonal").with_columns(register=pl.lit(REGISTER))
    return Output(
        tables={"consumption_deltas": _filled("consumption_deltas", steps)},
        state={"last": pl.concat([rest, newest])},
        verdicts=verdicts(refused, pl.col("reason")),
    )


def windows(rows: pl.DataFrame, registry: pl.DataFrame, state: Frames, context: BatchContext) -> Output:
    """Ten minutes of each phase, closed when arrivals are past their end by the lateness, or by a flush."""
    watermark = pl.lit(context.watermarks.get_column("watermark").max(), STAMP)
    is_over = (window_start() + WINDOW <= watermark).fill_null(False)
    in_time = rows.filter(~is_over).select(*SAMPLE.names())
    samples = pl.concat([state["sample"], in_time])
    closing = samples if context.close_all else samples.filter(is_over)
    wide = (
        closing.unique(["meter_id", "observed_at"])
        .group_by("meter_id", window_start=window_start())
        .agg(
            **{f"sample_count{name}": pl.col(name).count() for name in VOLTAGES},
            **{f"mean_mv{name}": pl.col(name).mean().round().cast(pl.Int64) for name in VOLTAGES},
            **{f"min_mv{name}": pl.col(name).min() for name in VOLTAGES},
            **{f"max_mv{name}": pl.col(name).max() for name in VOLTAGES},
        )
    )
    statistics = ("sample_count", "mean_mv", "min_mv", "max_mv")
    long = pl.concat(
        [
            wide.select(
                "meter_id", "window_start", phase=pl.lit(phase), **{each: f"{each}{name}" for each in statistics}
            )
            for phase, name in zip(PHASES, VOLTAGES, strict=True)
        ]
    )
    return Output(
        tables={"voltage_windows": _filled("voltage_windows", long.filter(pl.col("sample_count") > 0))},
        state={"sample": samples.clear() if context.close_all else samples.filter(~is_over)},
        verdicts=verdicts(rows.filter(is_over), pl.lit(DeltaReason.OUT_OF_ORDER.value)),
    )


def _filled(table: str, rows: pl.DataFrame) -> pl.DataFrame:
    """The columns of a lake table; null where there is none."""
    return rows.select(name if name in rows.columns else pl.lit(None).alias(name) for name in TABLES[table].names)


JOBS = {
    "deltas": StreamingJob(
        name="core_deltas",
        version=1,
        sources=(
            Source(READINGS, deltas, columns=("meter_id", "observed_at", f"{REGISTER}_wh"), state={"last": LAST}),
        ),
        writes=("consumption_deltas",),
    ),
    "windows": StreamingJob(
        name="core_windows",
        version=1,
        sources=(
            Source(READINGS, windows, columns=tuple(SAMPLE.names()), state={"sample": SAMPLE}, closes_windows=True),
        ),
        writes=("voltage_windows",),
    ),
}
