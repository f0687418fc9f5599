"""Quarter hours of energy: the columns against the definition, one microsecond's share at a time in whole numbers."""

from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import polars as pl
from hypothesis import given, settings
from hypothesis import strategies as st

from metering.alarms.power_fails import EDGE, power_fails
from metering.energy.delta_engine import BASELINE, STEPS
from metering.energy.intervals import OPEN, quarter_hours

START = datetime(2024, 3, 31, tzinfo=UTC)
QUARTER_S = 900
SPREAD = ("ok", "gap", "rollover", "reset")
SECOND_US = 1_000_000
Edge = tuple[str, int, bool]
"""Meter, when, and whether its power came back; seconds after `START`."""
MAX_W = 20_000
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


def failed(edges: Sequence[Edge]) -> pl.DataFrame:
    rows = [(meter, at(when), is_up) for meter, when, is_up in edges]
    return power_fails(pl.DataFrame(rows, schema=EDGE, orient="row").unique()).with_columns(max_w=pl.lit(MAX_W))


def without_power(step: Step, edges: Sequence[Edge]) -> tuple[dict[int, int], bool]:
    """When, within a step, its meter had no power: end → begin, microseconds, and whether nobody said that it ended."""
    meter, since, until, wh, reason = step
    assert since is not None
    mine = {(when, is_up) for whose, when, is_up in edges if whose == meter}
    begins: dict[tuple[int, bool], set[int]] = {}
    for down in (when for when, is_up in mine if not is_up and since - 120 <= when < until):
        later = sorted((when, not is_up) for when, is_up in mine if when > down)
        if (down, True) in mine and not (later and not later[0][1]):
            continue  # over within its second
        ups = [when for when, is_down in later if not is_down]
        if ups and since < ups[0] <= until + 120:
            begins.setdefault((min(ups[0] * SECOND_US, until * SECOND_US - 1), True), set()).add(down)
        elif reason == "gap" and until - since <= 7200 and down >= since:
            begins.setdefault((until * SECOND_US - 1, False), set()).add(down)
    gone: dict[int, int] = {}
    heard: dict[int, bool] = {}
    for (end, is_told), downs in begins.items():
        begin = min([down for down in downs if down >= since], default=since) * SECOND_US
        if begin < end:
            gone[end] = min(begin, gone.get(end, begin))
            heard[end] = is_told and heard.get(end, True)
    short = -(-wh * 3600 * SECOND_US // MAX_W) - ((until - since) * SECOND_US - sum(e - b for e, b in gone.items()))
    if gone and short > 0:
        last = max(gone)
        if short > 120 * SECOND_US and all(heard.values()):
            return {}, False
        begin = gone.pop(last)
        if begin < last - short:
            gone[last - short] = begin
            heard[last - short] = heard[last]
        del heard[last]
    return gone, not all(heard.values())


def defined(rows: Sequence[Step], edges: Sequence[Edge] = ()) -> Quarters:
    """The definition: what each quarter hour gets, step by step."""
    energy, covered, rank, powered = (Counter[tuple[str, int]]() for _ in range(4))
    newest: dict[str, int] = {}
    for meter, since, until, wh, reason in rows:
        newest[meter] = max(newest.get(meter, 0), until)
        if since is None or reason not in SPREAD:
            continue
        step = (meter, since, until, wh, reason)
        gone, is_endless = without_power(step, edges)

        def powered_us(second: int, since: int = since, gone: dict[int, int] = gone) -> int:
            until = second * SECOND_US
            return until - since * SECOND_US - sum(max(0, min(end, until) - begin) for end, begin in gone.items())

        whole = powered_us(until)
        without = (until - since) * SECOND_US - whole
        if whole > 7200 * SECOND_US:
            continue
        cuts = [since, *range((since // QUARTER_S + 1) * QUARTER_S, until, QUARTER_S), until]
        for left, right in pairwise(cuts):
            key = (meter, left // QUARTER_S)
            before, to = powered_us(left), powered_us(right)
            energy[key] += wh * to // whole - wh * before // whole
            covered[key] += right - left
            powered[key] += to - before
            is_cut = before > 0 or to < whole
            is_explained = whole <= min(without, QUARTER_S * SECOND_US)
            is_guess = reason == "reset" or (is_cut and reason == "gap" and not is_explained) or is_endless
            rank[key] = max(rank[key], 0 if to == before else 2 if is_guess else int(is_cut))
    names = ["measured", "interpolated", "estimated"]
    return {
        key: (
            energy[key],
            covered[key],
            "incomplete" if covered[key] < QUARTER_S else names[rank[key]] if powered[key] else "power_fail",
        )
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
def series(draw: st.DrawFn) -> tuple[list[Step], list[int], list[Edge]]:
    """Steps of two meters, each forward in time, how they are cut into batches, and when the meters had no power."""
    rows: list[Step] = []
    edges: list[Edge] = []
    for meter in ("m1", "m2"):
        clock: int | None = None
        spans = draw(st.lists(st.sampled_from([1, 60, 300, 899, 900, 901, 1800, 4000, 7200, 7201]), max_size=15))
        for span in spans:
            reason = "first" if clock is None else draw(st.sampled_from([*SPREAD, "ok", "meter_exchange"]))
            until = draw(st.integers(0, 900)) if clock is None else clock + span
            rows.append((meter, clock, until, draw(st.integers(0, 5000)) if reason != "first" else 0, reason))
            clock = until
        moments = draw(st.lists(st.integers(-1000, 20_000), max_size=6))
        moments += draw(st.lists(st.sampled_from([clock or 0, 300, 900, 901]), max_size=2))
        edges += [(meter, when, draw(st.booleans())) for when in moments]
    cuts = draw(st.lists(st.integers(0, max(len(rows), 1)), max_size=3))
    return rows, sorted({0, len(rows), *(cut for cut in cuts if cut <= len(rows))}), edges


@settings(max_examples=150, deadline=None)
@given(series())
def test_any_cut_into_batches_gives_the_definition(case: tuple[list[Step], list[int], list[Edge]]) -> None:
    rows, cuts, edges = case
    open_intervals, over = pl.DataFrame(schema=OPEN), []
    newest: dict[str, int] = {}
    for left, right in pairwise(cuts):
        batch = rows[left:right]
        newest |= {meter: until for meter, _, until, _, _ in batch}
        quarters = quarter_hours(frame(batch), open_intervals, baseline(newest), failed(edges))
        over.append(quarters.rows)
        open_intervals = quarters.open
    together = pl.concat(over) if over else pl.DataFrame()
    assert found(together) == defined(rows, edges)
    assert len(together) == len(found(together)), "a quarter hour is over once"


def test_the_energy_of_whole_quarter_hours_is_the_registers_rise() -> None:
    rows = [
        ("m1", None, 0, 0, "first"),
        ("m1", 0, 700, 10, "ok"),
        ("m1", 700, 2000, 29, "ok"),
        ("m1", 2000, 2700, 1, "ok"),
    ]
    quarters = quarter_hours(frame(rows), pl.DataFrame(schema=OPEN), baseline({"m1": 2700}), failed([]))
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
    quarters = quarter_hours(frame(rows), pl.DataFrame(schema=OPEN), baseline({"m1": 9900}), failed([]))
    assert found(quarters.rows) == {("m1", 0): (10, 600, "incomplete"), ("m1", 10): (7, 900, "measured")}
