"""Whatever is killed at whatever moment of a batch, the lake ends with the rows of a run that nobody disturbed.

A preloaded Kafka, batches of fixed size, the real driver with all its queries in a process of its own.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from glob import glob  # of folders that come and go: pathlib's fails over one that is gone
from pathlib import Path
from typing import Any

import psutil
import pytest
from confluent_kafka import Producer, TopicPartition
from confluent_kafka.admin import AdminClient

import lake
from kafka_io.topics import create_topics
from lake.store import Store, used
from schemas.codec import encode
from schemas.tables import TABLES
from schemas.topics import EVENTS, READINGS, Topic
from stack.isolated import SHORT_LIVED_JVM, own_settings
from stack.jobs import JobMetrics, jobs, metrics_text
from stack.native import NativeStack
from streaming_jobs import discovered
from tests.eventually import eventually
from tests.lake_by_hand import add_rows
from tests.stores import KINDS, Place, place

START = datetime(2024, 3, 31, tzinfo=UTC)
METERS = [f"m{number:02d}" for number in range(12)]
READINGS_EACH = 60
OF_A_BATCH = 45  # records of a topic, of all partitions
VERSIONS = {job.name: job.version for job in discovered()}
WATCHED = ("voltage_deviation", "consumption_deltas", "readings_lake")
PHASES = ("planned", "written", "intent", "some tables", "all tables")
"""What a batch has left behind, one after the other: Spark's plan, an object of its state, its intent, commits."""


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

    def __init__(self, home: Path, bootstrap: str, place: Place | None = None) -> None:
        self.home = home
        self.store = Store((place or Place()).store(home))
        self.known: dict[str, str] = {}
        self.metrics: list[list[JobMetrics]] = []
        (home / "tmp").mkdir()
        known = {"phases": "L1", "nominal_mv": 230_000, "fuse_a": 25, "interval_s": 60, "transformer_id": "T1"}
        rows = [{"meter_id": meter_id, "feeder_id": f"F{meter_id[-1]}", **known} for meter_id in METERS]
        with self.used():
            add_rows("registry", rows, "2024-01-01")
        self.environment = {
            **os.environ,
            "METERSTREAM_HOME": str(home),
            "METERSTREAM_STORE": self.store.url,
            "METERSTREAM_KAFKA_BOOTSTRAP": bootstrap,
            "METERSTREAM_MAX_OFFSETS_PER_TRIGGER": str(OF_A_BATCH),
            "METERSTREAM_ALLOWED_LATENESS_S": "600",
            "METERSTREAM_TRIGGER_S": "0.2",
            "METERSTREAM_COMPACT_FILES": "6",
            "METERSTREAM_UPKEEP_S": "0.5",
            "METERSTREAM_FLUSH": "true",
            "SPARK_SUBMIT_OPTS": SHORT_LIVED_JVM,
        }

    @contextlib.contextmanager
    def running(self) -> Iterator[subprocess.Popen[bytes]]:
        (self.home / "run" / "streaming.ready").unlink(missing_ok=True)
        shutil.rmtree(self.home / "run" / "queries", ignore_errors=True)  # as the driver does, some time after
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

    def goes_on_with(self, other: "Driver") -> None:
        """From now on its store is another's; its home is its own."""
        self.store = other.store
        self.environment["METERSTREAM_STORE"] = other.store.url

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """While it holds, the lake of this process is the driver's."""
        with used(self.store.url):
            yield

    def folder(self, job: str) -> str:
        """Where a job's intents and state lie; of no name before its first start."""
        of_job = f"state/{job}-v{VERSIONS[job]}"
        return next((f"{of_job}/{name}" for name in self.store.folders(of_job)), "nowhere")

    def intents(self, job: str) -> list[str]:
        """Of the batches that a job has done, in their order."""
        return [path for path in self.store.paths(f"{self.folder(job)}/intents") if path.endswith(".json")]

    def committed(self, job: str) -> int:
        """The last batch that has an intent; −1 before the first."""
        return max((int(Path(intent).stem) for intent in self.intents(job)), default=-1)

    def phase(self, job: str, batch: int) -> str | None:
        """How far the first batch of a driver has come."""
        if self.committed(job) < batch:
            if any(f"/{batch:08d}-" in path for path in self.store.paths(f"{self.folder(job)}/state")):
                return "written"
            return "planned" if glob(f"{self.home}/run/queries/*{job}*/offsets/0") else None
        parts = json.loads(self.text(f"{self.folder(job)}/intents/{batch:08d}.json"))["parts"]
        said = f'"appId":"{job}-{Path(self.folder(job)).name}","version":{batch}'
        done = {table: any(said in commit for commit in self.commits(table)) for table, *_ in parts}
        return "all tables" if all(done.values()) else "some tables" if any(done.values()) else "intent"

    def commits(self, table: str) -> list[str]:
        """What the last commits of a table say."""
        log = [path for path in self.store.paths(f"lake/{table}/_delta_log") if path.endswith(".json")]
        return [self.text(path) for path in log[-30:]]

    def text(self, path: str) -> str:
        """An object that never changes: it is asked for once."""
        if path not in self.known:
            self.known[path] = self.store.get(path).decode()
        return self.known[path]

    def flushed(self) -> int:
        """How many jobs have closed what was open."""
        newest = [intents[-1] for job in VERSIONS if (intents := self.intents(job))]
        return sum(json.loads(self.text(intent))["is_flush"] for intent in newest)

    def rows(self) -> dict[str, list[tuple[Any, ...]]]:
        """Every table that has rows, as any reader sees it, ordered; the query's id and the day of it left out."""
        found = {}
        with self.used(), lake.open().duckdb() as tables:
            for table in TABLES:
                without_ids = "EXCLUDE (date) REPLACE (regexp_replace(batch, '-[0-9a-f-]{36}-', '-') AS batch)"
                columns = f"* {without_ids}" if table == "accounting" else "*"
                if rows := tables.execute(f"SELECT {columns} FROM {table} ORDER BY ALL").fetchall():
                    found[table] = rows
        return found

    def ask(self, query: str) -> list[tuple[Any, ...]]:
        """What the lake answers."""
        with self.used(), lake.open().duckdb() as tables:
            return tables.execute(query).fetchall()


def kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to a driver with its JVM and its Python workers; from its first line on the driver does nothing more."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(signal.SIGSTOP)
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
    compacted = [path for path in clean.store.paths("lake") if "/part-" in path]
    assert {Path(file).parts[-3] for file in compacted} >= {"readings", "consumption_deltas"}, "small files stay small"
    stored = clean.ask("SELECT stage, count(*) FROM late_readings GROUP BY ALL ORDER BY ALL")
    counted = "SELECT stage, sum(late)::BIGINT FROM accounting GROUP BY ALL HAVING sum(late) > 0 ORDER BY ALL"
    assert clean.ask(counted) == stored
    sums = "SELECT sum(received - stored - duplicate - late - quarantined - invalid), min(received) FROM accounting"
    assert clean.ask(sums)[0][0] == 0
    assert clean.flushed() == len(VERSIONS)


def test_meters_with_wrong_clocks_change_nothing_of_the_others(clean: Driver) -> None:
    (sane,) = clean.ask(
        f"""SELECT count(*) FROM voltage_windows WHERE meter_id NOT IN ('m10', 'm11')
        AND window_start BETWEEN '{START}' AND '{START + timedelta(hours=1)}'"""
    )
    assert sane == (10 * READINGS_EACH // 10,)  # each of the ten others has its six windows
    assert clean.ask("SELECT count(*) FROM late_readings WHERE meter_id = 'm10'") == [(0,)]


@pytest.mark.long
@pytest.mark.timeout(7_200)
@pytest.mark.parametrize("kind", KINDS)
def test_kills_at_each_phase_of_a_batch_and_of_a_flush_change_no_row(
    clean: Driver, kafka: str, tmp_path: Path, kind: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with place(kind, tmp_path_factory.mktemp("server")) as stores:
        _killed(clean, Driver(tmp_path, kafka, stores))


def _killed(clean: Driver, driver: Driver) -> None:
    hit: list[str | None] = []
    for phase in PHASES:
        while phase not in hit:  # a kill may come too late for it
            assert len(hit) < 4 * len(PHASES), f"kills came at {hit}"
            job = min(WATCHED, key=driver.committed)  # whose topic is not at its end yet
            with driver.running() as process:
                batch = driver.committed(job) + 1
                wanted = PHASES[PHASES.index(phase) :]
                assert watch(process, lambda: driver.phase(job, batch) in wanted)  # noqa: B023
                kill(process)
            hit.append(driver.phase(job, batch))
    with driver.running() as process:
        driver.ask_to_end(process)
        assert watch(process, lambda: driver.flushed() >= 1)
        kill(process)
    hit.append(f"{driver.flushed()} flushed")
    assert driver.to_the_end() == 0
    expected = clean.rows()
    found = driver.rows()
    assert found.keys() == expected.keys()
    for table, rows in expected.items():
        assert found[table] == rows, f"{table}, after kills at {hit}"


@pytest.mark.long
@pytest.mark.parametrize("kind", ["folder", "s3", "hdfs"])
def test_a_driver_whose_machine_stands_still_or_is_lost_and_one_with_the_store_alone_change_no_row(
    clean: Driver, kafka: str, kind: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with place(kind, tmp_path_factory.mktemp("server")) as stores:
        lost = Driver(tmp_path_factory.mktemp("lost"), kafka, stores)
        with lost.running() as process:
            assert watch(process, lambda: lost.committed("readings_lake") >= 2)
            tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            for each in tree:
                each.suspend()
            other = Driver(tmp_path_factory.mktemp("other"), kafka, stores)
            other.goes_on_with(lost)
            with other.running() as another:
                assert watch(another, lambda: lost.committed("readings_lake") >= 5)
                for each in tree:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        each.resume()
                eventually(lambda: {process.poll(), another.poll()} != {None}, 300)
            assert {process.poll(), another.poll()} - {None, 0, -9}, "two drivers went on beside each other"
        shutil.rmtree(lost.home)
        assert other.to_the_end() == 0
        expected, found = clean.rows(), other.rows()
    assert found.keys() == expected.keys()
    for table, rows in expected.items():
        assert found[table] == rows, table


@pytest.mark.long
def test_a_killed_worker_a_batch_that_fails_and_deleted_intents_change_no_row(
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
    with driver.running() as process:
        assert watch(process, lambda: driver.phase(job, 1) == "all tables")
        kill(process)
    driver.store.delete(driver.store.paths(f"{driver.folder(job)}/intents"))
    assert driver.to_the_end() == 1
    assert "and its intent is gone" in (driver.home / "log").read_text(errors="replace")
    command = [sys.executable, "-m", "stack", "begin-anew", job, "--yes"]  # the repair that the error names
    subprocess.run(command, env=driver.environment, check=True, capture_output=True)
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

    def of_it(table: str) -> tuple[Any, ...]:
        when = "window_start" if table == "voltage_windows" else "observed_at"
        return driver.ask(f"SELECT count(*), count(DISTINCT {when}) FROM {table} WHERE meter_id = 'm99'")[0]

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
    sums = "SELECT sum(received - stored - duplicate - late - quarantined - invalid) FROM accounting"
    assert driver.ask(sums) == [(0,)]
