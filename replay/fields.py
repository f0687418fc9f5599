"""What the fields of a log say: text → values, and energies of intervals → registers."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import polars as pl

from schemas.topics import METER_ID

NUMBER = re.compile(r"[+-]?(?:\d{1,15}(?:\.\d{0,12})?|\.\d{1,12})(?:[eE][+-]?\d{1,2})?", re.ASCII)
MAX_EXACT = 2**53  # below it a double holds every integer


@dataclass(frozen=True)
class Field:
    """How a column's text becomes a value.

    Attributes:
        column: of the log.
        value: from its text; null where that does not fit, and where it is empty.
        kind: what it must be, for the reason of a refusal.
        may_be_empty: empty text is no error.
    """

    column: str
    value: pl.Expr
    kind: str
    may_be_empty: bool = True


def number(column: str, factor: int, *, is_signed: bool = False) -> Field:
    """A decimal number times a factor, rounded to an integer; exact for numbers of up to 15 digits."""
    # 6 places first: a half stays a half in binary too
    product = (pl.col(column).cast(pl.Float64, strict=False) * factor).round(6).round()
    is_sound = product.abs() < MAX_EXACT if is_signed else product.is_between(0, MAX_EXACT)
    value = pl.when(is_sound).then(product.cast(pl.Int64, strict=False))
    return Field(column, value, "number" if is_signed else "number from 0")


def energy(column: str, factor: int) -> Field:
    """The same of an energy that a register is summed from: it must be there."""
    return Field(column, number(column, factor).value, "number from 0", may_be_empty=False)


def stamp(column: str, format: str) -> Field:
    """Date and time by strptime's format."""
    value = pl.col(column).str.to_datetime(format, time_unit="us", strict=False)
    return Field(column, value, f"time as {format}", may_be_empty=False)


def meter(column: str) -> Field:
    """The id of a meter."""
    value = pl.when(pl.col(column).str.contains(f"^(?:{METER_ID.pattern})$")).then(column)
    return Field(column, value, "meter id", may_be_empty=False)


def word(column: str, words: Mapping[str, Any]) -> Field:
    """One of a list of words."""
    value = pl.col(column).replace_strict(list(words), list(words.values()), default=None, return_dtype=pl.Int64)
    return Field(column, value, " or ".join(words))


def exact(text: str | None, factor: int) -> int | None:
    """A decimal number times a factor, rounded to an integer; none where the field is empty.

    Raises:
        ValueError: not a number.
    """
    if text is None or not text.strip():
        return None
    if not NUMBER.fullmatch(text.strip()):
        msg = f"not a number: {text!r}"
        raise ValueError(msg)
    return int((Decimal(text.strip()) * factor).to_integral_value())


def summed(intervals: pl.DataFrame, register: str, per_wh: int) -> pl.DataFrame:
    """The intervals with a register in whole Wh, rounded down: what is less than a Wh stays in the sum.

    The register begins at 0 with a row of its own. An interval that comes again adds nothing: its row has the register
    as it would stand with that row's energy. So the register does not depend on the order of the rows.

    Args:
        intervals: meter_id, begun_at, observed_at (its end), `energy`, and what else there is; each meter's in the
            order of the log.
        register: column that is added.
        per_wh: how much of `energy` is a Wh.
    """
    interval = ["meter_id", "observed_at"]
    before = (pl.col("energy").cum_sum() - pl.col("energy")).over("meter_id")
    first = intervals.unique(interval, keep="first").sort(interval).select(*interval, before=before)
    rows = intervals.join(first, on=interval, how="left", maintain_order="left")
    rows = rows.with_columns(((pl.col("before") + pl.col("energy")) // per_wh).alias(register))
    begins = intervals.group_by("meter_id").agg(pl.col("begun_at").min().alias("observed_at"))
    begins = begins.with_columns(pl.lit(0, pl.Int64).alias(register))
    rows = pl.concat([begins, rows.drop("begun_at", "energy", "before")], how="diagonal")
    meters = pl.Enum(intervals["meter_id"].unique(maintain_order=True))
    return rows.sort(pl.col("meter_id").cast(meters), maintain_order=True)
