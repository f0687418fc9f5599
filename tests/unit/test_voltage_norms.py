"""What norms say of weeks of windows: limits to the last window, percentiles, and what nobody knows."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metering.voltage.norms import (
    ANSI,
    AS61000,
    EN50160,
    FAILURES,
    PERIODS,
    PRODIST,
    judged,
    prodist_compensation,
)
from tests.logs_by_hand import LOGS, log, read
from tests.logs_by_hand import UCI as UCI_HEADER

MONDAY = datetime(2024, 6, 3, tzinfo=UTC)
WEEK = timedelta(days=7)
ALL = {"any": (EN50160, ANSI, AS61000, PRODIST)}
UCI = LOGS / "household-voltage-1min"


def windows(volts: Sequence[float | None], first: datetime = MONDAY, **other: Any) -> pl.DataFrame:
    """Windows one after another; None has an interruption."""
    known = {"meter_id": "m", "phase": "L1", "nominal_mv": 230_000, "jurisdiction": EN50160, **other}
    rows = [
        {
            **known, "window_start": first + number * timedelta(minutes=10), "min_mv": round((volt or 0) * 1000),
            "max_mv": round((volt or 0) * 1000), "exact_mv": (volt or 0) * 1000.0, "is_valid": volt is not None,
        }
        for number, volt in enumerate(volts)
    ]  # fmt: skip
    return pl.DataFrame(rows, schema_overrides={"nominal_mv": pl.Int64, "jurisdiction": pl.String})


def verdicts(
    frame: pl.DataFrame, start: datetime = MONDAY, period: str = "week", level: str = "phase", **other: Any
) -> dict[str, dict[str, Any]]:
    """Norm → its row of the only phase, or meter."""
    end = other.pop("end", start + (WEEK if period == "week" else timedelta(days=1)))
    meters = frame.get_column("meter_id").unique()
    rows = [{"meter_id": m, "period": period, "period_start": start, "period_end": end} for m in meters]
    failures = pl.DataFrame(other.pop("failures", []), schema=FAILURES, orient="row")
    found = judged(frame, failures, pl.DataFrame(rows, schema=PERIODS), **other)
    return {row["norm"]: row for row in found.filter(level=level).to_dicts()}


def counts(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["judged_windows"], row["outside_windows"], row["beyond_windows"], row["complies"]


def test_one_window_above_ten_percent_fails_a_week_that_is_else_well_within() -> None:
    row = verdicts(windows([231.0] * 1007 + [260.0]))[EN50160]
    assert counts(row) == (1008, 1, 1, False)
    assert row["outside_pct"] == pytest.approx(100 / 1008)


@pytest.mark.parametrize(("outside", "share", "complies"), [(50, 4.960, True), (51, 5.060, False)])
def test_fifty_of_1008_windows_may_lie_below_ten_percent_and_no_more(
    outside: int, share: float, complies: bool
) -> None:
    row = verdicts(windows([206.9] * outside + [230.0] * (1008 - outside)))[EN50160]
    assert counts(row) == (1008, outside, 0, complies)
    assert row["outside_pct"] == pytest.approx(share, abs=0.0005)


def test_a_voltage_on_a_limit_is_within_it() -> None:
    assert counts(verdicts(windows([207.0, 253.0] * 504))[EN50160]) == (1008, 0, 0, True)
    assert counts(verdicts(windows([195.5] + [230.0] * 1007))[EN50160]) == (1008, 1, 0, True)
    assert counts(verdicts(windows([195.499] + [230.0] * 1007))[EN50160]) == (1008, 1, 1, False)


@pytest.mark.parametrize(
    ("precarious", "critical", "drp", "drc", "complies"),
    [(30, 0, 2.976, 0, True), (31, 0, 3.075, 0, False), (0, 5, 0, 0.496, True), (0, 6, 0, 0.595, False)],
)
def test_prodist_counts_precarious_and_critical_windows_apart(
    precarious: int, critical: int, drp: float, drc: float, complies: bool
) -> None:
    volts = [201.9] * precarious + [233.1] * critical + [220.0] * (1008 - precarious - critical)
    row = verdicts(windows(volts, nominal_mv=220_000, jurisdiction=PRODIST))[PRODIST]
    assert counts(row) == (1008, precarious, critical, complies)
    assert (row["outside_pct"], row["beyond_pct"]) == (pytest.approx(drp, abs=0.0005), pytest.approx(drc, abs=0.0005))


@pytest.mark.parametrize(
    ("nominal_mv", "adequate", "precarious", "critical"),
    [
        (220_000, [202, 231], [191, 201.999, 231.001, 233], [190.999, 233.001]),
        (127_000, [117, 133], [110, 116.999, 133.001, 135], [109.999, 135.001]),
    ],
)
def test_prodist_has_tables_of_its_own_for_220_and_127_volts(
    nominal_mv: int, adequate: list[float], precarious: list[float], critical: list[float]
) -> None:
    volts = [*adequate, *precarious, *critical, *[nominal_mv / 1000] * 1000]
    row = verdicts(windows(volts, nominal_mv=nominal_mv, jurisdiction=PRODIST))[PRODIST]
    assert counts(row)[:3] == (1008, 4, 2)


def test_prodist_replaces_an_invalid_window_and_does_not_judge_fewer_than_1008() -> None:
    brazil: dict[str, Any] = {"nominal_mv": 220_000, "jurisdiction": PRODIST}
    before = MONDAY - timedelta(days=1)
    week = [220.0] * 1000 + [None] * 8
    assert counts(verdicts(windows([220.0] * 136 + [200.0] * 8 + week, before, **brazil))[PRODIST])[:3] == (1008, 8, 0)
    short = verdicts(windows([220.0] * 7 + week, MONDAY - timedelta(minutes=70), **brazil))[PRODIST]
    assert (short["judged_windows"], short["complies"], short["outside_pct"]) == (1007, None, None)
    day = verdicts(windows([200.0] * 144, **brazil), period="day")[PRODIST]
    assert counts(day) == (144, 144, 0, None), "a set has 1008 windows, a day has not"


def test_prodist_and_every_norm_judge_a_meter_by_its_worst_phase() -> None:
    brazil: dict[str, Any] = {"nominal_mv": 220_000, "jurisdiction": PRODIST}
    volts = {"L1": 5, "L2": 31, "L3": 30}
    frame = pl.concat([windows([201.0] * n + [220.0] * (1008 - n), phase=p, **brazil) for p, n in volts.items()])
    row = verdicts(frame, level="meter")[PRODIST]
    assert (row["worst_phase"], *counts(row)) == ("L2", 1008, 31, 0, False)


def test_prodist_pays_back_what_lies_above_its_limits() -> None:
    assert prodist_compensation(5, 1, 1) == pytest.approx(0.095)
    assert prodist_compensation(3, 0.5, 100) == prodist_compensation(0, 0, 100) == 0
    assert prodist_compensation(5, 0, 100) == pytest.approx(6)


def test_percentiles_are_linear_between_ranks() -> None:
    row = verdicts(windows([200.0 + n / 10 for n in range(101)]), period="day")[EN50160]
    assert [row[name] for name in ("p1_mv", "p5_mv", "p50_mv", "p95_mv", "p99_mv")] == [
        200_100, 200_500, 205_000, 209_500, 209_900,
    ]  # fmt: skip
    assert verdicts(windows([200.0, 210.0]), period="day")[EN50160]["p1_mv"] == 200_100


@pytest.mark.parametrize(
    ("volts", "complies"),
    [
        ([230.0] * 998 + [200.0] * 10, True),  # the first percentile lies at rank 10.07 of 0 … 1007
        ([230.0] * 997 + [215.0] * 11, True),  # 215 + 0.07 × 15 = 216.05
        ([230.0] * 997 + [214.9] * 11, False),
        ([230.0] * 997 + [270.0] * 11, False),  # 230 + 0.93 × 40 = 267.2
        ([230.0] * 998 + [270.0] * 10, True),
        ([216.0] * 504 + [253.0] * 504, True),
    ],
)
def test_as_61000_wants_the_first_and_the_99th_percentile_within_its_limits(
    volts: Sequence[float | None], complies: bool
) -> None:
    assert verdicts(windows(volts, jurisdiction=AS61000))[AS61000]["complies"] is complies


def test_a_week_that_en_50160_passes_may_fail_the_percentiles_and_range_b() -> None:
    week = [210.0] * 60 + [230.0] * 948
    found = verdicts(windows(week, jurisdiction="any"), norms_of=ALL)
    assert {norm: row["complies"] for norm, row in found.items()} == {
        EN50160: True, AS61000: False, ANSI: False, PRODIST: None,
    }  # fmt: skip
    assert counts(found[ANSI])[:3] == (1008, 60, 60)
    assert found[PRODIST]["judged_windows"] == 0, "it has no limits for 230 V"


def test_ansi_counts_windows_outside_range_a_and_outside_range_b() -> None:
    america: dict[str, Any] = {"nominal_mv": 120_000, "jurisdiction": ANSI}
    volts = [120.0] * 1000 + [113.9, 112.0, 126.1, 126.9] + [114.0, 126.0, 110.04, 126.96]
    row = verdicts(windows(volts, **america))[ANSI]
    assert counts(row) == (1008, 6, 0, True)
    assert counts(verdicts(windows([*volts[:-1], 127.0], **america))[ANSI]) == (1008, 6, 1, False)


def test_of_an_incomplete_week_nothing_is_known_though_it_is_counted() -> None:
    assert counts(verdicts(windows([230.0] * 958))[EN50160]) == (958, 0, 0, True)
    row = verdicts(windows([230.0] * 956 + [260.0]))[EN50160]
    assert (row["is_complete"], *counts(row)) == (False, 957, 1, 1, None)


def test_windows_with_an_interruption_are_left_out_of_n_and_are_not_missing() -> None:
    row = verdicts(windows([230.0] * 908 + [None] * 100))[EN50160]
    assert (row["windows"], row["valid_windows"], *counts(row)) == (1008, 908, 908, 0, 0, True)
    dark = [("m", MONDAY + timedelta(minutes=9080), MONDAY + 2 * WEEK)]
    row = verdicts(windows([230.0] * 908), failures=dark)[EN50160]
    assert (row["is_complete"], *counts(row)) == (True, 908, 0, 0, True)
    assert counts(verdicts(windows([None] * 1008))[EN50160]) == (0, None, None, None)


@pytest.mark.parametrize(("monday", "hours"), [("2024-03-25", 167), ("2024-10-21", 169), ("2024-06-03", 168)])
def test_an_iso_week_has_as_many_windows_as_its_hours(monday: str, hours: int) -> None:
    zone = ZoneInfo("Europe/Amsterdam")
    start = datetime.fromisoformat(monday).replace(tzinfo=zone)
    first, end = start.astimezone(UTC), (start + WEEK).astimezone(UTC)
    assert end - first == timedelta(hours=hours)
    week = windows([260.0] * 3 + [230.0] * hours * 6 + [260.0] * 3, first - timedelta(minutes=30))
    assert counts(verdicts(week, first, end=end)[EN50160]) == (hours * 6, 0, 0, True)
    enough = windows([230.0] * (hours * 6 * 95 // 100), first)
    assert verdicts(enough, first, end=end)[EN50160]["complies"] is None
    assert verdicts(pl.concat([enough, windows([230.0], end - timedelta(hours=1))]), first, end=end)[EN50160][
        "complies"
    ]


@pytest.mark.parametrize(
    "unknown",
    [{"nominal_mv": None}, {"jurisdiction": None}, {"jurisdiction": "Atlantis"}],
    ids=["nominal", "jurisdiction", "other"],
)
def test_a_meter_of_which_nominal_or_jurisdiction_is_not_known_is_judged_by_nothing(unknown: dict[str, Any]) -> None:
    (row,) = verdicts(windows([230.0] * 1008, **unknown)).values()
    assert (row["valid_windows"], row["p50_mv"], *counts(row)) == (1008, 230_000, 0, None, None, None)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000), volts=st.lists(st.floats(180, 270), min_size=20, max_size=60))
def test_rows_in_another_order_give_the_same(seed: int, volts: list[float]) -> None:
    phases = [windows(list(volts), phase=phase, jurisdiction="any") for phase in ("L1", "L2")]
    frame = pl.concat([*phases, windows(volts[::-1], meter_id="n", jurisdiction="any")])
    periods = pl.DataFrame(
        [
            {"meter_id": meter, "period": period, "period_start": MONDAY, "period_end": MONDAY + WEEK}
            for meter in "mn"
            for period in ("day", "week")
        ],
        schema=PERIODS,
    )
    shuffled = frame.sample(fraction=1, shuffle=True, seed=seed)
    one, other = (judged(each, FAILURES.to_frame(), periods, ALL) for each in (frame, shuffled))
    assert one.equals(other)


def three_weeks(folder: Path) -> Path:
    """A log of a home by minutes: the real one where it is, else ours, which lacks two minutes of its second week."""
    for path in UCI.glob("*.txt.gz"):
        return path
    lines, start = [], datetime(2006, 12, 18)  # noqa: DTZ001
    for minute in range(3 * 7 * 1440):
        stamp, volts = start + timedelta(minutes=minute), 236 + minute // 10 % 101 / 10
        if minute not in (12_003, 12_004):
            lines.append(f"{stamp:%d/%m/%Y;%H:%M:%S};1.000;0.000;{volts:.3f};4.000;0.000;0.000;0.000\n")
    return log(folder / "own.txt", UCI_HEADER + "".join(lines))


def test_a_home_complies_in_each_of_its_three_weeks(tmp_path: Path) -> None:
    minutes = pl.from_arrow(read(three_weeks(tmp_path), "uci-household").readings)
    assert isinstance(minutes, pl.DataFrame)
    by_window = minutes.group_by(window_start=pl.col("observed_at").dt.truncate("10m")).agg(
        samples=pl.col("voltage_l1_mv").count(),
        min_mv=pl.col("voltage_l1_mv").min(),
        max_mv=pl.col("voltage_l1_mv").max(),
        exact_mv=pl.col("voltage_l1_mv").mean(),
    )
    known = {"meter_id": "m", "phase": "L1", "nominal_mv": 230_000, "jurisdiction": EN50160}
    kinds = {name: pl.lit(value) for name, value in known.items()}
    means = by_window.with_columns(**kinds, is_valid=pl.col("samples") >= 9)
    found = []
    for monday in ("2006-12-18", "2006-12-25", "2007-01-01"):
        start = datetime.fromisoformat(monday).replace(tzinfo=ZoneInfo("Europe/Paris")).astimezone(UTC)
        row = verdicts(means, start)[EN50160]
        found.append((*counts(row), *[pytest.approx(row[name], abs=1) for name in ("mean_mv", "p1_mv", "p99_mv")]))
    assert found == (REAL if UCI.exists() else our_own())


REAL = [
    (1007, 0, 0, True, 241_370, 233_331, 247_340),
    (1007, 0, 0, True, 241_915, 232_450, 249_341),
    (1008, 0, 0, True, 240_922, 232_433, 247_315),
]


def our_own() -> list[tuple[Any, ...]]:
    """What must follow from our log: ranks counted by hand."""
    found = []
    for week in range(3):
        mv = sorted(236_000 + k % 101 * 100 for k in range(week * 1008, week * 1008 + 1008) if k != 1_200)
        ranks = [(share * (len(mv) - 1) // 100, share * (len(mv) - 1) % 100 / 100) for share in (1, 99)]
        percentiles = [mv[low] + part * (mv[low + 1] - mv[low]) for low, part in ranks]
        found.append((len(mv), 0, 0, True, sum(mv) / len(mv), *percentiles))
    return found


def test_without_windows_there_is_no_row() -> None:
    assert judged(windows([230.0]).clear(), FAILURES.to_frame(), PERIODS.to_frame()).is_empty()
