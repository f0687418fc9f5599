import datetime
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyspark.sql import DataFrame, SparkSession

from batch_jobs import discovered
from engine.night import BatchJob, in_order, publish, silent
from engine.settings import JudgeSettings
from lake.locks import files_replaced, report_run
from lake.paths import glob_of, report_path, table_path
from lake.reading import newest_registry, read_registry, registry_files
from schemas.errors import ConfigError, ContractBroken, RetryLater
from schemas.tables import REPORTS, TABLES
from settings import home

DAY = datetime.date(2024, 6, 10)
MIDNIGHT = datetime.datetime(2024, 6, 10, tzinfo=datetime.UTC)
ROOT = Path(__file__).parents[2]
LIMITS = JudgeSettings()
ALARM_IDS = pa.schema([TABLES["alarms"].field("alarm_id")])


def keep(table: str, day: datetime.date, rows: list[dict[str, Any]], part: int = 0) -> None:
    folder = table_path(table) / f"date={day.isoformat()}"
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, TABLES[table]), folder / f"part-{part}.parquet")


@pytest.fixture
def lake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("METERSTREAM_HOME", str(tmp_path))
    keep("registry", DAY, [{"meter_id": m, "phases": "L1", "interval_s": 3600, "time_zone": "UTC"} for m in "abc"])
    for shift in (-1, 0, 1):
        day = DAY + datetime.timedelta(days=shift)
        readings: list[dict[str, Any]] = []
        for hour in range(24):
            at = MIDNIGHT + datetime.timedelta(days=shift, hours=hour)
            for meter in "ab":
                place = {"topic": "meter-readings-v1", "partition": 0, "offset": len(readings)}
                wh = 100 * (24 * (shift + 1) + hour)
                reading = {"meter_id": meter, "observed_at": at, "arrival_at": at, "import_t1_wh": wh}
                readings.append(reading | {"voltage_l1_mv": 230_000, "sag_count_l1": hour} | place)
        keep("readings", day, [*readings, *[row | {"offset": row["offset"] + 1000} for row in readings[:3]]])
    noon = MIDNIGHT + datetime.timedelta(hours=12)
    alarm = {"alarm_id": "1", "meter_id": "a", "alarm_type": "tamper", "severity": "error", "source": "meter_event"}
    life = {"state": "active", "raised_at": noon, "updated_at": noon, "repeat_count": 0}
    keep("alarms", DAY, [{**alarm, **life}])
    quarters: list[dict[str, Any]] = [{"interval_start": noon + datetime.timedelta(minutes=15 * n)} for n in range(4)]
    known = {"meter_id": "a", "register": "import_t1", "energy_wh": 25, "covered_s": 900, "quality": "measured"}
    keep("interval_readings", DAY, [quarter | known for quarter in quarters])
    letter = {"payload": b"x", "reason": "bad_topic", "detail": "", "received_at": noon}
    keep("dead_letters", DAY, [letter])
    return tmp_path


def rows_of(report: str) -> list[tuple[Any, ...]]:
    found = duckdb.execute(f"select * from read_parquet('{glob_of(report_path(report))}') order by all").fetchall()
    assert found
    return found


@pytest.mark.parametrize("job", discovered(), ids=lambda job: job.name)
def test_a_date_run_twice_has_the_same_rows_and_nothing_else_is_written(
    spark: SparkSession, lake: Path, job: BatchJob
) -> None:
    first = publish(spark, job, DAY, LIMITS)
    rows = rows_of(job.report)
    assert len(rows) == first
    assert publish(spark, job, DAY, LIMITS) == first
    assert rows_of(job.report) == rows
    assert [folder.name for folder in report_path(job.report).iterdir()] == ["date=2024-06-10"]
    assert [report.name for report in (home() / "reports").iterdir()] == [job.report]
    assert list((home() / "staging").iterdir()) == []


def test_the_days_of_a_meter_add_up_to_its_register(spark: SparkSession, lake: Path) -> None:
    job = next(job for job in discovered() if job.name == "daily_consumption")
    for shift in (-1, 0, 1):
        publish(spark, job, DAY + datetime.timedelta(days=shift), LIMITS)
    total = f"select sum(import_wh) from read_parquet('{glob_of(report_path(job.report))}') where meter_id = 'a'"
    assert duckdb.execute(total).fetchall() == [(100 * 71,)]


def test_a_lake_without_rows_gives_an_empty_report(
    spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("METERSTREAM_HOME", str(tmp_path))
    for job in discovered():
        assert publish(spark, job, DAY, LIMITS) == 0


def test_an_unknown_time_zone_in_the_registry_is_named(
    spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("METERSTREAM_HOME", str(tmp_path))
    keep("registry", DAY, [{"meter_id": "a", "time_zone": "Europe/Nowhere"}])
    with pytest.raises(ConfigError, match="Europe/Nowhere"):
        publish(spark, discovered()[0], DAY, LIMITS)


def test_a_night_passes_over_what_no_registry_and_no_meter_can_mean(spark: SparkSession, lake: Path) -> None:
    slips = [
        {"meter_id": "a", "interval_s": 0, "nominal_mv": 0, "fuse_a": -5},
        {"meter_id": "b", "interval_s": 604_800, "nominal_mv": 2**62, "fuse_a": 2**62},
    ]
    keep("registry", DAY, [{"phases": "L1", "time_zone": "UTC", **slip} for slip in slips])
    at, place = MIDNIGHT + datetime.timedelta(hours=12, minutes=7), {"topic": "t", "partition": 0, "offset": 1}
    wild = {"meter_id": "a", "observed_at": at, "arrival_at": at, "voltage_l1_mv": 2 * 10**12}
    keep("readings", DAY, [wild | place], part=1)
    known = [("a", None, None, None), ("b", None, None, 604_800)]
    columns = ["meter_id", "nominal_mv", "fuse_a", "interval_s"]
    assert sorted(newest_registry(registry_files()).select(columns).rows()) == known
    assert sorted(tuple(row) for row in read_registry(spark).select(columns).collect()) == known
    for job in discovered():
        assert publish(spark, job, DAY, LIMITS) > 0

    def said(report: str, names: str) -> list[tuple[Any, ...]]:
        where = "where meter_id is not null order by meter_id"
        return duckdb.execute(f"select meter_id, {names} from '{glob_of(report_path(report))}' {where}").fetchall()

    assert said("daily_consumption_v1", "import_wh, expected_readings") == [("a", 2_400, None), ("b", 2_400, 0)]
    assert said("data_quality_v1", "expected, missing, completeness_pct") == [("a", *[None] * 3), ("b", 0, None, None)]
    assert said("voltage_compliance_v1", "max_mv, max_v")[0] == ("a", 2 * 10**12, None)


def test_a_profile_has_the_first_hour_of_its_four_weeks_which_is_of_an_earlier_utc_day(
    spark: SparkSession, lake: Path
) -> None:
    keep("registry", DAY, [{"meter_id": "a", "time_zone": "Europe/Amsterdam"}])
    begin = datetime.datetime(2024, 5, 13, 22, tzinfo=datetime.UTC)
    quarters = [{"interval_start": begin + datetime.timedelta(minutes=15 * n)} for n in range(4)]
    known = {"meter_id": "a", "register": "import_t1", "energy_wh": 25, "covered_s": 900, "quality": "measured"}
    keep("interval_readings", begin.date(), [quarter | known for quarter in quarters])
    job = next(job for job in discovered() if job.name == "load_profile")
    publish(spark, job, DAY, LIMITS)
    hours = f"select hours, mean_wh from '{glob_of(report_path(job.report))}' where hour_of_day = 0"
    assert duckdb.execute(hours).fetchall() == [(1, 100)]


def nothing(tables: Mapping[str, DataFrame], registry: DataFrame, date: datetime.date) -> DataFrame:
    return next(iter(tables.values()))


def test_a_job_runs_after_those_whose_reports_it_reads(
    spark: SparkSession, lake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for report in ("a_reader_v1", "z_writer_v2"):
        monkeypatch.setitem(REPORTS, report, TABLES["alarms"])
    reader = BatchJob("a_reader", 1, {"z_writer_v2": 1}, nothing)
    writer = BatchJob("z_writer", 2, {"alarms": 0}, nothing)
    assert [job.name for job in in_order([reader, writer])] == ["z_writer", "a_reader"]
    with pytest.raises(ConfigError, match="z_writer_v2 has nothing for 2024-06-10"):
        publish(spark, reader, DAY, LIMITS)
    assert publish(spark, writer, DAY, LIMITS) == publish(spark, reader, DAY, LIMITS) == 1


def test_jobs_that_read_each_other_in_a_circle_are_refused() -> None:
    one, other = BatchJob("one", 1, {"other_v1": 0}, nothing), BatchJob("other", 1, {"one_v1": 0}, nothing)
    with pytest.raises(ContractBroken, match="circle"):
        in_order([one, other])


@pytest.mark.parametrize("arguments", [[], ["--date", "yesterday"], ["--date", "2024-02-30"]])
def test_a_date_that_is_none_is_an_error_of_use(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "batch_jobs", *arguments]
    environment = {**os.environ, "PYTHONPATH": "."}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "--date" in ended.stderr


def test_a_report_that_cannot_be_made_is_named_and_the_others_are_there(lake: Path) -> None:
    (table_path("alarms") / f"date={DAY.isoformat()}" / "part-1.parquet").write_bytes(b"PAR1half")
    environment = {**os.environ, "PYTHONPATH": ".", "METERSTREAM_HOME": str(lake)}
    order = [sys.executable, "-m", "batch_jobs", "--date", DAY.isoformat()]
    ended = subprocess.run(order, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    last = ended.stderr.splitlines()[-1]
    assert last.startswith("error: reports of 2024-06-10 are missing: alarm_report_v1: ")
    assert "part-1.parquet" in last
    written = {path.parent.name for path in report_path("").glob("*/date=2024-06-10")}
    assert written == {job.report for job in discovered()} - {"alarm_report_v1"}


def test_a_day_without_readings_is_said_with_the_days_that_have_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("METERSTREAM_HOME", str(tmp_path))
    assert "has no readings of 2024-06-10; it has none of any day" in (silent(DAY) or "")
    for day in ("2024-06-11", "2024-06-13"):
        (tmp_path / "lake" / "readings" / f"date={day}").mkdir(parents=True)
    assert "it has those of 2024-06-11 to 2024-06-13" in (silent(DAY) or "")
    assert silent(DAY + datetime.timedelta(days=1)) is None


def test_a_report_whose_columns_are_not_the_declared_ones_is_not_written(
    spark: SparkSession, lake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(REPORTS, "one_v1", pa.schema([("alarm_id", pa.string()), ("meters", pa.int64())]))
    job = BatchJob("one", 1, {"alarms": 0}, lambda tables, _, __: tables["alarms"].select("alarm_id", "meter_id"))
    with pytest.raises(ContractBroken, match=r"one_v1 .*meter_id string \(given\), meters bigint \(declared\)"):
        publish(spark, job, DAY, LIMITS)
    assert not report_path("one_v1").exists()


def test_while_a_night_reads_a_table_nobody_may_merge_its_files(
    spark: SparkSession, lake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(REPORTS, "locked_v1", ALARM_IDS)
    seen: dict[str, bool] = {}

    def transform(tables: Mapping[str, DataFrame], registry: DataFrame, date: datetime.date) -> DataFrame:
        for table in ("alarms", "readings"):
            with files_replaced(table) as is_alone:
                seen[table] = is_alone
        return tables["alarms"].select("alarm_id")

    publish(spark, BatchJob("locked", 1, {"alarms": 0}, transform), DAY, LIMITS)
    assert seen == {"alarms": False, "readings": True}
    with files_replaced("alarms") as is_alone:
        assert is_alone


def test_a_report_is_written_by_one_process_at_a_time_and_is_never_away(
    spark: SparkSession, lake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(REPORTS, "alone_v1", ALARM_IDS)
    job = BatchJob("alone", 1, {"alarms": 0}, lambda tables, _, __: tables["alarms"].select("alarm_id"))
    publish(spark, job, DAY, LIMITS)
    folder = report_path("alone_v1") / f"date={DAY.isoformat()}"
    with report_run("alone_v1", DAY.isoformat()) as is_alone:
        assert is_alone
        with pytest.raises(RetryLater, match=f"another process writes alone_v1 of {DAY.isoformat()}"):
            publish(spark, job, DAY, LIMITS)
    before = folder.stat().st_ino
    publish(spark, job, DAY, LIMITS)
    assert folder.stat().st_ino != before, "the folder is another one"
    assert not list((home() / "staging").glob("alone_v1-*"))
