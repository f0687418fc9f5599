"""Critical events through a real Kafka in real-time mode: at once, each with one id, none lost by kill -9."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Consumer, Producer, TopicPartition
from typer.testing import CliRunner

from lake.store import used
from schemas.codec import decode, encode
from schemas.errors import ConfigError
from schemas.topics import CRITICAL_EVENTS, EVENTS, READINGS
from stack.__main__ import app
from stack.isolated import environment, own_settings
from stack.native import NativeStack
from streaming_jobs.critical_events import CriticalSettings, known, start
from tests.eventually import eventually
from tests.lake_by_hand import add_rows
from tests.stores import place


@pytest.fixture(scope="module")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NativeStack]:
    stack = NativeStack(own_settings(tmp_path_factory.mktemp("critical")))
    try:
        stack.start(["kafka"])
        yield stack
    finally:
        stack.stop()


class Reader:
    """Everything that comes to the topic from now on."""

    def __init__(self, bootstrap: str) -> None:
        self.consumer = Consumer({"bootstrap.servers": bootstrap, "group.id": f"{uuid.uuid4()}"})
        partitions = [TopicPartition(CRITICAL_EVENTS.name, number) for number in range(CRITICAL_EVENTS.partitions)]
        for each in partitions:
            each.offset = self.consumer.get_watermark_offsets(each, 30)[1]
        self.consumer.assign(partitions)
        self.records: list[dict[str, Any]] = []

    def ids(self) -> set[str]:
        message = self.consumer.poll(0.05)
        while message is not None:
            assert message.error() is None
            self.records.append(decode(message.value() or b"", CRITICAL_EVENTS.entity))
            message = self.consumer.poll(0)
        return {record["event_id"] for record in self.records}


def failures(bootstrap: str, numbers: range) -> None:
    producer = Producer({"bootstrap.servers": bootstrap, "linger.ms": 0})
    for number in numbers:
        record = {"meter_id": f"m{number % 7}", "observed_at": datetime.now(UTC), "dialect": "c12.19", "seq": number}
        value = encode("event", {**record, "dialect_version": "1", "source_table": "ST76", "code": "AE1"})
        producer.produce(EVENTS.name, value, f"m{number % 7}")
    assert producer.flush(30) == 0


@pytest.fixture
def running(kafka: NativeStack) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts the job; whatever is left of it is killed."""
    begun: list[subprocess.Popen[bytes]] = []
    ready = kafka.home / "run" / "critical_events.ready"

    def run(**more: str) -> subprocess.Popen[bytes]:
        ready.unlink(missing_ok=True)
        variables = {**os.environ, **environment(kafka.settings), "METERSTREAM_CRITICAL_CHECKPOINT_S": "5", **more}
        with (kafka.home / "logs" / "critical.log").open("ab") as log:
            command = [sys.executable, "-m", "streaming_jobs.critical_events"]
            begun.append(subprocess.Popen(command, env=variables, stdout=log, stderr=log, start_new_session=True))
        eventually(ready.exists, 120)
        return begun[-1]

    yield run
    for process in begun:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture(params=["s3", pytest.param("hdfs", marks=pytest.mark.long)])
def elsewhere(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Variables by which the job keeps its checkpoint in a store that is not its home."""
    with place(str(request.param), tmp_path_factory.mktemp("server")) as stores:
        yield {"METERSTREAM_STORE": stores.store(Path("critical")), **stores.variables}


def test_what_is_sent_while_it_runs_or_lies_dead_is_told_with_one_id_each(
    kafka: NativeStack, running: Callable[..., subprocess.Popen[bytes]], elsewhere: dict[str, str]
) -> None:
    bootstrap = kafka.settings.kafka_bootstrap
    process = running(**elsewhere)
    reader = Reader(bootstrap)  # the job has made the topic
    failures(bootstrap, range(0, 1))  # what comes from "ready" on is told
    eventually(reader.ids, 30)
    began = time.monotonic()
    failures(bootstrap, range(1, 101))
    eventually(lambda: len(reader.ids()) >= 101, 30)
    assert time.monotonic() - began < 5, "before the checkpoint that a micro-batch would wait for"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    failures(bootstrap, range(101, 201))
    process = running(**elsewhere)
    failures(bootstrap, range(201, 301))
    ids = {(record["meter_id"], record["event_id"]) for record in eventually(lambda: whole(reader), 120)}
    assert len({event_id for _, event_id in ids}) == len(ids), "an id is one meter's"
    variables = {"METERSTREAM_KAFKA_PORT": str(kafka.settings.kafka_port)}
    shown = CliRunner().invoke(app, ["critical", "--from-start", "--count", "300"], env=variables)
    assert (shown.exit_code, len(shown.stdout.splitlines())) == (0, 300)
    assert re.search(r"  m[0-6] +power_failure AE1  \(told after [\d,]+ ms\)\n", shown.stdout)
    process.terminate()
    assert process.wait(300) == 0
    assert not (Path(kafka.home) / "run" / "critical_events.ready").exists()


def test_a_nominal_voltage_that_becomes_known_counts_from_then_on(
    kafka: NativeStack, running: Callable[[], subprocess.Popen[bytes]]
) -> None:
    def read(meter_id: str, voltage_mv: int) -> None:
        record = {"meter_id": meter_id, "observed_at": datetime.now(UTC), "dialect": "dsmr-5"}
        producer = Producer({"bootstrap.servers": kafka.settings.kafka_bootstrap})
        producer.produce(READINGS.name, encode("reading", {**record, "voltage_l1_mv": voltage_mv}), meter_id)
        assert producer.flush(30) == 0

    def far_out() -> set[tuple[str, int]]:
        reader.ids()
        return {(one["meter_id"], one["voltage_mv"]) for one in reader.records if one["kind"] == "voltage_far_out"}

    process = running()
    reader = Reader(kafka.settings.kafka_bootstrap)
    with used(f"file://{kafka.home}"):
        add_rows("registry", [{"meter_id": "american", "nominal_mv": 120_000}], "2024-01-01")
    log = kafka.home / "logs" / "critical.log"
    eventually(lambda: "meters=1" in log.read_text(errors="replace"), 120)
    read("nobody-knows", 200_000)
    read("american", 121_000)
    read("american", 200_000)
    eventually(lambda: ("american", 200_000) in far_out(), 120)
    assert far_out() == {("american", 200_000)}
    process.terminate()
    assert process.wait(300) == 0
    assert "ERROR" not in log.read_text(errors="replace"), "neither a new beginning nor a clean end is one"


def whole(reader: Reader) -> list[dict[str, Any]]:
    return reader.records if len(reader.ids()) >= 301 else []


def test_a_driver_with_too_few_task_slots_is_refused(kafka: NativeStack, spark: Any) -> None:
    settings = CriticalSettings(kafka_bootstrap=kafka.settings.kafka_bootstrap)
    with pytest.raises(ConfigError, match="holds 8 task slots for good and wants 12 in all"):
        start(spark, settings, known(()))
