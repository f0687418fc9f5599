"""What `replay inspect` says, against figures worked out by hand."""

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pytest
from rich.console import Console

from replay.statistics import (
    TARGETS,
    Spread,
    Statistics,
    autocorrelation,
    backward,
    comparison,
    comparisons,
    hourly_swing_v,
    is_in_range,
    kwh_per_day,
    minute_values,
    missing,
    ordered,
    power_to_register_pct,
    statistics,
    transformer_coherence,
    usual_interval_s,
    voltage_export_correlation,
    voltage_import_correlation,
)
from replay.tape import Tape, log_schema, registry_of, write_tape
from schemas.tables import REGISTERS

BEGIN = datetime(2016, 6, 15, tzinfo=UTC)
WH = tuple(f"{register}_wh" for register in REGISTERS)


def readings(seconds: Iterable[float], meter_id: str = "m1", **columns: npt.ArrayLike) -> pl.DataFrame:
    """Readings of a meter so many seconds after the begin; columns not named are null."""
    known = {"meter_id": meter_id, "observed_at": [BEGIN + timedelta(seconds=float(second)) for second in seconds]}
    schema = {"voltage_l1_mv": pl.Int64, "import_w": pl.Int64, "export_w": pl.Int64} | dict.fromkeys(WH, pl.Int64)
    frame = pl.DataFrame(known | {name: np.asarray(values) for name, values in columns.items()})
    return frame.with_columns(
        [pl.lit(None, kind).alias(name) for name, kind in schema.items() if name not in columns]
    ).select("meter_id", "observed_at", *schema)


def waves(count: int = 600, memory: float = 0.9, seed: int = 1) -> npt.NDArray[np.int64]:
    """Volts in mV with a known autocorrelation of one step."""
    generator = np.random.default_rng(seed)
    noise = generator.standard_normal(count)
    for step in range(1, count):
        noise[step] = memory * noise[step - 1] + np.sqrt(1 - memory**2) * noise[step]
    return np.rint(230_000 + 2_000 * noise).astype(int)


def tape_of(frame: pl.DataFrame, folder: Path) -> Tape:
    schema = log_schema("reading")
    full = frame.with_columns(dialect=pl.lit("x")).to_arrow()
    columns = [
        full[field.name].cast(field.type) if field.name in full.column_names else pa.nulls(len(full), field.type)
        for field in schema
    ]
    table = pa.Table.from_arrays(columns, schema=schema)
    return write_tape(
        folder, readings=table, events=log_schema("event").empty_table(),
        registry=registry_of(table, time_zone="Europe/Berlin", interval_s=60), format="x", source="x",
        time_zone="Europe/Berlin", rows_in=len(table), defects={}, interval_s=60,
    )  # fmt: skip


def test_a_lag_is_a_time_and_not_a_row() -> None:
    volts = waves()
    whole = readings(np.arange(600) * 60, voltage_l1_mv=volts)
    lacking = whole.filter(pl.int_range(600) % 7 != 3)
    one = autocorrelation(minute_values(ordered(whole)), timedelta(minutes=1))
    assert one[0] == pytest.approx(np.corrcoef(volts[1:], volts[:-1])[0, 1])
    kept = np.arange(600) % 7 != 3
    pairs = kept[1:] & kept[:-1]
    expected = np.corrcoef(volts[1:][pairs], volts[:-1][pairs])[0, 1]
    assert autocorrelation(minute_values(ordered(lacking)), timedelta(minutes=1))[0] == pytest.approx(expected)
    assert expected != pytest.approx(one[0], abs=1e-6)


def test_a_tape_with_steps_of_five_minutes_knows_ten_minutes_and_not_one() -> None:
    minutes = minute_values(ordered(readings(np.arange(400) * 300, voltage_l1_mv=waves(400))))
    assert autocorrelation(minutes, timedelta(minutes=1)).is_empty()
    assert 0.6 < autocorrelation(minutes, timedelta(minutes=10))[0] < 0.95


def test_readings_within_a_minute_count_as_their_mean() -> None:
    minutes = minute_values(ordered(readings([0, 20, 40, 61], voltage_l1_mv=[1000, 2000, 3000, 9000])))
    assert minutes["volts"].to_list() == [2.0, 9.0]


def test_the_swing_is_the_median_over_the_hours_of_highest_minus_lowest() -> None:
    volts = np.full(180, 230_000)
    volts[10], volts[70], volts[80], volts[130] = 233_000, 228_000, 234_000, 229_000
    minutes = minute_values(ordered(readings(np.arange(180) * 60, voltage_l1_mv=volts)))
    assert hourly_swing_v(minutes, 60).to_list() == [3.0]


def test_an_hour_that_is_hardly_there_has_no_swing() -> None:
    at = np.concatenate([np.arange(60), np.arange(60, 65), np.arange(120, 180)]) * 60
    volts = np.where(np.arange(len(at)) % 2, 230_000, np.where(at < 7200, 232_000, 236_000))
    assert hourly_swing_v(minute_values(ordered(readings(at, voltage_l1_mv=volts))), 60)[0] == pytest.approx(4.0)


def test_nine_minutes_by_the_second_have_no_swing_and_twelve_readings_of_five_minutes_do() -> None:
    short = minute_values(ordered(readings(np.arange(540), voltage_l1_mv=waves(540))))
    assert hourly_swing_v(short, 1).is_empty()
    volts = np.array([230_000, 231_500] * 6)
    assert hourly_swing_v(minute_values(ordered(readings(np.arange(12) * 300, voltage_l1_mv=volts))), 300)[0] == 1.5


def test_voltage_is_compared_with_import_minus_export_and_while_exporting_with_export() -> None:
    net_w = np.tile([-3000, -1000, 500, 2000], 100)
    volts = 235_000 - net_w
    columns = {"import_w": np.maximum(net_w, 0), "export_w": np.maximum(-net_w, 0), "voltage_l1_mv": volts}
    minutes = minute_values(ordered(readings(np.arange(400) * 60, **columns)))
    assert voltage_import_correlation(minutes)[0] == pytest.approx(-1)
    assert voltage_export_correlation(minutes)[0] == pytest.approx(1)


def test_a_meter_without_power_has_that_of_its_register() -> None:
    minutes = minute_values(ordered(readings([0, 60, 120], import_t1_wh=[0, 10, 40])))
    assert minutes["import_w"].to_list() == [None, 600.0, 1800.0]


def test_meters_are_compared_with_those_of_their_own_transformer_only() -> None:
    common, other = waves(900), waves(900, seed=2)
    frames = [
        readings(np.arange(900) * 60, name, voltage_l1_mv=volts)
        for name, volts in (("a", common), ("b", common + 500), ("c", other), ("d", other * 2))
    ]
    registry = pl.DataFrame({"meter_id": ["a", "b", "c", "d"], "transformer_id": ["T1", "T1", "T2", "T2"]})
    assert transformer_coherence(minute_values(ordered(pl.concat(frames))), registry).to_list() == pytest.approx([1, 1])
    one = registry.with_columns(transformer_id=pl.lit("T"))
    assert len(transformer_coherence(minute_values(ordered(pl.concat(frames))), one)) == 6


def test_gaps_steps_back_and_duplicates_are_counted() -> None:
    frame = readings([0, 60, 60, 120, 300, 360], import_t1_wh=[10, 20, 25, 15, 30, 40])
    whole = ordered(frame)
    assert (len(frame) - len(whole), usual_interval_s(whole), missing(whole, 60), backward(whole)) == (1, 60, 2, 1)


def test_energy_a_day_is_what_the_register_rises_by_over_its_days() -> None:
    whole = ordered(readings([0, 43_200, 86_400, 172_800], import_t1_wh=[1000, 6000, 4000, 13_000]))
    assert kwh_per_day(whole, "import_t1").to_list() == [pytest.approx((5 + 9) / 2)]
    assert kwh_per_day(whole, "export_t1").to_list() == [None]


def test_power_over_time_is_compared_with_the_register_over_usual_steps_only() -> None:
    frame = readings([0, 3600, 7200, 36_000], import_w=[1000, 1000, 1000, 9000], import_t1_wh=[0, 1000, 1800, 99_000])
    assert power_to_register_pct(ordered(frame), 3600)[0] == pytest.approx(100 * (2000 / 1800 - 1))


def test_a_tape_without_voltage_and_power_gets_dashes(tmp_path: Path) -> None:
    tape = tape_of(readings(np.arange(50) * 1800, import_t1_wh=np.arange(50) * 200), tmp_path / "tape")
    found = statistics(tape)
    assert set(found.realism.values()) == {None} and found.mean_day_v == [None] * 24
    day = found.kwh_per_day["import_t1"]
    assert day is not None
    assert [day.median, day.low, day.high] == pytest.approx([9.6] * 3) and day.meters == 1
    assert found.power_to_register_pct is None
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(comparison({"half hours": found}))
    assert "V swing within an hour" in (text := console.export_text()) and "–" in text and "9.60" in text


def test_a_figure_out_of_range_is_marked() -> None:
    steady = statistics_with(autocorrelation_1min=Spread(0.2, 0.1, 0.3, 5), hourly_swing_v=Spread(5, 4, 6, 5))
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(comparison({"noise": steady}))
    lines = console.export_text().splitlines()
    assert any("1 min" in line and "✗ 0.20" in line for line in lines)
    assert any("swing" in line and "✓ 5.00" in line for line in lines)
    assert is_in_range("hourly_swing_v", Spread(3, 1, 9, 4)) and not is_in_range("hourly_swing_v", Spread(13, 1, 9, 4))


def test_every_value_of_many_tapes_is_there_at_80_columns_and_a_dash_says_why(tmp_path: Path) -> None:
    short = statistics(tape_of(readings(np.arange(540), voltage_l1_mv=waves(540)), tmp_path / "short"))
    blind = statistics(tape_of(readings(np.arange(50) * 1800, import_t1_wh=np.arange(50) * 200), tmp_path / "blind"))
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for table in comparisons({"short": short, "blind": blind, "a-name-of-more-than-24-letters": short}, 80):
        console.print(table)
    text = console.export_text()
    words = " ".join(text.split())
    assert "…\n" not in text and max(map(len, text.splitlines())) <= 80
    assert text.count("usual interval") == 3 and "1800 s" in text and "9.60" in text
    assert words.count("– (no hour is half there)") == 2
    assert "– (no voltage in the tape)" in words and "– (no power in the tape)" in words
    both = [table.columns for table in comparisons({"short": short, "blind": blind}, 200)]
    assert [len(columns) for columns in both] == [4]


def statistics_with(**realism: Spread) -> Statistics:
    return Statistics(
        1, 1, 60, None, None, 0, 0, 0, dict.fromkeys(REGISTERS), None,
        dict.fromkeys(TARGETS) | realism, list(range(24)), [None] * 24,
    )  # fmt: skip


def test_independent_noise_is_out_of_every_range(tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    volts, import_w = 230_000 + generator.normal(0, 500, 1440).astype(int), generator.integers(0, 3000, 1440)
    found = statistics(tape_of(readings(np.arange(1440) * 60, voltage_l1_mv=volts, import_w=import_w), tmp_path / "x"))
    figures = {name: figure for name, figure in found.realism.items() if figure}
    assert len(figures) == 4 and not any(is_in_range(name, figure) for name, figure in figures.items())
