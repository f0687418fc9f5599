"""Faults: each is sent as planned, and the truth has it."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from replay.dirt import Dirt
from replay.dirt.entries import Entry
from replay.fleet import fleet
from replay.run import play
from replay.run.ledger import run_folder
from replay.run.order import Order
from replay.tape import read_tape
from schemas.closed_lists import DeadLetterReason, FaultKind, Poison
from schemas.codec import decode
from schemas.errors import ConfigError, InvalidMessage
from tests.unit.test_run import Kept
from tests.wire import small_tape

pytestmark = pytest.mark.usefixtures("home")
METERS = 40


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
        faults = self.faults.select("meter_id", "seq", "kind", "amount", "detail", true_at="observed_at")
        return frame.join(faults, on=["meter_id", "seq"], maintain_order="left")

    def others_are_untouched(self) -> bool:
        """All readings but those with a fault are the same as without."""
        key = ["meter_id", "seq"]
        columns = [name for name in self.clean.columns if name not in ("run_id", "place")]
        left = self.clean.join(self.faults, on=key, how="anti").select(columns).sort(key)
        return left.equals(self.dirty.join(self.faults, on=key, how="anti").select(columns).sort(key))


def rows(sink: Kept, kind: str) -> pl.DataFrame:
    found: list[dict[str, Any]] = []
    for place, (sent_kind, _, _, payload) in enumerate(sink.sent):
        if sent_kind == kind:
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
    assert late.get_column("observed_at").equals(late.get_column("true_at"))
    after = played.dirty.join(late.select("meter_id", at="place", late_seq="seq"), on="meter_id")
    newer = after.filter((pl.col("seq") > pl.col("late_seq")) & (pl.col("place") < pl.col("at")))
    assert newer.group_by("meter_id").len().get_column("len").to_list() == [9] * 5, (
        "nine five-minute readings overtake it"
    )
    assert played.others_are_untouched()


def test_a_reordered_record_comes_right_after_the_next_one(tape: Path) -> None:
    played = Played(tape, entry(FaultKind.REORDER))
    for row in played.faults.iter_rows(named=True):
        seqs = played.dirty.filter(pl.col("meter_id") == row["meter_id"]).sort("place").get_column("seq").to_list()
        at = seqs.index(row["seq"])
        assert seqs[at - 2 : at + 2] == [row["seq"] - 1, row["seq"] + 1, row["seq"], row["seq"] + 2]


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
    assert both.get_column("observed_at").equals(both.get_column("true_at"))
    assert played.others_are_untouched()


@pytest.mark.parametrize(("kind", "year"), [(FaultKind.CLOCK_1970, 1970), (FaultKind.CLOCK_2099, 2099)])
def test_a_clock_that_is_lost_goes_on_from_another_year(tape: Path, kind: FaultKind, year: int) -> None:
    played = Played(tape, entry(kind, length=2))
    lost = played.touched(played.dirty)
    begin = datetime(year, 1, 1, tzinfo=UTC)
    assert lost.get_column("observed_at").to_list() == [begin] * 5 + [begin + small_tape.STEP] * 5 or sorted(
        lost.get_column("observed_at").to_list()
    ) == sorted([begin, begin + small_tape.STEP] * 5)
    assert lost.get_column("observed_at").equals(lost.get_column("true_at"))


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
        clean = played.clean.filter(pl.col("meter_id") == meter_id).sort("seq")
        before = clean.row(by_predicate=pl.col("seq") == stuck.get_column("seq")[0] - 1, named=True)
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
    faults = {row["payload"]: row for row in played.faults.iter_rows(named=True)}
    found = [(encoding, payload) for kind, _, encoding, payload in played.sent if payload in faults]
    assert len(found) == len(faults) == 7 == played.ledger.poison
    for encoding, payload in found:
        poison = Poison(faults[payload]["detail"])
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
    said = played.faults.filter(pl.col("topic") == "events").select("meter_id", "seq", code="detail")
    assert len(said.join(played.events, on=["meter_id", "seq", "code"])) == len(said) == 55


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


def test_a_fault_comes_when_at_says(tape: Path) -> None:
    played = Played(tape, entry(FaultKind.SPIKE, at="3h"))
    assert played.faults.get_column("seq").is_between(35, 36).all()
    late = played.faults.get_column("due_at") - (small_tape.BEGIN + timedelta(hours=3))
    assert ((late >= timedelta(0)) & (late <= small_tape.STEP)).all()


def test_a_second_storm_takes_another_transformer_and_a_third_finds_none(tape: Path) -> None:
    storm = Entry(kind=FaultKind.POWER_STORM)
    played = Played(tape, storm, storm)
    assert played.faults.filter(pl.col("topic") == "events").get_column("meter_id").n_unique() == METERS
    with pytest.raises(ConfigError, match="asks for 1 transformers, 0 have"):
        Dirt(fleet(read_tape(tape), METERS), [storm] * 3, 1)


def test_poison_goes_out_at_its_time(tape: Path) -> None:
    played = Played(tape, entry(FaultKind.POISON, meters=30, bytes=[Poison.TRAILING_BYTES]))
    place = {payload: place for place, (*_, payload) in enumerate(played.sent)}
    for fault in played.faults.iter_rows(named=True):
        readings = played.dirty.filter(pl.col("meter_id") == fault["meter_id"])
        before = readings.filter(pl.col("seq") < fault["seq"]).get_column("place")
        after = readings.filter(pl.col("seq") > fault["seq"]).get_column("place")
        assert max(before) < place[fault["payload"]] < min(after)
