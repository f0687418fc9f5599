"""Replay → MQTT → bridge → Kafka → Spark → lake, for real, with and without kill -9 on the way."""

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from replay.run import run_folder
from schemas.topics import INGESTED
from stack import proof
from stack.demo import drain, environment, own_settings, waiting_is_over
from stack.native import NativeStack
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
    "voltage_windows": "meter_id, phase, window_start, sample_count, mean_mv, min_mv, max_mv, stddev_mv, band",
    "alarms": "alarm_id, meter_id, alarm_type, state, raised_at, cleared_at, repeat_count",
    "dead_letters": "payload, reason, meter_id, mqtt_topic",
    "readings": "meter_id, observed_at, seq, import_t1_wh, voltage_l1_mv",
    "quarantined_readings": "meter_id, observed_at, stage, reason",
}
"""What may not change by a kill: distinct rows of these columns, less what the books call duplicates."""


@dataclass
class Result:
    books: dict[str, proof.Books]
    rows: dict[str, list[tuple[Any, ...]]]
    problems: list[str]
    energy_wh: tuple[int, int]


def in_kafka(bootstrap: str) -> int:
    offsets = proof.end_offsets(bootstrap)
    return sum(offsets[topic.name] for topic in INGESTED)


def kill(stack: NativeStack, name: str) -> None:
    pid = stack.pid(name)
    assert pid, f"{name} does not run"
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie", 10)


def run_chain(home: Path, monkeypatch: pytest.MonkeyPatch, kills: dict[float, str], cluster: bool = False) -> Result:
    """One run; at each share of the records in Kafka a process is killed, and started again by the supervisor."""
    settings = own_settings(home)
    for name, value in environment(settings).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("METERSTREAM_TRIGGER_S", "2")
    small_tape.write(home / "tape")
    (home / "dirt.yml").write_text(BAD_INPUT)
    stack = NativeStack(settings, cluster=cluster)
    try:
        stack.start()
        stack.start_supervisor()
        command = [sys.executable, "-m", "replay", "run", "--tape", str(home / "tape"), "--to", "mqtt"]
        options = ["--speed", str(SPEED), "--run-id", "r1", "--dirt", str(home / "dirt.yml"), "--json"]
        with subprocess.Popen([*command, *options], stdout=subprocess.PIPE, cwd=home / "tmp") as replay:
            try:
                for share, name in sorted(kills.items()):
                    eventually(lambda share=share: in_kafka(settings.kafka_bootstrap) > share * SENT, 120)
                    kill(stack, name)
                assert replay.wait(120) == 0
            finally:
                replay.kill()
        eventually(lambda: waiting_is_over(settings, SENT), 120)
        drain(stack)
        stack.start(["nats", "kafka"])
        offsets = proof.end_offsets(settings.kafka_bootstrap)
    finally:
        stack.stop()
    lake = proof.open_lake()
    truth = run_folder("r1") / "truth.parquet"
    rows = {
        table: lake.execute(f"SELECT DISTINCT {columns} FROM {table} WHERE {_stored(table)} ORDER BY ALL").fetchall()
        for table, columns in STORED.items()
    }
    tape_wh, delta_wh, _ = proof.energy(lake, truth)
    return Result(
        {line.stage: line for line in proof.books(lake)},
        rows,
        proof.problems(lake, offsets, SENT, truth),
        (tape_wh, delta_wh),
    )


def _stored(table: str) -> str:
    return "reason <> 'duplicate'" if table == "consumption_deltas" else "true"


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Result:
    with pytest.MonkeyPatch.context() as monkeypatch:
        return run_chain(tmp_path_factory.mktemp("clean"), monkeypatch, {})


def test_everything_that_was_sent_is_accounted_for(clean: Result) -> None:
    assert clean.problems == []
    assert clean.books["readings_lake"].received == SENT
    assert clean.energy_wh[0] == clean.energy_wh[1] > 0
    assert all(line.duplicate == line.late == 0 for line in clean.books.values())


def test_each_kind_of_bad_record_ends_with_its_reason(clean: Result) -> None:
    reasons = sorted(reason for _, reason, *_ in clean.rows["dead_letters"])
    assert reasons == ["invalid_telegram", "meter_id_mismatch", "unknown_schema_id"]
    quarantined = [(stage, reason) for _, _, stage, reason in clean.rows["quarantined_readings"]]
    assert sorted(quarantined) == [
        ("consumption_deltas", "impossible_clock"),
        ("voltage_deviation", "impossible_clock"),
    ]
    assert clean.books["readings_lake"].invalid == 3
    assert clean.books["consumption_deltas"].quarantined == 1


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("kills", "cluster"),
    [({0.3: "ingest"}, False), ({0.3: "streaming"}, False), ({0.3: "spark-worker-1"}, True)],
    ids=["bridge", "driver", "worker of a cluster"],
)
def test_a_kill_in_the_middle_changes_nothing_that_is_stored(
    clean: Result, kills: dict[float, str], cluster: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = run_chain(tmp_path, monkeypatch, kills, cluster)
    assert killed.problems == []
    assert killed.energy_wh == clean.energy_wh
    for table, rows in clean.rows.items():
        assert killed.rows[table] == rows, table
    for stage, line in clean.books.items():
        after = killed.books[stage]
        assert (after.stored, after.invalid, after.quarantined) == (line.stored, line.invalid, line.quarantined)
        assert after.late == line.late
        assert after.received == line.received + after.duplicate
