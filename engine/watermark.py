"""The watermark, up to which windows are over: ours is by arrivals, Spark's is the maximum over all rows."""

from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta

import polars as pl

WATERMARKS = pl.Schema(
    {"run_id": pl.String(), "previous_watermark": pl.Datetime("us", "UTC"), "watermark": pl.Datetime("us", "UTC")}
)
CLOCK = pl.Schema(
    {
        "run_id": pl.String(),
        "newest_at": pl.Datetime("us", "UTC"),
        "has_come": pl.Boolean(),
        "watermark_at": pl.Datetime("us", "UTC"),
    }
)
"""State of a job that closes windows: a partition's newest arrival of each run, whether the batch had one, and the
watermark of the batch."""


def clock(
    rows: pl.DataFrame, known: pl.DataFrame, watermarks: pl.DataFrame, by: Sequence[str] = ("run_id",)
) -> pl.DataFrame:
    """The partition's clock after a batch, columns `CLOCK`: arrivals are ours, so one meter's clock moves nobody's.

    Args:
        rows: with run_id and arrival_at.
        known: the clock before.
        watermarks: of this batch, columns `WATERMARKS`: they become the next one's `previous_watermark`.
        by: with `partition` the clocks of several, in rows, known and what comes of them.
    """
    arrivals = rows.select(*by, newest_at="arrival_at", has_come=pl.lit(True))
    before = known.select(*by, "newest_at", has_come=pl.lit(False))
    newest = pl.concat([before, arrivals]).group_by(by).agg(pl.col("newest_at").max(), pl.col("has_come").any())
    watermark = watermarks.select("run_id", watermark_at="watermark")
    return newest.join(watermark, on="run_id", how="left", nulls_equal=True).select(*dict.fromkeys([*by, *CLOCK]))


def watermarks(clocks: Iterable[pl.DataFrame], allowed_lateness_s: float, planned_at: datetime) -> pl.DataFrame:
    """Watermarks, columns `WATERMARKS`, by the clocks that the batch before left, columns `CLOCK`.

    Of the partitions that the batch had records of, the one that stands furthest back says how far a run has come:
    while a backlog is taken in, they do not stand at the same hour, and what one still has to bring is not late. A
    partition that had none has no more to bring, or its meters are silent.

    Args:
        clocks: of all partitions.
        allowed_lateness_s: what comes this much later still counts.
        planned_at: when the batch was planned: an arrival after it is of a bridge whose clock was wrong, and no clock.
            A replay's arrivals are of the time that it replays.
    """
    is_real, newest_at = pl.col("run_id").is_null(), pl.col("newest_at")
    sane = pl.when(is_real).then(pl.min_horizontal(newest_at, pl.lit(planned_at))).otherwise(newest_at)
    after = sane.filter(pl.col("has_come")).min() - timedelta(seconds=allowed_lateness_s)
    known = pl.concat([pl.DataFrame(schema=CLOCK), *clocks])
    newest = known.group_by("run_id").agg(previous_watermark=pl.col("watermark_at").max(), watermark=after)
    return newest.with_columns(watermark=pl.max_horizontal("previous_watermark", "watermark")).cast(WATERMARKS)
