"""Outages: which power failures are one, what is told of it, and what is forgotten."""

from datetime import UTC, datetime, timedelta
from typing import Any

import polars as pl
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.watermark import WATERMARKS
from metering.alarms.outages import MEMBER, ROWS, group_outages
from schemas.tables import ALARMS, polars_schema

START = datetime(2024, 3, 31, tzinfo=UTC)
FAILURES = pl.Schema({**polars_schema(ALARMS), "transformer_id": pl.String(), "feeder_id": pl.String()})


def at(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


def down(meter_id: str, seconds: float, **other: Any) -> dict[str, Any]:
    return {
        "alarm_id": f"{meter_id}/{seconds}", "meter_id": meter_id, "alarm_type": "power_failure", "state": "active",
        "raised_at": at(seconds), "repeat_count": 0, "updated_at": at(seconds + 1), "transformer_id": "T1",
        "feeder_id": "F1", **other,
    }  # fmt: skip


def up(failed: dict[str, Any], seconds: float) -> dict[str, Any]:
    return {**failed, "state": "cleared", "cleared_at": at(seconds), "updated_at": at(seconds + 1)}


class Stream:
    """State between batches, as the job keeps it."""

    def __init__(self) -> None:
        self.members = MEMBER.to_frame()
        self.rows: list[dict[str, Any]] = []

    def batch(self, *changes: dict[str, Any], watermark: float = -3600, served: int = 40) -> None:
        runs = {change.get("run_id") for change in changes} | {None}
        watermarks = pl.DataFrame([{"run_id": run, "watermark": at(watermark)} for run in runs], schema=WATERMARKS)
        found = group_outages(pl.DataFrame(changes, schema=FAILURES), self.members, watermarks, {"T1": served})
        self.members = found.members
        self.rows += found.rows.to_dicts()

    def newest(self) -> dict[str, dict[str, Any]]:
        """Each outage as it stands, without its name."""
        return {row["outage_id"]: {**row, "outage_id": None} for row in self.rows}


def outages(*changes: dict[str, Any]) -> list[dict[str, Any]]:
    stream = Stream()
    stream.batch(*changes)
    return stream.rows


def test_three_meters_of_a_transformer_within_two_minutes_are_an_outage_and_two_are_none() -> None:
    failures = [down("m1", 0), down("m2", 60), down("m3", 120)]
    (row,) = outages(*failures)
    assert (row["began_at"], row["meters"], row["state"], row["kind"]) == (at(0), ["m1", "m2", "m3"], "active", None)
    assert outages(*failures[:2]) == []
    assert outages(*failures[:2], down("m3", 121)) == []
    assert outages(*failures[:2], down("m2", 120)) == [], "a meter that fails twice is one meter"


def test_transformers_and_runs_have_outages_of_their_own_and_a_meter_without_a_transformer_has_none() -> None:
    failures = [down("m1", 0), down("m2", 0), down("m3", 0)]
    assert outages(*failures[:2], {**failures[2], "transformer_id": "T2"}) == []
    assert outages(*failures[:2], {**failures[2], "run_id": "another"}) == []
    assert outages(*[{**failure, "transformer_id": None} for failure in failures]) == []


def test_up_to_five_minutes_is_momentary_and_only_sustained_interruptions_have_meter_minutes() -> None:
    failures = [down("m1", 0), down("m2", 0), down("m3", 0)]
    short = [up(failure, 300) for failure in failures]
    (row,) = outages(*failures, *short)
    assert (row["kind"], row["meter_minutes"], row["restored_at"]) == ("momentary", 0, at(300))
    (row,) = outages(*failures, *short[:2], up(failures[2], 600))
    assert (row["kind"], row["meter_minutes"], row["restored_at"]) == ("sustained", 10, at(600))
    assert (row["meter_count"], row["sustained_count"]) == (3, 1)


def test_an_outage_of_short_interruptions_one_after_another_is_momentary_for_each_customer() -> None:
    failures = [down("m1", 0), down("m2", 60), down("m3", 120)]
    ends = [up(failures[0], 200), up(failures[1], 300), up(failures[2], 400)]
    (row,) = outages(*failures, *ends)
    assert (row["kind"], row["sustained_count"], row["meter_minutes"]) == ("momentary", 0, 0)


def test_two_of_two_meters_of_a_transformer_are_an_outage_and_one_of_one_is_none() -> None:
    stream = Stream()
    stream.batch(down("m1", 0), down("m2", 60), served=2)
    assert [row["meters"] for row in stream.rows] == [["m1", "m2"]]
    alone = Stream()
    alone.batch(down("m1", 0), served=1)
    assert alone.rows == []


def test_what_fails_while_an_outage_is_open_belongs_to_it_and_afterwards_begins_another_group() -> None:
    failures = [down("m1", 0), down("m2", 0), down("m3", 0)]
    stream = Stream()
    stream.batch(*failures)
    stream.batch(down("m4", 900))
    assert stream.rows[-1]["meters"] == ["m1", "m2", "m3", "m4"]
    stream.batch(*[up(failure, 1000) for failure in [*failures, down("m4", 900)]])
    stream.batch(down("m5", 1100), down("m6", 1100), down("m7", 1100))
    assert [row["meters"] for row in stream.rows[-1:]] == [["m5", "m6", "m7"]]
    assert len(stream.newest()) == 2


def test_a_power_up_or_a_repetition_of_what_nobody_knows_changes_nothing() -> None:
    stream = Stream()
    stream.batch(up(down("m1", 0), 60))
    stream.batch(down("m2", 0), {**down("m2", 0), "repeat_count": 1})
    assert stream.rows == []
    assert len(stream.members) == 1


def test_a_meter_that_came_back_and_failed_again_is_not_restored() -> None:
    failures = [down("m1", 0), down("m2", 0), down("m3", 0)]
    (row,) = outages(*failures, up(failures[0], 120))
    assert (row["meter_count"], row["restored_count"]) == (3, 1)
    (row,) = outages(*failures, up(failures[0], 120), down("m1", 180))
    assert (row["meter_count"], row["restored_count"], row["state"]) == (3, 0, "active")


def test_an_outage_of_which_one_meter_never_came_back_does_not_take_the_failures_of_later_weeks() -> None:
    failures = [down("m1", 0), down("m2", 0), down("m3", 0)]
    week = 7 * 86_400
    stream = Stream()
    stream.batch(*failures, *[up(failure, 600) for failure in failures[:2]])
    stream.batch(down("m4", 600 + week))
    assert stream.rows[-1]["meters"] == ["m1", "m2", "m3", "m4"], "it is open: nothing else is known"
    late = 600 + 2 * week + 1
    stream.batch(down("m1", late), down("m2", late), down("m5", late))
    assert [row["meters"] for row in stream.newest().values()] == [["m1", "m2", "m3", "m4"], ["m1", "m2", "m5"]]
    stream.batch(watermark=late + 1)
    assert sorted(stream.members["meter_id"]) == ["m1", "m2", "m5"]


def test_what_is_over_is_forgotten_when_the_bound_has_passed_it_and_an_open_outage_is_not() -> None:
    failures = [down("m1", 0), down("m2", 0), down("m3", 0)]
    stream = Stream()
    stream.batch(*failures, down("m9", 0, transformer_id="T2"))
    stream.batch(watermark=86_400)
    assert sorted(stream.members["meter_id"]) == ["m1", "m2", "m3"]
    stream.batch(*[up(failure, 90_000) for failure in failures], watermark=86_400)
    assert len(stream.members) == 3
    stream.batch(watermark=90_000 + 122)
    assert stream.members.is_empty()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 400)), max_size=12, unique_by=lambda pair: pair[0]),
    st.integers(30, 900),
    st.lists(st.integers(0, 24), max_size=4).map(sorted),
)
def test_an_outage_ends_the_same_however_batches_are_cut(
    failed: list[tuple[int, int]], lasts_s: int, cuts: list[int]
) -> None:
    failures = [down(f"m{meter}", seconds) for meter, seconds in failed]
    changes = sorted(
        [*failures, *[up(failure, (failure["raised_at"] - START).total_seconds() + lasts_s) for failure in failures]],
        key=lambda change: (change["updated_at"], change["meter_id"]),
    )
    whole, cut = Stream(), Stream()
    for change in changes:
        whole.batch(change)
    for low, high in zip([0, *cuts], [*cuts, len(changes)], strict=True):
        cut.batch(*changes[low:high])
    assert cut.newest() == whole.newest()


def test_nothing_gives_nothing() -> None:
    found = group_outages(FAILURES.to_frame(), MEMBER.to_frame(), pl.DataFrame(schema=WATERMARKS), {})
    assert found.rows.schema == ROWS
    assert found.members.schema == MEMBER
