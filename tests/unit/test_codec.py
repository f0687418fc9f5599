"""Bytes and records: the two codecs agree, and every refusal has its reason."""

import io
import json
import struct
from datetime import UTC, datetime, timedelta
from typing import Any

import fastavro
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.closed_lists import DeadLetterReason
from schemas.codec import (
    FRAME,
    TIMESTAMP,
    arrow_schema,
    avro_schema,
    decode,
    decode_batch,
    decode_json,
    encode,
    encode_batch,
    latest,
)
from schemas.errors import ContractBroken, InvalidMessage

CROWD = 9  # a batch of up to eight goes to fastavro alone
AT = datetime(2024, 3, 31, 1, 0, 0, 123456, tzinfo=UTC)
MICROS = st.integers(-(2**48), 2**52).map(lambda us: datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=us))
KINDS = {pa.string(): st.text(max_size=12), pa.int64(): st.integers(-(2**53), 2**53), TIMESTAMP: MICROS}
KINDS[pa.binary()] = st.binary(max_size=12)
READING = {"meter_id": "m1", "observed_at": AT, "dialect": "dsmr-5", "import_t1_wh": 1, "voltage_l2_mv": 230_000}
EVENT = {
    "meter_id": "m1", "observed_at": AT, "dialect": "smr", "dialect_version": "5", "source_table": "events",
    "code": "1",
}  # fmt: skip


def records(entity: str) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {
            field.name: KINDS[field.type] | st.none() if field.nullable else KINDS[field.type]
            for field in arrow_schema(entity)
        }
    )


def filled(entity: str, record: dict[str, Any]) -> dict[str, Any]:
    return {name: record.get(name) for name in arrow_schema(entity).names}


def framed(schema_id: int, record: dict[str, Any], schema: dict[str, Any]) -> bytes:
    """By fastavro and struct alone."""
    out = io.BytesIO()
    fastavro.schemaless_writer(out, fastavro.parse_schema(schema), record)
    return struct.pack(">bI", 0, schema_id) + out.getvalue()


def reason_of(payload: bytes, entity: str = "reading") -> tuple[str, str]:
    with pytest.raises(InvalidMessage) as refused:
        decode(payload, entity)
    return refused.value.reason, refused.value.detail


@pytest.mark.parametrize("entity", ["reading", "event", "alarm"])
def test_pyruhvro_and_fastavro_write_and_read_the_same_bytes(entity: str) -> None:
    @settings(max_examples=20, deadline=None)
    @given(st.lists(records(entity), min_size=1, max_size=3))
    def agree(found: list[dict[str, Any]]) -> None:
        table = pa.Table.from_pylist(found, arrow_schema(entity))
        payloads = encode_batch(entity, table)
        assert payloads == [encode(entity, record) for record in found]
        assert payloads == [
            framed(latest(entity)[0], record, avro_schema(entity, latest(entity)[1])) for record in found
        ]
        assert [decode(payload, entity) for payload in payloads] == found
        decoded = decode_batch(payloads * CROWD, entity)
        assert decoded.records.to_pylist() == found * CROWD
        assert decoded.reasons.null_count == decoded.details.null_count == len(found) * CROWD

    agree()


def test_data_of_an_earlier_version_and_of_none_are_read_among_newer_ones() -> None:
    record = filled("reading", READING)
    new, added = encode("reading", record), ("import_t3_wh", "import_t4_wh", "export_t3_wh", "export_t4_wh")
    old = framed(1, {name: value for name, value in record.items() if name not in added}, avro_schema("reading", "1.0"))
    before = {**record, **dict.fromkeys(added)}
    decoded = decode_batch([old, None, new, b"none", old] * CROWD, "reading")
    assert [row for row in decoded.records.to_pylist() if row["meter_id"]] == [before, record, before] * CROWD
    assert decoded.reasons.to_pylist() == [None, "not_framed", None, "not_framed", None] * CROWD
    assert decode_batch([old] * CROWD, "reading").records.to_pylist() == [before] * CROWD


@settings(max_examples=20, deadline=None)
@given(records("dead-letter"))
def test_dead_letters_come_back_with_their_original_bytes_alone_and_in_a_crowd(letter: dict[str, Any]) -> None:
    payload = encode("dead-letter", letter)
    assert decode(payload, "dead-letter") == letter
    decoded = decode_batch([payload] * CROWD, "dead-letter")
    assert decoded.records.to_pylist() == [letter] * CROWD
    assert decoded.reasons.null_count == CROWD


def test_the_frame_is_a_zero_and_the_schema_id_in_four_bytes() -> None:
    assert encode("reading", filled("reading", READING))[:5] == b"\x00\x00\x00\x00\x07"
    assert encode("event", filled("event", EVENT))[:5] == b"\x00\x00\x00\x00\x02"


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"", DeadLetterReason.NOT_FRAMED),
        (b"\x00\x00\x00\x00", DeadLetterReason.NOT_FRAMED),
        (b"\x01\x00\x00\x00\x01abc", DeadLetterReason.NOT_FRAMED),
        (b'{"meter_id": "m1"}', DeadLetterReason.NOT_FRAMED),
        (FRAME.pack(0, 999) + b"abc", DeadLetterReason.UNKNOWN_SCHEMA_ID),
        (FRAME.pack(0, 2**32 - 1), DeadLetterReason.UNKNOWN_SCHEMA_ID),
        (encode("event", filled("event", EVENT)), DeadLetterReason.WRONG_ENTITY),
        (FRAME.pack(0, 1), DeadLetterReason.UNDECODABLE),
        (encode("reading", filled("reading", READING))[:-1], DeadLetterReason.UNDECODABLE),
        (FRAME.pack(0, 1) + b"\xff" * 40, DeadLetterReason.UNDECODABLE),
        (FRAME.pack(0, 1) + b"\x04\xff\xfe" + b"\x00" * 60, DeadLetterReason.UNDECODABLE),
        (encode("reading", filled("reading", READING)) + b"\x00", DeadLetterReason.TRAILING_BYTES),
    ],
    ids=lambda value: value.hex()[:24] if isinstance(value, bytes) else str(value),
)
def test_bytes_that_are_no_reading_are_refused_with_their_reason_alone_and_in_a_crowd(
    payload: bytes, reason: DeadLetterReason
) -> None:
    found, detail = reason_of(payload)
    assert found == reason
    assert detail
    good = encode("reading", filled("reading", READING))
    crowd = decode_batch([good] * 20 + [payload] + [good] * 20, "reading")
    assert crowd.reasons.to_pylist() == [None] * 20 + [reason.value] + [None] * 20
    assert crowd.details.to_pylist()[20] == detail
    rows = crowd.records.to_pylist()
    assert rows[20] == filled("reading", {})
    assert rows[:20] == rows[21:] == [filled("reading", READING)] * 20


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=60), st.booleans())
def test_no_bytes_bring_the_decoder_down(data: bytes, is_framed: bool) -> None:
    payload = FRAME.pack(0, 1) + data if is_framed else data
    crowd = decode_batch([payload, *[encode("reading", filled("reading", READING))] * 9], "reading")
    expected: tuple[dict[str, Any], str | None]
    try:
        expected = (decode(payload, "reading"), None)
    except InvalidMessage as error:
        expected = (filled("reading", {}), error.reason)
    assert (crowd.records.to_pylist()[0], crowd.reasons.to_pylist()[0]) == expected
    assert crowd.reasons.null_count == 9 + (expected[1] is None)


def micros_of(year: int) -> int:
    return (datetime(year, 1, 1, tzinfo=UTC) - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)


@pytest.mark.parametrize("micros", [2**62, -(2**62), 2**63 - 1, micros_of(1), micros_of(2) - 1, micros_of(9999)])
def test_a_time_beyond_the_calendar_or_at_its_ends_is_refused_alone_and_in_a_crowd(micros: int) -> None:
    plain = {**avro_schema("reading", "1.0")}
    plain["fields"] = [
        {**field, "type": "long"} if field["name"] == "observed_at" else field for field in plain["fields"]
    ]
    wild = framed(1, {**filled("reading", READING), "observed_at": micros}, plain)
    assert reason_of(wild)[0] == DeadLetterReason.UNDECODABLE
    good = encode("reading", filled("reading", READING))
    crowd = decode_batch([good] * 20 + [wild], "reading")
    assert crowd.reasons.to_pylist() == [None] * 20 + [DeadLetterReason.UNDECODABLE.value]


@pytest.mark.parametrize("field", ["voltage_l1_mv", "import_t1_wh", "export_w", "sag_count_l3"])
@pytest.mark.parametrize("value", [2**53 + 1, -(2**53) - 1, 2**63 - 1, -(2**63)])
def test_a_number_that_no_meter_can_mean_is_refused_alone_and_in_a_crowd(field: str, value: int) -> None:
    wild = encode("reading", filled("reading", {**READING, field: value}))
    assert reason_of(wild) == (DeadLetterReason.UNDECODABLE, f"{field} is out of range: {value}")
    good = encode("reading", filled("reading", {**READING, "seq": 2**63 - 1}))
    crowd = decode_batch([good] * 20 + [wild] + [good] * 20, "reading")
    assert crowd.reasons.to_pylist() == [None] * 20 + [DeadLetterReason.UNDECODABLE.value] + [None] * 20
    assert set(crowd.records.column("seq").to_pylist()) == {2**63 - 1, None}, "a number is no measurement"


def test_one_bad_row_among_thousands_costs_no_other() -> None:
    sound = [encode("reading", filled("reading", {**READING, "seq": number})) for number in range(5_000)]
    payloads = [*sound[:17], None, *sound[18:4_321], sound[4_321][:-3], *sound[4_322:]]
    decoded = decode_batch(payloads, "reading")
    wrong = {n: reason for n, reason in enumerate(decoded.reasons.to_pylist()) if reason}
    assert wrong == {17: "not_framed", 4_321: "undecodable"}
    expected = [None if number in wrong else number for number in range(5_000)]
    assert decoded.records.column("seq").to_pylist() == expected


def test_no_payload_gives_no_row() -> None:
    decoded = decode_batch([], "reading")
    assert (len(decoded.records), decoded.records.column_names) == (0, arrow_schema("reading").names)


@pytest.mark.parametrize(
    "wrong", [{"meter_id": None}, {"observed_at": "yesterday"}, {"import_t1_wh": "1"}, {"import_t1_wh": 2**63}], ids=str
)
def test_a_record_of_ours_that_does_not_fit_is_a_bug_of_ours(wrong: dict[str, Any]) -> None:
    with pytest.raises(ContractBroken, match=r"does not fit reading 1\.1"):
        encode("reading", filled("reading", READING) | wrong)


def json_of(**changed: Any) -> bytes:
    record = {**READING, "observed_at": "2024-03-31T02:00:00.123456+01:00", **changed}
    return json.dumps({name: value for name, value in record.items() if value is not ...}).encode()


def test_json_has_the_same_fields_and_units_and_any_offset() -> None:
    assert decode_json(json_of(), "reading") == filled("reading", READING)
    assert decode_json(json_of(observed_at="2024-03-31T01:00:00.123456Z"), "reading") == filled("reading", READING)
    assert decode_json(json_of(seq=None), "reading") == filled("reading", READING)


@settings(max_examples=20, deadline=None)
@given(records("reading"))
def test_json_and_avro_say_the_same(record: dict[str, Any]) -> None:
    text = {name: value.isoformat() if isinstance(value, datetime) else value for name, value in record.items()}
    assert decode_json(json.dumps(text).encode(), "reading") == record


@pytest.mark.parametrize(
    ("payload", "detail"),
    [
        (b"", "Expecting value"),
        (b"{", "Expecting property"),
        (b'{"meter_id": "\xff"}', "codec"),
        (b"[]", "not a JSON object"),
        (b"null", "not a JSON object"),
        (b"[" * 100_000, "recursion"),
        (json_of(volts=230, amps=1), "unknown fields: amps, volts"),
        (json_of(meter_id=...), "meter_id is missing"),
        (json_of(observed_at=None), "observed_at is missing"),
        (json_of(import_t1_wh="1"), "import_t1_wh is not a int64: '1'"),
        (json_of(import_t1_wh=1.0), "import_t1_wh is not a int64: 1.0"),
        (json_of(import_t1_wh=True), "import_t1_wh is not a int64: True"),
        (json_of(import_t1_wh=2**63), "import_t1_wh is not a int64"),
        (json_of(import_t1_wh=float("nan")), "import_t1_wh is not a int64: nan"),
        (json_of(meter_id=5), "meter_id is not a string: 5"),
        (json_of(observed_at="yesterday"), "observed_at is not ISO 8601: 'yesterday'"),
        (json_of(observed_at=1711846800), "observed_at is not ISO 8601: 1711846800"),
        (json_of(observed_at="2024-03-31T01:00:00"), "observed_at has no UTC offset: 2024-03-31T01:00:00"),
        (json_of(observed_at="2024-03-31\ud80001:00:00"), "observed_at has no UTC offset: 2024-03-31\\ud80001:00:00"),
        (json_of(observed_at="0001-01-01T00:00:00+01:00"), "observed_at is before the calendar"),
        (json_of(observed_at="0001-01-01T00:00:00Z"), "observed_at is out of range: 0001-01-01"),
        (json_of(observed_at="9999-12-31T23:59:59Z"), "observed_at is out of range: 9999-12-31"),
        (json_of(voltage_l1_mv=2**63 - 1), f"voltage_l1_mv is out of range: {2**63 - 1}"),
        (json_of(equipment_id="\ud800"), "equipment_id"),
        (json_of(**{"\ud800": 1}), "unknown fields: \\ud800"),
        (json_of(**{"x" * 100_000: 1}), "unknown fields: xxx"),
    ],
    ids=lambda value: str(value)[-60:],
)
def test_json_that_is_no_reading_is_refused_and_says_what_is_wrong(payload: bytes, detail: str) -> None:
    with pytest.raises(InvalidMessage) as refused:
        decode_json(payload, "reading")
    assert refused.value.reason == DeadLetterReason.INVALID_JSON
    assert detail in refused.value.detail
    assert len(refused.value.detail.encode()) <= 2_000, "a dead letter can hold it"
    assert len(refused.value.detail) <= 500
