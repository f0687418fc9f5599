"""A flush at the end of a run closes each window once, also when it is asked twice or dies half-way."""

from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from engine import partition_tasks
from engine.intents import Intents
from engine.runner import Runner
from engine.stream import Stream
from lake.tables import Writer
from streaming_jobs import consumption_deltas, voltage_deviation
from tests.streaming.feed import SETTINGS, Feed, at, batches, flush, lake, pair, reading, rows, run, take

JOB = voltage_deviation.JOB
OVER = [("m1", "00:50", 2), ("m2", "00:50", 2)]
OPEN = [("m1", "01:00", 1), ("m2", "01:00", 1)]


def windows() -> list[tuple[str, str, int]]:
    """Meter, begin and number of samples of each window in the lake."""
    return sorted((row[0], f"{row[2]:%H:%M}", row[4]) for row in rows("voltage_windows"))


def fed(spark: SparkSession) -> tuple[Feed, Runner]:
    """A run of one batch: what is over is closed by the next, or by a flush."""
    feed = Feed()
    feed.add(batches()[0])
    runner = run(spark, feed, JOB)
    assert windows() == []
    assert not runner.is_flushed
    return feed, runner


def test_asked_again_it_closes_each_window_once(spark: SparkSession, home: Path) -> None:
    _, runner = fed(spark)
    flush(runner)
    assert windows() == sorted([*OVER, *OPEN])
    assert runner.is_flushed
    once = lake(runner)
    flush(runner)
    flush(Runner(JOB, SETTINGS))
    assert lake(runner) == once


def test_much_state_is_flushed_by_several_tasks(
    spark: SparkSession, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed, runner = Feed(), Runner(JOB, SETTINGS)
    feed.add(batches()[0], apart="m2")
    take(None, feed, runner)
    cuts: list[int] = []
    share = partition_tasks._shares

    def shares(places: list[partition_tasks.Place], most: int) -> list[list[partition_tasks.Place]]:
        found = share(places, most)
        cuts.append(len(found))
        return found

    monkeypatch.setattr(partition_tasks, "_shares", shares)
    monkeypatch.setattr(partition_tasks, "ROWS_OF_A_TASK", 2)
    flushing = Runner(JOB, SETTINGS)
    flushing.resume()
    Stream(spark, [flushing]).flush(flushing)
    assert cuts == [2]
    assert windows() == sorted([*OVER, *OPEN])


def test_one_that_died_before_its_intent_has_closed_nothing_and_after_it_everything(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed = Feed()
    feed.add(batches()[0])
    take(None, feed, Runner(JOB, SETTINGS))
    with monkeypatch.context() as patch, pytest.raises(ConnectionError):
        patch.setattr(Intents, "put", dying)
        flush(Runner(JOB, SETTINGS))
    take(None, feed, Runner(JOB, SETTINGS))
    assert windows() == []
    flushing = Runner(JOB, SETTINGS)
    flushing.resume()
    with monkeypatch.context() as patch, pytest.raises(ConnectionError):
        patch.setattr(Writer, "add_all", dying)
        Stream(None, [flushing]).flush(flushing)
    assert windows() == []
    after = Runner(JOB, SETTINGS)
    take(None, feed, after)
    assert windows() == sorted([*OVER, *OPEN])
    assert after.is_flushed


def dying(*_: object) -> None:
    raise ConnectionError


def test_after_a_flush_the_query_goes_on_and_a_restart_closes_nothing_that_nobody_asked_for(
    spark: SparkSession, home: Path
) -> None:
    feed, runner = fed(spark)
    flush(runner)
    feed.add([*pair(12, 112, 232), *pair(20, 120, 230)])
    run(spark, feed, JOB)
    run(spark, feed, JOB)
    assert windows() == sorted([*OVER, *OPEN])
    flush(Runner(JOB, SETTINGS))
    assert windows() == sorted([*OVER, *OPEN, ("m1", "01:10", 1), ("m2", "01:10", 1)])
    assert sum(line[5] for line in rows("accounting")) == 2  # what came again after its window was closed


def test_while_a_backlog_is_taken_in_a_partition_that_stands_hours_behind_another_is_not_late(
    spark: SparkSession, home: Path
) -> None:
    def ten_minutes(meter_id: str, hour: int) -> list[tuple[str, bytes]]:
        return [reading(meter_id, at(f"{hour:02d}:{minute:02d}"), voltage_l1_mv=230_000) for minute in (0, 5, 10)]

    feed = Feed()
    feed.add(*[[*ten_minutes("m1", 6 * n), *ten_minutes("m2", n)] for n in range(4)], apart="m2")
    runner = run(spark, feed, JOB)
    already = windows()
    assert ("m2", "01:00", 2) in already, "what is over for all is closed before the flush"
    flush(runner)
    hours = [("m1", 6 * n) for n in range(4)] + [("m2", n) for n in range(4)]
    assert windows() == sorted(
        [
            (meter_id, f"{hour:02d}:{minute}", count)
            for meter_id, hour in hours
            for minute, count in (("00", 2), ("10", 1))
        ]
    )
    assert rows("late_readings") == []


def test_a_job_with_nothing_open_is_flushed_without_a_row(spark: SparkSession, home: Path) -> None:
    feed = Feed()
    feed.add(batches()[0])
    runner = run(spark, feed, consumption_deltas.JOB)
    before = {table: rows(table) for table in runner.job.tables}
    flush(runner)
    assert {table: rows(table) for table in before} == before
    assert sum(line[3] for line in rows("accounting")) == len(batches()[0])


def test_a_query_that_never_ran_has_nothing_to_flush(spark: SparkSession, home: Path) -> None:
    runner = Runner(JOB, SETTINGS)
    flush(runner)
    assert runner.is_flushed
    assert not (home / "lake").exists()
