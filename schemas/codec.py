"""Bytes ⇄ record and bytes ⇄ Arrow batch, in Confluent's wire format: 0x00, 4-byte schema id, Avro datum.

Readings and events go through pyruhvro by the batch; fastavro is the judge of what that refuses, and does the
entities that come one by one (dead letters).
"""

import io
import json
import struct
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache
from typing import Any, NamedTuple

import fastavro
import pyarrow as pa
import pyarrow.compute as pc
import pyruhvro

from schemas.closed_lists import DeadLetterReason
from schemas.errors import ContractBroken, InvalidMessage
from schemas.topics import AVRO_FOLDER, SCHEMA_IDS

FRAME = struct.Struct(">bI")
LONGEST = 2**31 - 1  # bytes in a binary array
TIMESTAMP = pa.timestamp("us", "UTC")
RANGES = {
    pa.int64(): (-(2**53), 2**53),
    TIMESTAMP: (datetime(2, 1, 1, tzinfo=UTC), datetime(9998, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC)),
}
"""What a number or a time can be. So far a double has every integer, and differences, sums and percentages of a few
stay within 64 bits; and a window or a lateness added to a time stays within the calendar (years 1 to 9999)."""
UNBOUNDED = ("seq", "kafka_partition", "kafka_offset")  # are kept as they are: nothing is computed from them
ARROW_TYPES = {"string": pa.string(), "long": pa.int64(), "bytes": pa.binary()}


class DecodedBatch(NamedTuple):
    """What `decode_batch` returns.

    Attributes:
        records: one row per payload in its order, columns of the entity; all null where it was refused.
        reasons: per payload null or a `DeadLetterReason`.
        details: per payload null or what was wrong.
    """

    records: pa.Table
    reasons: pa.Array
    details: pa.Array


@cache
def avro_schema(entity: str, version: str) -> dict[str, Any]:
    """The released Avro schema as JSON object."""
    schema: dict[str, Any] = json.loads((AVRO_FOLDER.joinpath(entity, f"{version}.avsc")).read_text())
    return schema


@cache
def _parsed(entity: str, version: str) -> Any:
    return fastavro.parse_schema(avro_schema(entity, version))


@cache
def avro_text(entity: str, version: str) -> str:
    """The released Avro schema as JSON text."""
    return json.dumps(avro_schema(entity, version))


@cache
def latest(entity: str) -> tuple[int, str]:
    """(schema id, version) that we write for the entity."""
    return max((key, version) for key, (name, version) in SCHEMA_IDS.items() if name == entity)


@cache
def frame_of(schema_id: int) -> bytes:
    """What stands before the Avro datum."""
    return FRAME.pack(0, schema_id)


@cache
def arrow_schema(entity: str) -> pa.Schema:
    """Arrow schema of the entity's latest version; Avro's required fields are not nullable."""
    fields = []
    for field in avro_schema(entity, latest(entity)[1])["fields"]:
        optional = isinstance(field["type"], list)
        kind = field["type"][1] if optional else field["type"]
        fields.append(pa.field(field["name"], TIMESTAMP if isinstance(kind, dict) else ARROW_TYPES[kind], optional))
    return pa.schema(fields)


@cache
def _ranges(entity: str) -> dict[str, tuple[Any, Any]]:
    """Field → the least and the most that it can be."""
    return {
        field.name: RANGES[field.type]
        for field in arrow_schema(entity)
        if field.type in RANGES and field.name not in UNBOUNDED
    }


@cache
def _edges(entity: str) -> dict[str, tuple[int, int]]:
    """`_ranges` as Arrow holds them: times in microseconds since 1970."""

    def held(name: str, value: Any) -> int:
        return int(pa.scalar(value, arrow_schema(entity).field(name).type).cast(pa.int64()).as_py())

    return {name: (held(name, least), held(name, most)) for name, (least, most) in _ranges(entity).items()}


def _in_range(entity: str, record: dict[str, Any], reason: DeadLetterReason) -> dict[str, Any]:
    """The record.

    Raises:
        InvalidMessage: with the reason, where a value cannot be one.
    """
    for name, (least, most) in _ranges(entity).items():
        value = record[name]
        if value is not None and not least <= value <= most:
            raise InvalidMessage(reason, f"{name} is out of range: {value}")
    return record


def encode(entity: str, record: dict[str, Any]) -> bytes:
    """One framed datum.

    Raises:
        ContractBroken: the record does not fit the schema: it is ours, so that is a bug.
    """
    schema_id, version = latest(entity)
    out = io.BytesIO(frame_of(schema_id))
    out.seek(FRAME.size)
    try:
        fastavro.schemaless_writer(out, _parsed(entity, version), record)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        msg = f"record does not fit {entity} {version}: {error}"
        raise ContractBroken(msg) from error
    return out.getvalue()


def _version(payload: bytes, entity: str) -> str:
    if len(payload) < FRAME.size or payload[0] != 0:
        raise InvalidMessage(DeadLetterReason.NOT_FRAMED, "does not begin with 0x00 and a 4-byte schema id")
    schema_id = FRAME.unpack_from(payload)[1]
    if schema_id not in SCHEMA_IDS:
        raise InvalidMessage(DeadLetterReason.UNKNOWN_SCHEMA_ID, f"schema id {schema_id} is not in the table")
    name, version = SCHEMA_IDS[schema_id]
    if name != entity:
        raise InvalidMessage(DeadLetterReason.WRONG_ENTITY, f"schema id {schema_id} is {name}, expected {entity}")
    return version


def decode(payload: bytes, entity: str) -> dict[str, Any]:
    """The record in a framed datum, read by the latest schema.

    Raises:
        InvalidMessage: with the reason for the dead letter.
    """
    version = _version(payload, entity)
    stream = io.BytesIO(payload)
    stream.seek(FRAME.size)
    try:
        record: dict[str, Any] = fastavro.schemaless_reader(  # type: ignore[assignment]
            stream, _parsed(entity, version), _parsed(entity, latest(entity)[1])
        )
    except Exception as error:  # the reader raises whatever the bytes lead it into
        raise InvalidMessage(DeadLetterReason.UNDECODABLE, f"{type(error).__name__}: {error}") from error
    if stream.tell() != len(payload):
        raise InvalidMessage(
            DeadLetterReason.TRAILING_BYTES, f"{len(payload) - stream.tell()} bytes follow the {entity}"
        )
    return _in_range(entity, record, DeadLetterReason.UNDECODABLE)


def encode_batch(entity: str, records: pa.Table) -> list[bytes]:
    """Framed data of a table with the entity's columns, in row order."""
    schema_id, version = latest(entity)
    header = frame_of(schema_id)
    out: list[bytes] = []
    for batch in records.select(arrow_schema(entity).names).cast(arrow_schema(entity)).to_batches():
        for data in pyruhvro.serialize_record_batch(batch, avro_text(entity, version), 1):
            out.extend([header + datum for datum in data.to_pylist()])
    return out


def _ruhvro_decode(framed: pa.BinaryArray, entity: str) -> pa.Table | None:
    """All decoded, or None where at least one is not exactly one datum in the frame of the first one's version."""
    frame = (framed[0].as_py() or b"")[: FRAME.size]
    version = next((one for key, (name, one) in SCHEMA_IDS.items() if name == entity and frame_of(key) == frame), None)
    is_framed = pc.equal(pc.binary_slice(framed, 0, FRAME.size), frame)
    if framed.null_count or version is None or not pc.all(is_framed).as_py():
        return None
    data = pc.binary_slice(framed, FRAME.size, LONGEST)
    try:
        batch = pyruhvro.deserialize_array(data.to_pylist(), avro_text(entity, version))
        again = pyruhvro.serialize_record_batch(batch, avro_text(entity, version), 1)
    except ValueError:
        return None
    for name, (least, most) in _edges(entity).items():
        if name not in batch.schema.names:
            continue
        found = pc.min_max(batch.column(name).cast(pa.int64())).as_py()
        if found["min"] is not None and (found["min"] < least or found["max"] > most):
            return None
    is_same = pa.chunked_array(again, pa.binary()).equals(pa.chunked_array([data]))
    if not is_same:  # it takes trailing bytes without a word
        return None
    schema, table = arrow_schema(entity), pa.Table.from_batches([batch])
    known = {name: table[name] for name in table.column_names}
    return pa.table({field.name: known.get(field.name, pa.nulls(len(table), field.type)) for field in schema})


def _by_version(values: pa.BinaryArray, entity: str) -> list[pa.Array]:
    """Places of the data of each version that is there; what is of none is with the last."""
    frames = pc.binary_slice(values, 0, FRAME.size)
    frames_of_entity = [frame_of(key) for key, (name, _) in SCHEMA_IDS.items() if name == entity]
    number = pc.index_in(frames, pa.array(frames_of_entity, pa.binary())).fill_null(len(frames_of_entity) - 1)
    return [pc.indices_nonzero(pc.equal(number, one)) for one in pc.unique(number)]


def decode_batch(payloads: Sequence[bytes | None] | pa.BinaryArray, entity: str) -> DecodedBatch:
    """The records in framed data; a bad one costs a look at its neighbours, never the batch.

    pyruhvro refuses a whole array for one bad datum and does not say which, and is silent on trailing bytes: so the
    result is encoded again and compared, and a slice that fails is halved until the few left go to fastavro. Data of
    several versions are taken version by version.

    Args:
        payloads: framed data; null counts as not framed.
        entity: `reading` or `event`.
    """
    values = payloads if isinstance(payloads, pa.BinaryArray) else pa.array(payloads, pa.binary())
    by_version = _by_version(values, entity)
    if len(by_version) > 1:
        parts = [decode_batch(values.take(places), entity) for places in by_version]
        order = pc.sort_indices(pa.concat_arrays(by_version))
        of_all = pa.concat_tables([part.records for part in parts]).take(order)
        why = pa.concat_arrays([part.reasons for part in parts]).take(order)
        return DecodedBatch(of_all, why, pa.concat_arrays([part.details for part in parts]).take(order))
    schema = arrow_schema(entity)
    reasons: list[str | None] = [None] * len(payloads)
    details: list[str | None] = [None] * len(payloads)
    pieces: list[pa.Table] = []
    nothing = {name: None for name in schema.names}
    nullable = pa.schema([field.with_nullable(True) for field in schema])

    def one_by_one(start: int, stop: int) -> None:
        rows = []
        for index in range(start, stop):
            try:
                rows.append(decode(values[index].as_py() or b"", entity))
            except InvalidMessage as error:
                rows.append(nothing)
                reasons[index], details[index] = error.reason, error.detail
        pieces.append(pa.Table.from_pylist(rows, nullable))

    def take(start: int, stop: int) -> None:
        if stop - start <= 8:
            one_by_one(start, stop)
            return
        batch = _ruhvro_decode(values.slice(start, stop - start), entity)
        if batch is not None:
            pieces.append(batch.cast(nullable))
            return
        middle = (start + stop) // 2
        take(start, middle)
        take(middle, stop)

    if any(field.type == pa.binary() for field in schema):
        one_by_one(0, len(payloads))  # pyruhvro knows no bytes
    elif len(values):
        take(0, len(payloads))
    records = pa.concat_tables(pieces) if pieces else nullable.empty_table()
    return DecodedBatch(records, pa.array(reasons, pa.string()), pa.array(details, pa.string()))


def decode_json(payload: bytes, entity: str) -> dict[str, Any]:
    """The record in a JSON object with the entity's own field names and units; times are ISO 8601 with an offset.

    Raises:
        InvalidMessage: `invalid_json` with the field that does not fit.
    """
    try:
        record = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise InvalidMessage(DeadLetterReason.INVALID_JSON, str(error)) from error
    if not isinstance(record, dict):
        raise InvalidMessage(DeadLetterReason.INVALID_JSON, "not a JSON object")
    schema = arrow_schema(entity)
    unknown = sorted(set(record) - set(schema.names))
    if unknown:
        raise InvalidMessage(DeadLetterReason.INVALID_JSON, f"unknown fields: {', '.join(unknown)}")
    for field in schema:
        value = record.get(field.name)
        if value is None and not field.nullable:
            raise InvalidMessage(DeadLetterReason.INVALID_JSON, f"{field.name} is missing")
        if value is None:
            record[field.name] = None
        elif field.type == TIMESTAMP:
            record[field.name] = _utc(field.name, value)
        elif (field.type == pa.string() and not isinstance(value, str)) or (
            field.type == pa.int64() and (type(value) is not int or not -(2**63) <= value < 2**63)
        ):
            raise InvalidMessage(DeadLetterReason.INVALID_JSON, f"{field.name} is not a {field.type}: {value!r}")
        elif isinstance(value, str) and not _is_text(value):
            raise InvalidMessage(DeadLetterReason.INVALID_JSON, f"{field.name} is not text: {value!r}")
    return _in_range(entity, record, DeadLetterReason.INVALID_JSON)


def _is_text(value: str) -> bool:
    """False for what JSON can write and UTF-8 cannot: half a surrogate pair."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _utc(name: str, value: Any) -> datetime:
    try:
        stamp = datetime.fromisoformat(value)
    except (ValueError, TypeError) as error:
        raise InvalidMessage(DeadLetterReason.INVALID_JSON, f"{name} is not ISO 8601: {value!r}") from error
    if stamp.tzinfo is None:
        raise InvalidMessage(DeadLetterReason.INVALID_JSON, f"{name} has no UTC offset: {value}")
    try:
        return stamp.astimezone(UTC)
    except OverflowError as error:
        raise InvalidMessage(DeadLetterReason.INVALID_JSON, f"{name} is before the calendar: {value}") from error
