"""Arrays by what they hold, and times as microseconds: of a run since its begin, of the world since 1970."""

import numpy as np
import numpy.typing as npt
import polars as pl

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

SECOND = 1_000_000
STAMP = pl.Datetime("us", "UTC")


def from_microseconds(microseconds: Integers) -> pl.Series:
    """Times by microseconds since 1970."""
    return pl.Series(microseconds).cast(pl.Datetime("us")).dt.replace_time_zone("UTC")
