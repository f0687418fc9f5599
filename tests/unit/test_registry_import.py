"""`stack registry import`: what a CSV puts right in the registry, and what of it is refused."""

from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from typer.testing import CliRunner

from lake.reading import newest_registry, registry_files
from schemas.errors import ConfigError
from schemas.tables import TABLES
from stack.__main__ import app
from stack.registry import correct
from tests.lake_by_hand import add_rows

TODAY = date(2024, 5, 2)
FIRST = datetime(2024, 1, 1, tzinfo=UTC)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A registry with two meters, in a file of before `wraps_wh` was added."""
    monkeypatch.setenv("METERSTREAM_HOME", str(tmp_path / "home"))
    rows = [
        {"meter_id": meter_id, "usage_point_id": f"u-{meter_id}", "valid_from": FIRST, "nominal_mv": 230_000,
         "phases": "L1,L2,L3", "fuse_a": 25, "time_zone": "Europe/Brussels", "jurisdiction": "EN50160"}
        for meter_id in ("m1", "m2")
    ]  # fmt: skip
    known = TABLES["registry"]
    with monkeypatch.context() as before:
        before.setitem(TABLES, "registry", known.remove(known.get_field_index("wraps_wh")))
        add_rows("registry", rows, "2024-01-01")
    return tmp_path


def csv_of(folder: Path, text: str) -> Path:
    file = folder / "meters.csv"
    file.write_text(text)
    return file


def now(meter_id: str) -> dict[str, Any]:
    (row,) = newest_registry(registry_files()).filter(pl.col("meter_id") == meter_id).to_dicts()
    return row


def test_what_a_row_names_is_put_right_and_the_rest_stays(home: Path) -> None:
    text = 'meter_id,nominal_mv,phases,fuse_a,wraps_wh\nm1,133000,"L1,L3",,16777216\nm2,,,null,\n'
    done = correct(csv_of(home, text), TODAY)
    assert (done.corrected, done.dated, done.added) == (2, 0, 0)
    m1 = now("m1")
    assert (m1["nominal_mv"], m1["phases"], m1["fuse_a"], m1["wraps_wh"]) == (133_000, "L1,L3", 25, 2**24)
    assert (m1["usage_point_id"], m1["valid_from"], m1["time_zone"]) == ("u-m1", FIRST, "Europe/Brussels")
    assert (now("m2")["fuse_a"], now("m2")["nominal_mv"]) == (None, 230_000)
    assert len(registry_files()) == 1, "it is the same row"


def test_a_meter_that_the_registry_has_not_is_added_and_a_date_begins_a_row(home: Path) -> None:
    text = "meter_id,valid_from,fuse_a,is_unlimited\nnew,,35,true\nm1,2024-05-01T00:00:00+02:00,63,\n"
    done = correct(csv_of(home, text), TODAY)
    assert (done.corrected, done.dated, done.added) == (0, 1, 1)
    assert (now("new")["fuse_a"], now("new")["is_unlimited"], now("new")["usage_point_id"]) == (35, True, "new")
    assert (now("m1")["fuse_a"], now("m1")["nominal_mv"]) == (63, 230_000)
    assert now("m1")["valid_from"] == datetime(2024, 4, 30, 22, tzinfo=UTC)
    correct(csv_of(home, "meter_id,fuse_a\nm1,80\n"), TODAY)
    assert now("m1")["fuse_a"] == 80, "the newest row is the one that is put right"


def test_rows_of_one_file_build_on_each_other_and_a_date_that_is_there_is_put_right(home: Path) -> None:
    february, march = "2024-02-01T00:00:00Z", "2024-03-01T00:00:00Z"
    done = correct(csv_of(home, f"meter_id,valid_from,fuse_a,phases\nm1,{february},35,\nm1,{march},,L1\n"), TODAY)
    assert (done.corrected, done.dated, done.added) == (0, 2, 0)
    assert (now("m1")["fuse_a"], now("m1")["phases"]) == (35, "L1")
    done = correct(csv_of(home, f"meter_id,valid_from,fuse_a\nm1,{february},40\n"), TODAY)
    assert (done.corrected, done.dated, done.added) == (1, 0, 0)
    assert now("m1")["fuse_a"] == 35, "the newest is as it was"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "meters.csv:1: no such column: |meters.csv:1: the header is '';"),
        ("meter_id,nominal_v\nm1,230\n", "meters.csv:1: no such column: nominal_v; expected meter_id and others of "),
        ("meter_id,fuse_a,fuse_a\nm1,1,2\n", "meters.csv:1: the header is 'meter_id,fuse_a,fuse_a'"),
        ("meter_id,fuse_a\n", "meters.csv has no row below its header"),
        ("meter_id,fuse_a\nm1,3x25\n", r"meters.csv:2: fuse_a is '3x25', expected a whole number of 1 to 1,000,000$"),
        ("meter_id,fuse_a\nm1,0\n", "meters.csv:2: fuse_a is '0', expected a whole number"),
        ("meter_id,fuse_a\nm1,1,2\n", "meters.csv:2: 3 fields, expected 2"),
        ("meter_id,fuse_a\na.b,1\n", "meters.csv:2: meter_id is 'a.b', expected 1 to 64 letters"),
        ("meter_id,fuse_a\n,1\n", "meters.csv:2: meter_id is empty"),
        ("meter_id,phases\nm1,L4\n", "meters.csv:2: phases is 'L4', expected some of L1,L2,L3, in this order"),
        ("meter_id,nominal_mv\nm1,230\n", "meters.csv:2: nominal_mv is '230', expected a whole number of 10,000 to "),
        ("meter_id,valid_from\nm1,0001-01-01T00:00:00+02:00\n", "meters.csv:2: valid_from is '0001-01-01"),
        ("meter_id,time_zone\nm1,Mars\n", "meters.csv:2: time_zone is 'Mars', expected an IANA time zone"),
        ("meter_id,is_unlimited\nm1,1\n", "meters.csv:2: is_unlimited is '1', expected true or false"),
        ("meter_id,valid_from\nm1,2024-05-01\n", "valid_from is '2024-05-01', expected a time with its offset"),
        ("meter_id,fuse_a\nm1,1\nm1,2\n", "meters.csv:3: m1 has a row in line 2 already"),
        ("meter_id,fuse_a\n" + "".join(f"m{n},x\n" for n in range(7)), "and 2 more"),
    ],
)
def test_a_wrong_field_is_named_with_its_line_and_nothing_is_taken(home: Path, text: str, complaint: str) -> None:
    before = registry_files()
    with pytest.raises(ConfigError, match=complaint):
        correct(csv_of(home, text), TODAY)
    assert registry_files() == before


def test_the_command_says_what_it_did_and_what_may_not_be_meant(home: Path) -> None:
    file = csv_of(home, "meter_id,jurisdiction\nm1,AS60038\nm2,null\n")
    ran = CliRunner().invoke(app, ["registry", "import", str(file)])
    assert ran.exit_code == 0, ran.output
    assert f"{file}: 2 corrected, 0 dated, 0 added" in ran.output
    assert "jurisdiction AS60038: no limits are known, voltages are not judged" in ran.output
    assert now("m2")["jurisdiction"] is None
    assert CliRunner().invoke(app, ["registry", "import", str(home / "none.csv")]).exit_code == 2
