"""What the commands say, to people and where nobody looks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from engine.driver import only_one
from engine.intents import Intents
from engine.settings import StreamSettings
from lake.reading import Lake
from replay.__main__ import app
from replay.record import sent_by
from replay.run import play
from replay.run.ledger import run_folder
from replay.run.order import Order
from replay.sinks import NullSink
from schemas.errors import ConfigError, RetryLater
from settings import load
from stack.__main__ import app as stack
from streaming_jobs import voltage_deviation
from tests.lake_by_hand import add_rows
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
    with only_one("voltage_deviation"):
        command = [sys.executable, "-m", "streaming_jobs.voltage_deviation", "--kafka-bootstrap", "localhost:1"]
        found = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    why = f"voltage_deviation runs in another process with METERSTREAM_HOME={tmp_path}; stop that one first"
    assert (found.returncode, found.stderr) == (1, f"error: {why}\n")


@pytest.mark.parametrize(
    ("intent", "query_id", "message"),
    [
        ("", '{"id": "x"}', "voltage_deviation: {}/x/intents/00000000.json cannot be read"),
        ("", "", "voltage_deviation: {}/id.json cannot be read. Repair: "),
    ],
)
def test_a_damaged_intent_ends_a_driver_with_one_sentence_that_says_what_to_do(
    tmp_path: Path, intent: str, query_id: str, message: str
) -> None:
    place = tmp_path / "state" / f"voltage_deviation-v{voltage_deviation.JOB.version}"
    (place / "x" / "intents").mkdir(parents=True)
    (place / "x" / "intents" / "00000000.json").write_text(intent)
    (place / "id.json").write_text(query_id)
    command = [sys.executable, "-m", "streaming_jobs.voltage_deviation", "--kafka-bootstrap", "localhost:1"]
    env = {**os.environ, "METERSTREAM_HOME": str(tmp_path)}
    found = subprocess.run(command, check=False, env=env, capture_output=True, text=True, timeout=300)
    assert found.returncode == 1
    assert found.stderr.startswith("error: " + message.replace("{}", str(place)))
    assert len(found.stderr.splitlines()) == 1


def test_the_files_of_a_table_are_said_and_a_job_begins_anew_without_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("METERSTREAM_HOME", str(tmp_path))
    mine, other = ({"stage": stage, "received": 1} for stage in ("voltage_deviation", "readings_lake"))
    add_rows("accounting", [mine, other], "2024-03-04")
    add_rows("voltage_windows", [{"meter_id": "a"}], "2024-03-04")
    intents = Intents("voltage_deviation", voltage_deviation.JOB.version)
    assert intents.query_id
    invoke = CliRunner().invoke
    said = invoke(stack, ["files", "accounting"])
    assert said.output.splitlines() == Lake().files("accounting")
    before = json.loads(invoke(stack, ["files", "accounting", "--version", "0", "--json"]).output)
    assert before == {"table": "accounting", "version": 0, "files": []}
    assert invoke(stack, ["files", "accounts"]).exit_code == 2
    assert invoke(stack, ["files", "accounting", "--version", "yesterday"]).exit_code == 2
    assert invoke(stack, ["begin-anew", "voltage"]).exit_code == 2
    assert invoke(stack, ["begin-anew", "voltage_deviation"], input="n\n").exit_code == 1
    assert Lake().polars("voltage_windows").collect().height == 1
    assert invoke(stack, ["begin-anew", "voltage_deviation", "--yes"]).exit_code == 0
    assert Lake().polars("voltage_windows").collect().height == 0
    assert Lake().polars("accounting").collect()["stage"].to_list() == ["readings_lake"]
    assert Intents("voltage_deviation", voltage_deviation.JOB.version).newest() is None
    assert invoke(stack, ["upkeep"]).exit_code == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [("TRIGGER_S", "nan"), ("ALLOWED_LATENESS_S", "-5"), ("MAX_OFFSETS_PER_TRIGGER", "0"), ("COMPACT_FILES", "1")],
)
def test_a_setting_that_makes_no_sense_is_an_error_that_names_it(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(f"METERSTREAM_{name}", value)
    with pytest.raises(ConfigError, match=f"METERSTREAM_{name}"):
        load(StreamSettings, kafka_bootstrap="none:0")
