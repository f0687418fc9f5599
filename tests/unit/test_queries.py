"""The lake asked by SQL: every table by its name, also where it has no row, or files of before a column was added."""

from datetime import UTC, datetime
from pathlib import Path

import polars as pl
import pytest
from deltalake import DeltaTable

import lake
from lake.reading import newest_registry, registered, registry_files
from lake.store import store
from schemas.errors import ConfigError
from schemas.tables import CURRENT, TABLES, polars_schema
from tests.lake_by_hand import add

AT = datetime(2024, 6, 10, 12, tzinfo=UTC)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METERSTREAM_HOME", str(tmp_path))


def keep(table: str, rows: list[dict[str, object]], without: str | None = None, day: str = "2024-06-10") -> None:
    """Adds a file as it was before the column `without` was added to the table."""
    frame = pl.DataFrame(rows, schema=polars_schema(TABLES[table]))
    if not without:
        add(table, frame, day)
        return
    with pytest.MonkeyPatch.context() as before:
        known = TABLES[table]
        before.setitem(TABLES, table, known.remove(known.get_field_index(without)))
        add(table, frame.drop(without), day)


def test_an_empty_lake_has_every_table_with_its_columns() -> None:
    with lake.open().duckdb() as found:
        for table, schema in TABLES.items():
            assert found.sql(f"FROM {table}").columns == [*schema.names, CURRENT.get(table, "date")]
            assert found.sql(f"FROM {table}").fetchall() == []


def test_a_column_is_null_in_files_of_before_it_was_added_for_every_reader() -> None:
    keep("alarms", [{"alarm_id": "old", "raised_at": AT}], without="severity")
    keep("alarms", [{"alarm_id": "new", "raised_at": AT, "severity": "error"}])
    expected = [("new", "error", AT.date()), ("old", None, AT.date())]
    names = ["alarm_id", "severity", "date"]
    with lake.open().duckdb() as found:
        assert found.sql("SELECT alarm_id, severity, date FROM alarms ORDER BY alarm_id").fetchall() == expected
    tables = lake.open()
    assert sorted(tables.polars("alarms").select(names).collect().rows()) == expected
    arrow = tables.arrow("alarms").to_table(names).to_pylist()
    assert sorted(tuple(row.values()) for row in arrow) == expected
    frame = tables.pandas("alarms").sort_values("alarm_id")
    assert frame["alarm_id"].to_list() == ["new", "old"]
    assert frame["severity"].isna().to_list() == [False, True]


def test_an_older_version_and_a_time_are_read_as_they_were() -> None:
    keep("alarms", [{"alarm_id": "old"}])
    then = datetime.now(UTC)
    keep("alarms", [{"alarm_id": "new"}])
    first = lake.open({"alarms": 1})
    assert first.polars("alarms").select("alarm_id").collect().rows() == [("old",)]
    assert first.duckdb().sql("SELECT alarm_id FROM alarms").fetchall() == [("old",)]
    assert lake.open(then).polars("alarms").select("alarm_id").collect().rows() == [("old",)]
    long_ago = datetime(2001, 1, 1, tzinfo=UTC)
    assert lake.open(long_ago).files("alarms") == []  # nobody had written to it
    assert lake.open(long_ago).duckdb().sql("SELECT * FROM alarms").fetchall() == []
    DeltaTable(store().uri("lake/alarms")).create_checkpoint()
    for commit in ("0", "1"):
        store().delete([f"lake/alarms/_delta_log/{commit:0>20}.json"])  # as the log is cleaned
    with pytest.raises(ConfigError, match="alarms has no version of 2001-01-01 .* any more: its oldest one is of"):
        lake.open(long_ago).files("alarms")
    with pytest.raises(ConfigError, match="table alarms has no version 77"):
        lake.open({"alarms": 77}).files("alarms")
    with pytest.raises(ConfigError, match="the lake has no table alarm; it has readings, events"):
        lake.open().files("alarm")


def test_a_column_that_no_file_has_yet_is_null() -> None:
    keep("alarms", [{"alarm_id": "old", "raised_at": AT}], without="severity")
    with lake.open().duckdb() as found:
        assert found.sql("SELECT alarm_id, severity FROM alarms").fetchall() == [("old", None)]


def test_a_table_may_have_the_name_of_a_word_of_sql(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TABLES, "select", TABLES["alarms"])
    with lake.open().duckdb() as found:
        assert found.sql('SELECT alarm_id FROM "select"').fetchall() == []


def test_a_current_table_has_its_rows() -> None:
    keep("latest_readings", [{"meter_id": "m1", "import_t1_wh": 7}], day="0")
    with lake.open().duckdb() as found:
        assert found.sql("SELECT meter_id, import_t1_wh FROM latest_readings").fetchall() == [("m1", 7)]


def test_a_registry_of_before_a_column_was_added_is_read() -> None:
    keep("registry", [{"meter_id": "m1", "fuse_a": 25, "registered_by": "r1"}], without="jurisdiction")
    keep("registry", [{"meter_id": "m2", "jurisdiction": "EN"}], day="2024-06-11")
    assert newest_registry(registry_files()).select("meter_id", "fuse_a", "jurisdiction").rows() == [
        ("m1", 25, None),
        ("m2", None, "EN"),
    ]
    known = registered(pl.Series(["m1"]))
    assert known.select("meter_id", "jurisdiction").rows() == [("m1", None)]
    assert known["registered_by"].to_list() == ["r1"]
    with lake.open().duckdb() as found:
        assert found.sql("SELECT jurisdiction FROM newest_registry ORDER BY meter_id").fetchall() == [(None,), ("EN",)]


def test_a_report_has_its_columns_before_the_first_night_and_its_rows_after_it(tmp_path: Path) -> None:
    with lake.open().duckdb() as found:
        assert found.sql("SELECT meter_id, import_kwh FROM daily_consumption").fetchall() == []
    folder = tmp_path / "reports" / "daily_consumption_v1" / "date=2024-06-10"
    folder.mkdir(parents=True)
    pl.DataFrame({"meter_id": ["m1"], "import_wh": [7]}).write_parquet(folder / "part-0.parquet")
    newer = tmp_path / "reports" / "daily_consumption_v9" / "date=2024-06-10"
    newer.mkdir(parents=True)
    pl.DataFrame({"meter_id": ["m9"]}).write_parquet(newer / "part-0.parquet")
    with lake.open().duckdb() as found:
        assert found.sql("SELECT meter_id, import_wh, quality FROM daily_consumption_v1").fetchall() == [
            ("m1", 7, None)
        ]
        assert found.sql("SELECT meter_id FROM daily_consumption").fetchall() == [("m9",)], "the newest version"
