"""From an MQTT message to a Kafka record, without a broker."""

from datetime import UTC, datetime

import pytest

from ingest.decode import dead_letter, routed
from schemas.codec import decode, encode
from schemas.errors import InvalidMessage
from schemas.topics import DEAD_LETTERS, EVENTS, READINGS, mqtt_topic

NOW = datetime(2026, 1, 1, tzinfo=UTC)
READING = {"meter_id": "m1", "observed_at": datetime(2024, 1, 1, tzinfo=UTC), "dialect": "own", "import_t1_wh": 5}
EVENT = {
    "meter_id": "m1",
    "observed_at": datetime(2024, 1, 1, tzinfo=UTC),
    "dialect": "c12.19",
    "dialect_version": "1",
    "source_table": "ST76",
    "code": "AE1",
}


def test_a_reading_keeps_its_values_and_gets_our_arrival() -> None:
    said = {**READING, "received_at": datetime(1999, 1, 1, tzinfo=UTC)}
    record = routed(mqtt_topic("m1"), encode("reading", said), NOW)
    assert (record.topic, record.key) == (READINGS.name, b"m1")
    found = decode(record.value, "reading")
    assert found["received_at"] == NOW
    assert found["import_t1_wh"] == 5


def test_an_event_goes_to_its_own_topic() -> None:
    record = routed(mqtt_topic("m1", "events"), encode("event", EVENT), NOW)
    assert record.topic == EVENTS.name


def test_the_body_must_be_of_the_meter_that_the_topic_names() -> None:
    with pytest.raises(InvalidMessage) as refused:
        routed(mqtt_topic("m2"), encode("reading", READING), NOW)
    assert refused.value.reason == "meter_id_mismatch"


def test_production_refuses_run_ids() -> None:
    payload = encode("reading", {**READING, "run_id": "r"})
    assert routed(mqtt_topic("m1"), payload, NOW).topic == READINGS.name
    with pytest.raises(InvalidMessage) as refused:
        routed(mqtt_topic("m1"), payload, NOW, accept_run_ids=False)
    assert refused.value.reason == "run_id_refused"


def test_a_dead_letter_has_the_original_bytes_and_says_why() -> None:
    error = InvalidMessage("undecodable", "why")
    letter = dead_letter("meters/x", b"\xff\0", error, NOW)
    assert letter.topic == DEAD_LETTERS.name
    found = decode(letter.value, "dead-letter")
    assert (found["payload"], found["reason"], found["detail"], found["mqtt_topic"], found["meter_id"]) == (
        b"\xff\0",
        "undecodable",
        "why",
        "meters/x",
        None,
    )
