"""Plans of faults: what their file may say, and where on a tape a fault finds its meter, reading and register."""

from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from replay.dirt import Dirt
from replay.dirt.entries import Entry, read_dirt
from replay.fleet import Fleet, fleet
from replay.tape import Tape, read_tape
from schemas.closed_lists import FaultKind, Poison
from schemas.errors import ConfigError
from tests.unit.test_dirt import METERS, entry
from tests.wire import small_tape

ROOT = Path(__file__).parents[2]
HOME = pl.col("meter_id").str.slice(5).cast(pl.Int64)
TICK = (pl.col("observed_at") - small_tape.BEGIN) / small_tape.STEP


def bent(tape: Path, **columns: pl.Expr) -> Tape:
    """The tape with other values in its readings."""
    sound = read_tape(tape)
    rows = pl.DataFrame(pl.from_arrow(sound.readings)).with_columns(**columns)
    return replace(sound, readings=rows.to_arrow().cast(sound.readings.schema))


def of_homes(faults: pl.DataFrame) -> set[int]:
    """Numbers of the logs whose meters have a fault."""
    return {(int(name[1:]) - 1) % small_tape.METERS for name in faults.get_column("meter_id")}


def around(crew: Fleet, faults: pl.DataFrame, register: str = "import_t1_wh") -> list[list[int | None]]:
    """What a register shows without faults in the reading before each fault and in its own."""
    found = []
    for meter_id, seq in faults.select("meter_id", "seq").iter_rows():
        meter = np.flatnonzero(crew.meter_ids(np.arange(len(crew))) == meter_id).repeat(2)
        rows = crew.readings(meter, crew.begin("readings", meter) + seq + [-1, 0])
        found.append(rows.get_column(register).to_list())
    return found


def test_the_example_has_one_of_every_kind(tape: Path) -> None:
    entries = read_dirt(ROOT / "config" / "dirt.yml")
    assert {each.kind for each in entries} == set(FaultKind)
    crew = fleet(read_tape(tape), 1_000)
    assert set(Dirt(crew, entries, 1).faults.get_column("kind")) == {kind.value for kind in FaultKind}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("faults: [{kind: sneeze}]", r"faults\.0\.kind"),
        ("faults: [{kind: late, by: soon}]", "'soon' is no time"),
        ("faults: [{kind: late, by: 45}]", "45 is no time: say 90s"),
        ("faults: [{kind: gap, lenght: 3}]", r"faults\.0\.lenght: no such part; an entry has kind, meters"),
        ("faults: [", "cannot read"),
        ("[]", "dirt.yml"),
        ("faults: [{kind: reset, times: 2}]", "once per meter"),
        ("faults: [{kind: late, by: -5m}]", "only a clock jumps back"),
        ("faults: [{kind: late, by: 10000000d}]", r"faults\.0\.by"),
        ("faults: [{kind: clock_jump, by: 0s}]", "whole seconds, and not 0"),
        ("faults: [{kind: clock_jump, by: 0.4s}]", "whole seconds, and not 0"),
        ("faults: [{kind: power_storm, by: -5m}]", "only a clock jumps back"),
        ("faults: [{kind: power_storm, meters: 3, times: 2}]", "a power_storm has no meters, no times: leave it out"),
        ("faults: [{kind: gap, by: 1h}]", "a gap has no by: leave it out"),
        ("faults: [{kind: late, length: 2}]", "a late has no length: leave it out"),
        ("faults: [{kind: gap, times: 2, at: 3h}]", "leave times out"),
        ("faults: [{kind: gap, at: -3h}]", r"faults\.0\.at"),
        ("faults: [{kind: gap, at: 10000000d}]", r"faults\.0\.at"),
        ("faults: [{kind: gap, meters: -2}]", "a number from 1 to 1000000000"),
        ("faults: [{kind: gap, meters: 0}]", "a number from 1 to 1000000000"),
        ("faults: [{kind: gap, meters: 1.5}]", "a number from 1 to 1000000000"),
        ("faults: [{kind: gap, meters: .inf}]", "a number from 1 to 1000000000"),
        ("faults: [{kind: gap, meters: 1.0e+300}]", "a number from 1 to 1000000000"),
        ("faults: [{kind: gap, length: 10000000000}]", r"faults\.0\.length"),
        ("faults: [{kind: gap, meters: []}]", "a number from 1 to 1000000000"),
        ("faults: [{kind: gap, meters: [a, b, a]}]", "names one twice"),
        ("faults: [{kind: poison, bytes: []}]", r"faults\.0\.bytes"),
        ("faults: [{kind: unit_slip, amount: 0.4}]", "whole number from 2 to 1000000"),
        ("faults: [{kind: unit_slip, amount: 2.5}]", "whole number from 2 to 1000000"),
        ("faults: [{kind: unit_slip, amount: 1.0e+15}]", "whole number from 2 to 1000000"),
        ("faults: [{kind: spike, amount: 0}]", "whole number from 1 to 1000000000000"),
        ("faults: [{kind: spike, amount: 1.0e+300}]", "whole number from 1 to 1000000000000"),
    ],
)
def test_a_wrong_file_is_told_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "dirt.yml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_dirt(tmp_path / "dirt.yml")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (entry(FaultKind.GAP, meters=41), "asks for 41 meters, 39 are left"),
        (entry(FaultKind.GAP, length=200), "do not hold"),
        (entry(FaultKind.LATE, times=9), "do not hold 9 faults that reach over 10"),  # a reading, and 45 minutes
        (entry(FaultKind.GAP, meters=["m0000001", "nobody"]), "nobody"),
        (Entry(kind=FaultKind.POWER_STORM, transformers=9), "asks for 9 transformers, 2 have"),
        (Entry(kind=FaultKind.POWER_STORM, at="11h"), "do not hold it"),
        (Entry(kind=FaultKind.POWER_STORM, at="10m"), "0 have meters .* and have 6 before and after"),
        (Entry(kind=FaultKind.POWER_STORM, at="7201s", by="1s"), "0 have meters .* that would miss a reading"),
        (entry(FaultKind.METER_EXCHANGE, at="5m"), "before and after"),
        (entry(FaultKind.GAP, at="30h"), "before and after"),
    ],
)
def test_what_a_tape_cannot_hold_is_said(tape: Path, wrong: Entry, message: str) -> None:
    sound = entry(FaultKind.TAMPER, meters=0.01)
    with pytest.raises(ConfigError, match=rf"faults\.1: .*{message}"):
        Dirt(fleet(read_tape(tape), METERS, burst=True), [sound, wrong], 1)


def test_a_meter_that_is_named_has_its_own_fault_when_a_storm_takes_all_transformers(tape: Path) -> None:
    storm, gap = Entry(kind=FaultKind.POWER_STORM, transformers=2), Entry(kind=FaultKind.GAP, meters=["m0000002"])
    faults = Dirt(fleet(read_tape(tape), METERS), [storm, gap], 1).faults
    assert faults.filter(pl.col("meter_id") == "m0000002").get_column("kind").unique().to_list() == ["gap"]
    with pytest.raises(ConfigError, match=r"faults.1: gap: m0000002 is named by another entry"):
        Dirt(fleet(read_tape(tape), METERS), [gap, gap], 1)
    with pytest.raises(ConfigError, match=r"x1 is no meter of the fleet"):
        Dirt(fleet(read_tape(tape), METERS), [Entry(kind=FaultKind.GAP, meters=["x1"])], 1)


def test_a_storm_is_refused_where_the_tape_names_no_transformer(tape: Path) -> None:
    sound = read_tape(tape)
    logs = pl.DataFrame(pl.from_arrow(sound.registry)).with_columns(transformer_id=pl.lit(None, pl.String))
    crew = fleet(replace(sound, registry=logs.to_arrow().cast(sound.registry.schema)), METERS)
    with pytest.raises(ConfigError, match=r"faults\.0: .* names no transformer: leave it out"):
        Dirt(crew, [Entry(kind=FaultKind.POWER_STORM)], 1)


def test_a_fault_finds_a_register_that_counts_and_says_so_where_none_does(tape: Path) -> None:
    reset = [entry(FaultKind.RESET)]
    second = bent(tape, import_t1_wh=pl.lit(0), import_t2_wh=pl.col("import_t1_wh") + 1)
    faults = Dirt(fleet(second, METERS), [*reset, entry(FaultKind.ROLLOVER)], 1).faults
    assert faults.get_column("detail").to_list() == ["import_t2_wh"] * 10
    with pytest.raises(
        ConfigError, match="reset asks for 5 meters, 0 of 40 .* no register of m.* shows more than 0 there"
    ):
        Dirt(fleet(bent(tape, import_t1_wh=pl.lit(0), export_t1_wh=pl.lit(0)), METERS), reset, 1)


def test_meters_that_cannot_have_a_fault_are_passed_over_unless_they_are_named(tape: Path) -> None:
    counts = pl.when(HOME >= 10).then("import_t1_wh").otherwise(0)
    begins_anew = pl.when((HOME < 10) & (TICK >= 100)).then(pl.col("import_t1_wh") % 1_000).otherwise("import_t1_wh")
    for kind, column in ((FaultKind.RESET, counts), (FaultKind.SPIKE, counts), (FaultKind.ROLLOVER, begins_anew)):
        crew = fleet(bent(tape, import_t1_wh=column, export_t1_wh=pl.lit(0)), METERS)
        assert of_homes(Dirt(crew, [entry(kind, meters=20)], 1).faults) == set(range(10, 20)), kind
        with pytest.raises(ConfigError, match="0 of 1 that are free can have it"):
            Dirt(crew, [entry(kind, meters=["m0000003"])], 1)


def test_no_register_is_below_zero_for_a_log_that_begins_anew_itself_is_not_reset(tape: Path) -> None:
    anew = pl.when(TICK >= 100).then(pl.col("import_t1_wh") % 1_000).otherwise(pl.col("import_t1_wh") + 5_000)
    for kind in (FaultKind.RESET, FaultKind.METER_EXCHANGE):
        with pytest.raises(ConfigError, match="begin anew in its own log"):
            Dirt(fleet(bent(tape, import_t1_wh=anew), METERS), [entry(kind)], 1)


def test_a_spike_is_on_a_register_that_the_reading_has_and_that_rises(tape: Path) -> None:
    stands = bent(tape, import_t1_wh=pl.lit(7_000), import_t2_wh=pl.col("import_t1_wh") + 1)
    in_turn = bent(
        tape,
        import_t1_wh=pl.when(TICK % 2 == 0).then("import_t1_wh"),
        export_t1_wh=pl.when(TICK % 2 == 1).then("export_t1_wh"),
    )
    faults = Dirt(fleet(stands, METERS), [entry(FaultKind.SPIKE)], 1).faults
    assert set(faults.get_column("detail")) == {"import_t2_wh"}
    faults = Dirt(fleet(in_turn, METERS), [entry(FaultKind.SPIKE, meters=20)], 1).faults
    for seq, detail in faults.select("seq", "detail").iter_rows():
        assert detail == ("export_t1_wh" if seq % 2 else "import_t1_wh")


@pytest.mark.parametrize(
    "kind",
    [FaultKind.RESET, FaultKind.ROLLOVER, FaultKind.METER_EXCHANGE, FaultKind.SPIKE, FaultKind.UNIT_SLIP],
)
def test_a_fault_moves_on_to_the_next_reading_that_shows_its_register(tape: Path, kind: FaultKind) -> None:
    hourly = bent(tape, import_t1_wh=pl.when(TICK % 12 == 0).then("import_t1_wh"), export_t1_wh=pl.lit(None, pl.Int64))
    crew = fleet(hourly, METERS)
    names = crew.meter_ids(np.arange(1, METERS)).to_list()  # home-00 is at 0 in the beginning
    faults = Dirt(crew, [entry(kind, meters=names)], 1).faults
    assert len(faults) == METERS - 1
    assert all(shown is not None for _, shown in around(crew, faults))
    at = Dirt(fleet(hourly, METERS, burst=True), [entry(kind, meters=names, at="10801s")], 1).faults
    assert at.get_column("seq").unique().to_list() == [48], "the reading of the fourth hour is the next one"


def test_no_fault_of_registers_is_before_the_first_value_of_the_run(tape: Path) -> None:
    crew = fleet(bent(tape, import_t1_wh=pl.when(TICK >= 120).then("import_t1_wh"), export_t1_wh=pl.lit(0)), METERS)
    for kind in (FaultKind.RESET, FaultKind.METER_EXCHANGE, FaultKind.ROLLOVER, FaultKind.SPIKE, FaultKind.UNIT_SLIP):
        faults = Dirt(crew, [entry(kind, meters=30)], 1).faults
        assert all(before is not None for before, _ in around(crew, faults)), kind


def test_a_register_at_0_that_rises_later_has_spikes_and_rolls_over_and_is_reset_once_it_counts(tape: Path) -> None:
    stays = pl.when(TICK >= 100).then(pl.col("import_t1_wh") + 1).otherwise(0)
    crew = fleet(bent(tape, import_t1_wh=stays, export_t1_wh=pl.lit(0)), own_clock=True)
    assert len(Dirt(crew, [entry(FaultKind.SPIKE, meters=20, at="3h")], 1).faults) == 20
    assert set(Dirt(crew, [entry(FaultKind.ROLLOVER, at="3h")], 1).faults.get_column("seq")) == {100}
    for kind in (FaultKind.RESET, FaultKind.METER_EXCHANGE, FaultKind.UNIT_SLIP):
        assert Dirt(crew, [entry(kind, at="3h")], 1).faults.get_column("seq").min() == 101
        with pytest.raises(ConfigError, match="0 of 20 .* more than 0 there"):
            Dirt(fleet(bent(tape, import_t1_wh=pl.lit(0), export_t1_wh=pl.lit(0)), own_clock=True), [entry(kind)], 1)


def test_after_a_reset_a_register_shows_less_than_before(tape: Path) -> None:
    steps = fleet(bent(tape, import_t1_wh=50 * TICK.cast(pl.Int64) + 1, export_t1_wh=pl.lit(0)), own_clock=True)
    leaps = pl.when(TICK < 100).then(1).when(TICK < 101).then(50).otherwise(60)
    leap = fleet(bent(tape, import_t1_wh=leaps, export_t1_wh=pl.lit(0)), own_clock=True)
    for crew in (steps, leap):
        shown = around(crew, Dirt(crew, [entry(FaultKind.RESET, meters=20)], 1).faults)
        assert all(before is not None and after is not None and after - before < before for before, after in shown)
    faults = Dirt(leap, [entry(FaultKind.RESET, at="499m")], 1).faults
    assert around(leap, faults) == [[50, 60]] * 5, "1, 1, 49 would be a step ahead"


def test_no_register_steps_ahead_through_a_reset(tape: Path) -> None:
    doubles = (2.0 ** TICK.clip(0, 40)).cast(pl.Int64)
    crew = fleet(bent(tape, export_t1_wh=doubles), own_clock=True)
    faults = Dirt(crew, [entry(FaultKind.RESET, meters=10, at="2h")], 1).faults
    assert faults.get_column("seq").unique().to_list() == [41]
    assert faults.get_column("detail").unique().to_list() == ["import_t1_wh"]


def test_a_box_is_exchanged_where_the_log_names_one(tape: Path) -> None:
    crew = fleet(bent(tape, equipment_id=pl.when(HOME < 10).then("equipment_id")), own_clock=True)
    faults = Dirt(crew, [entry(FaultKind.METER_EXCHANGE, meters=10)], 1).faults
    assert set(faults.get_column("meter_id")) == {f"home-{number:02d}" for number in range(10)}


def test_meters_that_are_named_are_not_taken_by_an_entry_before(tape: Path) -> None:
    entries = [entry(FaultKind.GAP, meters=39), entry(FaultKind.LATE, meters=["m0000001"])]
    faults = Dirt(fleet(read_tape(tape), METERS), entries, 1).faults
    assert faults.filter(kind="late").get_column("meter_id").to_list() == ["m0000001"]


def test_a_storm_leaves_out_meters_whose_log_is_not_there_before_and_after_it(tape: Path) -> None:
    sound = read_tape(tape)
    rows = pl.DataFrame(pl.from_arrow(sound.readings)).filter((HOME >= 10) | (TICK < 26))
    crew = fleet(replace(sound, readings=rows.to_arrow().cast(sound.readings.schema)))
    faults = Dirt(crew, [Entry(kind=FaultKind.POWER_STORM, at="3h")], 1).faults
    assert of_homes(faults) == set(range(10, 20))
    assert set(faults.filter(topic="readings").get_column("meter_id")) == set(faults.get_column("meter_id"))


def test_power_comes_back_after_it_went_however_short_a_storm_is(tape: Path) -> None:
    for seed in range(20):
        crew = fleet(read_tape(tape), burst=True)  # all report at that second
        faults = Dirt(crew, [Entry(kind=FaultKind.POWER_STORM, at="2h", by="1s")], seed).faults
        said = faults.filter(topic="events").sort("meter_id", "seq").get_column("detail").to_list()
        assert said == ["AE1", "AE2"] * (len(said) // 2)


def test_a_log_that_names_no_equipment_takes_every_fault_but_an_exchange(tape: Path) -> None:
    crew = fleet(bent(tape, equipment_id=pl.lit(None, pl.String)), own_clock=True)
    other = [kind for kind in FaultKind if kind not in (FaultKind.POWER_STORM, FaultKind.METER_EXCHANGE)]
    faults = Dirt(crew, [entry(kind, meters=1) for kind in other], 1).faults
    assert set(faults.get_column("kind")) == {kind.value for kind in other}
    with pytest.raises(ConfigError, match="no register of home.* of equipment that its log names"):
        Dirt(crew, [entry(FaultKind.METER_EXCHANGE)], 1)


def test_poison_of_no_two_meters_is_the_same(tape: Path) -> None:
    for poison in Poison:
        crew = fleet(read_tape(tape), METERS)
        faults = Dirt(crew, [entry(FaultKind.POISON, meters=METERS, bytes=[poison], at="2h")], 1).faults
        assert faults.get_column("payload").n_unique() == METERS, poison


def test_events_of_a_run_of_a_month_keep_to_their_meters(tmp_path: Path) -> None:
    small_tape.write(tmp_path / "tape")
    crew = fleet(read_tape(tmp_path / "tape"), METERS, duration=timedelta(days=30), loop=True)
    dirt = Dirt(crew, [entry(FaultKind.TAMPER, meters=METERS, times=3)], 1)
    for (_,), own in dirt.faults.sort("due_at").group_by("meter_id", maintain_order=True):
        assert own.get_column("seq").is_sorted()
        assert own.get_column("seq").n_unique() == 3
