"""The contract: schemas with their examples, released files, topics, code tables."""

import csv
import hashlib
import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas import codec, tables, topics
from schemas.closed_lists import Edge, EventAction, Severity
from schemas.codec import TIMESTAMP, arrow_schema, avro_schema, decode, decode_batch, decode_json, encode, latest
from schemas.errors import ContractBroken, InvalidMessage
from schemas.topics import AVRO_FOLDER, ENCODINGS, KINDS, SCHEMA_IDS, TOPICS, MqttTopic, mqtt_topic, parse_mqtt_topic

SCHEMAS = Path(codec.__file__).parent
EXAMPLES = SCHEMAS / "examples"
CODES = SCHEMAS / "events" / "codes.csv"
RELEASED = {
    "acknowledgement/1.0.avsc": "297a9844d9a8d1528c4ceb887272d3d8de1c5fde6a00ec88e291d69ebe1ec3d0",
    "alarm/1.0.avsc": "43181c13ba1f034c9c6c82470bc795ba36fa9567312d558ba4d03ff4b638448c",
    "critical-event/1.0.avsc": "881de2069f3018733f2f523f5aab9585b9d1706c736d8992801861d5fb1ecb43",
    "dead-letter/1.0.avsc": "3706d938b5d13016b2c88847ba98a575a838e5140ff62866ee5bdd69b5e77063",
    "event/1.0.avsc": "126bd09a909d68fcd4d3ef6fae65118a51c4d6a36907f4d2e8ad0311143bc5d2",
    "reading/1.1.avsc": "8d6143d5c25a8ec9131487c05b5eafcb7effb505981526204e7d4e4193b9d4c1",
    "reading/1.0.avsc": "6150a69a112e41a9851701be21a5b216b91aded2c789c64dda005918d8037a17",
}
"""What was released never changes: a change is a new file, with an id of its own."""

FOLDER = Path(str(AVRO_FOLDER))


def examples(kind: str) -> list[Path]:
    return sorted(EXAMPLES.glob(f"*/{kind}/*.json"))


def loaded(path: Path) -> tuple[str, dict[str, Any]]:
    """Entity and record of an example: times from ISO 8601, bytes from Latin-1."""
    entity = path.parts[-3]
    record = json.loads(path.read_text())
    for field in arrow_schema(entity):
        if isinstance(record.get(field.name), str) and field.type == TIMESTAMP:
            record[field.name] = datetime.fromisoformat(record[field.name])
        elif isinstance(record.get(field.name), str) and field.type == pa.binary():
            record[field.name] = record[field.name].encode("latin-1")
    return entity, record


def name_of(path: Path) -> str:
    return "/".join(path.parts[-3:])


@pytest.mark.parametrize("path", examples("valid"), ids=name_of)
def test_a_valid_example_goes_through_the_wire_and_back(path: Path) -> None:
    entity, record = loaded(path)
    assert decode(encode(entity, record), entity) == {name: record.get(name) for name in arrow_schema(entity).names}


@pytest.mark.parametrize(
    "path", [path for path in examples("valid") if path.parts[-3] in ("reading", "event")], ids=name_of
)
def test_a_valid_example_is_valid_json_of_a_meter_too(path: Path) -> None:
    entity, record = loaded(path)
    assert encode(entity, decode_json(path.read_bytes(), entity)) == encode(entity, record)


def is_refused(path: Path) -> bool:
    entity, record = loaded(path)
    try:
        if entity in ("reading", "event"):
            decode_json(path.read_bytes(), entity)
        else:
            encode(entity, record)
    except (InvalidMessage, ContractBroken):
        return True
    return False


@pytest.mark.parametrize("path", examples("invalid"), ids=name_of)
def test_an_invalid_example_is_refused(path: Path) -> None:
    assert is_refused(path)


def test_the_check_of_invalid_examples_passes_no_valid_one() -> None:
    assert not any(is_refused(path) for path in examples("valid"))


def test_every_schema_has_examples_of_both_kinds_and_every_field_stands_in_one() -> None:
    for entity in {name for name, _ in SCHEMA_IDS.values()}:
        valid = [path for path in examples("valid") if path.parts[-3] == entity]
        assert valid, entity
        assert [path for path in examples("invalid") if path.parts[-3] == entity], entity
        named = {name for path in valid for name in json.loads(path.read_text())}
        assert named == set(arrow_schema(entity).names)


def hashes(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.glob("*/*.avsc"))
    }


def test_released_schema_files_are_unchanged_and_listed() -> None:
    assert hashes(FOLDER) == RELEASED


def test_a_changed_schema_file_would_be_noticed(tmp_path: Path) -> None:
    (tmp_path / "reading").mkdir()
    text = (FOLDER / "reading" / "1.0.avsc").read_text()
    (tmp_path / "reading" / "1.0.avsc").write_text(text.replace("tariff", "rate"))
    assert hashes(tmp_path)["reading/1.0.avsc"] != RELEASED["reading/1.0.avsc"]


def test_schema_ids_and_files_belong_together_one_to_one() -> None:
    assert len(set(SCHEMA_IDS.values())) == len(SCHEMA_IDS)
    files = {(path.parent.name, path.stem) for path in FOLDER.glob("*/*.avsc")}
    assert files == set(SCHEMA_IDS.values())
    assert all(topic.entity in {name for name, _ in SCHEMA_IDS.values()} for topic in TOPICS)


def test_later_fields_are_optional_so_that_old_bytes_can_be_read() -> None:
    for entity, version in SCHEMA_IDS.values():
        first = {field["name"] for field in avro_schema(entity, "1.0")["fields"]}
        added = [field for field in avro_schema(entity, version)["fields"] if field["name"] not in first]
        assert all(field["type"][0] == "null" and field["default"] is None for field in added)


@pytest.fixture
def newer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """The event's schema with one more optional field, as version 1.1 with id 99."""
    for name, version in SCHEMA_IDS.values():
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / f"{version}.avsc").write_text((FOLDER / name / f"{version}.avsc").read_text())
    schema = json.loads((FOLDER / "event" / "1.0.avsc").read_text())
    schema["fields"].insert(3, {"name": "detail", "type": ["null", "string"], "default": None})
    (tmp_path / "event" / "1.1.avsc").write_text(json.dumps(schema))
    request.addfinalizer(forget)
    monkeypatch.setattr(codec, "AVRO_FOLDER", tmp_path)
    monkeypatch.setitem(SCHEMA_IDS, 99, ("event", "1.1"))
    forget()


def forget() -> None:
    of_schemas = (codec.avro_schema, codec._parsed, codec.avro_text, codec.latest, codec.arrow_schema)
    for cached in (*of_schemas, codec._ranges, codec._edges):
        cached.cache_clear()


def test_old_data_is_read_by_a_newer_schema(request: pytest.FixtureRequest) -> None:
    _, record = loaded(EXAMPLES / "event" / "valid" / "status_bit_set.json")
    old = encode("event", record)
    assert latest("event") == (2, "1.0")
    request.getfixturevalue("newer")
    assert latest("event") == (99, "1.1")
    expected = {**record, "detail": None}
    assert decode(old, "event") == expected
    new = encode("event", {**expected, "detail": "more"})
    crowd = decode_batch([old, new] * 20, "event")
    assert crowd.records.to_pylist() == [expected, {**expected, "detail": "more"}] * 20
    assert crowd.reasons.null_count == 40


def test_topic_names_are_kebab_case_with_the_schema_s_major_version() -> None:
    for topic in TOPICS:
        assert topic.name.replace("-", "").isalnum()
        assert topic.name.islower()
        assert topic.name.endswith(f"-v{latest(topic.entity)[1].split('.')[0]}")
        assert topic.config["compression.type"] == "lz4"
        assert topic.dead_letters in (None, topics.DEAD_LETTERS.name)
    assert len({topic.name for topic in TOPICS}) == len(TOPICS)


@given(
    st.from_regex(topics.METER_ID, fullmatch=True),
    st.sampled_from(
        [(kind, encoding) for kind in KINDS for encoding in ENCODINGS if (kind, encoding) != ("events", "dsmr")]
    ),
)
def test_an_mqtt_topic_comes_apart_into_what_it_was_made_of(meter_id: str, last: tuple[str, str]) -> None:
    text = mqtt_topic(meter_id, *last)
    assert parse_mqtt_topic(text) == MqttTopic(meter_id, *last)
    assert len(text.split("/")[1]) == 1
    assert int(text.split("/")[1], 16) < 16


def test_the_shard_is_a_hex_digit_of_crc32_so_that_other_languages_agree() -> None:
    assert mqtt_topic("123456789") == "meters/6/123456789/readings/avro"  # crc32 of these is cbf43926


@pytest.mark.parametrize(
    ("topic", "reason"),
    [
        ("", "bad_topic"),
        ("meters/6/123456789/readings", "bad_topic"),
        ("meters/6/123456789/readings/avro/more", "bad_topic"),
        ("metres/6/123456789/readings/avro", "bad_topic"),
        ("meters/6/123456789/alarms/avro", "bad_topic"),
        ("meters/7/123456789/readings/avro", "bad_topic"),
        ("meters/6//readings/avro", "bad_topic"),
        ("meters/6/1234.6789/readings/avro", "bad_topic"),
        ("meters/6/1234*6789/readings/avro", "bad_topic"),
        ("meters/6/1234 6789/readings/avro", "bad_topic"),
        ("meters/6/123456789\n/readings/avro", "bad_topic"),
        (f"meters/6/{'1' * 65}/readings/avro", "bad_topic"),
        ("meters/6/123456789/readings/xml", "unknown_encoding"),
        ("meters/6/123456789/events/dsmr", "unknown_encoding"),
    ],
)
def test_a_topic_that_is_not_ours_is_refused_with_its_reason(topic: str, reason: str) -> None:
    with pytest.raises(InvalidMessage) as refused:
        parse_mqtt_topic(topic)
    assert refused.value.reason == reason


def codes() -> list[dict[str, str]]:
    with CODES.open(newline="") as lines:
        return list(csv.DictReader(lines))


def wrong_codes(rows: list[dict[str, str]]) -> list[str]:
    """What is wrong with a code table."""
    found, keys = [], set()
    for row in rows:
        key = tuple(row[name] for name in ("dialect", "dialect_version", "source_table", "code"))
        if key in keys:
            found.append(f"{key} twice")
        keys.add(key)
        if (
            row["edge"] not in set(Edge)
            or row["severity"] not in set(Severity)
            or row["action"] not in set(EventAction)
        ):
            found.append(f"{key} has a word that is in no closed list")
        if not all(key) or not row["event_type"] or row["tier"] not in ("1", "2"):
            found.append(f"{key} is not filled in")
        if row["once_within_s"] and (not row["once_within_s"].isdigit() or row["action"] != "count"):
            found.append(f"{key}: once_within_s is seconds, of a code that is counted")
        if (row["action"] == "raise") != bool(row["alarm_type"]) or (row["edge"] == "none") != (
            row["alarm_type"] == ""
        ):
            found.append(f"{key}: what raises or clears has an alarm type, and nothing else has")
    raised = {(row["dialect"], row["alarm_type"]) for row in rows if row["edge"] in ("raise", "level")}
    cleared = {(row["dialect"], row["alarm_type"]) for row in rows if row["edge"] == "clear"}
    return [*found, *[f"{pair} can be cleared and not raised" for pair in sorted(cleared - raised)]]


def test_the_code_tables_use_closed_lists_and_each_key_once() -> None:
    assert wrong_codes(codes()) == []


@pytest.mark.parametrize(
    "changed",
    [
        {"severity": "bad"},
        {"edge": "rise"},
        {"action": "call"},
        {"tier": "3"},
        {"alarm_type": ""},
        {"event_type": ""},
        {"once_within_s": "300"},
        {"once_within_s": "soon"},
    ],
    ids=str,
)
def test_a_wrong_word_in_a_code_table_is_found(changed: dict[str, str]) -> None:
    rows = codes()
    assert wrong_codes([{**rows[0], **changed}, *rows[1:]])
    assert wrong_codes([*rows, rows[0]])


def test_every_code_of_the_domain_reference_is_there() -> None:
    found: dict[tuple[str, str], set[str]] = {}
    for row in codes():
        found.setdefault((row["dialect"], row["source_table"]), set()).add(row["code"])
    assert found["c12.19", "ST3"] == {f"A5{bit}" for bit in range(14)}
    assert found["c12.19", "ST76"] == {f"AE{number}" for number in range(1, 49)}
    assert found["ge-i210", "MT3"] == {f"M5{bit}" for bit in range(7)}
    assert found["itron", "MT76"] == {f"ME{number}" for number in (10, 11, 12, 13, 16, 17, 28)}
    for dialect in ("dsmr", "smr"):
        named = {
            str(number) for low, high in ((1, 25), (40, 49), (51, 59), (77, 99)) for number in range(low, high + 1)
        }
        assert named <= found[dialect, "events"], sorted(named - found[dialect, "events"], key=int)


def test_80_to_85_mean_something_else_in_each_dialect() -> None:
    types = {(row["dialect"], row["code"]): row["event_type"] for row in codes()}
    for number in range(80, 86):
        assert types["dsmr", str(number)] != types["smr", str(number)]


def test_tables_hold_all_columns_that_others_rely_on_in_utc_microseconds() -> None:
    for name, schema in tables.TABLES.items():
        assert len(set(schema.names)) == len(schema.names), name
        assert all(field.type == TIMESTAMP for field in schema if pa.types.is_timestamp(field.type)), name
    assert set(arrow_schema("reading").names) < set(tables.READINGS.names)
    assert set(arrow_schema("event").names) < set(tables.EVENTS.names)
    assert tables.ACCOUNTING.names[3:] == ["received", "stored", "duplicate", "late", "quarantined", "invalid"]
