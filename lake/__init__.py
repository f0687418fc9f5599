"""Tables, state and reports on a store: where they lie, how they are written, read and kept small."""

from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lake.reading import Lake


def open(versions: "Mapping[str, int | datetime] | int | datetime | None" = None) -> "Lake":
    """The lake of this home for its readers: `lake.reading.Lake`, for Polars, pandas, Arrow, DuckDB and Spark.

    Args:
        versions: table → a version or a time, or a time for all: as it was then; what is not there is as it is now.
    """
    from lake.reading import Lake

    return Lake(versions)
