"""Recording, without a broker: what is kept of a batch, in which order."""

from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa

from kafka_io.ranges import KAFKA
from replay.record import Recorded, _interval_s, _never_back, _take
from schemas.codec import arrow_schema, encode
from schemas.topics import DEAD_LETTERS, READINGS

AT = datetime(2024, 3, 4, 6, tzinfo=UTC)
Message = tuple[int, int, bytes | None, bytes | None]


def reading(meter_id: str, minute: int, **more: Any) -> bytes:
    known = {"meter_id": meter_id, "observed_at": AT + timedelta(minutes=minute), "dialect": "own", "run_id": "r1"}
    return encode("reading", {**dict.fromkeys(arrow_schema("reading").names), **known, **more})


def table(batch: list[Message]) -> pa.Table:
    """Records as they are fetched, of one partition or several."""
    partitions, stamps, keys, values = zip(*batch, strict=True)
    columns = {"key": keys, "value": values, "partition": partitions, "offset": range(len(batch))}
    at = pa.array(stamps, pa.timestamp("ms", "UTC")).cast(KAFKA.field("timestamp").type)
    columns |= {"topic": [READINGS.name] * len(batch), "timestamp": at}
    return pa.table([pa.array(columns[name], KAFKA.field(name).type) for name in KAFKA.names], schema=KAFKA)


def recorded(*batches: list[Message], run_id: str | None = None) -> Recorded:
    into = Recorded(READINGS)
    for batch in batches:
        _take(into, table(batch), run_id)
    return into


def minutes(into: Recorded) -> list[tuple[str, int]]:
    rows = into.in_order().select(["meter_id", "observed_at"]).to_pylist()
    return [(row["meter_id"], int((row["observed_at"] - AT).total_seconds() // 60)) for row in rows]


def test_records_of_all_partitions_are_in_the_order_of_kafkas_time_and_late_ones_stay_late() -> None:
    into = recorded(
        [(0, 100, b"a", reading("a", 1)), (0, 300, b"a", reading("a", 3)), (0, 400, b"a", reading("a", 2))],
        [(1, 200, b"b", reading("b", 1)), (1, 350, b"b", reading("b", 1))],
    )
    assert minutes(into) == [("a", 1), ("b", 1), ("a", 3), ("b", 1), ("a", 2)]


def test_a_producer_whose_clock_falls_back_does_not_change_the_order_of_its_partition() -> None:
    into = recorded([(0, 500, b"a", reading("a", 1)), (0, 100, b"a", reading("a", 2)), (1, 300, b"b", reading("b", 1))])
    assert minutes(into) == [("b", 1), ("a", 1), ("a", 2)]
    assert _never_back(np.array([0, 1, 0]), np.array([5, 1, 2])).tolist() == [5, 1, 5]


def test_what_cannot_be_decoded_is_counted_by_its_reason_and_left_out() -> None:
    good = reading("a", 1)
    into = recorded([(0, 1, b"a", good), (0, 2, b"a", b"\xff" + good), (0, 3, b"a", good + b"\0"), (0, 4, b"b", good)])
    assert minutes(into) == [("a", 1)]
    assert into.read == 4
    assert into.defects == {"not_framed": 1, "trailing_bytes": 1, "meter_id_mismatch": 1}


def test_only_the_asked_run_is_kept() -> None:
    into = recorded([(0, 1, b"a", reading("a", 1)), (0, 2, b"a", reading("a", 2, run_id="r2"))], run_id="r2")
    assert minutes(into) == [("a", 2)]
    nobody = recorded([(0, 1, b"a", reading("a", 1, run_id=None))], run_id="r2")
    assert minutes(nobody) == []


def test_dead_letters_are_counted_by_their_reason() -> None:
    letter = {"payload": b"?", "reason": "invalid_json", "detail": "", "received_at": AT}
    into = Recorded(DEAD_LETTERS)
    _take(into, table([(0, 1, b"a", encode("dead-letter", letter))]), None)
    assert into.defects == {"invalid_json": 1}


def test_what_a_run_stamps_is_not_on_the_tape() -> None:
    names = recorded([(0, 1, b"a", reading("a", 1))]).in_order().schema.names
    assert not {"run_id", "seq", "sent_at", "received_at"} & set(names)


def test_the_interval_is_the_usual_step_of_a_meter_whatever_came_twice_or_late() -> None:
    rows = [(0, minute, b"a", reading("a", minute)) for minute in (0, 5, 10, 10, 15, 30, 20)]
    assert _interval_s(recorded([*rows, (0, 99, b"b", reading("b", 2))]).in_order()) == 300
    assert _interval_s(recorded([(0, 1, b"a", reading("a", 1))]).in_order()) is None
