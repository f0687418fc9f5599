"""What the topics for people say: critical events as they come, alarms as they stand, and who has seen which."""

from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import Any

from confluent_kafka import OFFSET_BEGINNING, OFFSET_END, KafkaError, KafkaException, TopicPartition

from kafka_io import clients
from schemas.closed_lists import AlarmState
from schemas.codec import decode, encode
from schemas.errors import ConfigError, InvalidMessage, RetryLater
from schemas.topics import ALARMS, COMMANDS, CRITICAL_EVENTS, HOUR_MS, METER_ID, Topic

ALL_DOWN, AT_THE_END = KafkaError._ALL_BROKERS_DOWN, KafkaError._PARTITION_EOF
KEPT = f"topic {ALARMS.name}, which has {ALARMS.retention_ms // (24 * HOUR_MS)} days of them"
Record = dict[str, Any]


def _records(bootstrap: str, topic: Topic, from_start: bool, to_end: bool) -> Iterator[tuple[Record, datetime]]:
    """Records of a topic, each with the time at which Kafka had it; what is none of ours is left out.

    Args:
        bootstrap: host:port of a Kafka broker.
        topic: to read.
        from_start: with what Kafka already has, else what comes from now on.
        to_end: up to what Kafka has now, else without an end.

    Raises:
        RetryLater: Kafka does not answer, or stops answering.
    """
    complaints: list[KafkaError] = []
    options = {"fetch.wait.max.ms": 5, "enable.partition.eof": True, "error_cb": complaints.append, **clients.SILENT}
    consumer = clients.consumer(bootstrap, options)
    try:
        open_partitions = set(consumer.list_topics(topic.name, timeout=10).topics[topic.name].partitions)
        begin = OFFSET_BEGINNING if from_start else OFFSET_END
        consumer.assign([TopicPartition(topic.name, number, begin) for number in open_partitions])
        while open_partitions or not to_end:
            message = consumer.poll(0.5)
            error = message.error() if message else next((c for c in complaints if c.code() == ALL_DOWN), None)
            if message and error and error.code() == AT_THE_END:
                open_partitions.discard(message.partition())
            elif error:
                raise KafkaException(error)
            elif message:
                try:
                    record = decode(message.value() or b"", topic.entity)
                except InvalidMessage:
                    continue  # a job has made a dead letter of it
                yield record, datetime.fromtimestamp(message.timestamp()[1] / 1000, UTC)
    except KafkaException as error:
        msg = f"no Kafka at {bootstrap} ({error.args[0].str()}): make up starts it"
        raise RetryLater(msg) from error
    finally:
        consumer.close()


def critical_events(bootstrap: str, from_start: bool) -> Iterator[Record]:
    """Critical events as they come, each with `told_at`: when Kafka had it.

    Raises:
        RetryLater: Kafka does not answer, or stops answering.
    """
    for event, in_kafka_at in _records(bootstrap, CRITICAL_EVENTS, from_start, to_end=False):
        yield {**event, "told_at": in_kafka_at}


def alarms(bootstrap: str) -> dict[str, Record]:
    """The newest change of each alarm that Kafka still has, by alarm_id, the first acknowledgement with it.

    Raises:
        RetryLater: Kafka does not answer.
    """
    nobody = {"acknowledged_at": None, "acknowledged_by": None, "note": None}
    newest = {alarm["alarm_id"]: alarm | nobody for alarm, _ in _records(bootstrap, ALARMS, True, to_end=True)}
    for seen, _ in _records(bootstrap, COMMANDS, True, to_end=True):
        alarm = newest.get(seen["alarm_id"])
        if alarm and (alarm["acknowledged_at"] is None or seen["acknowledged_at"] < alarm["acknowledged_at"]):
            alarm |= {name: seen[name] for name in nobody}
    return newest


def newest_first(alarms: Iterable[Record], meter_id: str | None, cleared_too: bool) -> list[Record]:
    """Those of a meter, or of all, that stand or all."""
    chosen = [
        alarm for alarm in alarms
        if (cleared_too or alarm["state"] == AlarmState.ACTIVE.value) and meter_id in (None, alarm["meter_id"])
    ]  # fmt: skip
    return sorted(chosen, key=lambda alarm: alarm["raised_at"], reverse=True)


def acknowledge(bootstrap: str, alarm_id: str, meter_id: str | None, by: str, note: str | None) -> tuple[str, str]:
    """Says in Kafka that somebody has seen an alarm.

    Args:
        bootstrap: host:port of a Kafka broker.
        alarm_id: of the alarm; where no meter is named, its beginning is enough.
        meter_id: whose it is; None: the alarm is looked up.
        by: who has seen it.
        note: what is to be said of it.

    Returns:
        alarm_id and meter_id.

    Raises:
        ConfigError: there is no such alarm, or there are several, or the meter's id is none.
        RetryLater: Kafka did not take it.
    """
    if meter_id is None:
        fitting = [alarm for known, alarm in alarms(bootstrap).items() if known.startswith(alarm_id)]
        if len(fitting) != 1:
            msg = (
                f"{len(fitting) or 'no'} alarms begin with {alarm_id!r} in {KEPT}: .venv/bin/stack alarms lists those "
                "that stand; of an older one --meter says whose it is"
            )
            raise ConfigError(msg)
        alarm_id, meter_id = fitting[0]["alarm_id"], fitting[0]["meter_id"]
    if not METER_ID.fullmatch(meter_id):
        msg = f"--meter {meter_id}: a meter's id has letters, digits, _ and -"
        raise ConfigError(msg)
    record = {"alarm_id": alarm_id, "meter_id": meter_id, "acknowledged_by": by, "note": note}
    value = encode(COMMANDS.entity, {**record, "acknowledged_at": datetime.now(UTC)})
    refused: list[str] = []
    producer = clients.producer(bootstrap, {"message.timeout.ms": 10_000, **clients.SILENT})
    producer.produce(
        COMMANDS.name, value, meter_id, on_delivery=lambda error, _: refused.extend([str(error)] * bool(error))
    )
    if producer.flush(15) or refused:
        msg = f"Kafka at {bootstrap} did not take it ({'; '.join(refused) or 'no answer'}): make up starts it"
        raise RetryLater(msg)
    return alarm_id, meter_id


def alarm_line(alarm: dict[str, Any]) -> str:
    """An alarm for people: since when, whose, and who has seen it."""
    seen = f", seen by {alarm['acknowledged_by']}" if alarm["acknowledged_by"] else ""
    line = f"{alarm['alarm_id']}  {alarm['raised_at']:%Y-%m-%d %H:%M:%S}  {alarm['meter_id']:<16} "
    return f"{line}{alarm['state']:<7} {alarm['severity']:<7} {alarm['alarm_type']}{seen}"


def event_line(event: dict[str, Any]) -> str:
    """A critical event for people: when, whose, what, volts, and how long telling it took."""
    volts = "" if event["voltage_mv"] is None else f" {event['voltage_mv'] / 1000:.1f} V"
    delay_ms = (event["told_at"] - event["appended_at"]).total_seconds() * 1000
    what = " ".join(filter(None, (event["kind"], event["phase"], event["code"])))
    line = f"{event['observed_at']:%Y-%m-%d %H:%M:%S}  {event['meter_id']:<16} {what}{volts}"
    return f"{line}  (told after {delay_ms:,.0f} ms)"
