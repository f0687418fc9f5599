"""Replay → MQTT → bridge → Kafka → Spark → lake, for real, with and without kill -9 on the way.

One suite for every kind of stack: `tests/wire` runs it on native processes, `tests/integration` on containers.
"""

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from kafka_io.offsets import received
from lake.queries import AccountingLine, accounting_lines, compared_energy
from lake.reading import Lake
from replay.run.ledger import run_folder
from schemas.topics import INGESTED
from stack import proof
from stack.backlog import left_on_the_way
from stack.containers import ContainerStack
from stack.isolated import Stack, drain, environment, own_settings
from stack.native import NativeStack
from stack.parts import CLUSTER, S3
from streaming_jobs import discovered
from tests import brokers
from tests.eventually import eventually
from tests.wire import small_tape

SENT = small_tape.METERS * (small_tape.READINGS + 2) + 4  # readings, four of them bad, power failures, tampers
BAD_INPUT = """
faults:
  - {kind: poison, meters: 3, bytes: [invalid_telegram, unknown_schema_id, meter_id_mismatch]}
  - {kind: clock_2099}
"""
SPEED = 2_000  # half a day in 22 s

STORED = {
    "consumption_deltas": "meter_id, register, observed_at, previous_at, previous_wh, wh, delta_wh, reason, segment_id",
    "interval_readings": "meter_id, register, interval_start, energy_wh, covered_s, quality",
    "conflicts": "meter_id, register, observed_at, accepted_wh, refused_wh",
    "voltage_windows": "meter_id, phase, window_start, sample_count, mean_mv, min_mv, max_mv, stddev_mv, band",
    "voltage_rollups": "level, group_id, phase, window_start, meter_count, sample_count, mean_mv, min_mv, max_mv",
    "alarms": "alarm_id, meter_id, alarm_type, state, raised_at, cleared_at, repeat_count",
    "dead_letters": "payload, reason, meter_id, mqtt_topic",
    "readings": "meter_id, observed_at, seq, import_t1_wh, voltage_l1_mv",
    "quarantined_readings": "meter_id, observed_at, stage, reason",
}
"""What may not change by a kill: distinct rows of these columns, less what the accounting calls duplicates."""


@dataclass
class Result:
    accounting: dict[str, AccountingLine]
    rows: dict[str, list[tuple[Any, ...]]]
    problems: list[str]
    energy_wh: tuple[int, int]


def in_kafka(bootstrap: str) -> int:
    return received(bootstrap, INGESTED)


Kill = Callable[[Stack, str], object]


def kill(stack: Stack, name: str) -> None:
    """Kills a process; the supervisor starts it again, or, as the engine leaves a killed container dead, we do."""
    if isinstance(stack, ContainerStack):
        stack.kill(name)
        assert not stack.is_running(name)
        stack.start()
        return
    pid = brokers.kill(stack, name)
    eventually(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie", 10)


def play(stack: Stack, home: Path) -> None:
    """Replays the small tape, where the stack has its lake."""
    options = ["--to", "mqtt", "--speed", str(SPEED), "--run-id", "r1", "--json"]
    if isinstance(stack, ContainerStack):
        command = ["run", "--tape", "/given/tape", "--dirt", "/given/dirt.yml", *options]
        stack.run("replay", command, {str(home / "given"): "/given"})
        return
    command = ["run", "--tape", str(home / "given" / "tape"), "--dirt", str(home / "given" / "dirt.yml"), *options]
    order = [sys.executable, "-m", "replay", *command]
    with subprocess.Popen(order, stdout=subprocess.DEVNULL, cwd=home / "tmp") as replay:
        try:
            eventually(lambda: replay.poll() is not None or not (home / "run" / "kafka.pid").exists(), 240)
            assert replay.returncode == 0
        finally:
            replay.kill()  # it ends with the stack, too


def run_chain(
    kind: type[Stack], home: Path, monkeypatch: pytest.MonkeyPatch, store: str, killed: str = "", kill: Kill = kill
) -> Result:
    """One run; with `killed`, that process is killed once Kafka has three records in ten."""
    settings = own_settings(home, store)
    for name, value in environment(settings).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("METERSTREAM_TRIGGER_S", "2")
    is_asked_at_the_end = kind is NativeStack and not killed  # to flush; the others know it from their start
    if is_asked_at_the_end:
        monkeypatch.delenv("METERSTREAM_FLUSH")
    small_tape.write(home / "given" / "tape")
    (home / "given" / "dirt.yml").write_text(BAD_INPUT)
    stack = kind(settings, cluster=killed in CLUSTER)
    thread = ThreadPoolExecutor(1)
    try:
        stack.start()
        stack.start_supervisor()
        playing = thread.submit(play, stack, home)
        if killed:
            eventually(lambda: in_kafka(settings.kafka_bootstrap) > 0.3 * SENT, 120)
            assert not playing.done(), "the replay was over before the kill"
            kill(stack, killed)
        playing.result(1_200)
        eventually(lambda: left_on_the_way(settings, SENT) == (0, 0), 120)
        if is_asked_at_the_end:
            stack.stop(flush=True)
        else:
            drain(stack)
        stack.start(["nats", "kafka"])
        offsets = proof.end_offsets(settings.kafka_bootstrap)
        if settings.has_own_store:
            stack.start([S3.name])
        return _result(offsets)
    finally:
        stack.stop()  # which ends a replay that still runs in a container
        if isinstance(stack, ContainerStack):
            stack.clean()
        thread.shutdown(wait=False)


def _result(offsets: dict[str, int]) -> Result:
    lake = Lake().duckdb()
    truth = run_folder("r1") / "truth.parquet"
    rows = {
        table: lake.execute(f"SELECT DISTINCT {columns} FROM {table} WHERE {_stored(table)} ORDER BY ALL").fetchall()
        for table, columns in STORED.items()
    }
    tape_wh, delta_wh, _ = compared_energy(lake, str(truth))
    return Result(
        {line.stage: line for line in accounting_lines(lake)},
        rows,
        proof.problems(lake, offsets, SENT, truth),
        (tape_wh, delta_wh),
    )


def _stored(table: str) -> str:
    return "reason <> 'duplicate'" if table == "consumption_deltas" else "true"


class WholeChain:
    """What holds on every stack; a subclass says on which, and which of its processes are killed."""

    kind: type[Stack]

    @pytest.fixture(scope="class")
    def store_of(self) -> Callable[[Path], str]:
        """Where a home's lake lies, as `StackSettings.store`; in the home, unless the subclass has another place."""
        return lambda _: ""

    @pytest.fixture
    def kill(self) -> Kill:
        """How it is killed."""
        return kill

    @pytest.fixture
    def killed(self) -> str:
        """Name of the process that is killed in mid-run; parametrised by the subclass."""
        raise NotImplementedError

    @pytest.fixture(scope="class")
    def clean(self, store_of: Callable[[Path], str], tmp_path_factory: pytest.TempPathFactory) -> Result:
        home = tmp_path_factory.mktemp("clean")
        with pytest.MonkeyPatch.context() as monkeypatch:
            return run_chain(self.kind, home, monkeypatch, store_of(home))

    def test_everything_that_was_sent_is_accounted_for(self, clean: Result) -> None:
        assert clean.problems == []
        assert clean.accounting["readings_lake"].received == SENT
        assert clean.energy_wh[0] == clean.energy_wh[1] > 0
        assert all(line.duplicate == line.late == 0 for line in clean.accounting.values())

    def test_each_kind_of_bad_record_ends_with_its_reason(self, clean: Result) -> None:
        reasons = sorted(reason for _, reason, *_ in clean.rows["dead_letters"])
        assert reasons == ["invalid_telegram", "meter_id_mismatch", "unknown_schema_id"]
        quarantined = [(stage, reason) for _, _, stage, reason in clean.rows["quarantined_readings"]]
        refusing = [job.name for job in discovered() if any(s.refuses_impossible_clocks for s in job.sources)]
        assert sorted(quarantined) == [(name, "impossible_clock") for name in sorted(refusing)]
        assert {"consumption_deltas", "derived_alarms", "voltage_deviation"} <= set(refusing)
        assert clean.accounting["readings_lake"].invalid == 3
        assert clean.accounting["consumption_deltas"].quarantined == 1

    @pytest.mark.long
    def test_a_kill_in_the_middle_changes_nothing_that_is_stored(
        self,
        clean: Result,
        killed: str,
        kill: Kill,
        store_of: Callable[[Path], str],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        after = run_chain(self.kind, tmp_path, monkeypatch, store_of(tmp_path), killed, kill)
        assert after.problems == []
        assert after.energy_wh == clean.energy_wh
        for table, rows in clean.rows.items():
            assert after.rows[table] == rows, table
        for stage, line in clean.accounting.items():
            again = after.accounting[stage]
            assert (again.stored, again.invalid, again.quarantined) == (line.stored, line.invalid, line.quarantined)
            assert again.late == line.late
            assert again.received == line.received + again.duplicate
