"""Alarms that no meter raises itself: the same however batches are cut, and the columns that they are found by."""

from datetime import UTC, datetime, timedelta
from typing import Any

import polars as pl
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.watermark import WATERMARKS
from metering.alarms import derived
from metering.alarms.derived import KNOWN, LEVEL, METER, NEEDED, derived_alarms
from schemas.tables import READINGS, REGISTRY, polars_schema

START = datetime(2024, 3, 31, tzinfo=UTC)
ROWS = pl.Schema({name: polars_schema(READINGS)[name] for name in [*NEEDED, "topic", "partition", "offset"]})
METERS = pl.DataFrame(
    [
        {"meter_id": "m1", "phases": "L1", "nominal_mv": 230_000, "fuse_a": 25, "jurisdiction": "EN50160",
         "interval_s": 60},
        {"meter_id": "m2", "nominal_mv": 230_000, "fuse_a": 35, "phases": "L1,L2,L3", "jurisdiction": "EN50160",
         "interval_s": 600},
        {"meter_id": "m3", "phases": "L1,L2"},
    ],
    schema=polars_schema(REGISTRY),
).select(KNOWN)  # fmt: skip


def changes_of(batches: list[list[dict[str, Any]]]) -> list[tuple[Any, ...]]:
    """Changes by batches, and of a last one when all is long over."""
    meters, levels, changes = METER.to_frame(), LEVEL.to_frame(), []
    newest: dict[str | None, datetime] = {}
    for number, rows in enumerate([*batches, []]):
        shift = timedelta(days=365) if number == len(batches) else -timedelta(minutes=10)
        come = [{"run_id": run, "watermark": at + shift} for run, at in newest.items()]
        watermarks = pl.DataFrame(come, schema=WATERMARKS)
        found = derived_alarms(pl.DataFrame(rows, schema=ROWS), meters, levels, METERS, watermarks)
        meters, levels = found.meters, found.levels
        changes += found.alarms.select(
            "meter_id", "alarm_type", "state", "raised_at", "cleared_at", "updated_at"
        ).rows()
        for row in rows:
            newest[row["run_id"]] = max(newest.get(row["run_id"], row["arrival_at"]), row["arrival_at"])
    return sorted(changes, key=str)


READING = st.tuples(
    st.integers(1, 3),  # meter
    st.integers(1, 4_000),  # seconds since the one before
    st.sampled_from([None, 0, 5_000, 205_000, 208_000, 230_000, 256_000]),
    st.sampled_from([None, 0, 230_000]),
    st.sampled_from([None, 100, 6_200, 6_326, 30_000]),
    st.sampled_from([None, 0, 0, 1, 7]),  # export since the one before
)


@settings(max_examples=40, deadline=None)
@given(st.lists(READING, max_size=25), st.lists(st.integers(0, 25), max_size=5).map(sorted))
def test_what_is_said_does_not_depend_on_how_batches_are_cut(drawn: list[tuple[Any, ...]], cuts: list[int]) -> None:
    rows, seconds, exported = [], 0, {1: 0, 2: 0, 3: 9}
    for offset, (meter, step_s, l1_mv, l2_mv, load_w, export) in enumerate(drawn):
        seconds += step_s
        exported[meter] += export or 0
        rows.append(
            {
                "meter_id": f"m{meter}",
                "observed_at": START + timedelta(seconds=seconds),
                "dialect": "dsmr-5",
                "arrival_at": START + timedelta(seconds=seconds + 5),
                "run_id": None,
                "voltage_l1_mv": l1_mv,
                "voltage_l2_mv": l2_mv,
                "import_w": load_w,
                "export_t1_wh": None if export is None else exported[meter],
                "offset": offset,
            }  # fmt: skip
        )
    cut = [rows[low:high] for low, high in zip([0, *cuts], [*cuts, len(rows)], strict=True)]
    assert changes_of(cut) == changes_of([rows])


def heard(minutes: int, run_id: str, offset: int) -> dict[str, Any]:
    at = START + timedelta(minutes=minutes)
    return {"meter_id": "m1", "observed_at": START + timedelta(minutes=offset), "arrival_at": at, "run_id": run_id,
            "dialect": "dsmr-5", "offset": offset}  # fmt: skip


def test_from_one_run_to_another_no_time_passes_and_a_silence_ends_with_whatever_is_heard() -> None:
    rows = [heard(1_000, "a", 0), heard(1_001, "a", 1), heard(100, "b", 2), heard(101, "b", 3)]
    silent = [change[2:4] for change in changes_of([rows])]
    assert silent == [("active", START + timedelta(minutes=101 + 15))], "when all is over, by the clock of its run"
    assert changes_of([rows[:2], rows[2:3], rows[3:]]) == changes_of([rows])
    late = [heard(1_000, "a", 0), {**heard(1_100, "a", 1), "meter_id": "m2"}]
    open_silence = changes_of([late, [], [heard(50, "b", 2)]])
    assert [change[2] for change in open_silence if change[0] == "m1"] == ["active", "active", "cleared"]


VALUES = st.lists(st.tuples(st.integers(0, 3), st.sampled_from([None, True, False])), min_size=1, max_size=20)


@given(VALUES)
def test_columns_by_series_are_what_windows_over_it_give(drawn: list[tuple[int, bool | None]]) -> None:
    ordered = sorted(drawn, key=lambda pair: pair[0])
    frame = pl.DataFrame(ordered, schema={"series": pl.UInt32, "value": pl.Boolean}, orient="row")
    value = pl.col("value")
    found = frame.select(
        last=derived._last_of(value, "series"), next=derived._next_of(value, "series"),
        before=derived._before(value, "series"), first=derived._first_of(value, "series"),
    )  # fmt: skip
    first = value.drop_nulls().first().over("series")
    is_known = value.is_not_null().cum_max().over("series")
    expected = frame.select(
        last=value.forward_fill().over("series"), next=value.backward_fill().over("series"),
        before=value.shift(1).over("series"), first=pl.when(is_known).then(first),
    )  # fmt: skip
    assert found.rows() == expected.rows()
