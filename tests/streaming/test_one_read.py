"""Jobs that share a read write what they write alone; one that joins or leaves goes on from its own place."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import SparkSession

from engine.job import StreamingJob
from engine.partition_tasks import warm_up
from engine.runner import Runner
from engine.state import _known
from engine.stream import Stream
from schemas.codec import encode
from schemas.errors import StateLost
from schemas.topics import EVENTS, READINGS
from streaming_jobs import alarms, consumption_deltas, discovered
from tests.streaming.feed import SETTINGS, Feed, at, batches, flush, lake, run, take

JOBS = [replace(job, sends={}) for job in discovered()]
"""All of them, without the topic that alarms go to: Kafka has its own tests."""
OF_READINGS = [job for job in JOBS if READINGS in job.topics]


def event(clock: str, argument: str) -> tuple[str, bytes]:
    record = {"meter_id": "m1", "observed_at": at(clock), "received_at": at(clock), "dialect": "c12.19"}
    named = {"dialect_version": "1", "source_table": "ST3", "code": "A512", "argument": argument}
    return "m1", encode("event", record | named)


def fed() -> Feed:
    """Readings, events, and readings again."""
    feed = Feed()
    feed.add(*batches()[:2], apart="m2")
    feed.add([event("01:00", "1"), event("01:20", "0")], topic=EVENTS)
    feed.add(batches()[2], apart="m2")
    return feed


def whole(*jobs: StreamingJob) -> dict[str, Any]:
    """All that these jobs wrote, flushed."""
    found = {}
    for job in jobs:
        runner = Runner(job, SETTINGS)
        flush(runner)
        found[job.name] = _rows(runner)
    return found


def _rows(runner: Runner) -> list[Any]:
    tables = lake(runner)
    accounting = [line for line in tables["accounting"] if runner.job.name in line]
    return [accounting, *[(name, tables[name]) for name in (*runner.job.writes, *runner.job.current)]]


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What all jobs write that read together from the begin."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METERSTREAM_HOME", str(tmp_path_factory.mktemp("together")))
        take(None, fed(), *[Runner(job, SETTINGS) for job in JOBS])
        return whole(*JOBS)


def test_in_spark_tasks_together_they_write_the_same_rows(
    spark: SparkSession, home: Path, together: dict[str, Any]
) -> None:
    run(spark, fed(), *JOBS)
    assert whole(*JOBS) == together


def test_each_alone_writes_the_same_rows(home: Path, together: dict[str, Any]) -> None:
    feed = fed()
    for job in JOBS:
        take(None, feed, Runner(job, SETTINGS))
    assert whole(*JOBS) == together


@pytest.mark.parametrize("late", OF_READINGS, ids=lambda job: job.name)
def test_one_that_joins_late_catches_up_by_itself_and_ends_with_the_same_rows(
    home: Path, together: dict[str, Any], late: StreamingJob
) -> None:
    feed = fed()
    ends, feed.ends = feed.ends, feed.ends[:2]
    take(None, feed, *[Runner(job, SETTINGS) for job in JOBS if job is not late])
    feed.ends = ends
    _known.clear()
    take(None, feed, *[Runner(job, SETTINGS) for job in JOBS])
    found = whole(*JOBS)
    rows = {name: tables[2:] for name, (_, *tables) in found.items()}
    assert rows == {name: tables[2:] for name, (_, *tables) in together.items()}


def test_one_that_left_and_went_on_alone_comes_back_further_than_the_others(
    home: Path, together: dict[str, Any]
) -> None:
    feed = fed()
    ends, feed.ends = feed.ends, feed.ends[:1]
    take(None, feed, *[Runner(job, SETTINGS) for job in JOBS])
    feed.ends = ends[:2]
    take(None, feed, Runner(consumption_deltas.JOB, SETTINGS))
    feed.ends = ends
    take(None, feed, *[Runner(job, SETTINGS) for job in JOBS])
    assert whole(*JOBS) == together


def test_a_topic_that_grew_is_refused_before_anything_of_it_is_taken(home: Path) -> None:
    feed, runner = fed(), Runner(consumption_deltas.JOB, SETTINGS)
    take(None, feed, runner)
    before = lake(runner)
    stream = Stream(None, [runner], feed.fetch)
    places = dict.fromkeys(feed.ends[-1], 0)
    stream.catch_up(places, feed.ends[-1])
    with pytest.raises(StateLost, match=f"{READINGS.name}-7 came or went"):
        stream.catch_up(places | {(READINGS.name, 7): 0}, feed.ends[-1])
    assert lake(runner) == before


def test_a_slots_process_can_apply_every_rule_to_no_rows(spark: SparkSession, home: Path) -> None:
    warm_up(spark, discovered(), SETTINGS)


def test_what_a_job_does_not_read_moves_its_batches_no_further(home: Path) -> None:
    take(None, fed(), *[Runner(job, SETTINGS) for job in JOBS])
    runner = Runner(replace(alarms.JOB, sends={}), SETTINGS)
    runner.resume()
    assert [line[3] for line in lake(runner)["accounting"] if "alarms" in line] == [2]
