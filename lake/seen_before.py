"""Which records came before: redelivery repeats only what was not acknowledged, so the tail of each partition tells.

Pure functions over Polars frames. A query keeps the originals of the last offsets of each Kafka partition and compares.
"""

import polars as pl

from schemas.closed_lists import DeltaReason

PLACE = ["topic", "partition", "offset"]


def with_seen(records: pl.DataFrame, recent: pl.DataFrame, identity: list[str], values: list[str]) -> pl.DataFrame:
    """Marks records that were seen before; of several with one identity the first received is the original.

    Args:
        records: topic, partition and offset, the columns of `identity` and `values`.
        recent: originals of earlier batches, the same columns.
        identity: for a reading its meter and time.
        values: columns that differ in a conflict; none where the identity says all.

    Returns:
        The records with `seen`: null for an original, else `duplicate` or `conflict`.
    """
    columns = list(dict.fromkeys([*identity, *PLACE, *values]))
    both = pl.concat(
        [recent.select(columns).with_columns(new=pl.lit(False)), records.select(columns).with_columns(new=pl.lit(True))]
    ).sort([*identity, "new", *PLACE])
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
    marks = both.with_columns(seen=seen).filter("new").select(*PLACE, "seen")
    return records.join(marks, on=PLACE, how="left")


def is_recent(horizon: int) -> pl.Expr:
    """True within the last `horizon` offsets of a partition."""
    return pl.col("offset") > pl.col("offset").max().over("topic", "partition") - horizon
