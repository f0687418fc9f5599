"""A batch gets exactly the records that were planned, or says why not; on the real Kafka."""

import gc
from collections.abc import Iterator

import pyarrow as pa
import pytest
from confluent_kafka import Producer, TopicPartition
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from kafka_io import ranges
from kafka_io.offsets import newest_offsets
from kafka_io.ranges import KAFKA, Range, fetched
from schemas.errors import RetryLater, StateLost
from schemas.topics import READINGS
from stack.isolated import own_settings
from stack.native import NativeStack

COUNT = 30_000


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NativeStack]:
    stack = NativeStack(own_settings(tmp_path_factory.mktemp("ranges")))
    try:
        stack.start(["kafka"])
        yield stack
    finally:
        stack.stop()


@pytest.fixture(scope="module")
def kafka(stack: NativeStack) -> str:
    """`plain-0` and `plain-1` have records that name their offset; of `cut-0` the first are gone."""
    bootstrap = stack.settings.kafka_bootstrap
    admin = AdminClient({"bootstrap.servers": bootstrap})
    for done in admin.create_topics([NewTopic("plain", 2, 1), NewTopic("cut", 1, 1), NewTopic("sure", 1, 1)]).values():
        done.result(30)
    producer = Producer({"bootstrap.servers": bootstrap, "compression.type": "lz4", "enable.idempotence": True})
    for topic, partition in (("plain", 0), ("plain", 1), ("cut", 0)):
        for number in range(COUNT):
            producer.produce(
                topic, f"{number}".ljust(100), f"m{number % 7}", partition, timestamp=1_700_000_000_000 + number
            )
            producer.poll(0)
    producer.produce("plain", None, None, 1)  # neither key nor value
    assert producer.flush(60) == 0
    for done in admin.delete_records([TopicPartition("cut", 0, 1_000)]).values():
        done.result(30)
    return bootstrap


def numbers(records: pa.Table) -> list[int]:
    assert records.schema == KAFKA
    values = [int(value) for value in records.column("value").to_pylist()]
    assert records.column("offset").to_pylist() == values
    return values


@pytest.mark.parametrize(("start", "end"), [(0, 1), (0, COUNT), (12_345, 12_346), (9_999, 20_001), (COUNT - 1, COUNT)])
def test_a_range_is_what_lies_in_it_in_order(kafka: str, start: int, end: int) -> None:
    assert numbers(fetched(Range("plain", 0, start, end), kafka, False)) == list(range(start, end))


def test_ranges_one_after_the_other_by_the_same_client_do_not_mix(kafka: str) -> None:
    for partition, start in ((0, 5_000), (1, 100), (0, 100), (0, 5_000), (1, 29_000)):
        records = fetched(Range("plain", partition, start, start + 700), kafka, False)
        assert numbers(records) == list(range(start, start + 700))
        assert set(records.column("partition").to_pylist()) == {partition}


def test_key_time_and_nulls_are_kafkas(kafka: str) -> None:
    records = fetched(Range("plain", 1, COUNT - 1, COUNT + 1), kafka, False)
    assert records.column("key").to_pylist() == [f"m{(COUNT - 1) % 7}".encode(), None]
    assert records.column("value").to_pylist()[1] is None
    assert records.column("timestamp").cast(pa.int64()).to_pylist()[0] == (1_700_000_000_000 + COUNT - 1) * 1_000


def test_marks_of_transactions_are_no_records_wherever_they_lie(kafka: str) -> None:
    producer = Producer({"bootstrap.servers": kafka, "transactional.id": "t"})
    producer.init_transactions(30)
    for number in range(3):  # offsets 0 and its mark, 2 and its mark, 4 and its mark
        producer.begin_transaction()
        producer.produce("sure", f"{2 * number}".encode())
        producer.commit_transaction(30)
    assert numbers(fetched(Range("sure", 0, 0, 6), kafka, False)) == [0, 2, 4]
    assert numbers(fetched(Range("sure", 0, 0, 2), kafka, False)) == [0]
    assert numbers(fetched(Range("sure", 0, 1, 2), kafka, False)) == []
    assert numbers(fetched(Range("sure", 0, 5, 6), kafka, False)) == []


def test_what_kafka_no_longer_has_is_told_and_passed_over_when_accepted(kafka: str) -> None:
    with pytest.raises(StateLost, match="KAFKA_DATA_LOSS cut-0 at offset 10"):
        fetched(Range("cut", 0, 10, 2_000), kafka, False)
    assert gc.isenabled()
    assert numbers(fetched(Range("cut", 0, 10, 2_000), kafka, True)) == list(range(1_000, 2_000))
    assert numbers(fetched(Range("cut", 0, 10, 500), kafka, True)) == []
    assert numbers(fetched(Range("cut", 0, 1_500, 1_501), kafka, False)) == [1_500]


def test_a_topic_that_was_made_anew_and_is_shorter_is_told_and_passed_over_when_accepted(kafka: str) -> None:
    with pytest.raises(StateLost, match=f"KAFKA_DATA_LOSS plain-0 at offset {COUNT + 10}"):
        fetched(Range("plain", 0, COUNT + 10, COUNT + 20), kafka, False)
    assert numbers(fetched(Range("plain", 0, COUNT + 10, COUNT + 20), kafka, True)) == []


def test_a_topic_that_ends_within_the_range_is_told_and_its_rest_taken_when_accepted(
    kafka: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges, "SILENT_S", 2.0)
    with pytest.raises(StateLost, match=f"KAFKA_DATA_LOSS plain-0 ends at offset {COUNT}"):
        fetched(Range("plain", 0, COUNT - 5, COUNT + 5), kafka, False)
    rest = fetched(Range("plain", 0, COUNT - 5, COUNT + 5), kafka, True)
    assert numbers(rest) == list(range(COUNT - 5, COUNT))


def test_a_kafka_that_says_nothing_is_asked_again_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "SILENT_S", 2.0)
    with pytest.raises(RetryLater, match="Kafka gives nothing of plain-0 from offset 0 on: .*(refused|down|failed)"):
        fetched(Range("plain", 0, 0, 10), "127.0.0.1:1", False)


def test_a_kafka_that_does_not_say_what_it_has_is_asked_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kafka_io.offsets.NO_LEADER_S", 0.5)
    with pytest.raises(RetryLater, match="Kafka at 127.0.0.1:1 does not say what it has: .*"):
        newest_offsets("127.0.0.1:1", [READINGS])
