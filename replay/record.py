"""Kafka's topics of readings and events → a tape, so that an incident can be played again with `--clock original`.

Records keep their arrival order per meter: duplicates, late and reordered ones stay as they came. What a run stamps
(run_id, seq, sent_at, received_at) is left out; playing the tape stamps anew. Bytes that cannot be decoded have no
place on a tape: they are counted among its defects, by reason, as are the dead letters of the same time.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
from confluent_kafka import Consumer, KafkaException, TopicPartition

from kafka_io import clients
from kafka_io.offsets import kept
from kafka_io.ranges import Range, fetched
from lake.reading import Lake
from replay.run.ledger import read_ledger, run_folder
from replay.tape import Tape, log_schema, registry_of, write_tape
from schemas.closed_lists import DeadLetterReason
from schemas.codec import arrow_schema, decode_batch
from schemas.errors import ConfigError, RetryLater
from schemas.tables import REGISTRY
from schemas.topics import DEAD_LETTERS, KINDS, Topic

TIMEOUT_S = 10.0
BATCH = 50_000  # records decoded at once
TIME_ZONE = "UTC"  # where the lake's registry knows none of the meters
Progress = Callable[[int, int], None]
"""Records read so far, and records there are."""


@dataclass
class Recorded:
    """What was read of one topic.

    Attributes:
        rows: of the entity, in the order they were read.
        partitions: of the rows.
        stamps: Kafka's times of the rows, ms, made not to fall within a partition.
        read: records read, those left out too.
        defects: what was left out, by reason.
    """

    topic: Topic
    rows: list[pa.Table] = field(default_factory=list)
    partitions: list[npt.NDArray[np.int64]] = field(default_factory=list)
    stamps: list[npt.NDArray[np.int64]] = field(default_factory=list)
    read: int = 0
    defects: Counter[str] = field(default_factory=Counter)

    def in_order(self) -> pa.Table:
        """The rows by Kafka's time, each partition in its own order."""
        schema = log_schema(self.topic.entity)
        if not self.rows:
            return schema.empty_table()
        order = np.argsort(_never_back(np.concatenate(self.partitions), np.concatenate(self.stamps)), kind="stable")
        return pa.concat_tables(self.rows).take(pa.array(order)).select(schema.names)


def _never_back(partitions: npt.NDArray[np.int64], stamps: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Stamps that do not fall within a partition: producers' clocks may, and the order is the offsets'."""
    result = stamps.copy()
    for partition in np.unique(partitions):
        mine = partitions == partition
        result[mine] = np.maximum.accumulate(stamps[mine])
    return result


def record(
    folder: Path,
    bootstrap: str,
    *,
    run_id: str | None = None,
    begin: datetime | None = None,
    until: datetime | None = None,
    progress: Progress = lambda *_: None,
) -> tuple[Tape, datetime]:
    """Writes a tape of what Kafka has at this moment.

    Args:
        folder: of the tape; one that is there is replaced.
        bootstrap: host:port of a Kafka broker.
        run_id: only records of this run.
        begin: only records that Kafka took then or later.
        until: only records that Kafka took before.
        progress: called a few times a second.

    Returns:
        The tape, and when Kafka took the newest of its records.

    Raises:
        ConfigError: nothing to record, or the topics are not there.
        RetryLater: Kafka does not answer, or stops answering.
        StateLost: Kafka drops records while they are read.
    """
    topics = [*KINDS.values(), DEAD_LETTERS]
    consumer = clients.consumer(bootstrap, clients.SILENT)
    try:
        ranges = {topic: _range(consumer, topic, begin, until) for topic in topics}
        total = sum(end - start for each in ranges.values() for start, end in each.values())
        found = {topic: Recorded(topic) for topic in topics}
        done = 0
        for topic, each in ranges.items():
            if topic == DEAD_LETTERS and run_id is not None:
                continue  # a dead letter names no run
            done += _read(bootstrap, found[topic], each, run_id, partial(_report, progress, done, total))
    except KafkaException as error:
        msg = f"no Kafka at {bootstrap} ({error.args[0].str()}): make up starts it"
        raise RetryLater(msg) from error
    finally:
        consumer.close()
    readings, events = (found[topic].in_order() for topic in KINDS.values())
    if not len(readings):
        msg = f"nothing to record: {KINDS['readings'].name} has no such readings at {bootstrap}"
        raise ConfigError(msg)
    defects = Counter[str]()
    for topic, one in found.items():
        defects.update({f"{topic.name}: {reason}": count for reason, count in one.defects.items()})
    interval_s = _interval_s(readings)
    registry, time_zone = _registry(readings, events, interval_s)
    tape = write_tape(
        folder, readings=readings, events=events, registry=registry, format="record",
        source=f"run {run_id}" if run_id else "Kafka", time_zone=time_zone,
        rows_in=sum(one.read for one in found.values()), defects=defects, interval_s=interval_s,
    )  # fmt: skip
    newest = max(int(stamps.max()) for topic in KINDS.values() for stamps in found[topic].stamps if len(stamps))
    return tape, datetime.fromtimestamp(newest / 1000, UTC)


def sent_by(run_id: str) -> int | None:
    """How many readings and events of a run Kafka is to have; None where no run of that name is known here.

    Raises:
        RetryLater: it still runs, or was killed: nobody knows.
    """
    try:
        ledger = read_ledger(run_id)
    except FileNotFoundError:
        return None
    if not (run_folder(run_id) / "ledger.parquet").exists():
        msg = f"run {run_id} has no ledger: it still runs, or was killed; what is recorded is a part of it"
        raise RetryLater(msg)
    return ledger.records - ledger.poison


def _report(progress: Progress, before: int, total: int, read: int) -> None:
    progress(before + read, total)


def _range(
    consumer: Consumer, topic: Topic, begin: datetime | None, until: datetime | None
) -> dict[int, tuple[int, int]]:
    """First offset and the one after the last, by partition, as they are now."""
    listed = consumer.list_topics(topic.name, timeout=TIMEOUT_S).topics[topic.name]
    if listed.error is not None:
        msg = f"no topic {topic.name}: {listed.error.str()}"
        raise ConfigError(msg)
    found = {}
    for partition in sorted(listed.partitions):
        low, high = kept(consumer, topic.name, partition, TIMEOUT_S)
        start = _at(consumer, topic, partition, begin, high) if begin else low
        end = _at(consumer, topic, partition, until, high) if until else high
        found[partition] = (max(low, start), max(low, start, end))
    return found


def _at(consumer: Consumer, topic: Topic, partition: int, moment: datetime, high: int) -> int:
    """The first offset that Kafka took at a moment or later; its end where there is none."""
    wanted = TopicPartition(topic.name, partition, round(moment.timestamp() * 1000))
    offset: int = consumer.offsets_for_times([wanted], timeout=TIMEOUT_S)[0].offset
    return offset if offset >= 0 else high


def _read(
    bootstrap: str,
    into: Recorded,
    ranges: dict[int, tuple[int, int]],
    run_id: str | None,
    on_read: Callable[[int], None],
) -> int:
    """Reads a topic's ranges. Returns how many records."""
    for partition, (begin, end) in ranges.items():
        for start in range(begin, end, BATCH):
            place = Range(into.topic.name, partition, start, min(start + BATCH, end))
            _take(into, fetched(place, bootstrap, accept_loss=False), run_id)
            on_read(into.read)
    return into.read


def _take(into: Recorded, records: pa.Table, run_id: str | None) -> None:
    """Decodes records, columns `kafka_io.ranges.KAFKA`, and keeps what can be kept."""
    into.read += len(records)
    decoded = decode_batch(records["value"].combine_chunks(), into.topic.entity)
    if into.topic == DEAD_LETTERS:
        reasons = decoded.records.column("reason").to_pylist()
        into.defects.update(reason or DeadLetterReason.UNDECODABLE.value for reason in reasons)
        return
    foreign = pc.fill_null(pc.not_equal(records["key"], decoded.records["meter_id"].cast(pa.binary())), True)
    is_bad = pc.is_valid(decoded.reasons)
    into.defects.update(reason for reason in decoded.reasons.to_pylist() if reason is not None)
    is_foreign = pc.and_(foreign, pc.invert(is_bad))
    if mismatched := pc.sum(is_foreign).as_py():
        into.defects[DeadLetterReason.METER_ID_MISMATCH.value] += mismatched
    is_kept = pc.invert(pc.or_(is_bad, is_foreign))
    if run_id is not None:
        is_kept = pc.and_(is_kept, pc.fill_null(pc.equal(decoded.records["run_id"], run_id), False))
    schema = arrow_schema(into.topic.entity)
    into.rows.append(decoded.records.filter(is_kept).cast(schema))
    mask = is_kept.to_numpy(zero_copy_only=False)
    stamps = records["timestamp"].cast(pa.timestamp("ms", "UTC")).cast(pa.int64()).to_numpy()
    into.partitions.append(records["partition"].to_numpy().astype(np.int64)[mask])
    into.stamps.append(stamps[mask])


def _interval_s(readings: pa.Table) -> int | None:
    """The usual step between a meter's readings; None where no meter has two."""
    frame = pl.DataFrame(readings.select(["meter_id", "observed_at"])).unique()
    step = pl.col("observed_at").diff().over("meter_id")
    median = frame.sort("meter_id", "observed_at").select(step.drop_nulls().dt.total_seconds().median()).item()
    return round(median) if median else None


def _registry(readings: pa.Table, events: pa.Table, interval_s: int | None) -> tuple[pa.Table, str]:
    """The newest row of each meter in the lake's registry, and what the log says of the others; with the time zone."""
    ids = pc.unique(pa.chunked_array([*readings["meter_id"].chunks, *events["meter_id"].chunks]))
    lake = Lake().duckdb()
    lake.register("meters", pa.table({"meter_id": ids}))
    known = (
        lake.sql(
            f"""SELECT {", ".join(REGISTRY.names)} FROM newest_registry SEMI JOIN meters USING (meter_id)
            ORDER BY meter_id"""
        )
        .to_arrow_table()
        .cast(REGISTRY)
    )
    zones = Counter(zone for zone in known["time_zone"].to_pylist() if zone)
    time_zone = zones.most_common(1)[0][0] if zones else TIME_ZONE
    unknown = readings.filter(pc.invert(pc.is_in(readings["meter_id"], known["meter_id"].combine_chunks())))
    others = registry_of(unknown, time_zone=time_zone, interval_s=interval_s)
    return pa.concat_tables([known, others]), time_zone
