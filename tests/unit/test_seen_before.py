"""Redelivered records: the first received is the original."""

from typing import Any

import polars as pl

from metering.deduplication import with_seen

SCHEMA = pl.Schema(
    {"meter_id": pl.String(), "at": pl.Int64(), "wh": pl.Int64(), "topic": pl.String(), "partition": pl.Int64(),
     "offset": pl.Int64()}
)  # fmt: skip
NONE = SCHEMA.to_frame()


def records(*rows: tuple[int, str, int, int | None], partition: int = 0, topic: str = "t") -> pl.DataFrame:
    """(offset, meter, time, Wh)."""
    return pl.DataFrame(
        [{"offset": o, "meter_id": m, "at": at, "wh": wh, "topic": topic, "partition": partition}
         for o, m, at, wh in rows],
        schema=SCHEMA,
    )  # fmt: skip


def seen(found: pl.DataFrame, recent: pl.DataFrame = NONE, values: tuple[str, ...] = ("wh",)) -> dict[Any, str | None]:
    marked = with_seen(found, recent, ["meter_id", "at"], list(values))
    assert len(marked) == len(found)
    return dict(zip(marked["offset"], marked["seen"], strict=True))


def test_records_of_other_meters_and_times_are_originals() -> None:
    assert seen(records((0, "a", 1, 5), (1, "b", 1, 5), (2, "a", 2, 5))) == {0: None, 1: None, 2: None}


def test_the_lowest_offset_of_a_batch_is_the_original_in_whatever_order_the_rows_come() -> None:
    assert seen(records((7, "a", 1, 6), (5, "a", 1, 5), (6, "a", 1, 5))) == {5: None, 6: "duplicate", 7: "conflict"}


def test_an_original_of_an_earlier_batch_wins_over_any_offset() -> None:
    recent = records((9, "a", 1, 5))
    assert seen(records((10, "a", 1, 5), (11, "a", 1, 6)), recent) == {10: "duplicate", 11: "conflict"}


def test_two_nulls_are_the_same_value_and_a_null_is_another_than_a_number() -> None:
    assert seen(records((0, "a", 1, None), (1, "a", 1, None), (2, "a", 1, 0))) == {
        0: None,
        1: "duplicate",
        2: "conflict",
    }


def test_a_conflict_does_not_become_the_original_of_what_follows() -> None:
    assert seen(records((0, "a", 1, 5), (1, "a", 1, 6), (2, "a", 1, 6), (3, "a", 1, 5))) == {
        0: None,
        1: "conflict",
        2: "conflict",
        3: "duplicate",
    }


def test_without_values_the_identity_says_all() -> None:
    assert seen(records((0, "a", 1, 5), (1, "a", 1, 6)), values=()) == {0: None, 1: "duplicate"}


def test_an_absent_identity_is_an_identity_too() -> None:
    rows = records((0, "a", 1, 5), (1, "a", 1, 5)).with_columns(meter_id=pl.lit(None, pl.String))
    assert seen(rows) == {0: None, 1: "duplicate"}


def test_an_empty_batch_stays_empty() -> None:
    assert seen(NONE, records((0, "a", 1, 5))) == {}


def test_same_offsets_in_two_partitions_are_two_records() -> None:
    both = pl.concat([records((0, "a", 1, 5)), records((0, "b", 1, 5), partition=1)])
    marked = with_seen(both, NONE, ["meter_id", "at"], ["wh"])
    assert marked["seen"].to_list() == [None, None]
