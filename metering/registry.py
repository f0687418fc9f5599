"""The registry: which rows are of a meter, and which of them counts."""

import polars as pl

MOST = {"nominal_mv": 1_000_000_000, "fuse_a": 1_000_000, "interval_s": 366 * 86_400, "wraps_wh": 2**53}
"""A number of the registry that is not above 0, or above this, is a slip: it counts as unknown."""


def is_among(meter_ids: pl.Series) -> pl.Expr:
    """True of the rows of these meters: of a large registry a few are found sooner than all are joined."""
    return pl.col("meter_id").is_in(meter_ids.implode())


def newest(rows: pl.DataFrame) -> pl.DataFrame:
    """The newest row of each meter, by meter_id.

    Args:
        rows: of the registry; further columns stay.
    """
    order = ["meter_id", "valid_from", "usage_point_id"]
    by_age = rows.sort(order, descending=[False, True, False], nulls_last=[True, True, False])
    return by_age.unique("meter_id", keep="first", maintain_order=True)


def usable(rows: pl.DataFrame) -> pl.DataFrame:
    """Rows of the registry in which numbers that cannot be are null (`MOST`)."""
    return rows.with_columns(
        pl.when(pl.col(name).is_between(1, most)).then(name).alias(name) for name, most in MOST.items()
    )
