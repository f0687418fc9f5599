"""Alarms: raised, repeated, cleared, by the code tables."""

from datetime import UTC, datetime, timedelta
from itertools import pairwise, permutations
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metering.accounting import bucket_of
from metering.alarms.life_cycle import ONCE, OPEN, Result, alarm_id, lives, with_meaning
from metering.energy.delta_engine import STAMP

START = datetime(2024, 1, 1, tzinfo=UTC)
EVENTS = pl.Schema(
    {
        "meter_id": pl.String(),
        "run_id": pl.String(),
        "dialect": pl.String(),
        "dialect_version": pl.String(),
        "source_table": pl.String(),
        "code": pl.String(),
        "argument": pl.String(),
        "arrival_at": STAMP,
        "event_at": STAMP,
        "partition": pl.Int64(),
        "offset": pl.Int64(),
    }
)
TABLES = {"c12.19": "ST76", "dsmr": "events", "smr": "events", "ge-i210": "MT3"}


def at(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


def event(offset: int, seconds: float, code: str, **other: Any) -> dict[str, Any]:
    dialect = other.get("dialect", "dsmr")
    return {
        "meter_id": "m1", "dialect": dialect, "dialect_version": "5", "source_table": TABLES[dialect], "code": code,
        "arrival_at": at(seconds + 1), "event_at": at(seconds), "partition": 0, "offset": offset, **other,
    }  # fmt: skip


def move(*batches: list[dict[str, Any]]) -> Result:
    """The changes of all batches, state carried; the events of the last."""
    open_alarms, once, changes = OPEN.to_frame(), ONCE.to_frame(), []
    for rows in batches:
        result = lives(pl.DataFrame(rows, schema=EVENTS), open_alarms, once)
        open_alarms, once = result.open, result.once
        changes.append(result.alarms)
    return Result(pl.concat(changes), open_alarms, once, result.events)


def changes(result: Result) -> list[tuple[str, str, int]]:
    return result.alarms.select("alarm_type", "state", "repeat_count").rows()


def buckets(result: Result) -> list[str]:
    return result.events.sort("offset").select(bucket_of(pl.col("why"))).to_series().to_list()


def test_an_alarm_is_raised_and_cleared_with_the_times_of_its_events() -> None:
    result = move([event(0, 0, "40", run_id="r"), event(1, 60, "41", run_id="r")])
    name = alarm_id("m1", "terminal_cover_open", at(0))
    assert result.alarms.select(
        "alarm_id", "meter_id", "alarm_type", "severity", "state", "raised_at", "cleared_at", "repeat_count", "source",
        "run_id", "updated_at",
    ).rows() == [
        (name, "m1", "terminal_cover_open", "error", "active", at(0), None, 0, "meter_event", "r", at(1)),
        (name, "m1", "terminal_cover_open", "error", "cleared", at(0), at(60), 0, "meter_event", "r", at(61)),
    ]  # fmt: skip


def test_a_repeat_is_counted_on_the_open_alarm_and_raises_none() -> None:
    result = move([event(0, 0, "46"), event(1, 5, "46")], [event(2, 9, "46")])
    assert changes(result) == [
        ("failed_login", "active", 0),
        ("failed_login", "active", 1),
        ("failed_login", "active", 2),
    ]
    assert result.alarms["alarm_id"].n_unique() == 1


def test_after_a_clear_the_next_raise_is_an_alarm_of_its_own() -> None:
    result = move([event(0, 0, "1"), event(1, 5, "2"), event(2, 9, "1")])
    assert changes(result) == [("power_failure", state, 0) for state in ("active", "cleared", "active")]
    assert result.alarms["alarm_id"].n_unique() == 2


def test_a_raise_that_comes_after_its_clear_is_an_alarm_that_is_closed_already() -> None:
    result = move([event(0, 10, "2")], [event(1, 5, "1")])
    assert changes(result) == [("power_failure", "active", 0), ("power_failure", "cleared", 0)]
    assert result.alarms["raised_at"].to_list() == [at(5), at(5)]
    assert result.alarms["cleared_at"].to_list() == [None, at(10)]
    assert buckets(result) == ["stored"]


def test_a_clear_before_its_raise_in_the_same_second_closes_it() -> None:
    for batches in ([[event(0, 5, "2"), event(1, 5, "1")]], [[event(0, 5, "2")], [event(1, 5, "1")]]):
        assert changes(move(*batches)) == [("power_failure", "active", 0), ("power_failure", "cleared", 0)]


def test_a_failure_in_the_second_of_another_ones_end_is_open() -> None:
    result = move([event(0, 0, "1"), event(1, 5, "2"), event(2, 5, "1")])
    assert changes(result) == [("power_failure", state, 0) for state in ("active", "cleared", "active")]


def test_each_raise_is_closed_by_the_first_clear_after_it_of_those_that_came_before() -> None:
    result = move([event(0, 20, "2"), event(1, 40, "2")], [event(2, 10, "1"), event(3, 30, "1")], [event(4, 15, "1")])
    assert result.alarms.filter(pl.col("state") == "cleared").select("raised_at", "cleared_at").rows() == [
        (at(10), at(20)), (at(30), at(40)),
    ]  # fmt: skip
    assert buckets(result) == ["late"], "between the two it was closed"
    result = move([event(0, 0, "1"), event(1, 5, "2")], [event(2, 20, "2")], [event(3, 4, "1")], [event(4, 10, "1")])
    assert result.alarms["raised_at"].to_list() == [at(0), at(0), at(10), at(10)]


@pytest.mark.parametrize("order", list(permutations(range(4))), ids=str)
def test_failures_and_returns_in_whatever_order_give_alarms_that_are_true(order: tuple[int, ...]) -> None:
    """Of two failures each alarm has a true begin and end, or lasts from the first to the last; none stays open."""
    moments = [(0, "1"), (40, "2"), (60, "1"), (65, "2")]
    result = move(*[[event(offset, *moments[number])] for offset, number in enumerate(order)])
    found = set(result.alarms.filter(pl.col("state") == "cleared").select("raised_at", "cleared_at").rows())
    assert found <= {(at(0), at(40)), (at(60), at(65)), (at(0), at(65))}
    assert not result.open["is_open"].any() or moments[order[-1]][1] == "1" or len(found) > 0
    if order in ((3, 2, 1, 0), (1, 2, 0, 3), (1, 3, 2, 0), (1, 3, 0, 2), (0, 1, 2, 3)):
        assert found == {(at(0), at(40)), (at(60), at(65))}


def test_a_raise_older_than_all_clears_that_are_remembered_is_late_since_another_may_have_been_its_own() -> None:
    clears = [event(number, 10 + number, "2") for number in range(9)]
    result = move(clears, [event(20, 5, "1")])
    assert (changes(result), buckets(result)) == ([], ["late"])
    assert changes(move(clears, [event(20, 11.5, "1")])) == [
        ("power_failure", "active", 0), ("power_failure", "cleared", 0),
    ]  # fmt: skip


def test_within_a_batch_the_meters_own_order_counts_not_that_of_arrival() -> None:
    result = move([event(0, 10, "2"), event(1, 5, "1")])
    assert changes(result) == [("power_failure", "active", 0), ("power_failure", "cleared", 0)]


def test_an_event_older_than_the_newest_change_of_its_alarm_is_late_and_changes_nothing() -> None:
    result = move([event(0, 10, "1")], [event(1, 5, "1"), event(2, 5, "2"), event(3, 10, "40")])
    assert changes(result) == [("power_failure", "active", 0), ("terminal_cover_open", "active", 0)]
    assert buckets(result) == ["late", "stored", "stored"], "the clear waits for a raise before it"


def test_meters_and_types_have_alarms_of_their_own() -> None:
    result = move([event(0, 0, "1"), event(1, 1, "1", meter_id="m2"), event(2, 2, "44")], [event(3, 3, "2")])
    assert sorted(result.open.filter("is_open").select("meter_id", "alarm_type").rows()) == [
        ("m1", "meter_cover_open"),
        ("m2", "power_failure"),
    ]


def test_status_bits_are_levels() -> None:
    bits = [("1", 0), ("1", 1), ("0", 2), ("0", 3), ("1", 4)]
    rows = [event(n, t, "A58", dialect="c12.19", source_table="ST3", argument=a) for n, (a, t) in enumerate(bits)]
    assert changes(move(rows)) == [
        ("low_battery", "active", 0),
        ("low_battery", "active", 1),
        ("low_battery", "cleared", 0 + 1),
        ("low_battery", "active", 0),
    ]


@pytest.mark.parametrize("argument", [None, "", "2", "true"])
def test_a_status_bit_that_is_neither_set_nor_clear_does_not_clear_an_alarm(argument: str | None) -> None:
    bit = {"dialect": "c12.19", "source_table": "ST3"}
    result = move([event(0, 0, "A512", argument="1", **bit)], [event(1, 1, "A512", argument=argument, **bit)])
    assert changes(result) == [("tamper_detect", "active", 0)]
    assert buckets(result) == ["quarantined"]


@pytest.mark.parametrize("code", ["80", "81", "82"])
def test_80_to_82_are_counted_in_dsmr_and_an_alarm_in_smr(code: str) -> None:
    assert changes(move([event(0, 0, code, dialect="dsmr")])) == []
    phase = int(code) - 79
    assert changes(move([event(0, 0, code, dialect="smr")])) == [(f"voltage_out_of_band_l{phase}", "active", 0)]


@pytest.mark.parametrize("code", ["83", "84", "85"])
def test_83_to_85_are_a_swell_in_dsmr_and_the_way_back_in_smr(code: str) -> None:
    raised = str(int(code) - 3)
    for dialect, expected in (("dsmr", []), ("smr", ["active", "cleared"])):
        result = move([event(0, 0, raised, dialect=dialect), event(1, 1, code, dialect=dialect)])
        assert result.alarms["state"].to_list() == expected
        assert buckets(result) == ["stored", "stored"]


@pytest.mark.parametrize(
    "other",
    [
        {"code": "4711"},
        {"code": "1", "source_table": "ST76"},
        {"code": "AE1"},
        {"code": "1", "dialect": "c12.19"},
    ],
    ids=str,
)
def test_a_code_that_no_table_has_is_quarantined(other: dict[str, str]) -> None:
    result = move([event(0, 0, **other), event(1, 1, "2")])
    assert result.events.sort("offset").select(bucket_of(pl.col("why")).alias("bucket"), "why").rows() == [
        ("quarantined", "unknown_code"),
        ("stored", None),
    ]
    assert result.alarms.is_empty()


def test_a_counted_or_dropped_event_is_stored_and_raises_nothing() -> None:
    rows = [event(n, n, code, dialect="c12.19") for n, code in enumerate(["AE7", "AE12", "AE20"])]
    result = move(rows)
    assert (changes(result), buckets(result)) == ([], ["stored"] * 3)


def test_the_state_and_the_event_log_of_a_meter_move_the_same_alarm() -> None:
    result = move(
        [event(0, 0, "AE1", dialect="c12.19")],
        [event(1, 9, "A511", dialect="c12.19", source_table="ST3", argument="0")],
    )
    assert changes(result) == [("power_failure", "active", 0), ("power_failure", "cleared", 0)]


def test_the_order_of_the_rows_stays_when_codes_get_their_meaning() -> None:
    rows = [event(n, n, code) for n, code in enumerate(["41", "nothing", "1", "80", "40"])]
    found = with_meaning(pl.DataFrame(rows, schema=EVENTS))
    assert found.select("code", "event_type").rows() == [
        ("41", "terminal_cover_closed"),
        ("nothing", None),
        ("1", "power_failure"),
        ("80", "voltage_sag_l1"),
        ("40", "terminal_cover_removed"),
    ]


def test_an_alarm_is_named_by_meter_type_and_begin_alone() -> None:
    assert alarm_id("m1", "tamper", at(0)) == alarm_id("m1", "tamper", at(0))
    others = {alarm_id("m2", "tamper", at(0)), alarm_id("m1", "other", at(0)), alarm_id("m1", "tamper", at(1e-6))}
    assert len(others | {alarm_id("m1", "tamper", at(0))}) == 4


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["m1", "m2"]), st.sampled_from(["1", "2", "40", "41", "46", "80"])), max_size=20
    ),
    st.lists(st.integers(0, 20), max_size=4).map(sorted),
)
def test_alarms_do_not_depend_on_how_batches_are_cut(moves: list[tuple[str, str]], cuts: list[int]) -> None:
    rows = [event(n, n, code, meter_id=meter_id) for n, (meter_id, code) in enumerate(moves)]
    whole = move(rows)
    cut = move(*[rows[low:high] for low, high in pairwise([0, *cuts, max(len(rows), *cuts, 0)])])
    order = ["alarm_id", "updated_at"]
    assert cut.alarms.sort(order).equals(whole.alarms.sort(order))
    for _, alarm in whole.alarms.group_by("meter_id", "alarm_type"):
        opened = alarm.sort("updated_at")["state"].to_list()
        assert all(not (one == two == "cleared") for one, two in pairwise(opened))
