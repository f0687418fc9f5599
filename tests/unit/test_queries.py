"""The lake asked by SQL: every table by its name, also where it has no row, or files of before a column was added."""

from datetime import UTC, datetime
from pathlib import Path

import polars as pl
import pytest

from lake.paths import report_path, table_path
from lake.queries import open_lake
from lake.reading import newest_registry, registered, registry_files
from schemas.tables import TABLES, polars_schema

AT = datetime(2024, 6, 10, 12, tzinfo=UTC)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METERSTREAM_HOME", str(tmp_path))


def keep(table: str, file: str, rows: list[dict[str, object]], without: str | None = None) -> None:
    """Writes a file as it was before the column `without` was added."""
    frame = pl.DataFrame(rows, schema=polars_schema(TABLES[table]))
    path = table_path(table) / file
    path.parent.mkdir(parents=True, exist_ok=True)
    (frame.drop(without) if without else frame).write_parquet(path)


def test_an_empty_lake_has_every_table_with_its_columns() -> None:
    with open_lake() as lake:
        for table, schema in TABLES.items():
            assert [name for name in lake.sql(f"FROM {table}").columns if name != "date"] == schema.names
            assert lake.sql(f"FROM {table}").fetchall() == []


@pytest.mark.parametrize("old", ["date=2024-06-10/0.parquet", "date=2024-06-10/9.parquet"], ids=["first", "last"])
def test_a_column_is_null_in_files_of_before_it_was_added(old: str) -> None:
    keep("alarms", old, [{"alarm_id": "old", "raised_at": AT}], without="severity")
    keep("alarms", "date=2024-06-10/5.parquet", [{"alarm_id": "new", "raised_at": AT, "severity": "error"}])
    with open_lake() as lake:
        rows = lake.sql("SELECT alarm_id, severity, date FROM alarms ORDER BY alarm_id").fetchall()
    assert rows == [("new", "error", AT.date()), ("old", None, AT.date())]


def test_a_column_that_no_file_has_yet_is_null() -> None:
    keep("alarms", "date=2024-06-10/0.parquet", [{"alarm_id": "old", "raised_at": AT}], without="severity")
    with open_lake() as lake:
        assert lake.sql("SELECT alarm_id, severity FROM alarms").fetchall() == [("old", None)]


def test_a_table_may_have_the_name_of_a_word_of_sql(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TABLES, "select", TABLES["alarms"])
    with open_lake() as lake:
        assert lake.sql('SELECT alarm_id FROM "select"').fetchall() == []


def test_a_current_table_has_its_rows() -> None:
    keep("latest_readings", "current-meter-readings-v1-0.parquet", [{"meter_id": "m1", "import_t1_wh": 7}])
    with open_lake() as lake:
        assert lake.sql("SELECT meter_id, import_t1_wh FROM latest_readings").fetchall() == [("m1", 7)]


def test_a_registry_of_before_a_column_was_added_is_read() -> None:
    keep("registry", "date=2024-06-10/a.parquet", [{"meter_id": "m1", "fuse_a": 25}], without="jurisdiction")
    keep("registry", "date=2024-06-11/b.parquet", [{"meter_id": "m2", "jurisdiction": "EN"}])
    assert newest_registry(registry_files()).select("meter_id", "fuse_a", "jurisdiction").rows() == [
        ("m1", 25, None),
        ("m2", None, "EN"),
    ]
    known = registered(pl.Series(["m1"]))
    assert known.select("meter_id", "jurisdiction").rows() == [("m1", None)]
    assert known["file"][0].endswith("date=2024-06-10/a.parquet")
    with open_lake() as lake:
        assert lake.sql("SELECT jurisdiction FROM newest_registry ORDER BY meter_id").fetchall() == [(None,), ("EN",)]


def test_a_report_has_its_columns_before_the_first_night_and_its_rows_after_it() -> None:
    with open_lake() as lake:
        assert lake.sql("SELECT meter_id, import_kwh FROM daily_consumption").fetchall() == []
    folder = report_path("daily_consumption_v1") / "date=2024-06-10"
    folder.mkdir(parents=True)
    pl.DataFrame({"meter_id": ["m1"], "import_wh": [7]}).write_parquet(folder / "part-0.parquet")
    newer = report_path("daily_consumption_v9") / "date=2024-06-10"
    newer.mkdir(parents=True)
    pl.DataFrame({"meter_id": ["m9"]}).write_parquet(newer / "part-0.parquet")
    with open_lake() as lake:
        assert lake.sql("SELECT meter_id, import_wh, quality FROM daily_consumption_v1").fetchall() == [("m1", 7, None)]
        assert lake.sql("SELECT meter_id FROM daily_consumption").fetchall() == [("m9",)], "the newest version"
