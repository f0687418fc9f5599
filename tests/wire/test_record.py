"""Kafka → tape → Kafka: an incident is played again as it was, on a real broker."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import polars as pl
import pytest
from confluent_kafka.admin import AdminClient
from typer.testing import CliRunner

from replay.__main__ import app
from replay.dirt.entries import Entry
from replay.record import record
from replay.run import play
from replay.run.ledger import run_folder
from replay.run.order import Order
from replay.sinks import KafkaSink
from replay.tape import Tape, log_schema
from schemas.closed_lists import FaultKind
from schemas.codec import decode
from schemas.errors import ConfigError, InvalidMessage, RetryLater
from schemas.tables import polars_schema
from stack.isolated import environment, own_settings
from stack.native import NativeStack
from tests.unit.test_run import Kept
from tests.wire import small_tape

METERS = 40
DIRT = (
    *[Entry(kind=kind) for kind in FaultKind if kind != FaultKind.CLOCK_JUMP],
    Entry(kind=FaultKind.CLOCK_JUMP, by="-1h"),
)


class Broker:
    """A Kafka of our own with a dirty run `a`; `sent` is what it handed over."""

    def __init__(self, home: Path, bootstrap: str) -> None:
        self.home = home
        self.bootstrap = bootstrap
        self.sink = partial(KafkaSink, bootstrap)
        small_tape.write(home / "tape")
        self.sent = Kept()
        order = Order(home / "tape", "a", "kafka", METERS, dirt=DIRT)
        self.ledger = play(order, self.sink)
        self.between = datetime.now(UTC)
        play(Order(home / "tape", "sent", "null", METERS, dirt=DIRT), lambda: self.sent)

    def record(
        self, name: str, run_id: str | None = None, begin: datetime | None = None, until: datetime | None = None
    ) -> Tape:
        return record(self.home / name, self.bootstrap, run_id=run_id, begin=begin, until=until)[0]


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    home = tmp_path_factory.mktemp("record")
    settings = own_settings(home)
    stack = NativeStack(settings)
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, value in environment(settings).items():
            monkeypatch.setenv(name, value)
        try:
            stack.start(["kafka"])
            yield Broker(home, settings.kafka_bootstrap)
        finally:
            stack.stop()


def streams(tape: Tape) -> dict[str, pl.DataFrame]:
    """What each meter says, in its order."""
    frames = {"readings": pl.DataFrame(tape.readings), "events": pl.DataFrame(tape.events)}
    return {kind: frame.sort("meter_id", "log_row").drop("log_row") for kind, frame in frames.items()}


def sent_streams(sink: Kept) -> dict[str, pl.DataFrame]:
    """The same of what a replay handed over, without its poison."""
    frames = {}
    for kind in ("readings", "events"):
        rows = []
        for sent_kind, meter_id, _, payload in sink.sent:
            try:
                row = decode(payload, kind.removesuffix("s")) if sent_kind == kind else {}
            except InvalidMessage:
                continue
            if row.get("meter_id") == meter_id:
                rows.append(row)
        schema = polars_schema(log_schema(kind.removesuffix("s")))
        frame = pl.DataFrame(rows, infer_schema_length=None).select(schema.names()).cast(schema)
        frames[kind] = frame.sort("meter_id", maintain_order=True)
    return frames


def same(left: dict[str, pl.DataFrame], right: dict[str, pl.DataFrame]) -> bool:
    assert {kind: len(frame) for kind, frame in left.items()} == {kind: len(frame) for kind, frame in right.items()}
    return all(left[kind].equals(right[kind]) for kind in left)


def test_a_tape_holds_what_was_sent_in_the_order_it_came(broker: Broker) -> None:
    tape = broker.record("first", until=broker.between)
    assert same(streams(tape), sent_streams(broker.sent))
    assert tape.info.rows_in == broker.ledger.records
    assert sum(tape.info.defects.values()) == broker.ledger.poison == 1
    assert tape.info.interval_s == 300
    assert len(tape.registry) == METERS
    assert set(tape.registry["transformer_id"].to_pylist()) == {"T1-1", "T1-2"}, "of the lake's registry"
    came_back = pl.DataFrame(tape.readings).select((pl.col("observed_at").diff() < pl.duration()).over("meter_id"))
    assert came_back.sum().item() == 5, "what was late, reordered or had a wrong clock is as it was"


def test_played_again_with_its_own_clock_it_is_the_same_stream(broker: Broker) -> None:
    tape = broker.record("incident", run_id="a")
    null = Kept()
    play(Order(broker.home / "incident", "null", "null", own_clock=True), lambda: null)
    assert same(sent_streams(null), streams(tape))
    play(Order(broker.home / "incident", "again", "kafka", own_clock=True, again=True), broker.sink)
    assert same(streams(broker.record("again", run_id="again")), streams(tape))


def test_only_a_stretch_of_kafkas_time_is_recorded(broker: Broker) -> None:
    play(Order(broker.home / "tape", "later", "kafka", again=True), broker.sink)
    before, after = broker.record("before", until=broker.between), broker.record("after", begin=broker.between)
    assert same(streams(before), sent_streams(broker.sent))
    assert before.info.rows_in == broker.ledger.records
    assert after.info.rows_in + before.info.rows_in == broker.record("all").info.rows_in
    with pytest.raises(ConfigError, match="nothing to record"):
        broker.record("none", begin=datetime.now(UTC))


def test_nothing_of_a_recording_is_left_on_the_broker(broker: Broker) -> None:
    broker.record("all")
    groups = AdminClient({"bootstrap.servers": broker.bootstrap, "log_level": 0}).list_consumer_groups().result()
    assert [group.group_id for group in groups.valid] == []


def test_without_a_broker_it_says_to_try_again(tmp_path: Path) -> None:
    with pytest.raises(RetryLater, match="127.0.0.1:1"):
        record(tmp_path / "tape", "127.0.0.1:1")


def test_a_record_that_the_client_refuses_is_told_and_the_others_arrive(broker: Broker) -> None:
    sink = broker.sink()
    with pytest.raises(RetryLater, match="did not take 1 records: .*MSG_SIZE_TOO_LARGE"):
        sink.send("events", ["a", "b", "c"], [b"1", bytes(2_000_000), b"3"])
    sink.close()
    assert sink.acknowledged == 2


def test_a_recording_that_lacks_records_of_its_run_says_how_many(broker: Broker) -> None:
    command = ["record", "--to", str(broker.home / "whole"), "--run", "a", "--bootstrap", broker.bootstrap]
    sent = broker.ledger.readings + broker.ledger.events
    whole = CliRunner().invoke(app, command)
    assert (whole.exit_code, f"{sent:,} records of the {sent:,} that run a sent" in whole.stdout) == (0, True)
    run_file = run_folder("a") / "run.json"
    kept = run_file.read_text()
    run_file.write_text(json.dumps({**json.loads(kept), "records": broker.ledger.records + 1}))
    part = CliRunner().invoke(app, command)
    run_file.write_text(kept)
    assert (part.exit_code, f"{sent:,} records of the {sent + 1:,} that run a sent" in part.stdout) == (1, True)
    assert "1 records of run a are not in Kafka yet" in part.stderr
