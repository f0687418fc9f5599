"""N meters from M logs: what they send, in which order, and the truth about it."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import polars as pl
import pytest

from replay.fleet import Fleet, fleet
from replay.run import Ledger, play, run_folder
from replay.sinks import NullSink
from replay.tape import read_tape
from schemas.codec import decode
from schemas.errors import ConfigError
from tests.wire import small_tape

STEP = timedelta(minutes=7)


@pytest.fixture(scope="module")
def tape_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tape") / "small"
    small_tape.write(folder)
    return folder


def crew(tape_folder: Path, meters: int | None = 50, seed: int = 1, own_clock: bool = False) -> Fleet:
    return fleet(read_tape(tape_folder), meters, seed, None, own_clock)


def sent(played: Fleet, step: timedelta = STEP) -> pl.DataFrame:
    return pl.concat([piece.readings for piece in played.slices(step)])


def test_every_meter_sends_its_whole_log_once_in_order(tape_folder: Path) -> None:
    readings = sent(crew(tape_folder))
    assert len(readings) == 50 * small_tape.READINGS
    assert readings.get_column("due_at").is_sorted()
    per_meter = readings.group_by("meter_id", maintain_order=True).agg("seq", "observed_at")
    for row in per_meter.iter_rows(named=True):
        assert row["seq"] == list(range(small_tape.READINGS))
        assert row["observed_at"] == sorted(row["observed_at"])


def test_how_the_run_is_sliced_does_not_change_what_is_sent(tape_folder: Path) -> None:
    assert sent(crew(tape_folder)).equals(sent(crew(tape_folder), timedelta(hours=5)))


def test_the_same_seed_gives_the_same_fleet_and_another_another(tape_folder: Path) -> None:
    assert sent(crew(tape_folder)).equals(sent(crew(tape_folder)))
    assert not sent(crew(tape_folder)).equals(sent(crew(tape_folder, seed=2)))


def test_registers_never_step_back_and_the_truth_is_what_they_show(tape_folder: Path) -> None:
    played = crew(tape_folder)
    readings = sent(played).sort("meter_id", "seq")
    steps = readings.with_columns(step=pl.col("import_t1_wh").diff().over("meter_id")).drop_nulls("step")
    assert int(str(steps.get_column("step").min())) >= 0
    shown = readings.group_by("meter_id", maintain_order=True).agg(
        energy_wh=pl.col("import_t1_wh").last() - pl.col("import_t1_wh").first()
    )
    truth = played.truth().filter(pl.col("register") == "import_t1")
    assert truth.select("meter_id", "energy_wh").equals(shown.sort("meter_id"))


def test_a_fleet_has_as_many_grids_as_it_needs(tape_folder: Path) -> None:
    registry = crew(tape_folder, 50).registry
    assert registry.get_column("meter_id").n_unique() == registry.get_column("equipment_id").n_unique() == 50
    assert sorted(registry.get_column("transformer_id").unique()) == ["T1-1", "T1-2", "T1-3"]


def test_with_its_own_clock_the_log_is_sent_as_it_is(tape_folder: Path) -> None:
    tape = read_tape(tape_folder)
    readings = sent(crew(tape_folder, None, own_clock=True)).sort("meter_id", "observed_at")
    logged = pl.DataFrame(pl.from_arrow(tape.readings)).sort("meter_id", "observed_at")
    columns = [name for name in logged.columns if name != "log_row"]
    assert readings.select(columns).equals(logged.select(columns))


def test_a_log_of_one_meter_does_not_become_two_by_its_own_clock(tape_folder: Path) -> None:
    with pytest.raises(ConfigError, match="20 meters, not 21"):
        crew(tape_folder, 21, own_clock=True)


def test_a_stamp_in_2099_does_not_hold_up_the_run(tape_folder: Path) -> None:
    tape = read_tape(tape_folder)
    wild = datetime(2099, 1, 1, tzinfo=UTC)
    frame = pl.DataFrame(pl.from_arrow(tape.readings))
    frame = frame.with_columns(
        observed_at=pl.when(pl.col("log_row") == 100).then(pl.lit(wild)).otherwise("observed_at")
    )
    readings = frame.to_arrow().cast(tape.readings.schema)
    played = fleet(type(tape)(readings, tape.events, tape.registry, tape.info), None, 1, None, own_clock=True)
    assert played.last_at < wild
    assert len(sent(played)) == len(frame)


def test_the_ledger_says_what_was_sent_and_the_records_carry_the_run(
    tape_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("METERSTREAM_HOME", str(tmp_path))

    class Kept(NullSink):
        def __init__(self) -> None:
            super().__init__()
            self.payloads: list[tuple[str, bytes]] = []

        def send(self, meter_id: str, kind: str, payload: bytes, encoding: str = "avro") -> None:
            super().send(meter_id, kind, payload, encoding)
            self.payloads.append((kind, payload))

    sink = Kept()
    played = crew(tape_folder)
    ledger = play(played, sink, Ledger("r1", "t", 50, None, 1, "null", "run", "", "", ""))
    assert ledger.is_whole
    assert ledger.records == ledger.readings + ledger.events == len(sink.payloads) == played.records
    first = decode(next(payload for kind, payload in sink.payloads if kind == "readings"), "reading")
    assert (first["run_id"], first["seq"]) == ("r1", 0)
    per_meter = pl.read_parquet(run_folder("r1") / "ledger.parquet")
    assert int(per_meter.get_column("sent").sum()) == ledger.records
    assert (tmp_path / "lake" / "registry" / "date=2024-03-04" / "r1.parquet").exists()
