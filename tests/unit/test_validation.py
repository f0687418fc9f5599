"""Validated intervals: published examples of validation and estimation, and what holds of every series."""

import random
from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metering.alarms.power_fails import POWER_FAILS
from metering.validation.intervals import ROWS, validated
from schemas.tables import REGISTERS

DAY = datetime(2024, 6, 12, tzinfo=UTC)  # a Wednesday
QUARTER = timedelta(minutes=15)
WINTER_DAY, SPRING_DAY = datetime(2024, 10, 27, tzinfo=UTC), datetime(2024, 3, 31, tzinfo=UTC)
NO_REFERENCES = pl.DataFrame(
    schema={
        "meter_id": pl.String(),
        "register": pl.String(),
        "interval_start": pl.Datetime("us", "UTC"),
        "energy_wh": pl.Int64(),
    }
)
Value = tuple[datetime, int]


def given_readings(
    values: Sequence[Value],
    day: tuple[datetime, datetime] = (DAY, DAY + timedelta(days=1)),
    meter_id: str = "a",
    **known: Any,
) -> pl.DataFrame:
    """Readings of one register, with what the registry says."""
    of_registry = {
        "phases": "L1,L2,L3", "nominal_mv": 230_000, "fuse_a": 25, "default_fuse_a": 100, "jurisdiction": "EN50160",
        "is_unlimited": None, "wraps_wh": None, "interval_s": 900, "market": None, "time_zone": "UTC",
    } | known  # fmt: skip
    rows = [
        {
            "meter_id": meter_id, "observed_at": at, "import_t1_wh": wh, "run_id": None, "dialect": "dsmr-5",
            "equipment_id": None, "topic": "t", "partition": 0, "offset": number, "day_start": day[0],
            "day_end": day[1], **of_registry,
        }
        for number, (at, wh) in enumerate(values)
    ]  # fmt: skip
    kinds = {f"{register}_wh": pl.Int64() for register in REGISTERS}
    others = {"run_id": pl.String(), "equipment_id": pl.String(), "market": pl.String(), "fuse_a": pl.Int64(),
              "is_unlimited": pl.Boolean(), "wraps_wh": pl.Int64(), "interval_s": pl.Int64()}  # fmt: skip
    return pl.DataFrame(rows, schema_overrides={**kinds, **others}).with_columns(
        pl.col("observed_at", "day_start", "day_end").cast(pl.Datetime("us", "UTC")),
        *[pl.lit(None, kind).alias(name) for name, kind in kinds.items() if name != "import_t1_wh"],
    )


def quarter_by_quarter(energies: Sequence[int], begin: datetime = DAY, wh: int = 50_000) -> list[Value]:
    """A reading at each edge of quarter hours with this energy."""
    values = [(begin, wh)]
    for number, energy in enumerate(energies, 1):
        values.append((begin + number * QUARTER, values[-1][1] + energy))
    return values


def fails(*spans: tuple[datetime, datetime | None]) -> pl.DataFrame:
    return pl.DataFrame([("a", down, up) for down, up in spans], schema=POWER_FAILS, orient="row")


def done(
    readings: pl.DataFrame, references: pl.DataFrame = NO_REFERENCES, failed: pl.DataFrame | None = None
) -> pl.DataFrame:
    return validated(readings, fails() if failed is None else failed, references)


def like_days(energies: dict[date, int], quarters: range = range(96)) -> pl.DataFrame:
    """References: days in which each quarter hour has as many Wh as its number in the day, and so many more."""
    rows = [
        ("a", "import_t1", datetime(day.year, day.month, day.day, tzinfo=UTC) + number * QUARTER, more + number)
        for day, more in energies.items()
        for number in quarters
    ]
    return pl.DataFrame(rows, schema=NO_REFERENCES.schema, orient="row")


def without(values: list[Value], *numbers: int) -> list[Value]:
    return [value for number, value in enumerate(values) if number not in numbers]


def energies(rows: pl.DataFrame) -> list[int | None]:
    return rows.get_column("energy_wh").to_list()


def test_a_day_that_was_read_is_measured_and_sums_up_to_its_register() -> None:
    rows = done(given_readings(quarter_by_quarter([100] * 96)))
    assert energies(rows) == [100] * 96
    assert set(rows.select("quality", "method", "rule").rows()) == {("measured", "register", "frozen")}
    rows = done(given_readings(quarter_by_quarter(list(range(96)))))
    assert energies(rows) == list(range(96))
    assert set(rows.select("quality", "method", "rule").rows()) == {("measured", "register", None)}


def test_a_gap_of_two_quarters_is_filled_by_a_straight_line() -> None:
    """20 kWh, two missing, 30 kWh: a third and two thirds of the way."""
    values = without(quarter_by_quarter([20_000, 20_000, 30_000, 30_000], wh=500_000), 2)
    rows = done(given_readings(values, is_unlimited=True))
    assert energies(rows)[:4] == [20_000, 23_333, 26_667, 30_000]
    assert rows.select("quality", "method", "rule").rows()[1] == ("estimated", "linear", "gap")


def test_what_is_missing_between_two_registers_is_what_the_others_leave() -> None:
    """Eight slots between 100 and 106 kWh, four of them read with 1 kWh each: the other four have 2 kWh."""
    values = [(DAY + number * QUARTER, 100_000 + 1_000 * number) for number in range(5)]
    values += [(DAY + 8 * QUARTER, 106_000)]
    rows = done(given_readings(values))
    assert energies(rows)[:4] == [1_000] * 4
    missing = rows[4:8]
    assert sum(missing.get_column("energy_wh")) == 2_000
    assert set(missing.get_column("quality")) == {"estimated"}


def test_a_register_that_was_read_out_of_step_is_cut_at_the_quarters() -> None:
    """998 kWh at 12:07, 1000 at 12:15, 1006 at 12:30, 1008 at 12:37."""
    noon = DAY + timedelta(hours=12)
    values = [(noon + timedelta(minutes=minute), wh) for minute, wh in
              ((7, 998_000), (15, 1_000_000), (30, 1_006_000), (37, 1_008_000))]  # fmt: skip
    rows = done(given_readings(values, is_unlimited=True))[48:51]
    assert energies(rows) == [2_000, 6_000, 2_000]
    assert rows.get_column("quality").to_list() == ["incomplete", "measured", "incomplete"]


@pytest.mark.parametrize(("day", "quarters"), [(SPRING_DAY, 92), (DAY, 96), (WINTER_DAY, 100)])
def test_a_local_day_has_its_own_length(day: datetime, quarters: int) -> None:
    offset = timedelta(hours=1 if day == SPRING_DAY else 2)
    begin = day - offset
    end = begin + quarters * QUARTER
    known = {"time_zone": "Europe/Amsterdam"}
    values = quarter_by_quarter(list(range(quarters)), begin)
    assert energies(done(given_readings(values, (begin, end), **known))) == list(range(quarters))
    rows = done(given_readings(values[:-4], (begin, end), **known))  # an hour is missing: one gap of four
    assert rows.get_column("quality").to_list() == ["measured"] * (quarters - 4) + ["missing"] * 4


@pytest.mark.parametrize(
    ("market", "missing", "method"),
    [("DE", 8, "linear"), ("DE", 9, "like_day"), ("AT", 8, "like_day"), ("AT", 7, "linear"), ("CA-ON", 4, "linear"),
     ("CA-ON", 5, "like_day"), ("US-TX", 2, "like_day"), (None, 8, "linear"), ("nowhere", 8, "linear")],
)  # fmt: skip
def test_the_longest_straight_line_is_the_markets(market: str | None, missing: int, method: str) -> None:
    values = without(quarter_by_quarter(list(range(200, 296))), *range(11, 10 + missing))
    weeks = like_days({date(2024, 6, 5): 0, date(2024, 5, 29): 10, date(2024, 6, 11): 3})
    rows = done(given_readings(values, market=market), weeks)
    assert set(rows[10 : 10 + missing].get_column("method")) == {method}
    assert sum(energies(rows)) == sum(range(200, 296))  # type: ignore[arg-type]


def test_a_long_gap_has_the_shape_of_like_days_and_the_registers_energy() -> None:
    values = without(quarter_by_quarter([10] * 96), *range(41, 60))
    saturday, sunday, workdays = date(2024, 6, 8), date(2024, 6, 9), [date(2024, 6, day) for day in (11, 10, 7, 6)]
    shape = {day: 100 * number for number, day in enumerate(workdays)} | {saturday: 10_000, sunday: 10_000}
    rows = done(given_readings(values, market="DE"), like_days(shape))[40:60]
    means = [number + 100 for number in range(40, 60)]  # of the three nearest workdays: 0, 100 and 200
    expected = [200 * mean / sum(means) for mean in means]
    assert all(abs(wh - exact) < 1 for wh, exact in zip(energies(rows), expected, strict=True))  # type: ignore[operator]
    assert sum(energies(rows)) == 200  # type: ignore[arg-type]
    assert set(rows.select("quality", "method", "rule").rows()) == {("estimated", "like_day", "gap")}


def test_a_long_gap_without_like_days_is_even() -> None:
    values = without(quarter_by_quarter([10] * 96), *range(41, 60))
    rows = done(given_readings(values))[40:60]
    assert energies(rows) == [10] * 20
    assert set(rows.get_column("method")) == {"even"}


def test_what_comes_after_the_last_reading_is_estimated_and_in_no_register() -> None:
    rows = done(given_readings(quarter_by_quarter([10] * 60)), like_days({date(2024, 6, 11): 0}))
    assert energies(rows)[60:] == list(range(60, 96))
    assert set(rows[60:].select("quality", "method", "is_reconciled").rows()) == {("estimated", "like_day", False)}
    assert rows[:60].get_column("is_reconciled").all()
    rows = done(given_readings(quarter_by_quarter([10] * 60)))
    assert energies(rows)[60:] == [None] * 36
    assert set(rows[60:].select("quality", "rule").rows()) == {("missing", "gap")}
    assert rows[60].get_column("not_run").to_list() == [["like_day"]]


def test_nothing_is_said_of_the_time_before_a_meters_first_reading() -> None:
    rows = done(given_readings(quarter_by_quarter([10] * 36, DAY + 60 * QUARTER)), like_days({date(2024, 6, 11): 0}))
    assert energies(rows)[:60] == [None] * 60


def test_an_interval_without_power_is_0_and_no_end_of_a_line() -> None:
    values = without(quarter_by_quarter([40] * 8 + [0] * 4 + [40] * 84), *range(9, 12))
    failed = fails((DAY + 8 * QUARTER, DAY + 12 * QUARTER))
    rows = done(given_readings(values), failed=failed)
    assert energies(rows)[7:13] == [40, 0, 0, 0, 0, 40]
    assert set(rows[8:12].select("quality", "method", "rule").rows()) == {("power_fail", "zero", None)}
    later = without(values, *range(10, 12))  # two more are missing after the power came back
    rows = done(given_readings(later), failed=failed)
    assert energies(rows)[8:12] == [0, 0, 0, 0]
    assert "linear" not in rows[12:15].get_column("method").to_list()
    assert sum(energies(rows)) == 92 * 40  # type: ignore[arg-type]


def test_a_failure_that_was_told_a_moment_before_the_last_reading_is_one() -> None:
    failed = fails((DAY + 60 * QUARTER - timedelta(seconds=30), None))
    rows = done(given_readings(quarter_by_quarter([10] * 60)), like_days({date(2024, 6, 11): 0}), failed)
    assert energies(rows)[60:] == [0] * 36


def test_while_nobody_heard_that_the_power_is_back_it_is_0() -> None:
    failed = fails((DAY + 60 * QUARTER + timedelta(seconds=1), None))
    rows = done(given_readings(quarter_by_quarter([10] * 60)), like_days({date(2024, 6, 11): 0}), failed)
    assert energies(rows)[61:] == [0] * 35
    assert set(rows[61:].get_column("quality")) == {"power_fail"}


@pytest.mark.parametrize(
    ("highest", "third", "is_spike"), [(28_000, 10_000, False), (28_100, 10_000, True), (9, 1, False)]
)
def test_a_spike_is_one_by_the_third_highest_of_its_day(highest: int, third: int, is_spike: bool) -> None:
    rest = [number % 2 for number in range(93)]
    values = quarter_by_quarter([*rest, third, third, highest])
    rows = done(given_readings(values, is_unlimited=True))
    assert (rows.get_column("rule").to_list()[-1] == "spike") is is_spike
    assert rows.get_column("not_run").to_list()[0] == ["limit"]  # without a fuse nobody can say what is too much


def test_a_day_without_import_is_asked_for_and_one_register_without_is_not() -> None:
    still = given_readings(quarter_by_quarter([0] * 96))
    assert set(done(still).get_column("rule")) == {"zero"}
    low = [70_000 + 10 * number for number in range(97)]
    both = still.with_columns(import_t2_wh=pl.Series(low), export_t1_wh=pl.lit(5, pl.Int64))
    rows = done(both).filter(pl.col("register") != "import_t2")
    assert set(rows.get_column("register")) == {"import_t1", "export_t1"}
    assert set(rows.get_column("rule")) == {None}


@pytest.mark.parametrize("hours", [24, 25])
def test_a_meter_that_is_read_once_a_day_has_its_day_whatever_second_it_is_read_in(hours: int) -> None:
    values = [
        (DAY + timedelta(hours=number * hours - 24, seconds=5 * number), 1_000 + 960 * number) for number in range(4)
    ]
    rows = done(given_readings(values, interval_s=86_400))
    assert set(rows.get_column("quality")) == {"interpolated"}


def test_half_hours_are_quarter_hours_where_clocks_are_45_minutes_off() -> None:
    begin = DAY - timedelta(hours=5, minutes=45)
    values = [(begin + number * 2 * QUARTER, 1_000 + 100 * number) for number in range(-1, 50)]
    day = (begin, begin + timedelta(days=1))
    rows = done(given_readings(values, day, interval_s=1_800, time_zone="Asia/Kathmandu"))
    assert len(rows) == 96
    assert sum(energies(rows)) == 4_800  # type: ignore[arg-type]


def test_a_part_that_is_known_is_no_guess_and_stays_in_the_sum() -> None:
    values = quarter_by_quarter([10] * 60) + [(DAY + 60 * QUARTER + timedelta(minutes=7), 50_605)]
    rows = done(given_readings(values), like_days({date(2024, 6, 11): 0}))
    assert rows[60].select("energy_wh", "quality", "is_reconciled").rows() == [(5, "incomplete", True)]
    assert energies(rows)[61:] == list(range(61, 96))


def test_half_hours_are_those_of_who_reads_each_half_hour() -> None:
    values = [(DAY + number * 2 * QUARTER, 1_000 + 100 * number + number % 3) for number in range(49)]
    rows = done(given_readings(values, interval_s=1_800))
    assert len(rows) == 48
    assert set(rows.get_column("quality")) == {"measured"}
    assert sum(energies(rows)) == values[-1][1] - values[0][1]  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.booleans())
def test_intervals_sum_up_to_the_register_whatever_is_missing_and_in_any_order(seed: int, has_like_days: bool) -> None:
    drawn = random.Random(seed)
    begin = DAY - timedelta(hours=3)
    every = drawn.choice([10, 60, 300, 900, 1_700])
    moments = range(0, 30 * 3600, every) if every > 60 else range(0, 30 * 3600, every * 10)
    at = [begin + timedelta(seconds=second + drawn.randrange(5)) for second in moments]
    wh, values = 10_000, []
    for moment in at:
        wh += drawn.randrange(60)
        values.append((moment, wh))
    for _ in range(drawn.randrange(4)):
        lost = drawn.randrange(len(values))
        del values[lost : lost + drawn.randrange(1, 1 + len(values) // 3)]
    if len(values) < 2:
        return
    references = like_days({date(2024, 6, 11): 0, date(2024, 6, 10): 5}) if has_like_days else NO_REFERENCES
    down = DAY + timedelta(seconds=drawn.randrange(86_400))
    failed = fails((down, down + timedelta(seconds=drawn.randrange(7_200))))
    readings = given_readings(values, interval_s=every if every > 60 else every * 10)
    rows = done(readings, references, failed)
    assert rows.schema == ROWS
    shuffled = readings.sample(fraction=1.0, shuffle=True, seed=seed % 1000)
    assert done(shuffled, references, failed).equals(rows)
    whole_days = [(DAY + timedelta(days=shift), DAY + timedelta(days=shift + 1)) for shift in (-1, 0, 1)]
    interval_s = readings["interval_s"][0]
    days = [done(given_readings(values, day, interval_s=interval_s), references, failed) for day in whole_days]
    ours = pl.concat(days).filter("is_reconciled")
    total = ours.get_column("energy_wh").sum()
    assert total == values[-1][1] - values[0][1]
    assert (pl.concat(days).get_column("energy_wh").fill_null(0) >= 0).all()
