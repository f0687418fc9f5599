"""Energy from registers: the columns against the definition, the invariant, and each reason by example."""

from collections import Counter
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metering.accounting import bucket_of
from metering.deduplication import PLACE, with_seen
from metering.energy.delta_engine import BASELINE, STAMP, steps, with_limits, with_why
from metering.energy.walk import Limits, walk
from schemas.tables import REGISTERS

START = datetime(2024, 1, 1, tzinfo=UTC)
VALUES = [*[f"{register}_wh" for register in REGISTERS], "equipment_id"]
READINGS = pl.Schema(
    {
        "meter_id": pl.String(),
        "observed_at": STAMP,
        "run_id": pl.String(),
        "topic": pl.String(),
        "partition": pl.Int64(),
        "offset": pl.Int64(),
        **{f"{register}_wh": pl.Int64() for register in REGISTERS},
        "equipment_id": pl.String(),
        "max_w": pl.Int64(),
        "interval_s": pl.Int64(),
        "quantum_wh": pl.Int64(),
        "wraps_wh": pl.Int64(),
    }
)
RECENT = ["meter_id", "observed_at", *PLACE, *VALUES]
STEP = ["previous_at", "previous_wh", "delta_wh", "reason", "segment_id"]
INFERRED = ["meter_id", "register", "observed_at", "wh", *STEP]
ACCEPTED = {"first", "ok", "gap", "rollover", "meter_exchange", "reset"}
NO_LIMITS = Limits(max_w=None, interval_s=None, quantum_wh=1)
FUSED = Limits(max_w=3_600, interval_s=60, quantum_wh=1)  # a watt-hour a second


def at(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


def rows(*values: tuple[float, int] | tuple[float, int, str | None]) -> list[dict[str, Any]]:
    """(seconds, Wh[, equipment id]) of one register."""
    return [
        {
            "meter_id": "m1",
            "register": "import_t1",
            "observed_at": at(value[0]),
            "wh": value[1],
            "equipment_id": value[2] if len(value) == 3 else "a",
            "run_id": None,
        }
        for value in values
    ]


def reasons(found: list[dict[str, Any]]) -> list[tuple[str, int | None]]:
    """Of each reading; what a held one became is in brackets, before the one that decided it."""
    return [(f"[{row['reason']}]" if row["inferred"] else row["reason"], row["delta_wh"]) for row in found]


def series(draw: st.DrawFn, meter_id: str, limits: Limits, ordered: bool) -> list[dict[str, Any]]:
    """Records of one meter as they come, with every fault."""
    kinds = ["ok", "ok", "ok", "wild", "back", "fall", "exchange", "swap", "no_equipment", "empty", "again", "conflict"]
    moves = draw(
        st.lists(
            st.tuples(
                st.sampled_from(kinds if ordered else [*kinds, "early"]),
                st.integers(0, 80),
                st.sampled_from([1, 10, 60, 60, 3600]),
            ),
            max_size=25,
        )
    )
    wh, clock, equipments = draw(st.sampled_from([0, 500, 999_900, 99_999_990])), 0, ["a", "b", "c"]
    equipment: str | None = "a"
    out: list[dict[str, Any]] = []
    for kind, amount, span in moves:
        value, seconds, shown = wh + amount, clock + span, equipment
        if kind == "wild":
            value = wh + 10**7 + amount
        elif kind == "back":
            value = max(wh - 1 - amount, 0)
        elif kind == "fall":  # a rollover where the register is nearly full, else a reset
            wh = value = amount % 7
        elif kind == "exchange":
            equipment = shown = equipments[amount % 3]
            wh = value = amount * 1_000
        elif kind == "swap":
            equipment = shown = draw(st.sampled_from(["a", "b", None]))
        elif kind == "no_equipment":
            shown = None
        elif kind == "early":
            seconds = clock - span
        if kind in ("again", "conflict") and out:
            copy = dict(out[-1])
            if kind == "conflict":
                copy["import_t1_wh"] = (copy["import_t1_wh"] or 0) + 1 + amount
            out.append(copy)
            continue
        clock = max(clock, seconds)
        if kind == "ok":
            wh = value
        out.append(
            {
                "meter_id": meter_id,
                "observed_at": at(seconds),
                "run_id": None,
                "import_t1_wh": None if kind == "empty" else value,
                "import_t2_wh": None if amount % 5 == 0 else value * 2,
                "export_t1_wh": clock // 10,
                "export_t2_wh": None,
                "equipment_id": shown,
                "max_w": limits.max_w,
                "interval_s": limits.interval_s,
                "quantum_wh": limits.quantum_wh,
            }
        )
    return out


@st.composite
def deliveries(draw: st.DrawFn, ordered: bool = True) -> tuple[Limits, pl.DataFrame, list[int]]:
    """Records of two meters with their offsets, and the offsets at which batches are cut."""
    limits = Limits(draw(st.sampled_from([None, 3_600, 17_250])), draw(st.sampled_from([None, 60])), 1)
    mine, other = series(draw, "m1", limits, ordered), series(draw, "m2", limits, ordered)
    turns = draw(st.permutations([True] * len(mine) + [False] * len(other)))
    left, right = iter(mine), iter(other)
    received = [next(left) if turn else next(right) for turn in turns]
    placed = [{**row, "topic": "t", "partition": 0, "offset": n} for n, row in enumerate(received)]
    cuts = draw(st.lists(st.integers(0, len(placed)), max_size=4).map(sorted))
    return limits, pl.DataFrame(placed, schema=READINGS), [0, *cuts, len(placed)]


def engine(records: pl.DataFrame, cuts: list[int]) -> pl.DataFrame:
    """All steps, batch by batch with state carried; rows of a batch come in any order."""
    baseline, recent, found = BASELINE.to_frame(), records.clear().select(RECENT), []
    for low, high in pairwise(cuts):
        batch = records.filter(pl.col("offset").is_between(low, high - 1)).reverse()
        marked = with_seen(batch, recent, ["meter_id", "observed_at"], VALUES)
        result = steps(marked, baseline)
        baseline = result.baseline
        recent = pl.concat([recent, marked.filter(pl.col("seen").is_null()).select(RECENT)])
        found.append(result.steps)
    return pl.concat(found)


def definition(
    records: pl.DataFrame, limits: Limits
) -> tuple[dict[tuple[str, str, int], dict[str, Any]], list[dict[str, Any]]]:
    """`walk` over the originals of each register: steps by (meter, register, offset), and what held values became."""
    originals: dict[tuple[str, datetime], int] = {}
    for row in records.to_dicts():
        originals.setdefault((row["meter_id"], row["observed_at"]), row["offset"])
    out, became = {}, []
    for meter_id in ("m1", "m2"):
        for register in REGISTERS:
            mine = [
                {**row, "register": register, "wh": row[f"{register}_wh"]}
                for row in records.sort("observed_at").to_dicts()
                if row["meter_id"] == meter_id
                and row[f"{register}_wh"] is not None
                and row["offset"] in originals.values()
            ]
            for step in walk(None, mine, limits).steps:
                if step["row"] is None:
                    became.append(
                        {name: ({"meter_id": meter_id, "register": register} | step)[name] for name in INFERRED}
                    )
                else:
                    found = {name: step[name] for name in STEP}
                    out[(meter_id, register, mine[step["row"]]["offset"])] = found
    return out, became


@settings(max_examples=120, deadline=None)
@given(deliveries())
def test_the_columns_give_what_the_walk_gives_however_the_batches_are_cut(
    delivery: tuple[Limits, pl.DataFrame, list[int]],
) -> None:
    limits, records, cuts = delivery
    made = engine(records, cuts)
    of_records = made.filter(~pl.col("inferred")).to_dicts()
    found = {(row["meter_id"], row["register"], row["offset"]): row for row in of_records}
    expected, became = definition(records, limits)
    seen_again = {key for key in found if key not in expected}
    assert {key: {name: found[key][name] for name in STEP} for key in expected} == expected
    assert all(found[key]["reason"] in ("duplicate", "conflict") for key in seen_again)
    assert len(of_records) == len(found) == sum(records[f"{register}_wh"].count() for register in REGISTERS)
    assert sorted(made.filter("inferred").select(INFERRED).to_dicts(), key=repr) == sorted(became, key=repr)


@settings(max_examples=120, deadline=None)
@given(deliveries(ordered=False))
def test_the_sum_of_a_segment_is_its_last_value_minus_its_start_whatever_comes_in_whatever_order(
    delivery: tuple[Limits, pl.DataFrame, list[int]],
) -> None:
    _, records, cuts = delivery
    accepted = engine(records, cuts).filter(pl.col("reason").is_in(list(ACCEPTED))).sort("observed_at")
    for segment in accepted.partition_by("meter_id", "register", "segment_id"):
        steps_of = segment.to_dicts()
        first, last = steps_of[0], steps_of[-1]
        assert first["reason"] in ("first", "meter_exchange", "reset")
        assert all(row["reason"] in ("ok", "gap", "rollover") for row in steps_of[1:])
        assert first["reason"] != "reset" or first["delta_wh"] in (0, first["wh"])
        start = first["wh"] - first["delta_wh"]
        turned = sum(
            10 ** max(len(str(row["previous_wh"])), 6) for row in steps_of if row["reason"] == "rollover"
        )  # a full register each
        assert sum(row["delta_wh"] for row in steps_of) == last["wh"] + turned - start
    for register in accepted.partition_by("meter_id", "register"):
        rows_of = register.to_dicts()
        sizes = Counter(row["segment_id"] for row in rows_of)
        for number, (before, after) in enumerate(pairwise(rows_of), 1):
            is_back = after["reason"] not in ("meter_exchange", "reset") and after["segment_id"] != before["segment_id"]
            if is_back:  # the first one was wild, or an equipment's name came for one reading only
                continue
            possible = []  # the reading before; beyond exchanges of one reading, that may have been taken back
            for row in reversed(rows_of[:number]):
                possible.append((row["observed_at"], row["wh"]))
                if row["reason"] != "meter_exchange" or sizes[row["segment_id"]] > 1:
                    break
            assert (after["previous_at"], after["previous_wh"]) in possible


@settings(max_examples=60, deadline=None)
@given(deliveries(ordered=False))
def test_every_record_gets_exactly_one_bucket(delivery: tuple[Limits, pl.DataFrame, list[int]]) -> None:
    _, records, _ = delivery
    marked = with_seen(records, records.clear().select(RECENT), ["meter_id", "observed_at"], VALUES)
    judged = with_why(marked, steps(marked, BASELINE.to_frame()).steps)
    assert sorted(judged["offset"]) == sorted(records["offset"])
    buckets = judged.select(bucket_of(pl.col("why"))).to_series()
    assert set(buckets) <= {"stored", "duplicate", "late", "quarantined"}
    assert ((buckets == "stored") == judged["why"].is_null()).all()


@pytest.mark.parametrize(
    ("limits", "readings", "expected"),
    [
        pytest.param(FUSED, [(0, 100), (60, 130)], [("first", 0), ("ok", 30)], id="ok is the difference"),
        pytest.param(FUSED, [(0, 100), (60, 100)], [("first", 0), ("ok", 0)], id="standing still is ok"),
        pytest.param(FUSED, [(0, 5), (60, 66)], [("first", 0), ("ok", 61)], id="at the plausible maximum and quantum"),
        pytest.param(FUSED, [(0, 5), (60, 67)], [("first", 0), ("implausible", None)], id="one above the maximum"),
        pytest.param(FUSED, [(0, 5), (90, 6)], [("first", 0), ("ok", 1)], id="one and a half intervals are jitter"),
        pytest.param(FUSED, [(0, 5), (91, 6)], [("first", 0), ("gap", 1)], id="a longer span is a gap"),
        pytest.param(NO_LIMITS, [(0, 5), (9e5, 6)], [("first", 0), ("ok", 1)], id="no interval known, no gap"),
        pytest.param(NO_LIMITS, [(0, 5), (1, 10**9)], [("first", 0), ("ok", 10**9 - 5)], id="no fuse, no limit"),
        pytest.param(
            FUSED, [(0, 999_990), (60, 20)], [("first", 0), ("rollover", 30)], id="six nines roll over at a million"
        ),
        pytest.param(
            FUSED, [(0, 99_999_999), (60, 0)], [("first", 0), ("rollover", 1)], id="eight digits roll over at 10^8"
        ),
        pytest.param(
            FUSED,
            [(0, 999_890), (60, 999_900), (120, 20), (180, 40)],
            [("first", 0), ("ok", 10), ("implausible", None), ("[reset]", 20), ("ok", 20)],
            id="a rollover that is too large a step is a reset where the value is near 0, and the next one follows it",
        ),
        pytest.param(
            FUSED,
            [(0, 996_400), (21_600, 400)],
            [("first", 0), ("rollover", 4_000)],
            id="six hours later, from within an hour's most energy of its end, a register rolled over",
        ),
        pytest.param(
            FUSED,
            [(0, 996_390), (60, 996_398), (21_660, 0), (21_720, 5)],
            [("first", 0), ("ok", 8), ("implausible", None), ("[reset]", 0), ("ok", 5)],
            id="from further away it was reset, though six hours' most energy would reach its end",
        ),
        pytest.param(
            FUSED,
            [(0, 50_000), (60, 50_010), (86_400, 3_602), (86_460, 3_610)],
            [("first", 0), ("ok", 10), ("implausible", None), ("[meter_exchange]", 0), ("ok", 8)],
            id="a day later more than flows in an hour is not near 0",
        ),
        pytest.param(
            FUSED,
            [(0, 5_000), (60, 5_001), (120, 3), (180, 5_002)],
            [("first", 0), ("ok", 1), ("implausible", None), ("[glitch]", None), ("gap", 1)],
            id="one 0 is a glitch where the register comes back",
        ),
        pytest.param(
            FUSED,
            [(0, 5_000), (60, 5_001), (120, 120_000), (180, 120_010), (240, 120_020)],
            [("first", 0), ("ok", 1), ("implausible", None), ("[meter_exchange]", 0), ("ok", 10), ("ok", 10)],
            id="a box that nobody named was exchanged, when a second value follows from its first",
        ),
        pytest.param(
            FUSED,
            [(0, 10**9), (60, 5_000), (120, 5_010), (180, 5_020)],
            [("first", 0), ("implausible", None), ("[first]", 0), ("ok", 10), ("ok", 10)],
            id="the first value may be wild, too",
        ),
        pytest.param(
            FUSED,
            [(0, 5_000), (60, 5_060), (120, 5_010), (180, 5_020)],
            [("first", 0), ("ok", 60), ("implausible", None), ("[meter_exchange]", 0), ("ok", 10)],
            id="a wild value that was accepted holds the series for one true value",
        ),
        pytest.param(
            FUSED,
            [(0, 100), (60, 110), (120, 10**7), (180, 10**8), (240, 120)],
            [
                ("first", 0),
                ("ok", 10),
                ("implausible", None),
                ("[glitch]", None),
                ("implausible", None),
                ("[glitch]", None),
                ("gap", 10),
            ],
            id="two wild values that do not agree cost no true one",
        ),
        pytest.param(
            FUSED, [(0, 50), (60, 40)], [("first", 0), ("implausible", None)], id="10 Wh back near 0 is no reset"
        ),
        pytest.param(
            FUSED,
            [(0, 5_000), (60, 4_999), (120, 5_010)],
            [("first", 0), ("implausible", None), ("[glitch]", None), ("gap", 10)],
            id="1 Wh backward is not a full register, and the baseline is held",
        ),
        pytest.param(FUSED, [(0, 5), (60, -1)], [("first", 0), ("implausible", None)], id="below zero is wild"),
        pytest.param(
            FUSED, [(0, 9, "a"), (60, 7_000, "b")], [("first", 0), ("meter_exchange", 0)], id="a new box starts anew"
        ),
        pytest.param(
            FUSED, [(0, 900, "a"), (60, 0, "b")], [("first", 0), ("meter_exchange", 0)], id="a new box at 0 is no reset"
        ),
        pytest.param(
            FUSED,
            [(0, 10, "a"), (60, 11, None), (120, 12, "a")],
            [("first", 0), ("ok", 1), ("ok", 1)],
            id="a missing equipment id is no exchange, nor is the old one when it comes back",
        ),
        pytest.param(
            FUSED,
            [(0, 10, "a"), (60, 11, None), (120, 2, "b")],
            [("first", 0), ("ok", 1), ("meter_exchange", 0)],
            id="an exchange is seen across a reading without equipment id",
        ),
        pytest.param(
            FUSED, [(0, 10, None), (60, 11, "a")], [("first", 0), ("ok", 1)], id="the first known box is no exchange"
        ),
        pytest.param(
            FUSED,
            [(0, 10_000, "a"), (60, 10_010, "x"), (120, 10_020, "a")],
            [("first", 0), ("meter_exchange", 0), ("gap", 20)],
            id="an equipment id that flickers for one reading costs no energy",
        ),
        pytest.param(
            FUSED,
            [(0, 10_000, "a"), (60, 77_000, "x"), (120, 10_020, None), (180, 10_030, "a")],
            [("first", 0), ("meter_exchange", 0), ("gap", 20), ("ok", 10)],
            id="nor where the next telegram names none",
        ),
        pytest.param(
            FUSED,
            [(0, 10_000, "a"), (60, 10_010, "x"), (120, 0, "a"), (180, 10_030, "a")],
            [("first", 0), ("meter_exchange", 0), ("implausible", None), ("[glitch]", None), ("gap", 30)],
            id="a wild value of the old equipment is no second exchange",
        ),
        pytest.param(
            FUSED,
            [(0, 9_000), (60, 9_010), (120, 7), (120, 7), (180, 9_020)],
            [("first", 0), ("ok", 10), ("implausible", None), ("duplicate", None), ("[glitch]", None), ("gap", 10)],
            id="a held value that comes again is a duplicate",
        ),
        pytest.param(
            FUSED, [(60, 10), (0, 9), (120, 12)], [("first", 0), ("out_of_order", None), ("ok", 2)], id="an older one"
        ),
        pytest.param(FUSED, [(0, 10), (0, 10)], [("first", 0), ("duplicate", None)], id="the same again"),
        pytest.param(FUSED, [(0, 10), (0, 11)], [("first", 0), ("conflict", None)], id="the same time, another value"),
    ],
)
def test_a_step_has_the_reason_and_energy_of_the_domain_reference(
    limits: Limits, readings: list[tuple[float, int]], expected: list[tuple[str, int | None]]
) -> None:
    series_of = rows(*readings)
    assert reasons(walk(None, series_of, limits).steps) == expected
    wide = {f"{register}_wh": None for register in REGISTERS}
    frame = pl.DataFrame(
        [
            {
                **row,
                **wide,
                "import_t1_wh": row["wh"],
                "topic": "t",
                "partition": 0,
                "offset": n,
                "max_w": limits.max_w,
                "interval_s": limits.interval_s,
                "quantum_wh": limits.quantum_wh,
            }
            for n, row in enumerate(series_of)
        ],
        schema=READINGS,
    )
    one_by_one = engine(frame, list(range(len(frame) + 1)))
    assert reasons(one_by_one.to_dicts()) == expected


@pytest.mark.parametrize("cuts", [[0, 3], [0, 1, 3], [0, 2, 3], [0, 1, 2, 3]], ids=str)
def test_an_empty_equipment_id_is_none_at_all(cuts: list[int]) -> None:
    wide = {f"{register}_wh": None for register in REGISTERS}
    equipments = ["a", "", "b"]
    values = [9_000, 9_001, 7]
    frame = pl.DataFrame(
        [
            {**wide, "meter_id": "m1", "observed_at": at(n), "import_t1_wh": wh, "equipment_id": name, "topic": "t",
             "partition": 0, "offset": n, "quantum_wh": 1}
            for n, (name, wh) in enumerate(zip(equipments, values, strict=True))
        ],
        schema=READINGS,
    )  # fmt: skip
    assert engine(frame, cuts)["reason"].to_list() == ["first", "ok", "meter_exchange"]


def test_segments_are_named_by_their_begin_so_that_reprocessing_gives_the_same() -> None:
    found = walk(None, rows((0, 5_000), (60, 5_001), (120, 3), (180, 4), (240, 9_000, "b")), FUSED).steps
    assert [(row["reason"], row["segment_id"]) for row in found] == [
        ("first", "m1/import_t1/20240101T000000.000000Z"),
        ("ok", "m1/import_t1/20240101T000000.000000Z"),
        ("implausible", "m1/import_t1/20240101T000000.000000Z"),
        ("reset", "m1/import_t1/20240101T000200.000000Z"),
        ("ok", "m1/import_t1/20240101T000200.000000Z"),
        ("meter_exchange", "m1/import_t1/20240101T000400.000000Z"),
    ]


def test_the_plausible_maximum_is_fuse_times_phases_times_the_highest_legal_volts_and_a_margin() -> None:
    known = pl.DataFrame(
        {
            "phases": ["L1,L2,L3", "L1", None, "L1", "L1"],
            "fuse_a": [25, 25, 25, None, None],
            "nominal_mv": [None, 120_000, 230_000, 230_000, None],
            "jurisdiction": [None, "ANSI-C84.1", "EN50160", None, None],
            "is_unlimited": [None, False, None, None, True],
            "dialect": ["dsmr-5", "pv-home", None, "london", None],
            "default_fuse_a": [100, 100, None, None, 100],
        },
        schema={
            "phases": pl.String, "fuse_a": pl.Int64, "nominal_mv": pl.Int64, "jurisdiction": pl.String,
            "is_unlimited": pl.Boolean, "dialect": pl.String, "default_fuse_a": pl.Int64,
        },
    )  # fmt: skip
    assert with_limits(known)["max_w"].to_list() == [20_872, 3_491, 20_872, 83_490, None]
    assert with_limits(known)["quantum_wh"].to_list() == [1, 100, 1, 1, 1]


def wide_record(offset: int, seconds: float, **values: Any) -> dict[str, Any]:
    return {
        "meter_id": "m1", "observed_at": at(seconds), "topic": "t", "partition": 0, "offset": offset, "quantum_wh": 1,
        "equipment_id": "a", **{f"{name}_wh": values.get(name) for name in REGISTERS},
    }  # fmt: skip


def buckets(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> list[str]:
    """Buckets of the second batch, whose records nobody remembers to have seen."""
    baseline = BASELINE.to_frame()
    for batch in (first, second):
        frame = pl.DataFrame(batch, schema={**READINGS, "seen": pl.String})
        result = steps(frame, baseline)
        baseline = result.baseline
        judged = with_why(frame, result.steps)
    return judged.sort("offset").select(bucket_of(pl.col("why"))).to_series().to_list()


def test_a_record_is_in_the_bucket_that_its_registers_say_together() -> None:
    first = [wide_record(0, 0, import_t1=100, export_t1=100), wide_record(1, 60, import_t1=110, export_t1=110)]
    second = [
        wide_record(2, 120, import_t1=120, export_t1=120),
        wide_record(3, 0, import_t1=100, export_t1=100),
        wide_record(4, 180, import_t1=119, export_t1=130),
        wide_record(5, 240),
    ]
    assert buckets(first, second) == ["stored", "late", "quarantined", "stored"]


def test_a_record_redelivered_long_after_is_never_stored_again_when_its_registers_moved_apart() -> None:
    first = [wide_record(0, 0, import_t1=100, import_t2=100), wide_record(1, 60, import_t2=110)]
    assert buckets(first, [wide_record(2, 0, import_t1=100, import_t2=100)])[0] in ("late", "duplicate")
