"""What a batch takes: written down before it begins, and never too much."""

from datetime import UTC, datetime
from pathlib import Path

import pytest

from engine.checkpoint import offsets_after, plan, planned, planned_at, topic_ids
from engine.stream import bounded, require_same_partitions
from kafka_io.ranges import Range
from schemas.errors import StateLost


def test_a_plan_is_what_a_batch_takes_and_where_it_ends(tmp_path: Path) -> None:
    at = datetime(2024, 3, 31, tzinfo=UTC)
    plan(tmp_path, 0, {("t", 0): 5, ("t", 1): 0}, {("t", 0): 9, ("t", 1): 0}, at, {"t": "id"})
    plan(tmp_path, 1, {("t", 0): 9, ("t", 1): 0}, {("t", 0): 12, ("t", 1): 3, ("u", 2): 4}, at, {})
    assert (topic_ids(tmp_path, 0), topic_ids(tmp_path, 1)) == ({"t": "id"}, {})
    assert planned(tmp_path, 0) == [Range("t", 0, 5, 9)]
    assert planned(tmp_path, 1) == [Range("t", 0, 9, 12), Range("t", 1, 0, 3), Range("u", 2, 0, 4)]
    assert offsets_after(tmp_path, 1) == {("t", 0): 12, ("t", 1): 3, ("u", 2): 4}
    assert planned_at(tmp_path, 1) == at


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
