"""An MQTT message → Kafka records, or the dead letter that says why not."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from schemas.closed_lists import DeadLetterReason
from schemas.codec import decode, decode_json, encode
from schemas.dsmr import decode_telegram, failure_events, power_failures
from schemas.errors import InvalidMessage
from schemas.topics import DEAD_LETTERS, EVENTS, KINDS, MqttTopic, parse_mqtt_topic

MAX_PAYLOAD_BYTES = 65_536  # a telegram with all its lines has 2 kB
HISTORY = timedelta(days=1)
"""Of the failure log of a meter's first telegram: what ended earlier, by its clock, an earlier bridge has brought."""
LONGEST = timedelta(days=365)
"""A power failure that began so long before we hear of it is of a wrong clock: the jobs would not take its begin."""


@dataclass(frozen=True)
class Routed:
    """What goes to Kafka."""

    topic: str
    key: bytes
    value: bytes


def routed(
    mqtt_topic: str,
    payload: bytes,
    received_at: datetime,
    accept_run_ids: bool = True,
    failures: dict[str, datetime] | None = None,
) -> list[Routed]:
    """The Kafka record of a message, stamped with our clock, and events that a telegram's failure log tells of.

    Args:
        mqtt_topic: where it came in; its meter_id must equal the body's.
        payload: framed Avro, JSON or a DSMR telegram, as the topic's last level says.
        received_at: our wall clock, UTC.
        accept_run_ids: False in production, where nobody replays: a meter could set its own arrival by one.
        failures: meter → up to when its power failures were carried; what the message tells is added. Without it a
            failure log is not read.

    Raises:
        InvalidMessage: with the reason for the dead letter.
    """
    place = parse_mqtt_topic(mqtt_topic)
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise InvalidMessage(DeadLetterReason.TOO_LARGE, f"{len(payload)} bytes, at most {MAX_PAYLOAD_BYTES}")
    topic = KINDS[place.kind]
    record = _record(place, payload, topic.entity, received_at)
    if record["meter_id"] != place.meter_id:
        detail = f"the body says {record['meter_id']}, the topic {place.meter_id}"
        raise InvalidMessage(DeadLetterReason.METER_ID_MISMATCH, detail)
    if record.get("run_id") is not None and not accept_run_ids:
        raise InvalidMessage(DeadLetterReason.RUN_ID_REFUSED, f"run {record['run_id']}")
    record["received_at"] = received_at
    found = [(topic, record)]
    if place.encoding == "dsmr" and failures is not None:  # first, for who reads that the power is back
        found = [*[(EVENTS, event) for event in _failed(payload, record, failures)], *found]
    return [Routed(topic.name, place.meter_id.encode(), encode(topic.entity, each)) for topic, each in found]


def _failed(telegram: bytes, reading: dict[str, Any], failures: dict[str, datetime]) -> list[dict[str, Any]]:
    """Events of the power failures that a telegram is the first to tell of."""
    meter_id, at, received_at = (reading[name] for name in ("meter_id", "observed_at", "received_at"))
    since = failures.get(meter_id)
    if since is None or since > at:  # its clock was ahead
        since = at - HISTORY
    new = {
        (begin, end) for begin, end in power_failures(telegram) if since < end <= at and received_at < begin + LONGEST
    }
    failures[meter_id] = max([since, *(end for _, end in new)])
    return [{**event, "received_at": received_at} for event in failure_events(meter_id, new)]


def _record(place: MqttTopic, payload: bytes, entity: str, received_at: datetime) -> dict[str, Any]:
    match place.encoding:
        case "avro":
            return decode(payload, entity)
        case "json":
            return decode_json(payload, entity)
        case _:
            return decode_telegram(payload, place.meter_id, clock=received_at)


def dead_letter(mqtt_topic: str, payload: bytes, error: InvalidMessage, received_at: datetime) -> Routed:
    """The Kafka record of a message that cannot be taken, with its original bytes."""
    try:
        meter_id = parse_mqtt_topic(mqtt_topic).meter_id
    except InvalidMessage:
        meter_id = None
    letter = {
        "payload": payload,
        "reason": str(error.reason),
        "detail": error.detail,
        "received_at": received_at,
        "meter_id": meter_id,
        "mqtt_topic": mqtt_topic,
    }
    return Routed(DEAD_LETTERS.name, (meter_id or "").encode(), encode(DEAD_LETTERS.entity, letter))
