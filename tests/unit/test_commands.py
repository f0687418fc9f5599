"""What the commands say, to people and where nobody looks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from engine.settings import StreamSettings
from lake.locks import job_run
from replay.__main__ import app
from replay.record import sent_by
from replay.run import play
from replay.run.ledger import run_folder
from replay.run.order import Order
from replay.sinks import NullSink
from schemas.errors import ConfigError, RetryLater
from settings import load
from streaming_jobs import voltage_deviation
from tests.wire import small_tape

SPARKFUN = Path(__file__).parents[1] / "logs" / "sparkfun.csv"


def test_each_format_is_listed_with_its_time_zone() -> None:
    lines = CliRunner().invoke(app, ["formats"]).stdout.splitlines()
    assert any(line.split()[:2] == ["nem12", "Australia/Brisbane"] for line in lines)
    assert any(line.split()[:2] == ["p1mon-daily", "Europe/Amsterdam"] for line in lines)


def test_an_import_says_that_it_replaced_a_tape(tmp_path: Path) -> None:
    command = ["import", str(SPARKFUN), "--format", "sparkfun", "--to", str(tmp_path / "tape")]
    assert "replaced" not in CliRunner().invoke(app, command).stdout
    assert f"replaced the tape that was in {tmp_path / 'tape'}\n" in CliRunner().invoke(app, command).stdout


def test_a_grid_has_its_own_number_of_homes(tmp_path: Path) -> None:
    found = CliRunner().invoke(app, ["simulate", "--to", str(tmp_path / "tape"), "--meters", "3"])
    assert (found.exit_code, "--meters is for --profiles demandlib" in found.stderr) == (2, True)


def test_without_a_terminal_there_is_no_spinner_and_no_line_is_wrapped(tmp_path: Path) -> None:
    small_tape.write(tmp_path / "tape")
    command = [
        sys.executable,
        "-m",
        "replay",
        "run",
        "--tape",
        str(tmp_path / "tape"),
        "--to",
        "null",
        "--speed",
        "max",
    ]
    env = {"METERSTREAM_HOME": str(tmp_path), "PATH": "", "COLUMNS": "40"}
    found = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert found.stderr == ""
    result, digest = found.stdout.splitlines()
    assert result.startswith("run ") and result.endswith("s of CPU") and len(result) > 40
    assert len(digest.split()[1]) == 32
    command = [sys.executable, "-m", "replay", "inspect", *[str(tmp_path / "tape")] * 2]
    found = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert found.stderr == "" and str(tmp_path / "tape") in found.stdout


def test_a_run_tells_how_many_records_a_recording_of_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METERSTREAM_HOME", str(tmp_path))
    small_tape.write(tmp_path / "tape")
    ledger = play(Order(tmp_path / "tape", "r1", "null"), NullSink)
    assert sent_by("r1") == ledger.readings + ledger.events > 0
    assert sent_by("of-another-machine") is None
    (run_folder("r1") / "ledger.parquet").unlink()
    with pytest.raises(RetryLater, match="still runs, or was killed"):
        sent_by("r1")


def test_a_second_driver_of_a_job_is_told_so_before_it_touches_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("METERSTREAM_HOME", str(tmp_path))
    with job_run("voltage_deviation") as is_alone:
        assert is_alone
        command = [sys.executable, "-m", "streaming_jobs.voltage_deviation", "--kafka-bootstrap", "localhost:1"]
        found = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    why = f"voltage_deviation runs in another process with METERSTREAM_HOME={tmp_path}; stop that one first"
    assert (found.returncode, found.stderr) == (1, f"error: {why}\n")


@pytest.mark.parametrize(
    ("offsets", "metadata", "message"),
    [
        ("", '{"id":"x"}', "voltage_deviation: batch 0 was committed, and what it read cannot be read in "),
        ('v1\n{"batchTimestampMs":1}\n{}', "", "voltage_deviation: {}/metadata cannot be read. Repair: "),
    ],
)
def test_a_damaged_checkpoint_ends_a_driver_with_one_sentence_that_says_what_to_do(
    tmp_path: Path, offsets: str, metadata: str, message: str
) -> None:
    checkpoint = tmp_path / "state" / "checkpoints" / f"voltage_deviation-v{voltage_deviation.JOB.version}"
    for file, text in {"offsets/0": offsets, "commits/0": "v1\n{}", "metadata": metadata}.items():
        (checkpoint / file).parent.mkdir(parents=True, exist_ok=True)
        (checkpoint / file).write_text(text)
    command = [sys.executable, "-m", "streaming_jobs.voltage_deviation", "--kafka-bootstrap", "localhost:1"]
    env = {**os.environ, "METERSTREAM_HOME": str(tmp_path)}
    found = subprocess.run(command, check=False, env=env, capture_output=True, text=True, timeout=300)
    assert found.returncode == 1
    assert found.stderr.startswith("error: " + message.replace("{}", str(checkpoint)))
    assert len(found.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [("TRIGGER_S", "nan"), ("ALLOWED_LATENESS_S", "-5"), ("MAX_OFFSETS_PER_TRIGGER", "0"), ("MERGE_FILES", "1")],
)
def test_a_setting_that_makes_no_sense_is_an_error_that_names_it(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(f"METERSTREAM_{name}", value)
    with pytest.raises(ConfigError, match=f"METERSTREAM_{name}"):
        load(StreamSettings, kafka_bootstrap="none:0")
