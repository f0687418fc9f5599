"""Which records came before: redelivery repeats only what was not acknowledged, so the tail of each partition tells.

Pure functions over Polars frames. A query keeps the originals of the last offsets of each Kafka partition and compares.
"""

import polars as pl

from schemas.closed_lists import DeltaReason

PLACE = ["topic", "partition", "offset"]
EVENT = ("meter_id", "observed_at", "sent_at", "seq", "dialect", "source_table", "code", "argument")
"""What events that are the same have in common."""
FIRST = "first_"
"""Begin of the names of what an original has."""


def with_seen(records: pl.DataFrame, recent: pl.DataFrame, identity: list[str], values: list[str]) -> pl.DataFrame:
    """Marks records that were seen before; of several with one identity the first received is the original.

    Args:
        records: topic, partition and offset, the columns of `identity` and `values`.
        recent: originals of earlier batches, the same columns.
        identity: for a reading its meter and time.
        values: columns that differ in a conflict; none where the identity says all.

    Returns:
        The records with `seen`: null for an original, else `duplicate` or `conflict`; and `first_<column>` of each of
        `values`: what the original has, null for an original itself.
    """
    columns = list(dict.fromkeys([*identity, *PLACE, *values]))
    hashed = pl.struct(identity).hash()  # most records are alone: only those that share a hash are looked at
    of_new, of_old = records.select(hashed).to_series(), recent.select(hashed).to_series()
    came_again = of_old.is_in(of_new.implode())
    is_shared = of_new.is_duplicated()
    if not came_again.any() and not is_shared.any():
        nothing = [pl.lit(None, records.schema[name]).alias(FIRST + name) for name in values]
        return records.with_columns(*nothing, pl.lit(None, pl.String).alias("seen"))
    is_shared |= of_new.is_in(of_old.filter(came_again).implode())
    several = pl.concat(
        [
            recent.filter(came_again).select(columns).with_columns(row=pl.lit(None, pl.UInt32)),
            records.select(columns).with_row_index("row").filter(is_shared),
        ],
        how="diagonal",
    ).sort([*identity, pl.col("row").is_not_null(), *PLACE])
    same = pl.all_horizontal(
        pl.lit(True), *[pl.col(name).eq_missing(pl.col(name).first().over(identity)) for name in values]
    )
    seen = (
        pl.when(pl.int_range(pl.len()).over(identity) == 0)
        .then(None)
        .when(same)
        .then(pl.lit(DeltaReason.DUPLICATE.value))
        .otherwise(pl.lit(DeltaReason.CONFLICT.value))
    )
    first = [
        pl.when(seen.is_not_null()).then(pl.col(name).first().over(identity)).alias(FIRST + name) for name in values
    ]
    marks = several.select("row", *first, seen=seen).filter(pl.col("row").is_not_null())
    return records.with_row_index("row").join(marks, on="row", how="left", maintain_order="left").drop("row")


def originals(recent: pl.DataFrame, marked: pl.DataFrame) -> pl.DataFrame:
    """What is remembered, and those of `with_seen`'s records that came for the first time, in its columns."""
    return pl.concat([recent, marked.filter(pl.col("seen").is_null()).select(recent.columns)])
