"""An MQTT message → a Kafka record, or the dead letter that says why not. Pure."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from schemas.closed_lists import DeadLetterReason
from schemas.codec import decode, decode_json, encode
from schemas.dsmr import decode_telegram
from schemas.errors import InvalidMessage
from schemas.topics import DEAD_LETTERS, KINDS, MqttTopic, parse_mqtt_topic

MAX_PAYLOAD_BYTES = 65_536  # a telegram with all its lines has 2 kB


@dataclass(frozen=True)
class Routed:
    """What goes to Kafka."""

    topic: str
    key: bytes
    value: bytes


def routed(mqtt_topic: str, payload: bytes, received_at: datetime, accept_run_ids: bool = True) -> Routed:
    """The Kafka record of a message, stamped with our clock.

    Args:
        mqtt_topic: where it came in; its meter_id must equal the body's.
        payload: framed Avro, JSON or a DSMR telegram, as the topic's last level says.
        received_at: our wall clock, UTC.
        accept_run_ids: False in production, where nobody replays: a meter could set its own arrival by one.

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
    return Routed(topic.name, place.meter_id.encode(), encode(topic.entity, record))


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
