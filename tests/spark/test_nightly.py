import datetime
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pytest
from pyspark.sql import DataFrame, SparkSession

from batch_jobs import discovered
from engine.night import BatchJob, in_order
from engine.night_run import publish, silent
from engine.settings import JudgeSettings
from lake import reports
from lake.reading import Lake, newest_registry, registry_files
from lake.reports import files_of, folder_of, glob_of
from lake.spark import read_registry
from lake.tables import Writer
from lake.upkeep import Upkeep
from schemas.errors import ConfigError, ContractBroken
from schemas.tables import REPORTS, TABLES
from settings import home
from tests.lake_by_hand import add_rows

DAY = datetime.date(2024, 6, 10)
MIDNIGHT = datetime.datetime(2024, 6, 10, tzinfo=datetime.UTC)
ROOT = Path(__file__).parents[2]
LIMITS = JudgeSettings()
ALARM_IDS = pa.schema([TABLES["alarms"].field("alarm_id")])


def keep(table: str, day: datetime.date, rows: list[dict[str, Any]]) -> None:
    add_rows(table, rows, day.isoformat())


def published(spark: SparkSession, job: BatchJob, day: datetime.date = DAY) -> int:
    """A night of one job on the lake as it is now."""
    return publish(spark, Lake(), job, day, LIMITS)


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
    keep("communities", DAY, [{"community_id": "c", "model": "austria_dynamic", "time_zone": "UTC"}])
    keep("community_members", DAY, [{"community_id": "c", "meter_id": "a"}])
    letter = {"payload": b"x", "reason": "bad_topic", "detail": "", "received_at": noon}
    keep("dead_letters", DAY, [letter])
    return tmp_path


def rows_of(report: str) -> list[tuple[Any, ...]]:
    found = duckdb.execute(f"select * from read_parquet('{glob_of(report)}') order by all").fetchall()
    assert found
    return found


@pytest.mark.parametrize("job", discovered(), ids=lambda job: job.name)
def test_a_date_run_twice_has_the_same_rows_and_nothing_else_is_written(
    spark: SparkSession, lake: Path, job: BatchJob
) -> None:
    read: list[BatchJob] = []
    for other in reversed(discovered()):  # each before those whose reports it reads
        if any(other.report in reader.reads for reader in (job, *read)):
            read.insert(0, other)
    for other in read:
        published(spark, other)
    first = published(spark, job)
    rows = rows_of(job.report)
    assert len(rows) == first
    assert published(spark, job) == first
    assert rows_of(job.report) == rows
    assert files_of(job.report) == files_of(job.report, ["2024-06-10"])
    written = {report.name for report in (home() / "reports").iterdir()}
    assert written == {job.report, *[other.report for other in read]}


def test_a_report_as_of_a_time_is_of_the_tables_as_they_were_then(spark: SparkSession, lake: Path) -> None:
    job = next(job for job in discovered() if job.name == "alarm_report")
    published(spark, job)
    before, then = rows_of(job.report), datetime.datetime.now(datetime.UTC)
    time.sleep(0.01)  # a commit's time has milliseconds: the next one must be later, however fast the machine is
    noon = datetime.datetime(2024, 6, 10, 12, tzinfo=datetime.UTC)
    alarm = {"alarm_id": "2", "meter_id": "b", "alarm_type": "tamper", "severity": "error", "source": "meter_event"}
    keep("alarms", DAY, [{**alarm, "state": "active", "raised_at": noon, "updated_at": noon, "repeat_count": 0}])
    published(spark, job)
    assert rows_of(job.report) != before
    publish(spark, Lake(then), job, DAY, LIMITS)
    assert rows_of(job.report) == before


def test_the_days_of_a_meter_add_up_to_its_register(spark: SparkSession, lake: Path) -> None:
    job = next(job for job in discovered() if job.name == "daily_consumption")
    for shift in (-1, 0, 1):
        published(spark, job, DAY + datetime.timedelta(days=shift))
    total = f"select sum(import_wh) from read_parquet('{glob_of(job.report)}') where meter_id = 'a'"
    assert duckdb.execute(total).fetchall() == [(100 * 71,)]


def test_a_lake_without_rows_gives_an_empty_report(
    spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("METERSTREAM_HOME", str(tmp_path))
    for job in discovered():
        assert published(spark, job) == 0


def test_an_unknown_time_zone_in_the_registry_is_named(
    spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("METERSTREAM_HOME", str(tmp_path))
    keep("registry", DAY, [{"meter_id": "a", "time_zone": "Europe/Nowhere"}])
    with pytest.raises(ConfigError, match="Europe/Nowhere"):
        published(spark, discovered()[0])


def test_a_night_passes_over_what_no_registry_and_no_meter_can_mean(spark: SparkSession, lake: Path) -> None:
    slips = [
        {"meter_id": "a", "interval_s": 0, "nominal_mv": 0, "fuse_a": -5},
        {"meter_id": "b", "interval_s": 604_800, "nominal_mv": 2**62, "fuse_a": 2**62},
    ]
    Writer().delete("registry", "true")
    keep("registry", DAY, [{"phases": "L1", "time_zone": "UTC", **slip} for slip in slips])
    at, place = MIDNIGHT + datetime.timedelta(hours=12, minutes=7), {"topic": "t", "partition": 0, "offset": 1}
    wild = {"meter_id": "a", "observed_at": at, "arrival_at": at, "voltage_l1_mv": 2 * 10**12}
    keep("readings", DAY, [wild | place])
    known = [("a", None, None, None), ("b", None, None, 604_800)]
    columns = ["meter_id", "nominal_mv", "fuse_a", "interval_s"]
    assert sorted(newest_registry(registry_files()).select(columns).rows()) == known
    assert sorted(tuple(row) for row in read_registry(spark, Lake()).select(columns).collect()) == known
    for job in discovered():
        assert published(spark, job) > 0

    def said(report: str, names: str) -> list[tuple[Any, ...]]:
        where = "where meter_id is not null order by meter_id"
        return duckdb.execute(f"select meter_id, {names} from '{glob_of(report)}' {where}").fetchall()

    assert said("daily_consumption_v1", "import_wh, expected_readings") == [("a", 2_400, None), ("b", 2_400, 0)]
    assert said("data_quality_v1", "expected, missing, completeness_pct") == [("a", *[None] * 3), ("b", 0, None, None)]
    assert said("voltage_compliance_v2", "max_mv, max_v")[0] == ("a", 2 * 10**12, None)


def test_a_profile_has_the_first_hour_of_its_four_weeks_which_is_of_an_earlier_utc_day(
    spark: SparkSession, lake: Path
) -> None:
    Writer().delete("registry", "true")
    keep("registry", DAY, [{"meter_id": "a", "time_zone": "Europe/Amsterdam"}])
    begin = datetime.datetime(2024, 5, 13, 22, tzinfo=datetime.UTC)
    quarters = [{"interval_start": begin + datetime.timedelta(minutes=15 * n)} for n in range(4)]
    known = {"meter_id": "a", "register": "import_t1", "energy_wh": 25, "covered_s": 900, "quality": "measured"}
    keep("interval_readings", begin.date(), [quarter | known for quarter in quarters])
    job = next(job for job in discovered() if job.name == "load_profile")
    published(spark, job)
    hours = f"select hours, mean_wh from '{glob_of(job.report)}' where hour_of_day = 0"
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
        published(spark, reader)
    assert published(spark, writer) == published(spark, reader) == 1


def test_jobs_that_read_each_other_in_a_circle_are_refused() -> None:
    one, other = BatchJob("one", 1, {"other_v1": 0}, nothing), BatchJob("other", 1, {"one_v1": 0}, nothing)
    with pytest.raises(ContractBroken, match="circle"):
        in_order([one, other])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "--date, or --from and --to; found none"), (["--date", "yesterday"], "--date is a day"),
        (["--date", "2024-02-30"], "--date is a day"), (["--from", "2024-02-01"], "found --from"),
        (["--from", "2024-02-02", "--to", "2024-02-01"], "is after"),
        (["--from", "2024-02-02", "--to", "x"], "--to is"),
        (["--date", "2024-02-02", "--to", "2024-02-03"], "found --date, --to"),
    ],
)  # fmt: skip
def test_a_date_that_is_none_is_an_error_of_use(arguments: list[str], named: str) -> None:
    command = [sys.executable, "-m", "batch_jobs", *arguments]
    environment = {**os.environ, "PYTHONPATH": "."}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert named in ended.stderr


def test_several_days_are_written_one_after_the_other(lake: Path) -> None:
    order = [sys.executable, "-m", "batch_jobs.alarm_report", "--from", "2024-06-09", "--to", "2024-06-11", "--json"]
    environment = {**os.environ, "PYTHONPATH": ".", "METERSTREAM_HOME": str(lake)}
    ended = subprocess.run(order, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in ended.stdout.splitlines()]
    assert [(line["date"], line["rows"]) for line in lines] == [
        (f"2024-06-{day}", day == "10") for day in ("09", "10", "11")
    ]
    assert len(files_of("alarm_report_v1", ["2024-06-09", "2024-06-10", "2024-06-11"])) == 3 * len(
        files_of("alarm_report_v1", ["2024-06-10"])
    )


def test_a_report_that_cannot_be_made_is_named_and_the_others_are_there(lake: Path) -> None:
    (file,) = map(Path, Lake().files("alarms"))
    file.write_bytes(b"PAR1half")
    environment = {**os.environ, "PYTHONPATH": ".", "METERSTREAM_HOME": str(lake)}
    order = [sys.executable, "-m", "batch_jobs", "--date", DAY.isoformat()]
    ended = subprocess.run(order, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    last = ended.stderr.splitlines()[-1]
    assert last.startswith("error: reports are missing: alarm_report_v1 of 2024-06-10: ")
    assert file.name in last
    written = {path.parent.name for path in (lake / "reports").glob("*/date=2024-06-10")}
    assert written == {job.report for job in discovered() if "alarms" not in job.reads}


def test_a_day_without_readings_is_said_with_the_days_that_have_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("METERSTREAM_HOME", str(tmp_path))
    assert "has no readings of 2024-06-10; it has none of any day" in (silent(Lake(), DAY) or "")
    for shift in (1, 3):
        keep("readings", DAY + datetime.timedelta(days=shift), [{"meter_id": "a"}])
    assert "it has those of 2024-06-11 to 2024-06-13" in (silent(Lake(), DAY) or "")
    assert silent(Lake(), DAY + datetime.timedelta(days=1)) is None


def test_a_report_whose_columns_are_not_the_declared_ones_is_not_written(
    spark: SparkSession, lake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(REPORTS, "one_v1", pa.schema([("alarm_id", pa.string()), ("meters", pa.int64())]))
    job = BatchJob("one", 1, {"alarms": 0}, lambda tables, _, __: tables["alarms"].select("alarm_id", "meter_id"))
    with pytest.raises(ContractBroken, match=r"one_v1 .*meter_id string \(given\), meters bigint \(declared\)"):
        published(spark, job)
    assert files_of("one_v1") == []


def test_a_night_reads_the_lake_as_it_was_when_it_began_whatever_is_compacted_and_added_meanwhile(
    spark: SparkSession, lake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(REPORTS, "alone_v1", ALARM_IDS)
    begun = Lake()
    job = BatchJob("alone", 1, {"alarms": 0}, lambda tables, _, __: tables["alarms"].select("alarm_id"))
    assert publish(spark, begun, job, DAY, LIMITS) == 1
    keep("alarms", DAY, [{"alarm_id": "2"}])
    Upkeep(files=2).once()
    assert len(Lake().files("alarms")) == 1
    assert publish(spark, begun, job, DAY, LIMITS) == 1
    assert rows_of("alone_v1") == [("1", DAY)]
    assert published(spark, job) == 2
    assert published(spark, BatchJob("alone", 1, {"alarms": 0}, job.transform), DAY) == 2


def test_a_date_has_the_same_files_each_time_and_a_meters_rows_are_in_one(
    spark: SparkSession, lake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(REPORTS, "many_v1", pa.schema([TABLES["alarms"].field("meter_id")]))
    monkeypatch.setattr(reports, "METERS_A_FILE", 1)
    keep("alarms", DAY, [{"meter_id": f"m{number}"} for number in range(40)])
    job = BatchJob("many", 1, {"alarms": 0}, lambda tables, _, __: tables["alarms"].select("meter_id"))
    assert published(spark, job) == 41
    first = files_of("many_v1")
    assert [Path(file).name for file in first] == [f"{number:04d}-of-0004.parquet" for number in range(4)]
    before = {file: set(duckdb.execute(f"select meter_id from '{file}'").fetchall()) for file in first}
    assert sum(map(len, before.values())) == len(set().union(*before.values())) == 41
    monkeypatch.setattr(reports, "METERS_A_FILE", 1_000)
    one = BatchJob("many", 1, {"alarms": 0}, lambda tables, _, __: tables["alarms"].select("meter_id").limit(1))
    assert published(spark, one) == 1
    assert files_of("many_v1") == first
    assert len(rows_of("many_v1")) == 1
    glob = (lake / folder_of("many_v1")).glob("date=*/*.parquet")
    assert sorted(map(str, glob)) == first
