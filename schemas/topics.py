"""Kafka topics, pinned schema ids, and the MQTT topic layout."""

import re
import zlib
from dataclasses import dataclass, field
from importlib.resources import files

from schemas.closed_lists import DeadLetterReason
from schemas.errors import InvalidMessage

AVRO_FOLDER = files("schemas").joinpath("avro")
HOUR_MS = 3_600_000
COMPRESSED = {"compression.type": "lz4"}

SCHEMA_IDS = {
    1: ("reading", "1.0"),
    2: ("event", "1.0"),
    3: ("dead-letter", "1.0"),
    4: ("alarm", "1.0"),
    5: ("critical-event", "1.0"),
    6: ("acknowledgement", "1.0"),
    7: ("reading", "1.1"),
}
"""Schema id on the wire → (entity, version); a schema registry, where one runs, is loaded with the same."""


@dataclass(frozen=True)
class Topic:
    """One Kafka topic: key is the meter_id, values are framed Avro of `entity`.

    Attributes:
        partitions: fixed for a topic's life, since the key's partition keeps the order of a meter.
        retention_ms: how long Kafka keeps records; the lake keeps them longer.
        dead_letters: name of the topic that takes what cannot be decoded.
    """

    name: str
    entity: str
    partitions: int = 4
    retention_ms: int = 7 * 24 * HOUR_MS
    dead_letters: str | None = "dead-letters-v1"
    config: dict[str, str] = field(default_factory=COMPRESSED.copy, hash=False)


READINGS = Topic("meter-readings-v1", "reading")
EVENTS = Topic("meter-events-v1", "event")
DEAD_LETTERS = Topic(
    "dead-letters-v1", "dead-letter", partitions=1, retention_ms=30 * 24 * HOUR_MS, dead_letters=None,
    config={**COMPRESSED, "max.message.bytes": "2097152"},  # the longest of the bridge's records, as a batch
)  # fmt: skip
ALARMS = Topic("alarms-v1", "alarm", dead_letters=None)
CRITICAL_EVENTS = Topic("critical-events-v1", "critical-event", dead_letters=None)
COMMANDS = Topic("alarm-commands-v1", "acknowledgement")
TOPICS = (READINGS, EVENTS, DEAD_LETTERS, ALARMS, CRITICAL_EVENTS, COMMANDS)
INGESTED = (READINGS, EVENTS, DEAD_LETTERS)
"""The topics that the bridge writes: their end offsets say what it has carried."""

METER_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
"""A level of an MQTT topic and a token of a NATS subject at once."""
KINDS = {"readings": READINGS, "events": EVENTS}
ENCODINGS = ("avro", "json", "dsmr")


@dataclass(frozen=True)
class MqttTopic:
    """A parsed MQTT topic: `meters/<shard>/<meter_id>/<readings|events>/<avro|json|dsmr>`."""

    meter_id: str
    kind: str
    encoding: str


def shard(meter_id: str) -> str:
    """Shard of a meter: one hex digit of crc32, so that a bridge process can own shards."""
    return f"{zlib.crc32(meter_id.encode()) & 0xF:x}"


def mqtt_topic(meter_id: str, kind: str = "readings", encoding: str = "avro") -> str:
    """MQTT topic of a meter's readings or events."""
    return f"meters/{shard(meter_id)}/{meter_id}/{kind}/{encoding}"


def parse_mqtt_topic(topic: str) -> MqttTopic:
    """The parts of an MQTT topic.

    Raises:
        InvalidMessage: `bad_topic` where a level is missing, the meter id is not allowed or the shard is not its own,
            `unknown_encoding` where the last level is none of ours.
    """
    levels = topic.split("/")
    if len(levels) != 5 or levels[0] != "meters" or levels[3] not in KINDS or not METER_ID.fullmatch(levels[2]):
        raise InvalidMessage(DeadLetterReason.BAD_TOPIC, f"not meters/<shard>/<meter_id>/<kind>/<encoding>: {topic}")
    if levels[1] != shard(levels[2]):
        raise InvalidMessage(
            DeadLetterReason.BAD_TOPIC, f"shard {levels[1]} is not that of {levels[2]}: {shard(levels[2])}"
        )
    if levels[4] not in ENCODINGS or (levels[4] == "dsmr" and levels[3] != "readings"):
        raise InvalidMessage(DeadLetterReason.UNKNOWN_ENCODING, f"{levels[3]} cannot come as {levels[4]}")
    return MqttTopic(levels[2], levels[3], levels[4])
