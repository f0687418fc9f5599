"""Wild values in a plausible series: what the stream refuses, and what the night finds of the energy."""

import random
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from metering.energy.agreement import agreed
from metering.energy.walk import Judge, Limits, walk

LIMITS = Limits(max_w=17_250, interval_s=900, quantum_wh=1)
START = datetime(2024, 1, 1, tzinfo=UTC)
A_DAY = 96
DAYS = 3
SHARE = 0.05
KINDS = ("zero", "huge", "unit", "more", "negative", "less", "again")
Case = tuple[list[int], list[dict[str, Any]], set[int]]


def row(number: int, wh: int, equipment_id: str | None = None) -> dict[str, Any]:
    at = START + timedelta(minutes=15 * number)
    named = {"equipment_id": equipment_id, "run_id": None}
    return {"meter_id": "m1", "register": "import_t1", "observed_at": at, "wh": wh, **named}


def case(seed: int) -> Case:
    """True values of three days and one more hour, readings of them, and the numbers of the wild ones."""
    drawn = random.Random(seed)
    true = [drawn.choice([0, 5_000, 3_432_827, 999_000])]
    for _ in range(A_DAY * DAYS + 4):
        true.append(true[-1] + drawn.choice([0, 25, 100, 400, 1_500]))
    readings: list[dict[str, Any]] = []
    wild: set[int] = set()
    for number, wh in enumerate(true):
        value = wh
        if 0 < number <= A_DAY * DAYS and drawn.random() < SHARE:
            wild.add(number)
            value = {
                "zero": 0, "huge": wh + 10**7, "unit": wh * 1_000, "more": wh + drawn.randint(1, 4_000),
                "negative": -5, "less": max(0, wh - drawn.randint(1, 5_000)), "again": readings[-1]["wh"],
            }[drawn.choice(KINDS)]  # fmt: skip
        readings.append(row(number, value))
    return true, readings, wild


def those(steps: list[dict[str, Any]], *reasons: str) -> set[int]:
    return {step["row"] for step in steps if step["reason"] in reasons and step["row"] is not None}


@pytest.mark.parametrize("seed", range(40))
def test_the_stream_refuses_at_most_one_true_value_for_a_wild_one(seed: int) -> None:
    _, readings, wild = case(seed)
    assert len(those(walk(None, readings, LIMITS).steps, "implausible") - wild) <= len(wild)


@pytest.mark.parametrize("seed", range(40))
def test_the_night_gives_each_day_its_energy_unless_a_wild_value_is_next_to_midnight(seed: int) -> None:
    true, readings, wild = case(seed)
    steps = agreed(None, readings, LIMITS).steps
    for day in range(DAYS):
        begin, end = day * A_DAY, (day + 1) * A_DAY
        if wild & {begin - 1, begin, begin + 1, end - 1, end, end + 1}:
            continue
        found = sum(step["delta_wh"] or 0 for step in steps if begin < step["row"] <= end)
        assert found == true[end] - true[begin], f"day {day}"


@pytest.mark.parametrize("seed", range(20))
def test_the_night_names_only_wild_values_and_their_neighbours(seed: int) -> None:
    _, readings, wild = case(seed)
    beside = {number + shift for number in wild for shift in range(-3, 4)}
    steps = agreed(None, readings, LIMITS).steps
    assert those(steps, "glitch") <= beside
    assert not those(steps, "reset", "meter_exchange")


def night(*values: int | tuple[int, str], limits: Limits = LIMITS) -> list[tuple[str, int | None]]:
    """Reasons and energies of values a quarter of an hour apart; (value, equipment id) where it is named."""
    pairs = [value if isinstance(value, tuple) else (value, None) for value in values]
    steps = agreed(None, [row(number, *pair) for number, pair in enumerate(pairs)], limits).steps
    return [(step["reason"], step["delta_wh"]) for step in steps]


def test_a_box_that_nobody_named_begins_a_segment_with_its_second_value() -> None:
    assert night(9_000_000, 9_000_100, 120_000, 120_100) == [
        ("first", 0), ("ok", 100), ("meter_exchange", 0), ("ok", 100),
    ]  # fmt: skip


def test_a_register_that_begins_anew_near_0_was_reset() -> None:
    assert night(9_000, 9_100, 7, 9) == [("first", 0), ("ok", 100), ("reset", 7), ("ok", 2)]


def test_several_zeros_are_no_reset_where_the_register_comes_back() -> None:
    assert night(9_000, 9_100, 0, 0, 0, 9_500, 9_600) == [
        ("first", 0), ("ok", 100), ("glitch", None), ("glitch", None), ("glitch", None), ("gap", 400), ("ok", 100),
    ]  # fmt: skip


def test_a_wild_first_value_is_a_glitch() -> None:
    assert night(10**9, 9_000, 9_100) == [("glitch", None), ("first", 0), ("ok", 100)]


def test_a_named_box_begins_a_segment_with_its_first_value() -> None:
    assert night((9_000, "a"), (9_100, "a"), (5, "b")) == [("first", 0), ("ok", 100), ("meter_exchange", 0)]


def test_a_telegram_of_another_meter_costs_no_energy() -> None:
    assert night((9_000, "a"), (9_100, "a"), (77_000, "x"), (9_300, "a")) == [
        ("first", 0), ("ok", 100), ("glitch", None), ("gap", 200),
    ]  # fmt: skip


def total(steps: list[tuple[str, int | None]]) -> int:
    return sum(energy or 0 for _, energy in steps)


def test_zeros_that_a_register_without_a_limit_comes_back_from_are_no_reset() -> None:
    unlimited = Limits(max_w=None, interval_s=900, quantum_wh=1)
    values = [*range(2_000, 4_000, 100), 0, 0, *range(4_200, 10_200, 100)]
    steps = night(*values, limits=unlimited)
    assert total(steps) == 10_100 - 2_000
    assert [reason for reason, _ in steps].count("glitch") == 2


def test_a_value_that_is_too_high_by_what_is_plausible_and_a_zero_after_it_are_no_segment() -> None:
    values = [*range(1_000, 2_200, 60), 5_300, 0, *range(2_320, 3_400, 60)]
    assert total(night(*values, limits=Limits(max_w=20_000, interval_s=900, quantum_wh=1))) == 3_340 - 1_000


def test_a_reset_goes_on_however_long() -> None:
    values = [*range(20_000, 22_000, 100), *range(0, 30_000, 100)]
    assert total(night(*values)) == 1_900 + 29_900


def test_a_box_that_shows_a_little_more_is_no_long_step_over_true_readings() -> None:
    values = [*range(9_000_000, 9_004_000, 100), *range(9_024_000, 9_030_000, 100)]
    steps = night(*values)
    assert total(steps) == 3_900 + 5_900
    assert ("meter_exchange", 0) in steps


def test_a_named_box_whose_first_value_is_wild_has_no_phantom_reset() -> None:
    values = [(9_000, "a"), (9_100, "a"), (8_888_888, "b"), (700, "b"), (800, "b"), (900, "b")]
    assert total(night(*values)) == 100 + 200
    found = walk(None, [row(number, *pair) for number, pair in enumerate(values)], LIMITS).steps
    assert [(step["reason"], step["delta_wh"]) for step in found if step["delta_wh"] is not None] == [
        ("first", 0), ("ok", 100), ("meter_exchange", 0), ("first", 0), ("ok", 100), ("ok", 100),
    ]  # fmt: skip


@pytest.mark.parametrize("judge", [walk, agreed])
def test_a_register_ends_where_the_registry_says_so(judge: Judge) -> None:
    quarter = 91 * A_DAY
    reads = [row(0, 99_200_000), row(quarter, 300_000), row(2 * quarter, 1_400_000)]
    five_digits = Limits(max_w=69_000, interval_s=None, quantum_wh=1_000, wraps_wh=100_000_000)
    assert [(step["reason"], step["delta_wh"]) for step in judge(None, reads, five_digits).steps] == [
        ("first", 0), ("rollover", 1_100_000), ("ok", 1_100_000),
    ]  # fmt: skip
    assert [step["delta_wh"] for step in judge(None, reads, replace(five_digits, max_w=None)).steps] == [
        0, 1_100_000, 1_100_000,
    ]  # fmt: skip
    counter = replace(LIMITS, wraps_wh=2**24)
    over = judge(None, [row(0, 2**24 - 100), row(1, 200), row(2, 250)], counter).steps
    assert [step["delta_wh"] for step in over] == [0, 300, 50]
    for value in (2**24 // 2 + 1, -1):  # not behind the end; none at all
        back = judge(None, [row(0, 2**24 - 200), row(1, 2**24 - 100), row(2, value), row(3, 2**24 - 50)], counter)
        assert sum(step["delta_wh"] or 0 for step in back.steps) == 150


@pytest.mark.parametrize("seed", range(60))
def test_a_reset_or_an_exchange_of_a_young_register_costs_no_reading(seed: int) -> None:
    drawn = random.Random(seed)
    steps = [drawn.choice([50, 100, 400]) for _ in range(80)]
    old, begin = drawn.choice([0, 1_000, 12_000, 985_000, 9_985_000]), drawn.choice([0, 0, 120_000, 30_000])
    cut = drawn.randint(8, 40)
    values = [old + sum(steps[:place]) for place in range(cut)]
    values += [begin + sum(steps[cut : cut + place]) for place in range(80 - cut)]
    found = night(*values)
    assert "glitch" not in [reason for reason, _ in found]
    assert sum(delta or 0 for _, delta in found) == values[cut - 1] - old + values[-1] - begin


@pytest.mark.parametrize(("wraps_wh", "old", "step"), [(10**8, 80_000_000, 300), (None, 9_999_500, 10)])
def test_a_zero_of_a_register_without_a_limit_is_no_rollover(wraps_wh: int | None, old: int, step: int) -> None:
    unlimited = Limits(max_w=None, interval_s=900, quantum_wh=1, wraps_wh=wraps_wh)
    values = [0 if number == 20 else old + number * step for number in range(41)]
    found = night(*values, limits=unlimited)
    assert found[20] == ("glitch", None)
    assert sum(delta or 0 for _, delta in found) == 40 * step
    end = wraps_wh or 10**7
    over = [(end - 5 * step + number * step) % end for number in range(11)]
    assert sum(delta or 0 for _, delta in night(*over, limits=unlimited)) == 10 * step
