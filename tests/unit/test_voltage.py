"""Voltage windows: what they hold, when they are over, and the bands."""

from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.job import BatchContext
from engine.settings import StreamSettings
from engine.watermark import CLOCK, WATERMARKS, clock, watermarks
from metering.accounting import bucket_of
from metering.deduplication import originals, with_seen
from metering.energy.delta_engine import STAMP
from metering.voltage.windows import (
    ALL_PHASES,
    LIVE,
    VOLTAGES,
    WINDOWS,
    ClosedWindows,
    close_windows,
    windows,
    with_live,
)

START = datetime(2024, 1, 1, tzinfo=UTC)
SAMPLES = pl.Schema(
    {
        "meter_id": pl.String(),
        "observed_at": STAMP,
        "run_id": pl.String(),
        "topic": pl.String(),
        "partition": pl.Int64(),
        "offset": pl.Int64(),
        **dict.fromkeys(VOLTAGES, pl.Int64()),
        "live": pl.Int64(),
    }
)
JUDGED_BY = pl.Schema({"phases": pl.String(), "nominal_mv": pl.Int64(), "jurisdiction": pl.String()})
REGISTRY = pl.Schema({"meter_id": pl.String(), **JUDGED_BY}).to_frame()
CLOSED = pl.Schema({"meter_id": pl.String(), "run_id": pl.String(), "window_start": STAMP})


def at(minutes: float) -> datetime:
    return START + timedelta(minutes=minutes)


def sample(offset: int, minutes: float, mv: int | None = 230_000, **other: Any) -> dict[str, Any]:
    return {
        "meter_id": "m1", "observed_at": at(minutes), "run_id": None, "topic": "t", "partition": 0, "offset": offset,
        "voltage_l1_mv": mv, "live": ALL_PHASES, **other,
    }  # fmt: skip


class Stream:
    """State between batches, and the originals of the last offsets, as engine and job keep them."""

    def __init__(self, horizon: int = 1_000) -> None:
        self.samples, self.closed, self.horizon = SAMPLES.to_frame(), CLOSED.to_frame(), horizon
        self.recent = SAMPLES.to_frame()
        self.watermark: datetime | None = None
        self.windows: list[dict[str, Any]] = []

    def batch(
        self, rows: list[dict[str, Any]], watermark: float | None = None, close_all: bool = False
    ) -> ClosedWindows:
        """One batch after which the watermark of the one run lies at so many minutes, and what the next one closes."""
        result = self.step(rows, self.watermark, close_all)
        assert len(result.readings) == len(rows)
        self.step([], self.watermark if watermark is None else at(watermark))
        return result

    def step(self, rows: list[dict[str, Any]], after: datetime | None, close_all: bool = False) -> ClosedWindows:
        watermarks = pl.DataFrame(
            [{"run_id": None, "previous_watermark": self.watermark, "watermark": after}], schema=WATERMARKS
        )
        came = with_seen(pl.DataFrame(rows, schema=SAMPLES), self.recent, ["meter_id", "observed_at"], VOLTAGES)
        known = originals(self.recent, came)
        self.recent = known.filter(pl.col("offset") > pl.col("offset").max() - self.horizon)
        result = close_windows(came, self.samples, self.closed, watermarks, REGISTRY, close_all)
        self.watermark, self.samples, self.closed = after, result.samples, result.closed
        self.windows += result.windows.to_dicts()
        return result

    def starts(self) -> list[float]:
        return [(row["window_start"] - START).total_seconds() / 60 for row in self.windows]


def buckets(result: ClosedWindows) -> list[str]:
    return result.readings.sort("offset").select(bucket_of(pl.col("why"))).to_series().to_list()


def test_the_begin_of_a_window_belongs_to_it_and_its_end_to_the_next() -> None:
    rows = [sample(0, 0, 230_000), sample(1, 10 - 1e-6 / 60, 232_000), sample(2, 10, 240_000)]
    found = windows(pl.DataFrame(rows, schema=SAMPLES | JUDGED_BY))
    assert found.select("window_start", "window_end", "sample_count", "mean_mv").rows() == [
        (at(0), at(10), 2, 231_000),
        (at(10), at(20), 1, 240_000),
    ]


def test_one_sample_has_no_spread() -> None:
    (row,) = windows(pl.DataFrame([sample(0, 0, 231_000)], schema=SAMPLES | JUDGED_BY)).to_dicts()
    assert (row["stddev_mv"], row["min_mv"], row["max_mv"], row["mean_mv"]) == (0.0, 231_000, 231_000, 231_000)


def test_the_spread_is_that_of_the_population() -> None:
    rows = [sample(0, 0, 229_000), sample(1, 1, 231_000)]
    assert windows(pl.DataFrame(rows, schema=SAMPLES | JUDGED_BY))["stddev_mv"].to_list() == [1_000.0]


def test_each_phase_stands_on_its_own_and_an_absent_one_gives_no_window() -> None:
    rows = [sample(0, 0, 230_000, voltage_l3_mv=207_000, nominal_mv=230_000), sample(1, 1, None, nominal_mv=230_000)]
    found = windows(pl.DataFrame(rows, schema=SAMPLES | JUDGED_BY))
    assert found.select("phase", "sample_count", "mean_mv", "deviation_pct").rows() == [
        ("L1", 1, 230_000, 0.0),
        ("L3", 1, 207_000, -10.0),
    ]


@pytest.mark.parametrize(
    ("jurisdiction", "nominal_mv", "mv", "band"),
    [
        (None, 230_000, 207_000, None),
        ("EN50160", None, 130_000, None),
        ("of a country that nobody knows", 230_000, 130_000, None),
        ("EN50160", 230_000, 207_000, "normal"),
        ("EN50160", 230_000, 206_999, "low"),
        ("EN50160", 230_000, 195_500, "low"),
        ("EN50160", 230_000, 195_499, "very_low"),
        ("EN50160", 230_000, 253_000, "normal"),
        ("EN50160", 230_000, 253_001, "very_high"),
        ("ANSI-C84.1", 120_000, 114_000, "normal"),
        ("ANSI-C84.1", 120_000, 113_999, "low"),
        ("ANSI-C84.1", 120_000, 110_040, "low"),
        ("ANSI-C84.1", 120_000, 110_039, "very_low"),
        ("ANSI-C84.1", 120_000, 126_000, "normal"),
        ("ANSI-C84.1", 120_000, 126_001, "high"),
        ("ANSI-C84.1", 120_000, 126_960, "high"),
        ("ANSI-C84.1", 120_000, 126_961, "very_high"),
    ],
)
def test_a_limit_itself_is_within_the_band(
    jurisdiction: str | None, nominal_mv: int | None, mv: int, band: str | None
) -> None:
    row = sample(0, 0, mv, jurisdiction=jurisdiction, nominal_mv=nominal_mv)
    assert windows(pl.DataFrame([row], schema=SAMPLES | JUDGED_BY))["band"].to_list() == [band]


@given(
    st.lists(
        st.tuples(st.integers(0, 599_999), st.integers(200_000, 260_000) | st.none()),
        min_size=1, max_size=12, unique_by=lambda pair: pair[0],
    ),
)  # fmt: skip
def test_a_mean_is_over_time_each_sample_stands_for_half_the_time_to_its_neighbours(
    drawn: list[tuple[int, int | None]],
) -> None:
    rows = [sample(n, ms / 60_000, mv, voltage_l2_mv=230_000) for n, (ms, mv) in enumerate(drawn)]
    known = sorted((ms, mv) for ms, mv in drawn if mv is not None)
    found = windows(pl.DataFrame(rows, schema=SAMPLES | JUDGED_BY)).filter(pl.col("phase") == "L1")
    if len(known) < 2:
        assert found["mean_mv"].to_list() == [mv for _, mv in known]
        return
    gaps = [later - earlier for (earlier, _), (later, _) in pairwise(known)]
    stands = [one + other for one, other in zip([gaps[0], *gaps], [*gaps, gaps[-1]], strict=True)]
    mean = sum(mv * stand for (_, mv), stand in zip(known, stands, strict=True)) / sum(stands)
    assert abs(found["mean_mv"].item() - mean) <= 0.51


def test_a_burst_of_samples_counts_no_more_than_one_that_stands_as_long() -> None:
    burst = [sample(n, n / 60, 250_000) for n in range(60)]
    calm = [sample(100 + n, 1 + n, 230_000) for n in range(1, 9)]
    (mean,) = windows(pl.DataFrame([*burst, *calm], schema=SAMPLES | JUDGED_BY))["mean_mv"].to_list()
    assert 232_500 < mean < 234_500, "a ninth to a sixth of the time, not seven eighths of the samples"


def test_a_phase_that_the_registry_has_not_or_that_never_had_a_voltage_has_no_window() -> None:
    both = sample(0, 0, 230_000, voltage_l2_mv=0, live=0b001)
    assert windows(pl.DataFrame([both], schema=SAMPLES | JUDGED_BY))["phase"].to_list() == ["L1"]
    both = sample(0, 0, 230_000, voltage_l2_mv=231_000, voltage_l3_mv=0, phases="L2,L3")
    assert windows(pl.DataFrame([both], schema=SAMPLES | JUDGED_BY))["phase"].to_list() == ["L2", "L3"]


@given(
    st.lists(
        st.tuples(st.sampled_from([None, 0, 49_999, 50_000, 230_000]), st.sampled_from([0, 231_000])), max_size=12
    ),
    st.lists(st.integers(0, 12), max_size=3).map(sorted),
)
def test_a_phase_lives_from_its_first_voltage_on_however_batches_are_cut(
    volts: list[tuple[int | None, int]], cuts: list[int]
) -> None:
    rows = [sample(number, number, mv, voltage_l2_mv=other) for number, (mv, other) in enumerate(volts)]
    live, found = LIVE.to_frame(), []
    for low, high in zip([0, *cuts], [*cuts, len(rows)], strict=True):
        marked, live = with_live(pl.DataFrame(rows[low:high], schema=SAMPLES).drop("live"), live)
        found += marked.get_column("live").to_list()
    for phase in (0, 1):
        seen = [any((each[phase] or 0) >= 50_000 for each in volts[: number + 1]) for number in range(len(volts))]
        measured = [number for number, each in enumerate(volts) if each[phase] is not None]
        assert [bool(found[number] & (1 << phase)) for number in measured] == [seen[number] for number in measured]


def test_a_window_closes_when_the_bound_reaches_its_end_and_not_before() -> None:
    stream = Stream()
    stream.batch([sample(0, 1)], watermark=9.99)
    assert stream.starts() == []
    stream.batch([], watermark=10)
    assert stream.starts() == [0]
    stream.batch([], watermark=100)
    assert stream.starts() == [0]


def test_a_reading_for_a_window_that_is_over_is_late_and_changes_nothing() -> None:
    stream = Stream()
    stream.batch([sample(0, 1)], watermark=10)
    result = stream.batch([sample(1, 9.9), sample(2, 10)], watermark=10)
    assert buckets(result) == ["late", "stored"]
    stream.batch([], close_all=True)
    assert [(row["window_start"], row["sample_count"]) for row in stream.windows] == [(at(0), 1), (at(10), 1)]


def test_a_reading_out_of_order_within_the_bound_is_stored() -> None:
    stream = Stream()
    stream.batch([sample(0, 12)], watermark=5)
    assert buckets(stream.batch([sample(1, 3)], watermark=5)) == ["stored"]


def test_what_comes_with_the_bound_that_closes_its_window_is_still_in_it() -> None:
    stream = Stream()
    assert buckets(stream.batch([sample(0, 1)], watermark=60)) == ["stored"]
    assert stream.starts() == [0]


@pytest.mark.parametrize("flush", [False, True], ids=["closed by the watermark", "closed by a flush"])
def test_a_reading_redelivered_into_a_closed_window_is_a_duplicate_and_never_changes_it(flush: bool) -> None:
    stream = Stream()
    stream.batch([sample(0, 1)], watermark=None if flush else 10)
    if flush:
        stream.batch([], close_all=True)
    result = stream.batch([sample(1, 1), sample(2, 1, 999_000)])
    assert buckets(result) == ["duplicate", "quarantined"]
    stream.batch([], close_all=True)
    assert [row["sample_count"] for row in stream.windows] == [1]


def test_beyond_the_horizon_a_redelivered_reading_is_late() -> None:
    stream = Stream(horizon=2)
    stream.batch([sample(0, 1)], watermark=10)
    stream.batch([sample(1, 11), sample(2, 12), sample(3, 13)], watermark=10)
    assert buckets(stream.batch([sample(4, 1)], watermark=10)) == ["late"]


def test_in_an_open_window_a_redelivered_reading_is_a_duplicate_whatever_the_horizon() -> None:
    stream = Stream(horizon=1)
    stream.batch([sample(0, 1), sample(1, 2), sample(2, 3)], watermark=0)
    assert buckets(stream.batch([sample(3, 1)], watermark=0)) == ["duplicate"]


def test_a_flush_closes_each_window_once_and_what_comes_after_is_late() -> None:
    stream = Stream()
    stream.batch([sample(0, 1)], watermark=0)
    stream.batch([], close_all=True)
    stream.batch([], close_all=True)
    assert stream.starts() == [0]
    assert buckets(stream.batch([sample(1, 2), sample(2, 11)], watermark=0)) == ["late", "stored"]
    stream.batch([], watermark=30)
    assert stream.starts() == [0, 10]
    assert stream.closed.is_empty()


def test_the_bound_of_one_run_is_not_that_of_another() -> None:
    rows = [sample(0, 1, run_id="old"), sample(1, 1, meter_id="m2")]
    watermarks = pl.DataFrame([("old", None, at(60)), (None, None, at(5))], schema=WATERMARKS, orient="row")
    known = pl.DataFrame(rows, schema=SAMPLES)
    none = SAMPLES.to_frame().with_columns(seen=pl.lit(None, pl.String))
    result = close_windows(none, known, CLOSED.to_frame(), watermarks, REGISTRY)
    assert result.windows["meter_id"].to_list() == ["m1"]


def test_nothing_gives_nothing() -> None:
    result = Stream().batch([])
    assert result.windows.is_empty()
    assert result.windows.schema == WINDOWS


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(200, 260)), max_size=30, unique_by=lambda pair: pair[0]),
    st.lists(st.integers(0, 30), max_size=4).map(sorted),
)
def test_the_windows_do_not_depend_on_how_batches_are_cut(samples: list[tuple[int, int]], cuts: list[int]) -> None:
    rows = [sample(offset, minutes, volts * 1_000) for offset, (minutes, volts) in enumerate(samples)]
    stream = Stream(horizon=3)
    for low, high in zip([0, *cuts], [*cuts, len(rows)], strict=True):
        stream.batch(rows[low:high], watermark=-60)
    stream.batch([], close_all=True)
    found = pl.DataFrame(stream.windows, schema=WINDOWS).sort("window_start")
    assert found.equals(windows(pl.DataFrame(rows, schema=SAMPLES | JUDGED_BY)))


def watermark(*clocks: list[tuple[str | None, datetime, bool, datetime | None]]) -> dict[str | None, datetime]:
    """By run, a minute of lateness allowed, of a batch that was planned in minute 5."""
    frames = [pl.DataFrame(rows, CLOCK, orient="row") for rows in clocks]
    return dict(watermarks(frames, 60, at(5)).select("run_id", "watermark").iter_rows())


def test_an_arrival_of_the_future_holds_no_clock_but_that_of_a_replay() -> None:
    """The clock of a bridge was in 2036 for a message: windows are over by the batch's own time."""
    future = datetime(2036, 1, 1, tzinfo=UTC)
    assert watermark([(None, future, True, None), ("r1", future, True, None)]) == {
        None: at(4),
        "r1": future - timedelta(minutes=1),
    }
    assert watermark([(None, at(3), True, None)], [(None, future, True, None)]) == {None: at(2)}


def test_the_partition_that_stands_furthest_back_says_how_far_a_run_has_come() -> None:
    """A backlog is taken in: one partition is hours ahead of another, and nothing of the other is late for that."""
    fast, slow = ("r1", at(300), True, at(60)), ("r1", at(90), True, at(60))
    assert watermark([fast], [slow]) == {"r1": at(89)}
    through = ("r1", at(90), False, at(60))
    assert watermark([fast], [through]) == {"r1": at(299)}, "the batch had nothing of it: it holds nobody"
    assert watermark([("r1", at(300), False, at(60))], [through]) == {"r1": at(60)}, "time passes with arrivals"
    assert watermark([fast], [("r1", at(30), True, at(60))]) == {"r1": at(60)}, "what is over stays over"
    assert watermark([fast, (None, at(2), True, None)], [slow]) == {"r1": at(89), None: at(1)}


def test_a_partitions_clock_says_whether_the_batch_had_anything_of_a_run() -> None:
    context = BatchContext(
        StreamSettings(kafka_bootstrap="none:0"), pl.DataFrame([("r1", None, at(1))], WATERMARKS, orient="row")
    )
    nothing = pl.DataFrame(schema=CLOCK)
    said = pl.Schema({"run_id": pl.String(), "arrival_at": STAMP})
    rows = pl.DataFrame([("r1", at(5)), ("r1", at(4)), (None, at(9))], said, orient="row")
    first = clock(rows, nothing, context.watermarks)
    assert sorted(first.rows(), key=str) == [("r1", at(5), True, at(1)), (None, at(9), True, None)]
    second = clock(rows.filter(pl.col("run_id").is_null()), first, context.watermarks)
    assert sorted(second.rows(), key=str) == [("r1", at(5), False, at(1)), (None, at(9), True, None)]
    assert second.schema == CLOCK == clock(rows.clear(), nothing, context.watermarks).schema
