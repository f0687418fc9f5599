"""Quarter hours of energy: the columns against the definition, one microsecond's share at a time in whole numbers."""

from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import polars as pl
from hypothesis import given, settings
from hypothesis import strategies as st

from metering.energy.delta_engine import BASELINE, STEPS
from metering.energy.intervals import OPEN, quarter_hours

START = datetime(2024, 3, 31, tzinfo=UTC)
QUARTER_S = 900
SPREAD = ("ok", "gap", "rollover", "reset")
Step = tuple[str, int | None, int, int, str]
"""Meter, from, to, Wh, reason; seconds after `START`."""
Quarters = dict[tuple[str, int], tuple[int, int, str]]
"""Meter and number of the quarter hour → Wh, covered seconds, quality."""


def at(seconds: int) -> datetime:
    return START + timedelta(seconds=seconds)


def frame(rows: Sequence[Step]) -> pl.DataFrame:
    return pl.DataFrame(
        [
            {
                "meter_id": meter, "register": "import_t1", "delta_wh": wh, "reason": reason, "run_id": "r",
                "previous_at": None if since is None else at(since), "observed_at": at(until),
            }
            for meter, since, until, wh, reason in rows
        ],
        schema_overrides=STEPS,
    ).select(
        *[pl.col(name) if name in ("meter_id", "register", "delta_wh", "reason", "run_id", "previous_at", "observed_at")
          else pl.lit(None, kind).alias(name) for name, kind in STEPS.items()],
        number(),
    )  # fmt: skip


def number() -> pl.Expr:
    """Of a meter's only register."""
    return pl.col("meter_id").str.strip_chars("m").cast(pl.UInt32).alias("series")


def baseline(newest: dict[str, int]) -> pl.DataFrame:
    rows = [
        {"meter_id": meter, "register": "import_t1", "previous_at": at(seconds)} for meter, seconds in newest.items()
    ]
    return pl.DataFrame(rows, schema=BASELINE).with_columns(number())


def defined(rows: Sequence[Step]) -> Quarters:
    """The definition: what each quarter hour gets, step by step."""
    energy, covered, rank = (Counter[tuple[str, int]]() for _ in range(3))
    newest: dict[str, int] = {}
    for meter, since, until, wh, reason in rows:
        newest[meter] = max(newest.get(meter, 0), until)
        if since is None or reason not in SPREAD or until - since > 7200:
            continue
        edges = [since, *range((since // QUARTER_S + 1) * QUARTER_S, until, QUARTER_S), until]
        for left, right in pairwise(edges):
            key = (meter, left // QUARTER_S)
            energy[key] += wh * (right - since) // (until - since) - wh * (left - since) // (until - since)
            covered[key] += right - left
            is_cut = len(edges) > 2
            now = 2 if reason == "reset" or (is_cut and reason == "gap") else int(is_cut)
            rank[key] = max(rank[key], now)
    names = ["measured", "interpolated", "estimated"]
    return {
        key: (energy[key], covered[key], names[rank[key]] if covered[key] == QUARTER_S else "incomplete")
        for key in energy
        if (key[1] + 1) * QUARTER_S <= newest[key[0]]
    }


def found(rows: pl.DataFrame) -> Quarters:
    return {
        (row["meter_id"], int((row["interval_start"] - START).total_seconds()) // QUARTER_S): (
            row["energy_wh"], row["covered_s"], row["quality"],
        )
        for row in rows.to_dicts()
    }  # fmt: skip


@st.composite
def series(draw: st.DrawFn) -> tuple[list[Step], list[int]]:
    """Steps of two meters, each forward in time, and how they are cut into batches."""
    rows: list[Step] = []
    for meter in ("m1", "m2"):
        clock: int | None = None
        spans = draw(st.lists(st.sampled_from([1, 60, 300, 899, 900, 901, 1800, 4000, 7200, 7201]), max_size=15))
        for span in spans:
            reason = "first" if clock is None else draw(st.sampled_from([*SPREAD, "ok", "meter_exchange"]))
            until = draw(st.integers(0, 900)) if clock is None else clock + span
            rows.append((meter, clock, until, draw(st.integers(0, 5000)) if reason != "first" else 0, reason))
            clock = until
    cuts = draw(st.lists(st.integers(0, max(len(rows), 1)), max_size=3))
    return rows, sorted({0, len(rows), *(cut for cut in cuts if cut <= len(rows))})


@settings(max_examples=150, deadline=None)
@given(series())
def test_any_cut_into_batches_gives_the_definition(case: tuple[list[Step], list[int]]) -> None:
    rows, cuts = case
    open_intervals, over = pl.DataFrame(schema=OPEN), []
    newest: dict[str, int] = {}
    for left, right in pairwise(cuts):
        batch = rows[left:right]
        newest |= {meter: until for meter, _, until, _, _ in batch}
        quarters = quarter_hours(frame(batch), open_intervals, baseline(newest))
        over.append(quarters.rows)
        open_intervals = quarters.open
    together = pl.concat(over) if over else pl.DataFrame()
    assert found(together) == defined(rows)
    assert len(together) == len(found(together)), "a quarter hour is over once"


def test_the_energy_of_whole_quarter_hours_is_the_registers_rise() -> None:
    rows = [
        ("m1", None, 0, 0, "first"),
        ("m1", 0, 700, 10, "ok"),
        ("m1", 700, 2000, 29, "ok"),
        ("m1", 2000, 2700, 1, "ok"),
    ]
    quarters = quarter_hours(frame(rows), pl.DataFrame(schema=OPEN), baseline({"m1": 2700}))
    assert quarters.rows.get_column("energy_wh").sum() == 40
    assert quarters.rows.get_column("quality").to_list() == ["interpolated", "interpolated", "interpolated"]
    assert len(quarters.open) == 0


def test_a_step_that_is_longer_than_two_hours_is_not_spread() -> None:
    rows = [
        ("m1", None, 0, 0, "first"),
        ("m1", 0, 600, 10, "ok"),
        ("m1", 600, 9000, 5000, "gap"),
        ("m1", 9000, 9900, 7, "ok"),
    ]
    quarters = quarter_hours(frame(rows), pl.DataFrame(schema=OPEN), baseline({"m1": 9900}))
    assert found(quarters.rows) == {("m1", 0): (10, 600, "incomplete"), ("m1", 10): (7, 900, "measured")}
