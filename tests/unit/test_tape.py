"""A tape is written whole or not at all, and read with its types or refused."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from replay.tape import TABLES, Tape, log_schema, read_tape, registry_of, write_tape
from schemas.codec import arrow_schema
from schemas.errors import ConfigError, ContractBroken


def readings(*hours: int) -> pa.Table:
    rows = [
        {"meter_id": "m1", "observed_at": datetime(2020, 1, 1, hour, tzinfo=UTC), "dialect": "test", "import_t1_wh": 7}
        for hour in hours
    ]
    return pa.Table.from_pylist(rows, log_schema("reading"))


def write(folder: Path, table: pa.Table, **changes: Any) -> Tape:
    known = {
        "readings": table,
        "events": log_schema("event").empty_table(),
        "registry": registry_of(table, time_zone="UTC", interval_s=3600),
        "format": "test",
        "source": "test.txt",
        "time_zone": "UTC",
        "rows_in": 4,
        "defects": {"gap": 1},
        "interval_s": 3600,
    }
    return write_tape(folder, **(known | changes))


def test_what_was_written_is_read_again_in_the_order_of_the_log(tmp_path: Path) -> None:
    written = write(tmp_path / "date=x" / "tape", readings(5, 3, 3, 4))
    tape = read_tape(tmp_path / "date=x" / "tape")
    assert tape == written
    assert tape.readings["log_row"].to_pylist() == [0, 1, 2, 3]
    assert [stamp.hour for stamp in tape.readings["observed_at"].to_pylist()] == [5, 3, 3, 4]
    assert (tape.info.first_at, tape.info.last_at) == ("2020-01-01T03:00:00+00:00", "2020-01-01T05:00:00+00:00")
    assert tape.info.defects == {"gap": 1}


def test_a_tape_has_the_schemas_columns_without_what_a_run_stamps() -> None:
    stamped = {"sent_at", "received_at", "run_id", "seq"}
    for entity in ("reading", "event"):
        assert set(TABLES[f"{entity}s"].names) == set(arrow_schema(entity).names) - stamped | {"log_row"}


def test_a_tape_replaces_a_tape_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    write(tmp_path / "tape", readings(1))
    write(tmp_path / "tape", readings(1, 2))
    assert read_tape(tmp_path / "tape").readings.num_rows == 2
    assert [path.name for path in tmp_path.iterdir()] == ["tape"]


def test_a_folder_that_holds_something_else_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is no tape"):
        write(tmp_path, readings(1))
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_rows_that_do_not_fit_leave_no_half_tape(tmp_path: Path) -> None:
    with pytest.raises(ContractBroken, match="do not fit reading"):
        write(tmp_path / "tape", readings(1), readings=readings(1).drop_columns(["dialect"]))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("table", list(TABLES))
def test_a_tape_that_lacks_a_column_or_a_file_is_refused_by_its_name(tmp_path: Path, table: str) -> None:
    write(tmp_path / "tape", readings(1))
    path = tmp_path / "tape" / f"{table}.parquet"
    lacking = TABLES[table].names[0]
    pq.write_table(pq.ParquetFile(path).read().drop_columns([lacking]), path)
    with pytest.raises(ConfigError, match=rf"{table}.parquet: .*{lacking}"):
        read_tape(tmp_path / "tape")
    path.write_bytes(b"no parquet")
    with pytest.raises(ConfigError, match=rf"{table}.parquet"):
        read_tape(tmp_path / "tape")
    path.unlink()
    with pytest.raises(ConfigError, match=rf"{table}.parquet"):
        read_tape(tmp_path / "tape")


def test_a_tape_of_before_a_column_was_added_has_it_empty(tmp_path: Path) -> None:
    write(tmp_path / "tape", readings(1))
    path = tmp_path / "tape" / "readings.parquet"
    pq.write_table(pq.ParquetFile(path).read().drop_columns(["import_t3_wh"]), path)
    assert read_tape(tmp_path / "tape").readings["import_t3_wh"].to_pylist() == [None]


@pytest.mark.parametrize("content", [None, "{", "[]", json.dumps({"format": "x"})])
def test_a_folder_without_a_whole_tape_json_is_no_tape(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tape.json").write_text(content)
    with pytest.raises(ConfigError, match="is no tape"):
        read_tape(tmp_path)


def test_the_registry_says_null_for_what_a_log_cannot_tell() -> None:
    meter = registry_of(readings(2, 1), time_zone="Europe/Berlin", interval_s=None).to_pylist()[0]
    assert meter["valid_from"] == datetime(2020, 1, 1, 1, tzinfo=UTC)
    assert {meter[name] for name in ("phases", "equipment_id", "fuse_a", "transformer_id", "interval_s")} == {None}
