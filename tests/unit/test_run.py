"""Playing a tape: what goes out, its digest, the ledger, and how a run ends."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import polars as pl
import pytest

from lake.reading import Lake
from replay.pace import Pace
from replay.run import play
from replay.run.ledger import Ledger, read_ledger, run_folder
from replay.run.order import Order
from replay.sinks import NullSink
from schemas.codec import decode, decode_batch
from schemas.errors import ConfigError, RetryLater
from stack.registry import correct
from tests.eventually import eventually
from tests.lake_by_hand import add
from tests.wire import small_tape

pytestmark = pytest.mark.usefixtures("home")
RECORDS = 50 * small_tape.READINGS + 50 * 2 + 10  # readings, power failures, tampers (every fifth home)


class Kept(NullSink):
    """A sink that keeps what it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[tuple[str, str, str, bytes]] = []

    def send(self, kind: str, meter_ids: Sequence[str], payloads: Sequence[bytes], encoding: str = "avro") -> None:
        super().send(kind, meter_ids, payloads, encoding)
        self.sent += [(kind, meter, encoding, payload) for meter, payload in zip(meter_ids, payloads, strict=True)]


class Full(NullSink):
    """A sink whose other side is gone after some records."""

    def send(self, kind: str, meter_ids: Sequence[str], payloads: Sequence[bytes], encoding: str = "avro") -> None:
        if self.acknowledged > 1_000:
            msg = "gone"
            raise RetryLater(msg)
        super().send(kind, meter_ids, payloads, encoding)


def test_the_ledger_says_what_was_sent_and_the_records_carry_the_run(tape: Path, home: Path) -> None:
    sink = Kept()
    ledger = play(Order(tape, "r1", "null", 50), lambda: sink)
    assert ledger.is_whole
    assert ledger.records == ledger.readings + ledger.events == len(sink.sent) == RECORDS
    first = decode(next(payload for kind, _, _, payload in sink.sent if kind == "readings"), "reading")
    assert (first["run_id"], first["seq"], first["received_at"]) == ("r1", 0, None)
    per_meter = pl.read_parquet(run_folder("r1") / "ledger.parquet")
    assert per_meter.select(pl.sum("readings", "events", "poison")).row(0) == (ledger.readings, ledger.events, 0)
    assert per_meter.get_column("sent_until").min() == datetime.fromisoformat(ledger.last_at)
    assert not (home / "lake").exists(), "nothing follows in the lake"
    assert json.loads((run_folder("r1") / "run.json").read_text())["digest"] == ledger.digest


def test_flat_out_a_record_is_sent_on_the_runs_clock_at_its_due_time(tape: Path) -> None:
    sink = Kept()
    play(Order(tape, "r1", "kafka", 50), lambda: sink)
    reading = decode(sink.sent[0][3], "reading")
    assert timedelta(0) <= reading["sent_at"] - reading["observed_at"] < timedelta(minutes=5)
    assert datetime.now(UTC) - reading["received_at"] < timedelta(minutes=5), "past the bridge we stamp the arrival"


def test_one_seed_has_one_digest_however_the_run_is_cut_and_another_seed_another(tape: Path) -> None:
    def digest(order: Order) -> str:
        return play(order, NullSink).digest

    order = Order(tape, "a", "null", 50)
    first = digest(order)
    assert digest(replace(order, run_id="b")) == first
    assert digest(replace(order, run_id="c", processes=2)) == first
    assert digest(replace(order, run_id="d", speed=40_000.0)) == first
    assert digest(replace(order, run_id="e", seed=2)) != first
    assert digest(replace(order, run_id="f", burst=True)) == first, "when a record is sent is no part of it"


def test_a_paced_run_takes_its_time_and_tells_its_lateness(tape: Path) -> None:
    ledger = play(Order(tape, "r1", "null", 20, speed=36_000.0), NullSink)
    assert ledger.is_whole
    assert ledger.seconds >= 12 * 3600 / 36_000 - 0.2
    assert 0 <= ledger.late_mean_s <= ledger.late_max_s
    assert ledger.late_p99_s <= ledger.late_max_s


def test_where_the_other_side_is_gone_the_ledger_says_what_it_has(tape: Path) -> None:
    with pytest.raises(RetryLater, match="gone"):
        play(Order(tape, "r1", "null", 500), Full)
    ledger = Ledger(**json.loads((run_folder("r1") / "run.json").read_text()))
    assert not ledger.is_whole
    per_meter = pl.read_parquet(run_folder("r1") / "ledger.parquet")
    handed_over = int(per_meter.select(pl.sum_horizontal(pl.sum("readings", "events"))).item())
    assert 1_000 < ledger.records < handed_over <= ledger.records + 20_000, "the block that failed may have gone out"


def test_of_several_processes_the_one_that_fails_says_why(tape: Path) -> None:
    with pytest.raises(RetryLater, match="gone"):
        play(Order(tape, "r1", "null", 500, processes=2), Full)


def test_flat_out_no_meter_is_ahead_of_another_by_more_than_the_jobs_allow(
    tape: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("replay.run.blocks.BLOCK_RECORDS", 700)
    sink = Kept()
    play(Order(tape, "r1", "null", 300), lambda: sink)
    readings = decode_batch([payload for kind, *_, payload in sink.sent if kind == "readings"], "reading").records
    due = pl.Series(readings["sent_at"].combine_chunks())
    assert len(due) == 300 * small_tape.READINGS
    assert not ((due.cum_max() - due) > timedelta(minutes=10)).any()


def test_a_tape_too_sparse_to_share_is_played_by_one_process(tape: Path) -> None:
    shared = play(Order(tape, "r1", "null", 20, processes=2), NullSink)
    assert shared.processes == 1
    assert shared.digest == play(Order(tape, "r2", "null", 20), NullSink).digest


def test_what_waits_for_the_end_of_a_tick_is_late_by_that_and_says_so(tape: Path) -> None:
    sink = Kept()
    ledger = play(Order(tape, "r1", "null", 20, speed=36_000.0, pace=Pace.OPEN), lambda: sink)
    since = delays(sink)
    assert (since >= timedelta(0)).all()
    assert (since >= timedelta(minutes=50)).any(), "a tick of 0.1 s is an hour of the run"
    assert ledger.late_max_s >= 50 * 60 / 36_000


def delays(sink: Kept) -> pl.Series:
    """Of every reading, by how much it was sent after its meter's stamp, on the run's clock."""
    readings = decode_batch([payload for kind, *_, payload in sink.sent if kind == "readings"], "reading").records
    return pl.Series(readings["sent_at"].combine_chunks()) - pl.Series(readings["observed_at"].combine_chunks())


class Hindered(Kept):
    """A sink whose other side stands still for a while, once."""

    def send(self, kind: str, meter_ids: Sequence[str], payloads: Sequence[bytes], encoding: str = "avro") -> None:
        before = len(self.sent)
        super().send(kind, meter_ids, payloads, encoding)
        if before < 1_000 <= len(self.sent):
            time.sleep(1)
            self.waited_s += 1


@pytest.mark.parametrize("processes", [1, 2])
def test_a_steady_runs_clock_waits_so_that_nothing_is_late(tape: Path, processes: int) -> None:
    alone = delays(_played(tape, "alone", Kept))
    ledger = play(Order(tape, "r1", "null", 20, speed=36_000.0, processes=processes), Hindered)
    assert ledger.pace == "steady"
    assert 0.9 <= ledger.slip_s <= ledger.seconds - 12 * 3600 / 36_000 + 0.5
    assert ledger.waited_s == {"null": pytest.approx(1.0)}
    assert ledger.speed_reached < 36_000
    hindered = delays(_played(tape, "hindered", Hindered))
    assert max(hindered) - max(alone) < timedelta(minutes=12), "a second is ten hours of the run"
    assert ledger.digest == read_ledger("alone").digest == read_ledger("hindered").digest


def _played(tape: Path, run_id: str, sink_of: type[Kept]) -> Kept:
    sink = sink_of()
    play(Order(tape, run_id, "null", 20, speed=36_000.0), lambda: sink)
    return sink


def test_blocks_of_one_moment_wait_for_each_other_and_are_not_late(tape: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("replay.run.blocks.BLOCK_RECORDS", 7)
    sink = Hindered()
    ledger = play(Order(tape, "r1", "null", 20, speed=36_000.0, burst=True), lambda: sink)
    assert 0.9 <= ledger.slip_s
    assert max(delays(sink)) < timedelta(minutes=15), "a second is ten hours of the run"


def test_an_open_run_keeps_its_clock_and_says_how_late_it_was(tape: Path) -> None:
    ledger = play(Order(tape, "r1", "null", 20, speed=36_000.0, pace=Pace.OPEN), Hindered)
    assert (ledger.pace, ledger.slip_s) == ("open", 0.0)
    assert ledger.late_max_s >= 0.8


class Slow(NullSink):
    """A sink that is never done."""

    def close(self) -> None:
        time.sleep(300)


PLAY_SLOWLY = """
import sys
from pathlib import Path
from replay.run import play
from replay.run.order import Order
from tests.unit.test_run import Slow
if __name__ == "__main__":
    play(Order(Path(sys.argv[1]), "r1", "null", 300, speed=600.0, processes=int(sys.argv[2])), Slow)
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_a_second_ctrl_c_ends_at_once_and_leaves_no_process(tape: Path, tmp_path: Path, processes: int) -> None:
    script = tmp_path / "slow.py"
    script.write_text(PLAY_SLOWLY)
    command = [sys.executable, str(script), str(tape), str(processes)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, start_new_session=True, env=environment, stderr=subprocess.DEVNULL) as replay:
        eventually((run_folder("r1") / "run.json").exists, 60)
        time.sleep(0.5)
        os.killpg(replay.pid, signal.SIGINT)
        time.sleep(1)
        assert replay.poll() is None, "it waits for its sink"
        os.killpg(replay.pid, signal.SIGINT)
        assert replay.wait(20) != 0
        eventually(lambda: not _is_there(replay.pid), 20)


def test_processes_of_a_run_end_with_their_parent(tape: Path) -> None:
    command = [sys.executable, "-m", "replay", "run", "--tape", str(tape), "--to", "null", "--speed", "60"]
    with subprocess.Popen(
        [*command, "--run-id", "r1", "--processes", "2"], stdout=subprocess.DEVNULL, start_new_session=True
    ) as replay:
        eventually((run_folder("r1") / "run.json").exists, 60)
        replay.kill()
        replay.wait(20)
        eventually(lambda: not _is_there(replay.pid), 30)


def _is_there(group: int) -> bool:
    """Whether any process of the group runs."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("processes", [1, 2])
def test_ctrl_c_ends_a_run_with_a_ledger_that_is_right(tape: Path, home: Path, processes: int) -> None:
    command = [sys.executable, "-m", "replay", "run", "--tape", str(tape), "--to", "null", "--speed", "60"]
    options = ["--run-id", "r1", "--json", "--processes", str(processes)]
    with subprocess.Popen([*command, *options], stdout=subprocess.PIPE, start_new_session=True) as replay:
        eventually((run_folder("r1") / "run.json").exists, 60)
        assert replay.poll() is None
        os.killpg(replay.pid, signal.SIGINT)
        out, _ = replay.communicate(timeout=300)
    assert replay.returncode == 130
    ledger = Ledger(**json.loads(out))
    assert not ledger.is_whole
    per_meter = pl.read_parquet(run_folder("r1") / "ledger.parquet")
    assert ledger.records == int(per_meter.select(pl.sum_horizontal(pl.sum("readings", "events"))).item())
    assert ledger.records < 20 * small_tape.READINGS


def test_a_runs_name_is_used_once(tape: Path) -> None:
    play(Order(tape, "r1", "null"), NullSink)
    with pytest.raises(ConfigError, match="r1 is there already"):
        play(Order(tape, "r1", "null"), NullSink)


@pytest.mark.parametrize("name", ["../outside", "a/b", ".hidden", "", "a b"])
def test_a_runs_name_is_that_of_one_folder(tape: Path, home: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="a run's name has letters"):
        play(Order(tape, name, "null"), NullSink)
    assert not home.exists() or list(home.iterdir()) == []


def test_meters_that_the_data_folder_has_already_are_played_again_only_when_asked_for(tape: Path) -> None:
    play(Order(tape, "r1", "kafka", 50), NullSink)
    with pytest.raises(ConfigError, match="m0000001 is known by r1 already"):
        play(Order(tape, "r2", "kafka", 3), NullSink)
    assert play(Order(tape, "r2", "kafka", 3, again=True), NullSink).is_whole
    assert play(Order(tape, "r3", "null", 3), NullSink).is_whole
    named = play(Order(tape, "r4", "kafka", 3, prefix="b"), NullSink)
    assert pl.read_parquet(run_folder(named.run_id) / "ledger.parquet").get_column("meter_id")[0] == "b0000001"


def test_a_run_that_could_send_nothing_can_be_tried_again(tape: Path) -> None:
    def nobody() -> NullSink:
        msg = "no broker"
        raise RetryLater(msg)

    with pytest.raises(RetryLater):
        play(Order(tape, "r1", "kafka", 3), nobody)
    assert play(Order(tape, "r2", "kafka", 3), NullSink).is_whole


def test_the_newest_row_of_the_registry_says_what_a_meter_is(tape: Path) -> None:
    play(Order(tape, "r1", "kafka", 3), NullSink)
    newest = Lake().polars("registry").drop("date").collect()
    earlier = newest.with_columns(pl.col("valid_from") - pl.duration(days=9), equipment_id=pl.lit("x"))
    add("registry", earlier, "2024-01-01")
    assert play(Order(tape, "r2", "kafka", 3, again=True), NullSink).is_whole


def test_a_meter_that_was_put_right_is_played_again_and_stays_as_it_was_put(tape: Path, tmp_path: Path) -> None:
    play(Order(tape, "r1", "kafka", 3), NullSink)
    (tmp_path / "right.csv").write_text("meter_id,fuse_a,nominal_mv\nm0000001,63,133000\n")
    correct(tmp_path / "right.csv", date(2024, 5, 2))
    with pytest.raises(ConfigError, match=r"m0000001 is known by import right.csv already: .*--again adds"):
        play(Order(tape, "r2", "kafka", 3), NullSink)
    assert play(Order(tape, "r2", "kafka", 3, again=True), NullSink).is_whole
    rows = Lake().polars("registry").filter(pl.col("meter_id") == "m0000001").collect()
    assert rows.select("fuse_a", "nominal_mv").rows() == [(63, 133_000)]


def test_a_fleet_with_its_own_clock_keeps_its_own_names(tape: Path) -> None:
    with pytest.raises(ConfigError, match="no --meter-prefix"):
        play(Order(tape, "r1", "null", own_clock=True, prefix="b"), NullSink)


def test_another_tapes_meter_of_the_same_name_is_refused_in_any_case(tape: Path, tmp_path: Path) -> None:
    play(Order(tape, "r1", "kafka", 3), NullSink)
    registry = pl.read_parquet(tape / "registry.parquet").with_columns(fuse_a=pl.col("fuse_a") + 1)
    other = tmp_path / "other"
    shutil.copytree(tape, other)
    registry.write_parquet(other / "registry.parquet")
    with pytest.raises(ConfigError, match="known by r1 as another meter \\(fuse_a"):
        play(Order(other, "r2", "kafka", 3, again=True), NullSink)


def test_more_processes_than_meters_are_refused(tape: Path) -> None:
    with pytest.raises(ConfigError, match="--processes"):
        play(Order(tape, "r1", "null", 3, processes=4), NullSink)
