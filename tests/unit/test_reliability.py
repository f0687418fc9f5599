"""Indices of interruptions, and which days are a major event's."""

import math
import statistics
from datetime import UTC, date, datetime, timedelta
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metering.alarms.reliability import DAILY, INTERRUPTIONS, of_day, sums, threshold, with_indices
from metering.voltage.norms import PRODIST

DAY = date(2024, 6, 10)
AT = datetime(2024, 6, 10, 12, tzinfo=UTC)


def interruptions(*events: tuple[int, float | None], **other: Any) -> pl.DataFrame:
    """Interruptions: how many customers, and how many seconds each; None goes on."""
    known = {"transformer_id": "t", "feeder_id": "f", "day": DAY, "down_at": AT, **other}
    rows = [
        {**known, "up_at": None if seconds is None else AT + timedelta(seconds=seconds)}
        for customers, seconds in events
        for _ in range(customers)
    ]
    return pl.DataFrame(rows, schema=INTERRUPTIONS)


def indices(found: pl.DataFrame, served: int) -> dict[str, Any]:
    """Of the only transformer and day."""
    of_group = sums(found).with_columns(
        level=pl.lit("transformer"), group_id=pl.col("transformer_id"), customers_served=pl.lit(served)
    )
    (row,) = with_indices(of_group).to_dicts()
    return row


def daily(saidi_min: list[float], day: date = DAY, served: int = 1, **other: Any) -> pl.DataFrame:
    """Days of one group, the last one `day`; one customer, so that its minutes are SAIDI."""
    rows = [
        {
            "level": "fleet", "group_id": "fleet", "day": day - timedelta(days=len(saidi_min) - 1 - number),
            "customers_served": served, "interruptions": 1, "momentary_interruptions": 0, "open_interruptions": 0,
            "customer_minutes": minutes * served, **other,
        }
        for number, minutes in enumerate(saidi_min)
    ]  # fmt: skip
    return pl.DataFrame(rows, schema=DAILY)


SUSTAINED = [(4, 420), (7, 544), (3, 900), (4, 544)]
MOMENTARY = [(7, 60), (26, 60), (7, 60), (11, 60), (8, 60)]


@pytest.mark.parametrize(
    ("events", "saifi", "saidi_h", "caidi_h"),
    [
        (1, 0.153846, 0.0179487, 0.116667),
        (2, 0.423077, 0.0586325, 0.138586),
        (3, 0.538462, 0.0874786, 0.16246),
        (4, 0.692308, 0.110726, 0.159938),
    ],
)
def test_indices_grow_event_by_event(events: int, saifi: float, saidi_h: float, caidi_h: float) -> None:
    row = indices(interruptions(*SUSTAINED[:events], *MOMENTARY), 26)
    assert row["saifi"] == pytest.approx(saifi, rel=1e-5)
    assert row["saidi_min"] / 60 == pytest.approx(saidi_h, rel=1e-5)
    assert row["caidi_min"] / 60 == pytest.approx(caidi_h, rel=1e-5)
    assert row["maifi"] == pytest.approx(2.26923, rel=1e-5)


def test_a_feeder_of_2000_customers() -> None:
    lasted = [(200, 8.17), (600, 71.3), (25, 30.3), (90, 267.2), (700, 120), (1500, 10), (100, 40)]
    row = indices(interruptions(*[(customers, minutes * 60) for customers, minutes in lasted]), 2000)
    assert row["interruptions"] == 3215
    assert [row["saifi"], row["saidi_min"], row["caidi_min"]] == pytest.approx([1.6075, 86.110, 53.567], abs=0.0005)


@pytest.mark.parametrize(
    ("jurisdiction", "seconds", "is_sustained"),
    [(None, 300, 0), (None, 300.001, 1), ("EN50160", 240, 0), (PRODIST, 180, 1), (PRODIST, 179.999, 0)],
)
def test_what_is_momentary_depends_on_the_jurisdiction(
    jurisdiction: str | None, seconds: float, is_sustained: int
) -> None:
    row = indices(interruptions((1, seconds), jurisdiction=jurisdiction), 10)
    assert (row["interruptions"], row["momentary_interruptions"]) == (is_sustained, 1 - is_sustained)
    assert row["customer_minutes"] == pytest.approx(seconds / 60 * is_sustained)


def test_an_interruption_that_goes_on_is_counted_as_open_alone() -> None:
    row = indices(interruptions((3, None), (1, 600)), 10)
    assert (row["open_interruptions"], row["interruptions"], row["momentary_interruptions"]) == (3, 1, 0)


def test_without_customers_or_interruptions_there_is_no_index() -> None:
    row = indices(interruptions((1, 600)), 0)
    assert [row[name] for name in ("saifi", "saidi_min", "maifi")] == [None] * 3
    row = indices(interruptions((1, 60)), 10)
    assert [row[name] for name in ("saifi", "saidi_min", "caidi_min", "maifi")] == [0, 0, None, 0.1]


@settings(max_examples=50, deadline=None)
@given(lasted=st.lists(st.integers(181, 90_000), min_size=1, max_size=40), more=st.integers(0, 20))
def test_saidi_is_the_mean_of_the_customers_own_durations(lasted: list[int], more: int) -> None:
    """PRODIST works DEC out from the DIC of each customer."""
    frame = interruptions(*[(1, seconds) for seconds in lasted], jurisdiction=PRODIST)
    served = len(lasted) + more
    one, other = (indices(each, served) for each in (frame, frame.sample(fraction=1, shuffle=True, seed=more)))
    assert one == other
    assert one["saidi_min"] == pytest.approx(statistics.fmean([each / 60 for each in lasted] + [0.0] * more))
    assert one["caidi_min"] == pytest.approx(one["saidi_min"] / one["saifi"])


SAIDI = [0, 0.1, 0.2, 0.4, 0.8, 1.6]


def test_the_threshold_takes_the_sample_deviation_and_leaves_days_of_zero_out() -> None:
    found = threshold(SAIDI)
    assert found.days == 5
    assert [found.alpha, found.beta] == pytest.approx([-0.9162907, 1.0959619])
    assert found.t_med_min == pytest.approx(6.194204, abs=1e-6)
    logs = [math.log(each) for each in SAIDI if each]
    of_population = math.exp(statistics.fmean(logs) + 2.5 * statistics.pstdev(logs))
    assert of_population == pytest.approx(4.638331, abs=1e-6)
    assert threshold(SAIDI[::-1]) == threshold(SAIDI[1:]) == found
    assert threshold([0, 3]) == (1, None, None, None)
    assert threshold([]) == (0, None, None, None)


@pytest.mark.parametrize(("saidi_min", "is_major"), [(5.0, False), (6.1, False), (6.2, True)])
def test_a_day_above_the_threshold_of_the_days_before_is_a_major_events(saidi_min: float, is_major: bool) -> None:
    (row,) = of_day(daily([*SAIDI, saidi_min]), DAY).to_dicts()
    assert (row["history_days"], row["is_major_event_day"], row["is_provisional"]) == (5, is_major, True)
    assert row["t_med_min"] == pytest.approx(6.194204, abs=1e-6)


def test_history_is_five_years_and_provisional_below_thirty_days_or_four_years() -> None:
    def known_of(history: pl.DataFrame) -> tuple[Any, ...]:
        (row,) = of_day(pl.concat([history, daily([1.0])]), DAY).to_dicts()
        return row["history_days"], row["is_provisional"]

    old, recent = DAY - timedelta(days=1461), daily([1.0] * 29, DAY - timedelta(days=1))
    assert known_of(pl.concat([daily([2.0], old), recent])) == (30, False)
    assert known_of(pl.concat([daily([2.0], old), recent[1:]])) == (29, True)
    assert known_of(pl.concat([daily([2.0], old + timedelta(days=1)), recent])) == (30, True)
    assert known_of(pl.concat([daily([2.0], DAY - timedelta(days=1827)), recent])) == (29, True)


def test_groups_are_judged_each_by_its_own_days_and_a_first_day_by_none() -> None:
    other = daily([9.0], group_id="other")
    found = {row["group_id"]: row for row in of_day(pl.concat([daily([*SAIDI, 9.0]), other]), DAY).to_dicts()}
    assert found["fleet"]["is_major_event_day"] is True
    assert (found["other"]["is_major_event_day"], found["other"]["t_med_min"]) == (None, None)
    assert (found["other"]["is_provisional"], found["other"]["history_days"]) == (True, 0)
