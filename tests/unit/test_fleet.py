"""N meters from M logs: what they send, in which order, and the truth about it."""

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from replay.fleet import Fleet, fleet
from replay.tape import Tape, read_tape, write_tape
from schemas.errors import ConfigError
from tests.wire import small_tape

STEP = timedelta(minutes=7)
WEEK = timedelta(days=7)


@pytest.fixture(scope="module")
def tape(tape: Path) -> Tape:
    return read_tape(tape)


def sent(crew: Fleet, step: timedelta = STEP, kind: str = "readings") -> pl.DataFrame:
    """What the fleet sends, slice after slice, with `due`."""
    meters = np.arange(len(crew))
    before = crew.begin(kind, meters)
    pieces = []
    for end in range(
        0, (crew.last_at - crew.first_at) // timedelta(microseconds=1) + 1, step // timedelta(microseconds=1)
    ):
        after = crew.sent_before(kind, meters, end + step // timedelta(microseconds=1))
        pairs = crew.pairs(kind, 0, len(crew), before, after)
        rows = crew.readings(*pairs) if kind == "readings" else crew.events(*pairs)
        pieces.append(rows.with_columns(due=pl.Series(crew.due(kind, *pairs))))
        before = after
    return pl.concat(pieces).sort("due", "meter", "seq")


def one_log(folder: Path, days: int, step: timedelta, drop: range = range(0)) -> Tape:
    """A tape of one home with a register that rises by its row's number, so that every place of the log is known."""
    import pyarrow as pa

    from replay.tape import log_schema
    from schemas.tables import REGISTRY

    count = timedelta(days=days) // step
    rows = [
        {"meter_id": "home", "observed_at": small_tape.BEGIN + n * step, "equipment_id": "box", "dialect": "own",
         "import_t1_wh": n * (n + 1) // 2, "import_w": 100 + n % 50, "tariff": 1}
        for n in range(count) if n not in drop
    ]  # fmt: skip
    registry = [
        {"meter_id": "home", "usage_point_id": "up", "time_zone": "UTC", "interval_s": step // timedelta(seconds=1)}
    ]
    return write_tape(
        folder, readings=pa.Table.from_pylist(rows, log_schema("reading")), events=log_schema("event").empty_table(),
        registry=pa.Table.from_pylist(registry, REGISTRY), format="own", source="one", time_zone="UTC",
        rows_in=count, defects={}, interval_s=step // timedelta(seconds=1),
    )  # fmt: skip


def test_every_meter_sends_its_whole_log_once_in_order(tape: Tape) -> None:
    readings = sent(fleet(tape, 50))
    assert len(readings) == 50 * small_tape.READINGS
    for row in readings.group_by("meter_id").agg("seq", "observed_at").iter_rows(named=True):
        assert row["seq"] == list(range(small_tape.READINGS))
        assert row["observed_at"] == sorted(row["observed_at"])


def test_how_the_run_is_sliced_does_not_change_what_is_sent(tape: Tape) -> None:
    for kind in ("readings", "events"):
        assert sent(fleet(tape, 50), kind=kind).equals(sent(fleet(tape, 50), timedelta(hours=5), kind))


def test_the_same_seed_gives_the_same_fleet_and_another_another(tape: Tape) -> None:
    assert sent(fleet(tape, 50)).equals(sent(fleet(tape, 50)))
    assert not sent(fleet(tape, 50)).equals(sent(fleet(tape, 50, 2)))


def test_a_meter_does_not_depend_on_how_large_its_fleet_slice_is(tape: Tape) -> None:
    crew = fleet(tape, 50)
    meters, numbers = np.array([31, 7]), np.array([3, 100])
    both = crew.readings(meters, numbers)
    for row, (meter, number) in enumerate(zip(meters, numbers, strict=True)):
        assert crew.readings(np.array([meter]), np.array([number])).equals(both[row])


def test_registers_never_step_back_and_the_truth_is_what_they_show(tape: Tape) -> None:
    crew = fleet(tape, 50)
    readings = sent(crew).sort("meter_id", "seq")
    steps = readings.with_columns(step=pl.col("import_t1_wh").diff().over("meter_id")).drop_nulls("step")
    assert int(str(steps.get_column("step").min())) >= 0
    shown = readings.group_by("meter_id", maintain_order=True).agg(
        energy_wh=pl.col("import_t1_wh").last() - pl.col("import_t1_wh").first()
    )
    truth = crew.truth(0, 50).filter(pl.col("register") == "import_t1")
    assert truth.select("meter_id", "energy_wh").equals(shown.sort("meter_id"))
    halves = pl.concat([crew.truth(0, 17), crew.truth(17, 50)])
    assert halves.equals(crew.truth(0, 50))


def test_the_first_meters_use_what_the_logs_use_and_no_two_copies_are_alike(tape: Tape) -> None:
    truth = fleet(tape, 60).truth(0, 60).filter(pl.col("register") == "import_t1").sort("meter_id")
    logs = pl.DataFrame(pl.from_arrow(tape.readings)).group_by("meter_id").agg(
        wh=pl.col("import_t1_wh").max() - pl.col("import_t1_wh").min()
    )  # fmt: skip
    energy = truth.get_column("energy_wh").to_list()
    assert energy[:20] == logs.sort("meter_id").get_column("wh").to_list()
    assert all(energy[copy] != energy[copy + 20] for copy in range(20, 40))


def test_power_is_bent_with_the_register(tmp_path: Path) -> None:
    crew = fleet(one_log(tmp_path / "one", 1, timedelta(minutes=5)), 40)
    readings = sent(crew).sort("meter_id", "seq")
    log_w = 100 + readings.get_column("seq") % 50
    factors = readings.get_column("import_w") / log_w
    assert factors[: len(readings) // 40].to_list() == [1.0] * (len(readings) // 40)
    assert float(str(factors.min())) >= 0.69 * 0.69
    assert float(str(factors.max())) <= 1.31 * 1.31
    per_meter = readings.with_columns(factor=factors).group_by("meter_id").agg(pl.col("factor").n_unique())
    assert int(str(per_meter.get_column("factor").max())) > 5


def test_a_fleet_has_as_many_grids_as_it_needs(tape: Tape) -> None:
    registry = fleet(tape, 50).registry(0, 50)
    assert registry.get_column("meter_id").n_unique() == registry.get_column("equipment_id").n_unique() == 50
    assert sorted(registry.get_column("transformer_id").unique()) == ["T1-1", "T1-2", "T1-3"]


def test_reports_are_spread_over_the_interval_or_come_all_at_once(tape: Tape) -> None:
    crew = fleet(tape, 50)
    first = sent(crew).filter(pl.col("seq") == 0)
    assert first.get_column("due").n_unique() > 45
    assert first.get_column("observed_at").n_unique() == 1
    assert int(str(first.get_column("due").max())) < crew.interval == 300_000_000
    together = sent(fleet(tape, 50, burst=True)).filter(pl.col("seq") == 0)
    assert together.get_column("due").unique().to_list() == [0]


def test_a_copy_plays_another_week_of_the_log_at_the_same_hour_of_the_week(tmp_path: Path) -> None:
    step = timedelta(minutes=30)
    crew = fleet(one_log(tmp_path / "long", 30, step), 200, burst=True)
    readings = sent(crew, timedelta(days=3)).sort("meter", "seq")
    assert readings.get_column("seq").max() == 30 * 48 - 1, (
        "as long as the log; at the end of its fourth week it goes on"
    )
    weeks = crew.plan.week // (WEEK // timedelta(microseconds=1))
    assert set(weeks[1:].tolist()) == {0, 1, 2, 3}
    assert weeks[0] == 0
    assert readings.group_by("seq").agg(pl.col("observed_at").n_unique()).get_column("observed_at").max() == 1
    for meter in range(1, 200):
        if crew.plan.week[meter] and crew.plan.wave[meter] < 0.01:
            played = readings.filter(pl.col("meter") == meter).get_column("import_w").to_list()[:50]
            begin = int(weeks[meter]) * 7 * 48
            logged = [round(crew.plan.scale[meter] * (100 + (begin + n) % 50)) for n in range(50)]
            assert played == pytest.approx(logged, abs=3)
            return
    pytest.fail("no copy of another week that is bent so little that its values can be told")


def test_at_the_logs_end_a_meter_goes_on_at_its_begin_and_its_register_goes_on_rising(tmp_path: Path) -> None:
    step = timedelta(hours=1)
    crew = fleet(one_log(tmp_path / "day", 1, step, drop=range(3, 5)), duration=timedelta(days=3), loop=True)
    readings = sent(crew).sort("seq")
    assert readings.get_column("seq").to_list() == list(range(3 * 22)), "two hours of each day are missing in the log"
    stamps = readings.get_column("observed_at")
    assert stamps.is_sorted()
    assert stamps[22] - stamps[0] == timedelta(days=1)
    assert readings.get_column("import_t1_wh").is_sorted()
    shown = readings.get_column("import_t1_wh")
    assert int(crew.truth(0, 1).get_column("energy_wh")[0]) == shown[-1] - shown[0] == 3 * 23 * 24 // 2


def test_a_duration_is_of_the_log_for_every_meter_and_a_start_moves_the_clock(tape: Tape) -> None:
    begin = datetime(2026, 1, 5, tzinfo=UTC)
    crew = fleet(tape, 50, duration=timedelta(hours=1), start=begin)
    readings = sent(crew)
    assert len(readings) == 50 * 12
    assert readings.get_column("observed_at").min() == crew.first_at == begin
    assert readings.get_column("observed_at").max() == begin + timedelta(minutes=55)
    assert crew.registry(0, 1).get_column("valid_from")[0] == begin


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"loop": True}, "--duration"),
        ({"duration": timedelta(0)}, "more than 0"),
        ({"own_clock": True, "meters": 21}, "20 meters, not 21"),
        ({"own_clock": True, "start": small_tape.BEGIN}, "no --start"),
    ],
)
def test_what_cannot_be_played_is_said(tape: Tape, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fleet(tape, **wrong)


def test_with_its_own_clock_the_log_is_sent_as_it_is(tape: Tape) -> None:
    readings = sent(fleet(tape, own_clock=True)).sort("meter_id", "observed_at")
    logged = pl.DataFrame(pl.from_arrow(tape.readings)).sort("meter_id", "observed_at")
    for name in logged.columns:
        if name in readings.columns:
            assert readings.get_column(name).equals(logged.get_column(name)), name
        elif name != "log_row":
            assert logged.get_column(name).null_count() == len(logged), name


def test_a_second_box_in_the_log_is_a_second_box_of_every_copy(tmp_path: Path) -> None:
    tape = one_log(tmp_path / "two", 1, timedelta(hours=1))
    rows = pl.DataFrame(pl.from_arrow(tape.readings)).with_columns(
        equipment_id=pl.when(pl.col("log_row") < 10).then(pl.lit("first")).otherwise(pl.lit("second"))
    )
    exchanged = Tape(rows.to_arrow().cast(tape.readings.schema), tape.events, tape.registry, tape.info)
    boxes = sent(fleet(exchanged, 2)).sort("meter", "seq").group_by("meter_id", maintain_order=True).agg("equipment_id")
    for meter_id, ids in boxes.iter_rows():
        assert ids == [f"E-{meter_id}"] * 10 + [f"E-{meter_id}-1"] * 14


def test_a_stamp_in_2099_does_not_hold_up_the_run(tape: Tape) -> None:
    wild = datetime(2099, 1, 1, tzinfo=UTC)
    frame = pl.DataFrame(pl.from_arrow(tape.readings))
    frame = frame.with_columns(
        observed_at=pl.when(pl.col("log_row") == 100).then(pl.lit(wild)).otherwise("observed_at")
    )
    readings = frame.to_arrow().cast(tape.readings.schema)
    crew = fleet(Tape(readings, tape.events, tape.registry, tape.info), own_clock=True)
    assert crew.last_at < wild
    assert len(sent(crew)) == len(frame)


def changed(tape: Tape, **columns: pl.Expr) -> Tape:
    """The tape with other values in its readings."""
    rows = pl.DataFrame(pl.from_arrow(tape.readings)).with_columns(**columns)
    return replace(tape, readings=rows.to_arrow().cast(tape.readings.schema))


def test_a_log_of_three_years_is_played_at_its_own_times_and_one_stamp_of_1970_moves_nothing(tmp_path: Path) -> None:
    tape = one_log(tmp_path / "long", 1_200, timedelta(days=1))
    broken = pl.when(pl.col("log_row") == 700).then(pl.datetime(1970, 1, 1, time_zone="UTC"))
    crew = fleet(changed(tape, observed_at=broken.otherwise("observed_at")), own_clock=True)
    readings = sent(crew, timedelta(days=100))
    assert crew.first_at == small_tape.BEGIN
    assert len(readings) == 1_200
    others = readings.filter(pl.col("seq") != 700)
    since = (others.get_column("observed_at") - small_tape.BEGIN).dt.total_microseconds()
    assert others.get_column("due").equals(since, check_names=False)


def test_a_meters_only_event_of_1970_does_not_begin_the_run(tape: Tape) -> None:
    events = pl.DataFrame(pl.from_arrow(tape.events)).head(1)
    events = events.with_columns(observed_at=pl.datetime(1970, 1, 1, time_zone="UTC"))
    crew = fleet(replace(tape, events=events.to_arrow().cast(tape.events.schema)))
    assert crew.first_at == small_tape.BEGIN
    assert len(sent(crew, kind="events")) == 1


@pytest.mark.parametrize("looped", [False, True])
def test_a_register_that_begins_anew_in_the_log_does_so_in_every_copy_and_is_never_negative(
    tmp_path: Path, looped: bool
) -> None:
    tape = one_log(tmp_path / "reset", 1, timedelta(hours=1))
    anew = changed(tape, import_t1_wh=1_000 + pl.when(pl.col("log_row") < 15).then("import_t1_wh").otherwise(
        pl.col("import_t1_wh") - 990))  # fmt: skip
    crew = fleet(anew, 5, duration=timedelta(days=3) if looped else None, loop=looped)
    readings = sent(crew).sort("meter", "seq")
    logged = pl.DataFrame(pl.from_arrow(anew.readings)).get_column("import_t1_wh").to_list()
    through = sum(max(after - before, 0) for before, after in zip(logged, logged[1:], strict=False))
    laps = 3 if looped else 1
    for (number,), rows in readings.group_by("meter", maintain_order=True):
        shown = rows.get_column("import_t1_wh")
        steps = shown.diff()
        assert shown[:24].to_list() == logged, "nothing says how far another register would step back"
        assert rows.filter(steps < 0).get_column("seq").to_list() == [15 + 24 * lap for lap in range(laps)]
        truth = crew.truth(number, number + 1)
        assert truth.get_column("begins_anew").to_list() == [True]
        assert truth.get_column("energy_wh").to_list() == [steps.filter(steps > 0).sum()]
        assert truth.get_column("energy_wh").to_list() == [laps * through]


def test_each_log_and_its_copies_begin_anew_where_the_log_does(tape: Tape) -> None:
    at = pl.int_range(pl.len()).over("meter_id")
    own = pl.col("import_t1_wh")
    crew = fleet(
        changed(tape, import_t1_wh=pl.when(at < 100).then(own).otherwise(own - own.min().over("meter_id"))), 60
    )
    readings = sent(crew).sort("meter", "seq").with_columns(step=pl.col("import_t1_wh").diff().over("meter"))
    back = readings.filter(pl.col("step") < 0)
    assert back.get_column("meter").to_list() == list(range(60))
    assert back.get_column("seq").unique().to_list() == [100]
    assert int(str(readings.get_column("import_t1_wh").min())) >= 0


def test_another_box_begins_a_register_anew_though_it_shows_more(tmp_path: Path) -> None:
    tape = one_log(tmp_path / "two", 1, timedelta(hours=1))
    later = pl.col("log_row") >= 10
    boxes = pl.when(later).then(pl.lit("second")).otherwise(pl.lit("first"))
    crew = fleet(changed(tape, equipment_id=boxes, import_t1_wh=pl.col("import_t1_wh") + later * 5_000_000), 2)
    logged = [n * (n + 1) // 2 for n in range(24)]
    assert crew.truth(0, 1).get_column("energy_wh").to_list() == [logged[-1] - (logged[10] - logged[9])]
    copy = sent(crew).filter(pl.col("meter") == 1).sort("seq").get_column("import_t1_wh")
    assert copy[10] == 5_000_000 + logged[10]


def test_the_logs_themselves_are_played_to_their_end_though_copies_go_round_by_weeks(tmp_path: Path) -> None:
    tape = one_log(tmp_path / "long", 17, timedelta(hours=1))
    late = pl.when(pl.col("log_row") >= 16 * 24).then(pl.col("import_t1_wh") - 50_000).otherwise("import_t1_wh")
    tape = changed(tape, import_t1_wh=late)  # it begins anew after the last whole week
    logged = pl.DataFrame(pl.from_arrow(tape.readings)).get_column("import_t1_wh").to_list()
    readings = sent(fleet(tape, 3)).sort("meter", "seq")
    assert readings.filter(pl.col("meter") == 0).get_column("import_t1_wh").to_list() == logged
    assert readings.group_by("meter").len().get_column("len").to_list() == [17 * 24] * 3


def test_a_meters_plan_does_not_depend_on_the_fleets_size(tape: Tape) -> None:
    few, many = fleet(tape, 50), fleet(tape, 500)
    assert sent(few).equals(sent(many).filter(pl.col("meter") < 50))
    assert few.truth(0, 50).equals(many.truth(0, 50))


def test_a_copy_is_known_before_its_first_report_and_a_dead_phase_stays_dead(tape: Tape) -> None:
    valid = pl.DataFrame(pl.from_arrow(tape.registry)).with_columns(valid_from=small_tape.BEGIN + timedelta(hours=6))
    dead = changed(tape, voltage_l1_mv=pl.when(pl.col("log_row") % 7 == 0).then(0).otherwise(100))
    crew = fleet(replace(dead, registry=valid.to_arrow().cast(tape.registry.schema)), 100)
    known = crew.registry(0, 100).get_column("valid_from").to_list()
    assert known == [small_tape.BEGIN + timedelta(hours=6)] * 20 + [small_tape.BEGIN] * 80
    volts = sent(crew).get_column("voltage_l1_mv")
    assert int(str(volts.min())) == 0
    assert (volts == 0).sum() == (pl.DataFrame(pl.from_arrow(dead.readings)).get_column("voltage_l1_mv") == 0).sum() * 5


@pytest.mark.parametrize(
    ("bent", "message"),
    [
        (lambda tape: replace(tape, registry=tape.registry.slice(0, 18)), "lacks 2 of its meters: home-18, home-19"),
        (lambda tape: tape, "more than the tape's"),
    ],
)
def test_nothing_of_a_tape_is_left_out_in_silence(tape: Tape, bent: Callable[[Tape], Tape], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fleet(bent(tape), duration=timedelta(days=2))
