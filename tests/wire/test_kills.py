"""Whatever is killed at whatever moment of a batch, the lake ends with the rows of a run that nobody disturbed.

A preloaded Kafka, batches of fixed size, the real driver with all its queries in a process of its own.
"""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from glob import glob  # of folders that come and go: pathlib's fails over one that is gone
from pathlib import Path
from typing import Any

import duckdb
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from confluent_kafka import Producer, TopicPartition
from confluent_kafka.admin import AdminClient

from kafka_io.topics import create_topics
from lake.publishing import BatchKey
from schemas.codec import encode
from schemas.tables import REGISTRY
from schemas.topics import EVENTS, READINGS, Topic
from stack.isolated import SHORT_LIVED_JVM, own_settings
from stack.jobs import JobMetrics, jobs, metrics_text
from stack.native import NativeStack
from streaming_jobs import discovered
from tests.eventually import eventually

START = datetime(2024, 3, 31, tzinfo=UTC)
METERS = [f"m{number:02d}" for number in range(12)]
READINGS_EACH = 60
OF_A_BATCH = 45  # records of a topic, of all partitions
VERSIONS = {job.name: job.version for job in discovered()}
WATCHED = ("voltage_deviation", "consumption_deltas", "readings_lake")
PHASES = ("planned", "state", "staged", "table", "accounting", "committed")
"""What a batch has left behind, one after the other: its offsets, state, staged rows, a table's rows, its lines of the
accounting, its commit."""
MERGED = re.compile(r".*-\d{8}_\d{8}-0\.parquet")
FLUSH_PHASES = ("flush begun", "flush written", "between two flushes")


def records() -> list[tuple[Topic, str, bytes]]:
    """Readings of a spring night with its clock change, out of order, twice, in conflict, late, of broken meters."""
    drawn = random.Random(1)
    made: list[tuple[Topic, str, bytes]] = []

    def reading(meter_id: str, at: datetime, arrival: datetime, wh: int, mv: int) -> None:
        record = {"meter_id": meter_id, "observed_at": at, "received_at": arrival, "dialect": "dsmr-5"}
        values = {"import_t1_wh": wh, "export_t1_wh": wh // 3, "voltage_l1_mv": mv, "sag_count_l1": wh // 400}
        made.append((READINGS, meter_id, encode("reading", record | values)))

    for number in range(READINGS_EACH):
        arrival = START + timedelta(minutes=number)
        for index, meter_id in enumerate(METERS):
            wh, mv = number * 20 + index, 230_000 + drawn.randrange(-9_000, 9_000)
            fault = drawn.random()
            at = arrival
            if meter_id == "m10":
                at = arrival + timedelta(days=1)
            elif meter_id == "m11" and number % 3 == 0:
                at = datetime(1970, 1, 1, tzinfo=UTC)
            elif fault < 0.04:
                at = arrival - timedelta(minutes=45)  # its window is over
            elif fault < 0.06:
                wh = 10**9
            reading(meter_id, at, arrival, wh, mv)
            if fault > 0.96:
                reading(meter_id, at, arrival, wh + (fault > 0.98), mv)
        if number % 20 == 7:
            made.append((READINGS, "m00", b"\x00no telegram"))
        if number % 6 == 0:
            meter_id = METERS[number // 6 % len(METERS)]
            event = {"meter_id": meter_id, "observed_at": arrival, "received_at": arrival, "dialect": "c12.19"}
            event |= {
                "dialect_version": "1",
                "source_table": "ST3",
                "code": "A512",
                "argument": str(1 - number // 6 % 2),
            }
            made.append((EVENTS, meter_id, encode("event", event)))
    return made


@pytest.fixture(scope="module")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Kafka that has all records before any driver starts."""
    stack = NativeStack(own_settings(tmp_path_factory.mktemp("kafka")))
    try:
        stack.start(["kafka"])
        bootstrap = stack.settings.kafka_bootstrap
        create_topics(bootstrap)
        producer = Producer(
            {"bootstrap.servers": bootstrap, "partitioner": "murmur2_random", "enable.idempotence": True}
        )  # which also keeps the order where a first try fails
        for topic, key, value in records():
            producer.produce(topic.name, key=key, value=value)
        assert producer.flush(30) == 0
        yield bootstrap
    finally:
        stack.stop()


class Driver:
    """Drivers of one home, one after the other."""

    def __init__(self, home: Path, bootstrap: str) -> None:
        self.home = home
        self.metrics: list[list[JobMetrics]] = []
        folder = home / "lake" / "registry" / "date=2024-01-01"
        folder.mkdir(parents=True)
        (home / "tmp").mkdir()
        known = {"phases": "L1", "nominal_mv": 230_000, "fuse_a": 25, "interval_s": 60, "transformer_id": "T1"}
        rows = [{"meter_id": meter_id, "feeder_id": f"F{meter_id[-1]}", **known} for meter_id in METERS]
        pq.write_table(pa.Table.from_pylist(rows, REGISTRY), folder / "fleet.parquet")
        self.environment = {
            **os.environ,
            "METERSTREAM_HOME": str(home),
            "METERSTREAM_KAFKA_BOOTSTRAP": bootstrap,
            "METERSTREAM_MAX_OFFSETS_PER_TRIGGER": str(OF_A_BATCH),
            "METERSTREAM_ALLOWED_LATENESS_S": "600",
            "METERSTREAM_TRIGGER_S": "0.2",
            "METERSTREAM_MERGE_FILES": "6",
            "METERSTREAM_FLUSH": "true",
            "SPARK_SUBMIT_OPTS": SHORT_LIVED_JVM,
        }

    @contextlib.contextmanager
    def running(self) -> Iterator[subprocess.Popen[bytes]]:
        (self.home / "run" / "streaming.ready").unlink(missing_ok=True)
        with (self.home / "log").open("ab") as log:
            command = ["nice", sys.executable, "-m", "streaming_jobs"]  # who looks when to kill it comes first
            process = subprocess.Popen(command, env=self.environment, cwd=self.home / "tmp", stdout=log, stderr=log)
        try:
            yield process
        finally:
            kill(process)

    def to_the_end(self) -> int:
        """Takes what Kafka has, flushes, ends. Returns the exit code."""
        with self.running() as process:
            self.ask_to_end(process)
            return process.wait(1_200)

    def ask_to_end(self, process: subprocess.Popen[bytes]) -> None:
        ready = self.home / "run" / "streaming.ready"
        eventually(lambda: ready.exists() or process.poll() is not None, 90)
        process.send_signal(signal.SIGTERM)

    def query_id(self, job: str) -> str:
        return str(json.loads((self.checkpoint(job) / "metadata").read_text())["id"])

    def checkpoint(self, job: str) -> Path:
        return self.home / "state" / "checkpoints" / f"{job}-v{VERSIONS[job]}"

    def committed(self, job: str) -> int:
        """The last batch that is committed; −1 before the first."""
        return max((int(commit.name) for commit in (self.checkpoint(job) / "commits").glob("[0-9]*")), default=-1)

    def phase(self, job: str, batch: int) -> str | None:
        """How far a batch has come."""
        checkpoint = self.checkpoint(job)
        if (checkpoint / "commits" / f"{batch}").exists():
            return "committed"
        if not (checkpoint / "offsets" / f"{batch}").exists():
            return None
        key = f"{job}-{self.query_id(job)}-{batch:08d}"
        if glob(f"{self.home}/lake/accounting/date=*/{key}-*.parquet"):
            return "accounting"
        if glob(f"{self.home}/lake/*/date=*/{key}-*.parquet"):
            return "table"
        if glob(f"{self.home}/staging/{key}.*/*/date=*/*.parquet"):
            return "staged"
        if glob(f"{self.home}/state/{job}/*/{batch:08d}-*.zip"):
            return "state"
        return "planned"

    def flush_phase(self) -> str | None:
        """How far the flush has come; None before and after."""
        begun = [flush for flush in self.home.glob("state/*/*/*.flush")]
        done = [flush.with_suffix(".flushed").exists() for flush in begun]
        if not begun or (all(done) and len(done) == len(VERSIONS)):
            return None
        if all(done):
            return "between two flushes"
        job, query_id, batch = begun[done.index(False)].parts[-3:]
        key = BatchKey(job, query_id, f"{int(batch.partition('.')[0]):08d}f")
        is_written = any(self.home.glob(f"lake/*/date=*/{key}-*.parquet"))
        return "flush written" if is_written else "flush begun"

    def rows(self) -> dict[str, list[tuple[Any, ...]]]:
        """Every table that has rows, as any reader sees it, ordered; the query's id and the day of it left out."""
        found = {}
        lake = self.home / "lake"
        for table in sorted({part.relative_to(lake).parts[0] for part in lake.rglob("[!.]*.parquet")}):
            pattern = lake / table / ("*.parquet" if table == "latest_readings" else "date=*/*.parquet")
            without_ids = "EXCLUDE (date) REPLACE (regexp_replace(batch, '-[0-9a-f-]{36}-', '-') AS batch)"
            columns = f"* {without_ids}" if table == "accounting" else "*"
            found[table] = duckdb.execute(f"SELECT {columns} FROM '{pattern}' ORDER BY ALL").fetchall()
        return found


def kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to a driver with its JVM and its Python workers."""
    with contextlib.suppress(psutil.NoSuchProcess):
        tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for each in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        psutil.wait_procs(tree[1:], 30)
    process.wait()


def workers(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The Python workers of a driver, not the daemon that makes them."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            parent = child.parent()
            if parent and "pyspark.daemon" in child.cmdline() and "pyspark.daemon" in parent.cmdline():
                found.append(child)
    return found


def kill_workers(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to the workers that are there: Spark replaces one that had nothing to do, and fails over one that had."""
    for worker in workers(process):
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.kill()


def watch(process: subprocess.Popen[bytes], is_there: Callable[[], object], timeout_s: float = 1_200) -> bool:
    """Waits until something is there. False where the process ended before."""
    deadline = time.monotonic() + timeout_s
    while not is_there():
        time.sleep(0.002)
        assert time.monotonic() < deadline, "the moment did not come"
        if process.poll() is not None:
            return False
    return True


@pytest.fixture(scope="module")
def clean(kafka: str, tmp_path_factory: pytest.TempPathFactory) -> Driver:
    """A run that nobody disturbs; what it said of itself meanwhile is in `metrics`."""
    home = tmp_path_factory.mktemp("clean")
    driver, port = Driver(home, kafka), own_settings(home).metrics_port
    driver.environment["METERSTREAM_METRICS_PORT"] = str(port)
    with driver.running() as process:
        driver.ask_to_end(process)
        until = time.monotonic() + 1_200
        while process.poll() is None and time.monotonic() < until:
            driver.metrics += [jobs(text)] if (text := metrics_text(port)) else []
            time.sleep(0.2)
        assert process.wait(60) == 0
    return driver


def test_a_driver_tells_how_far_each_job_is_what_it_keeps_and_what_came_too_late(clean: Driver) -> None:
    sent = {READINGS: 0, EVENTS: 0}
    for topic, _, _ in records():
        sent[topic] += 1
    totals = {job.name: sum(sent.get(topic, 0) for topic in job.topics) for job in discovered()}
    heard = {name: [job for one in clean.metrics for job in one if job.job == name] for name in totals}
    for name, each in heard.items():
        lags = [(job.lag_records, job.records) for job in each if job.lag_records is not None]
        assert lags, f"{name} told no lag"
        for lag, taken in lags:  # a batch is counted when it is written, and gone from the lag some time after
            assert totals[name] - taken <= lag <= totals[name], (name, lag, taken)
        fallen = [lag for lag, _ in lags]
        assert fallen == sorted(fallen, reverse=True), name
        assert fallen[-1] < totals[name], name
        assert max(job.state_rows or 0 for job in each) > 0, name
        assert min(job.batch_seconds for job in each if job.batch_seconds is not None) > 0
    assert max(job.late for job in heard["voltage_deviation"]) > 0
    ends = [job.watermark for job in heard["voltage_deviation"] if job.watermark]
    assert ends == sorted(ends)
    assert START.timestamp() - 600 <= ends[-1] <= START.timestamp() + READINGS_EACH * 60


def test_the_run_has_every_kind_of_row_and_its_accounting_adds_up(clean: Driver) -> None:
    rows = clean.rows()
    for table in (
        "readings", "events", "dead_letters", "consumption_deltas", "interval_readings", "conflicts", "voltage_windows",
        "voltage_rollups", "voltage_events", "alarms", "alarm_counts", "quarantined_readings", "late_readings",
        "latest_readings",
    ):  # fmt: skip
        assert rows[table], table
    names = [part.name for part in (clean.home / "lake").glob("*/date=*/*.parquet")]
    assert all(any(MERGED.match(name) and name.startswith(job) for name in names) for job in WATCHED), names
    late = "SELECT stage, count(*) FROM '{}' GROUP BY ALL ORDER BY ALL"
    stored = duckdb.execute(late.format(clean.home / "lake" / "late_readings" / "date=*" / "*.parquet")).fetchall()
    counted = "SELECT stage, sum(late)::BIGINT FROM '{}' GROUP BY ALL HAVING sum(late) > 0 ORDER BY ALL"
    pattern = clean.home / "lake" / "accounting" / "date=*" / "*.parquet"
    assert duckdb.execute(counted.format(pattern)).fetchall() == stored
    sums = "SELECT sum(received - stored - duplicate - late - quarantined - invalid), min(received) FROM '{}'"
    assert duckdb.execute(sums.format(pattern)).fetchall()[0][0] == 0
    assert len(list((clean.home / "state").glob("voltage_deviation/*/*.flushed"))) == 1


def test_meters_with_wrong_clocks_change_nothing_of_the_others(clean: Driver) -> None:
    windows = clean.home / "lake" / "voltage_windows" / "date=*" / "*.parquet"
    late = clean.home / "lake" / "late_readings" / "date=*" / "*.parquet"
    sane = duckdb.execute(
        f"""SELECT count(*) FROM '{windows}' WHERE meter_id NOT IN ('m10', 'm11')
        AND window_start BETWEEN '{START}' AND '{START + timedelta(hours=1)}'"""
    ).fetchall()[0][0]
    assert sane == 10 * READINGS_EACH // 10  # each of the ten others has its six windows
    assert duckdb.execute(f"SELECT count(*) FROM '{late}' WHERE meter_id = 'm10'").fetchall() == [(0,)]


@pytest.mark.long
@pytest.mark.timeout(7_200)
def test_ten_kills_one_at_each_phase_of_a_batch_and_of_a_flush_change_no_row(
    clean: Driver, kafka: str, tmp_path: Path
) -> None:
    driver = Driver(tmp_path, kafka)
    hit: list[str] = []
    for phase in [*PHASES, "table", "accounting"]:
        job = min(WATCHED, key=driver.committed)  # whose topic is not at its end yet
        with driver.running() as process:
            batch = driver.committed(job) + 1
            wanted = PHASES[PHASES.index(phase) :]
            assert watch(process, lambda: driver.phase(job, batch) in wanted)  # noqa: B023
            kill(process)
        hit.append(str(driver.phase(job, batch)))
    for begun in (FLUSH_PHASES, FLUSH_PHASES[1:]):
        with driver.running() as process:
            driver.ask_to_end(process)
            assert watch(process, lambda: driver.flush_phase() in begun)  # noqa: B023
            kill(process)
        hit.append(str(driver.flush_phase()))
    for query_id in (driver.query_id("readings_lake"), str(uuid.uuid4())):  # its own, and of a query before it
        left = driver.home / "staging" / f"readings_lake-{query_id}-merge" / "readings"
        left.mkdir(parents=True, exist_ok=True)
    assert len({*hit} - {"None"}) >= 6, f"kills came at {hit}"
    assert set(hit) & set(FLUSH_PHASES), f"kills came at {hit}"
    assert driver.to_the_end() == 0
    expected = clean.rows()
    found = driver.rows()
    assert found.keys() == expected.keys()
    for table, rows in expected.items():
        assert found[table] == rows, f"{table}, after kills at {hit}"
    assert not any((driver.home / "staging").glob("*/*"))


@pytest.mark.long
def test_a_killed_worker_a_batch_that_fails_and_a_deleted_checkpoint_change_no_row(
    clean: Driver, kafka: str, tmp_path: Path
) -> None:
    driver = Driver(tmp_path, kafka)
    in_the_way = driver.home / "lake" / "voltage_windows"
    in_the_way.write_text("a file where a folder should be")
    assert driver.to_the_end() != 0  # a batch fails, the driver ends
    assert "voltage_windows" in (driver.home / "log").read_text(errors="replace")
    in_the_way.unlink()
    with driver.running() as process:
        assert not watch(process, lambda: kill_workers(process))  # Spark gives up, and the driver with it
        assert process.returncode not in (0, None)  # so that the supervisor starts it again
    job = "voltage_deviation"
    query_id = driver.query_id(job)
    shutil.rmtree(driver.checkpoint(job))
    assert driver.to_the_end() == 1
    assert "its state is there, and what it has read is gone" in (driver.home / "log").read_text(errors="replace")
    shutil.rmtree(driver.home / "state" / job)  # the repair that the error names
    for part in (driver.home / "lake").rglob(f"{job}-{query_id}-*"):
        part.unlink()
    assert driver.to_the_end() == 0
    expected, found = clean.rows(), driver.rows()
    assert found.keys() == expected.keys()
    for table, rows in expected.items():
        assert found[table] == rows, table


@pytest.mark.long
def test_what_kafka_no_longer_has_stops_the_driver_with_the_repair_and_is_passed_over_when_told(
    clean: Driver, kafka: str, tmp_path: Path
) -> None:
    driver = Driver(tmp_path, kafka)
    with driver.running() as process:
        assert watch(process, lambda: driver.committed("readings_lake") >= 1)
    client = AdminClient({"bootstrap.servers": kafka})
    partitions = [TopicPartition(READINGS.name, number, -1) for number in range(READINGS.partitions)]
    for deleted in client.delete_records(partitions).values():  # as retention does; all there is
        deleted.result(30)
    with driver.running() as process:
        assert process.wait(600) == 1
    log = (driver.home / "log").read_text(errors="replace")
    assert "Kafka no longer has records that were not read" in log
    assert "METERSTREAM_ACCEPT_LOSS=true" in log
    driver.environment["METERSTREAM_ACCEPT_LOSS"] = "true"
    assert driver.to_the_end() == 0
    assert 0 < len(driver.rows()["readings"]) < len(clean.rows()["readings"])


@pytest.mark.long
def test_a_flush_ends_though_meters_go_on_and_what_comes_meanwhile_is_for_the_next_start(
    kafka: str, tmp_path: Path
) -> None:
    driver, is_over, sent = Driver(tmp_path, kafka), threading.Event(), 0
    driver.environment["METERSTREAM_MAX_OFFSETS_PER_TRIGGER"] = "100000"

    def go_on() -> None:
        nonlocal sent
        producer = Producer({"bootstrap.servers": kafka, "partitioner": "murmur2_random"})
        while not is_over.wait(0.05):
            at = START + timedelta(minutes=sent)
            record = {"meter_id": "m99", "observed_at": at, "received_at": at, "dialect": "dsmr-5"}
            producer.produce(READINGS.name, encode("reading", record | {"voltage_l1_mv": 230_000}), "m99")
            sent += 1
        assert producer.flush(30) == 0

    def of_it(table: str) -> tuple[int, int]:
        pattern = driver.home / "lake" / table / "date=*" / "*.parquet"
        when = "window_start" if table == "voltage_windows" else "observed_at"
        query = f"SELECT count(*), count(DISTINCT {when}) FROM '{pattern}' WHERE meter_id = 'm99'"
        return tuple(duckdb.execute(query).fetchall()[0])

    meter = threading.Thread(target=go_on)
    meter.start()
    try:
        assert driver.to_the_end() == 0
    finally:
        is_over.set()
        meter.join()
    first, _ = of_it("readings")
    assert 0 < first < sent
    windows, starts = of_it("voltage_windows")
    assert windows == starts > 0
    assert driver.to_the_end() == 0
    assert of_it("readings") == (sent, sent)
    windows, starts = of_it("voltage_windows")
    assert windows == starts > 0
    accounting = f"'{driver.home}/lake/accounting/date=*/*.parquet'"
    found = duckdb.execute(
        f"SELECT sum(received - stored - duplicate - late - quarantined - invalid) FROM {accounting}"
    ).fetchall()
    assert found == [(0,)]
