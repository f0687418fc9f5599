"""From an MQTT message to a Kafka record, without a broker."""

from datetime import UTC, datetime

import pytest

from ingest.decode import dead_letter, routed
from schemas.codec import decode, encode
from schemas.dsmr import with_crc
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
    [record] = routed(mqtt_topic("m1"), encode("reading", said), NOW)
    assert (record.topic, record.key) == (READINGS.name, b"m1")
    found = decode(record.value, "reading")
    assert found["received_at"] == NOW
    assert found["import_t1_wh"] == 5


def test_an_event_goes_to_its_own_topic() -> None:
    [record] = routed(mqtt_topic("m1", "events"), encode("event", EVENT), NOW)
    assert record.topic == EVENTS.name


def test_the_body_must_be_of_the_meter_that_the_topic_names() -> None:
    with pytest.raises(InvalidMessage) as refused:
        routed(mqtt_topic("m2"), encode("reading", READING), NOW)
    assert refused.value.reason == "meter_id_mismatch"


def test_production_refuses_run_ids() -> None:
    payload = encode("reading", {**READING, "run_id": "r"})
    assert routed(mqtt_topic("m1"), payload, NOW)[0].topic == READINGS.name
    with pytest.raises(InvalidMessage) as refused:
        routed(mqtt_topic("m1"), payload, NOW, accept_run_ids=False)
    assert refused.value.reason == "run_id_refused"


def telegram(clock: str, *failures: str) -> bytes:
    """A telegram of a time with a failure log: `YYMMDDhhmmss` and S or W, and the pairs of end and seconds."""
    log = f"1-0:99.97.0({len(failures)})(0-0:96.7.19){''.join(failures)}\r\n" if failures else ""
    lines = f"1-3:0.2.8(50)\r\n0-0:1.0.0({clock})\r\n1-0:1.8.1(000001.000*kWh)\r\n{log}"
    return with_crc(f"/XMX5LGBBFG1009394887\r\n\r\n{lines}!")


def test_a_power_failure_is_carried_once_with_the_first_telegram_that_tells_of_it() -> None:
    place, carried, now = mqtt_topic("m1", "readings", "dsmr"), dict[str, datetime](), datetime(2019, 4, 1, tzinfo=UTC)

    def events(payload: bytes) -> list[tuple[datetime, str]]:
        *others, reading = routed(place, payload, now, failures=carried)
        assert (reading.topic, reading.key) == (READINGS.name, b"m1")
        assert {(other.topic, other.key) for other in others} <= {(EVENTS.name, b"m1")}
        found = [decode(other.value, "event") for other in others]
        assert all(each["received_at"] == now and each["meter_id"] == "m1" for each in found)
        return [(each["observed_at"], each["code"]) for each in found]

    history, short = "(190101000000W)(0000000300*s)", "(190324141000W)(0000000600*s)"
    later = "(190324145900W)(0000000060*s)"
    down, up = datetime(2019, 3, 24, 13, 0, tzinfo=UTC), datetime(2019, 3, 24, 13, 10, tzinfo=UTC)
    assert events(telegram("190324140000W", history)) == []
    assert events(telegram("190324141010W", short, history)) == [(down, "failed"), (up, "returned")]
    assert events(telegram("190324141020W", short, history)) == []
    assert [code for _, code in events(telegram("190324150000W", later, short, history))] == ["failed", "returned"]
    assert events(telegram("190324150010W")) == []
    days_later = "(190327100000W)(0000000060*s)"
    assert len(events(telegram("190329100000W", days_later))) == 2, "its telegrams were away for days"
    assert len(events(telegram("310324150000W", "(310324145900W)(0000000060*s)"))) == 2
    assert len(events(telegram("190330150000W", "(190330145900W)(0000000060*s)"))) == 2, "its clock was ahead"
    assert events(telegram("190331150000W", "(190331145900W)(2147483647*s)")) == []
    assert events(telegram("190108150000W", "(190108145900W)(0026000000*s)")) == [], "its clock is 83 days behind"


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
