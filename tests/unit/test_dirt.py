"""Faults: each is planned, sent as planned, and told as the truth."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from replay.dirt import Dirt
from replay.dirt.entries import Entry, read_dirt
from replay.fleet import Fleet, fleet
from replay.run import play
from replay.run.ledger import run_folder
from replay.run.order import Order
from replay.tape import Tape, read_tape
from schemas.closed_lists import DeadLetterReason, FaultKind, Poison
from schemas.codec import decode
from schemas.errors import ConfigError, InvalidMessage
from tests.unit.test_run import Kept
from tests.wire import small_tape

pytestmark = pytest.mark.usefixtures("home")
METERS = 40
ROOT = Path(__file__).parents[2]


class Played:
    """A run with faults beside the same run without."""

    def __init__(self, tape: Path, *entries: Entry, seed: int = 1, processes: int = 1) -> None:
        clean, dirty = Kept(), Kept()
        play(Order(tape, "clean", "null", METERS, seed), lambda: clean)
        self.ledger = play(Order(tape, "dirty", "null", METERS, seed, dirt=entries), lambda: dirty)
        self.clean, self.dirty, self.sent = rows(clean, "readings"), rows(dirty, "readings"), dirty.sent
        self.events_clean, self.events = rows(clean, "events"), rows(dirty, "events")
        self.faults = pl.read_parquet(run_folder("dirty") / "faults.parquet")

    def touched(self, frame: pl.DataFrame) -> pl.DataFrame:
        """Rows of a frame that have a fault, in its order, with the fault's columns."""
        of = self.faults.select("meter_id", "seq", "kind", "amount", "detail", told_at="observed_at")
        return frame.join(of, on=["meter_id", "seq"], maintain_order="left")

    def others_are_untouched(self) -> bool:
        """All readings but those with a fault are the same as without."""
        key = ["meter_id", "seq"]
        columns = [name for name in self.clean.columns if name not in ("run_id", "place")]
        left = self.clean.join(self.faults, on=key, how="anti").select(columns).sort(key)
        return left.equals(self.dirty.join(self.faults, on=key, how="anti").select(columns).sort(key))


def rows(sink: Kept, kind: str) -> pl.DataFrame:
    found: list[dict[str, Any]] = []
    for place, (of, _, _, payload) in enumerate(sink.sent):
        if of == kind:
            try:
                found.append({**decode(payload, kind.removesuffix("s")), "place": place})
            except InvalidMessage:
                continue
    return pl.DataFrame(found, infer_schema_length=None)


def entry(kind: FaultKind, **parts: Any) -> Entry:
    """An entry for five meters."""
    return Entry(kind=kind, **{"meters": 5, **parts})


def test_a_duplicate_is_sent_twice_with_one_seq(tape: Path) -> None:
    played = Played(tape, entry(FaultKind.DUPLICATE, times=3))
    assert len(played.dirty) == len(played.clean) + 15
    twice = played.touched(played.dirty)
    assert len(twice) == 30
    assert len(twice.unique(["meter_id", "seq", "import_t1_wh", "observed_at"])) == 15
    assert played.ledger.readings == len(played.dirty)


def test_a_late_record_keeps_its_stamp_and_comes_later(tape: Path) -> None:
    played = Played(tape, entry(FaultKind.LATE, by="45m"))
    late = played.touched(played.dirty)
    assert len(late) == len(played.faults) == 5
    assert late.get_column("observed_at").equals(late.get_column("told_at"))
    after = played.dirty.join(late.select("meter_id", at="place", late_seq="seq"), on="meter_id")
    newer = after.filter((pl.col("seq") > pl.col("late_seq")) & (pl.col("place") < pl.col("at")))
    assert newer.group_by("meter_id").len().get_column("len").to_list() == [9] * 5, (
        "nine five-minute readings overtake it"
    )
    assert played.others_are_untouched()


def test_a_reordered_record_comes_right_after_the_next_one(tape: Path) -> None:
    played = Played(tape, entry(FaultKind.REORDER))
    for row in played.faults.iter_rows(named=True):
        of = played.dirty.filter(pl.col("meter_id") == row["meter_id"]).sort("place").get_column("seq").to_list()
        at = of.index(row["seq"])
        assert of[at - 2 : at + 2] == [row["seq"] - 1, row["seq"] + 1, row["seq"], row["seq"] + 2]


def test_a_gap_is_not_sent_and_told(tape: Path) -> None:
    played = Played(tape, entry(FaultKind.GAP, length=4, times=2))
    assert len(played.faults) == 40 == len(played.clean) - len(played.dirty)
    assert played.touched(played.dirty).is_empty()
    assert not played.faults.get_column("is_sent").any()
    assert played.others_are_untouched()


@pytest.mark.parametrize("by", ["1h", "-1h"])
def test_a_clock_that_jumps_comes_back(tape: Path, by: str) -> None:
    played = Played(tape, entry(FaultKind.CLOCK_JUMP, by=by, length=3))
    both = played.touched(played.dirty).join(played.clean, on=["meter_id", "seq"], suffix="_clean")
    jumps = (both.get_column("observed_at") - both.get_column("observed_at_clean")).unique().to_list()
    assert jumps == [timedelta(hours=1 if by == "1h" else -1)]
    assert both.get_column("observed_at").equals(both.get_column("told_at"))
    assert played.others_are_untouched()


@pytest.mark.parametrize(("kind", "year"), [(FaultKind.CLOCK_1970, 1970), (FaultKind.CLOCK_2099, 2099)])
def test_a_clock_that_is_lost_goes_on_from_another_year(tape: Path, kind: FaultKind, year: int) -> None:
    played = Played(tape, entry(kind, length=2))
    lost = played.touched(played.dirty)
    begin = datetime(year, 1, 1, tzinfo=UTC)
    assert lost.get_column("observed_at").to_list() == [begin] * 5 + [begin + small_tape.STEP] * 5 or sorted(
        lost.get_column("observed_at").to_list()
    ) == sorted([begin, begin + small_tape.STEP] * 5)
    assert lost.get_column("observed_at").equals(lost.get_column("told_at"))


def steps(played: Played, register: str = "import_t1_wh") -> pl.DataFrame:
    """Steps of a register per meter, with and without faults, where they differ."""
    frames = []
    for frame in (played.clean, played.dirty):
        step = pl.col(register).diff().over("meter_id")
        frames.append(frame.sort("meter_id", "seq").select("meter_id", "seq", register, "equipment_id", step=step))
    both = frames[0].join(frames[1], on=["meter_id", "seq"], suffix="_dirty", maintain_order="left")
    return both.filter(pl.col("step") != pl.col("step_dirty"))


def test_after_a_reset_the_register_counts_from_zero(tape: Path) -> None:
    played = Played(tape, entry(FaultKind.RESET))
    odd = steps(played)
    assert len(odd) == len(played.faults) == 5
    assert odd.get_column("import_t1_wh_dirty").equals(odd.get_column("step"), check_names=False), "nothing is lost"
    assert odd.select("meter_id", "seq").equals(played.faults.select("meter_id", "seq").sort("meter_id"))


def test_a_register_rolls_over_at_its_last_digit(tape: Path) -> None:
    played = Played(tape, entry(FaultKind.ROLLOVER))
    odd = steps(played)
    assert len(odd) == 5
    assert (odd.get_column("step_dirty") + 10**8).equals(odd.get_column("step"), check_names=False)
    assert odd.select("meter_id", "seq").equals(played.faults.select("meter_id", "seq").sort("meter_id"))


def test_an_exchanged_meter_is_another_box_with_registers_of_its_own(tape: Path) -> None:
    played = Played(tape, entry(FaultKind.METER_EXCHANGE))
    odd = steps(played)
    assert len(odd) == 5
    assert (odd.get_column("equipment_id") != odd.get_column("equipment_id_dirty")).all()
    assert (odd.get_column("import_t1_wh_dirty") < 60_000).all()
    boxes = played.dirty.group_by("meter_id").agg(pl.col("equipment_id").n_unique()).get_column("equipment_id")
    assert sorted(boxes.to_list()) == [1] * (METERS - 5) + [2] * 5


def test_a_spike_is_one_wild_value(tape: Path) -> None:
    played = Played(tape, entry(FaultKind.SPIKE, amount=500_000))
    wild = played.touched(played.dirty).join(played.clean, on=["meter_id", "seq"], suffix="_clean")
    assert (wild.get_column("import_t1_wh") - wild.get_column("import_t1_wh_clean")).to_list() == [500_000] * 5
    assert played.others_are_untouched()


def test_a_frozen_meter_shows_what_it_showed_before_under_new_stamps(tape: Path) -> None:
    played = Played(tape, entry(FaultKind.FROZEN, length=6))
    for (meter_id,), stuck in played.touched(played.dirty).sort("seq").group_by("meter_id"):
        of = played.clean.filter(pl.col("meter_id") == meter_id).sort("seq")
        before = of.row(by_predicate=pl.col("seq") == stuck.get_column("seq")[0] - 1, named=True)
        for name in ("import_t1_wh", "voltage_l1_mv", "import_w"):
            assert stuck.get_column(name).unique().to_list() == [before[name]]
        assert stuck.get_column("observed_at").n_unique() == 6
    assert played.others_are_untouched()


def test_a_unit_slips(tape: Path) -> None:
    played = Played(tape, entry(FaultKind.UNIT_SLIP, length=2, amount=1000))
    slipped = played.touched(played.dirty).join(played.clean, on=["meter_id", "seq"], suffix="_clean")
    assert len(slipped) == 10
    assert (slipped.get_column("import_t1_wh_clean") * 1000).equals(
        slipped.get_column("import_t1_wh"), check_names=False
    )


def test_each_kind_of_poison_is_refused_for_its_reason_and_told_byte_by_byte(tape: Path) -> None:
    played = Played(tape, entry(FaultKind.POISON, meters=7, bytes=list(Poison)))
    told = {row["payload"]: row for row in played.faults.iter_rows(named=True)}
    found = [(encoding, payload) for kind, _, encoding, payload in played.sent if payload in told]
    assert len(found) == len(told) == 7 == played.ledger.poison
    for encoding, payload in found:
        poison = Poison(told[payload]["detail"])
        if encoding == "avro" and poison != Poison.METER_ID_MISMATCH:
            with pytest.raises(InvalidMessage) as refused:
                decode(payload, "reading")
            assert refused.value.reason == DeadLetterReason(poison.value)
    assert len(played.dirty) == len(played.clean) - 7 + 1, "one is a good record in a wrong name"


def test_a_storm_takes_one_transformer_and_nothing_else(tape: Path) -> None:
    played = Played(tape, Entry(kind=FaultKind.POWER_STORM, by="20m"))
    said = played.faults.filter(pl.col("topic") == "events")
    members = said.get_column("meter_id").unique().sort()
    assert len(members) == 20, "a copy of the grid has twenty homes under one transformer"
    assert said.get_column("detail").value_counts().sort("detail").rows() == [("AE1", 20), ("AE2", 20)]
    missing = played.faults.filter(~pl.col("is_sent"))
    assert set(missing.get_column("meter_id")) == set(members)
    assert 4 <= len(missing) / 20 <= 5
    assert played.others_are_untouched()


def test_said_events_take_their_place_among_the_tapes(tape: Path) -> None:
    played = Played(tape, entry(FaultKind.TAMPER), entry(FaultKind.VOLTAGE_ALARM), Entry(kind=FaultKind.POWER_STORM))
    assert len(played.events) == len(played.events_clean) + 5 + 10 + 40
    for _, own in played.events.sort("place").group_by("meter_id", maintain_order=True):
        assert own.get_column("seq").to_list() == list(range(len(own)))
    told = played.faults.filter(pl.col("topic") == "events").select("meter_id", "seq", code="detail")
    assert len(told.join(played.events, on=["meter_id", "seq", "code"])) == len(told) == 55


def test_one_meter_has_the_faults_of_one_entry(tape: Path) -> None:
    played = Played(tape, *[entry(kind, meters=2) for kind in FaultKind if kind != FaultKind.POWER_STORM])
    kinds = played.faults.group_by("meter_id").agg(pl.col("kind").n_unique())
    assert kinds.get_column("kind").to_list() == [1] * 2 * (len(FaultKind) - 1)
    assert played.ledger.faults == {kind.value: 2 for kind in FaultKind if kind != FaultKind.POWER_STORM}


def test_the_same_seed_gives_the_same_faults_in_one_process_or_two(tape: Path) -> None:
    entries = tuple(Entry(kind=kind) for kind in FaultKind)

    def run(run_id: str, **order: Any) -> tuple[str, list[tuple[Any, ...]]]:
        ledger = play(Order(tape, run_id, "null", METERS, dirt=entries, **order), Kept)
        return ledger.digest, pl.read_parquet(run_folder(run_id) / "faults.parquet").rows()

    first = run("a")
    assert run("b", processes=2) == first
    assert run("c", speed=50_000.0) == first
    assert run("d", seed=2) != first


def test_the_example_has_one_of_every_kind(tape: Path) -> None:
    entries = read_dirt(ROOT / "config" / "dirt.yml")
    assert {each.kind for each in entries} == set(FaultKind)
    crew = fleet(read_tape(tape), 1_000)
    assert set(Dirt(crew, entries, 1).faults.get_column("kind")) == {kind.value for kind in FaultKind}


@pytest.mark.parametrize(
    ("text", "told"),
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
def test_a_wrong_file_is_told_with_its_place(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "dirt.yml").write_text(text)
    with pytest.raises(ConfigError, match=told):
        read_dirt(tmp_path / "dirt.yml")


@pytest.mark.parametrize(
    ("wrong", "told"),
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
def test_what_a_tape_cannot_hold_is_said(tape: Path, wrong: Entry, told: str) -> None:
    sound = entry(FaultKind.TAMPER, meters=0.01)
    with pytest.raises(ConfigError, match=rf"faults\.1: .*{told}"):
        Dirt(fleet(read_tape(tape), METERS, burst=True), [sound, wrong], 1)


def test_a_fault_comes_when_at_says(tape: Path) -> None:
    played = Played(tape, entry(FaultKind.SPIKE, at="3h"))
    assert played.faults.get_column("seq").is_between(35, 36).all()
    late = played.faults.get_column("due_at") - (small_tape.BEGIN + timedelta(hours=3))
    assert ((late >= timedelta(0)) & (late <= small_tape.STEP)).all()


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


def test_a_second_storm_takes_another_transformer_and_a_third_finds_none(tape: Path) -> None:
    storm = Entry(kind=FaultKind.POWER_STORM)
    played = Played(tape, storm, storm)
    assert played.faults.filter(pl.col("topic") == "events").get_column("meter_id").n_unique() == METERS
    with pytest.raises(ConfigError, match="asks for 1 transformers, 0 have"):
        Dirt(fleet(read_tape(tape), METERS), [storm] * 3, 1)


def bent(tape: Path, **columns: pl.Expr) -> Tape:
    """The tape with other values in its readings."""
    sound = read_tape(tape)
    rows = pl.DataFrame(pl.from_arrow(sound.readings)).with_columns(**columns)
    return replace(sound, readings=rows.to_arrow().cast(sound.readings.schema))


def test_a_fault_finds_a_register_that_counts_and_says_so_where_none_does(tape: Path) -> None:
    reset = [entry(FaultKind.RESET)]
    second = bent(tape, import_t1_wh=pl.lit(0), import_t2_wh=pl.col("import_t1_wh") + 1)
    faults = Dirt(fleet(second, METERS), [*reset, entry(FaultKind.ROLLOVER)], 1).faults
    assert faults.get_column("detail").to_list() == ["import_t2_wh"] * 10
    with pytest.raises(
        ConfigError, match="reset asks for 5 meters, 0 of 40 .* no register of m.* shows more than 0 there"
    ):
        Dirt(fleet(bent(tape, import_t1_wh=pl.lit(0), export_t1_wh=pl.lit(0)), METERS), reset, 1)


HOME = pl.col("meter_id").str.slice(5).cast(pl.Int64)
TICK = (pl.col("observed_at") - small_tape.BEGIN) / small_tape.STEP


def of_homes(faults: pl.DataFrame) -> set[int]:
    """Numbers of the logs whose meters have a fault."""
    return {(int(name[1:]) - 1) % small_tape.METERS for name in faults.get_column("meter_id")}


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


def around(crew: Fleet, faults: pl.DataFrame, register: str = "import_t1_wh") -> list[list[int | None]]:
    """What a register shows without faults in the reading before each fault and in its own."""
    found = []
    for meter_id, seq in faults.select("meter_id", "seq").iter_rows():
        meter = np.flatnonzero(crew.meter_ids(np.arange(len(crew))) == meter_id).repeat(2)
        rows = crew.readings(meter, crew.begin("readings", meter) + seq + [-1, 0])
        found.append(rows.get_column(register).to_list())
    return found


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


def test_poison_goes_out_at_its_time(tape: Path) -> None:
    played = Played(tape, entry(FaultKind.POISON, meters=30, bytes=[Poison.TRAILING_BYTES]))
    place = {payload: place for place, (*_, payload) in enumerate(played.sent)}
    for fault in played.faults.iter_rows(named=True):
        of = played.dirty.filter(pl.col("meter_id") == fault["meter_id"])
        before = of.filter(pl.col("seq") < fault["seq"]).get_column("place")
        after = of.filter(pl.col("seq") > fault["seq"]).get_column("place")
        assert max(before) < place[fault["payload"]] < min(after)


def test_events_of_a_run_of_a_month_keep_to_their_meters(tmp_path: Path) -> None:
    small_tape.write(tmp_path / "tape")
    crew = fleet(read_tape(tmp_path / "tape"), METERS, duration=timedelta(days=30), loop=True)
    dirt = Dirt(crew, [entry(FaultKind.TAMPER, meters=METERS, times=3)], 1)
    for (_,), own in dirt.faults.sort("due_at").group_by("meter_id", maintain_order=True):
        assert own.get_column("seq").is_sorted()
        assert own.get_column("seq").n_unique() == 3
