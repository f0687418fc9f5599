"""What a batch takes and has come to: said once, and never too much."""

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from engine.checkpoint import ranges
from engine.intents import Intent, Intents
from engine.state import Kept
from engine.stream import bounded, require_same_partitions
from kafka_io.ranges import Range
from lake.tables import Part
from schemas.errors import RetryLater, StateLost


def test_an_intent_says_what_a_batch_has_come_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METERSTREAM_HOME", str(tmp_path))
    at, part = datetime(2024, 3, 31, tzinfo=UTC), Part("readings", "date=2024-03-31/a.parquet", 7, 2, "2024-03-31")
    kept = {"t-0": {"kind": Kept(("a.zip", "b.zip"), 3)}}
    starts, ends = {("t", 0): 5, ("t", 1): 0}, {("t", 0): 9, ("t", 1): 0, ("u", 2): 4}
    first = Intent(0, at, starts, ends, {"t": "id"}, kept, (part, part._replace(partition=None)))
    again = Intent.of_json(first.as_json())
    assert replace(again, state=kept) == first
    assert [[*files] for files, _ in again.state["t-0"].values()] == [["a.zip", "b.zip"]]
    assert ranges(first.starts, first.ends) == [Range("t", 0, 5, 9), Range("u", 2, 0, 4)]
    intents = Intents("some_job", 1)
    assert intents.newest() is None
    intents.put(first)
    intents.put(replace(first, number=1, is_flush=True))
    newest = Intents("some_job", 1).newest()
    assert newest
    assert (newest.number, newest.is_flush, newest.ends) == (1, True, ends)
    with pytest.raises(RetryLater, match="another driver runs some_job on file://.* it has done batch 1"):
        intents.put(replace(first, number=1))


def test_a_batch_takes_so_many_records_of_a_topic_and_of_each_partition_its_share() -> None:
    left = [Range("t", 0, 0, 900), Range("t", 1, 5, 95), Range("t", 2, 7, 8), Range("u", 0, 0, 3)]
    assert bounded(left, 99) == [Range("t", 0, 0, 89), Range("t", 1, 5, 13), Range("t", 2, 7, 8), Range("u", 0, 0, 3)]
    assert bounded(left, 1_000) == left


def test_a_topic_whose_partitions_became_more_or_fewer_is_refused_by_name() -> None:
    place = {("t", 0): 5, ("t", 1): 0}
    require_same_partitions(place, {("t", 0): 9, ("t", 1): 0, ("u", 0): 3})
    require_same_partitions({}, place)
    with pytest.raises(StateLost, match=r"^t-2, t-3 came or went after the jobs began"):
        require_same_partitions(place, place | {("t", 2): 0, ("t", 3): 1})
    with pytest.raises(StateLost, match=r"^t-1 came or went"):
        require_same_partitions(place, {("t", 0): 9})
