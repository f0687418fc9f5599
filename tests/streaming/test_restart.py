"""However a query dies, it ends with the same rows in the same files as one that was never disturbed."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pyspark.errors import StreamingQueryException
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from lake.streaming import Outcome, Runner, StreamingJob, StreamSettings
from schemas.codec import encode
from schemas.topics import DEAD_LETTERS
from streaming_jobs import consumption_deltas, readings_lake, voltage_deviation
from tests.streaming.feed import SETTINGS, Feed, at, batches, lake, rows, run, take

JOBS = [consumption_deltas.JOB, voltage_deviation.JOB, readings_lake.JOB]
DIED = "the power is gone"
COMMIT = "commit"
DEATHS = {
    "consumption_deltas": [(0, COMMIT), (1, "late_readings"), (2, "accounting"), (2, "latest_readings")],
    "voltage_deviation": [(0, "accounting"), (1, COMMIT), (2, "quarantined_readings")],
    "readings_lake": [(0, "dead_letters"), (2, COMMIT)],
}
"""Per job, one process after the other: the batch in which it dies, and what it dies in."""

Undisturbed = Callable[[StreamingJob], dict[str, Any]]


@pytest.fixture(scope="module")
def undisturbed(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    found: dict[str, dict[str, Any]] = {}

    def of(job: StreamingJob) -> dict[str, Any]:
        if job.name not in found:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("METERSTREAM_HOME", str(tmp_path_factory.mktemp(job.name)))
                feed = Feed()
                feed.add(*batches())
                found[job.name] = lake(run(spark, feed, job))
        return found[job.name]

    return of


class Mortal:
    """A runner that dies once, in the given batch, in front of Spark's commit or while a table is written."""

    def __init__(self, job: StreamingJob, batch_id: int, place: str) -> None:
        self.job, self.batch_id, self.place, self.now, self.is_alive = job, batch_id, place, -1, True
        self.runner = Runner(replace(job, transform=self.transform), SETTINGS)

    def process(self, records: DataFrame, batch_id: int) -> None:
        self.now = batch_id
        self.runner.process(records, batch_id)
        if self.is_alive and batch_id == self.batch_id:
            self.is_alive = False
            raise ConnectionError(DIED)

    def transform(self, records: DataFrame, registry: DataFrame, state: DataFrame, settings: StreamSettings) -> Outcome:
        outcome = self.job.transform(records, registry, state, settings)
        if self.now != self.batch_id or not self.is_alive or self.place == COMMIT:
            return outcome
        if self.place == "accounting":
            return replace(outcome, books=wrecked(outcome.books))
        if self.place in outcome.current:
            return replace(outcome, current={self.place: wrecked(outcome.current[self.place])})
        return replace(outcome, tables={**outcome.tables, self.place: wrecked(outcome.tables[self.place])})


def wrecked(frame: DataFrame) -> DataFrame:
    """A frame with the same columns that fails when it is evaluated."""
    failing = F.raise_error(F.lit(DIED))
    columns = [failing.cast(field.dataType).alias(field.name) for field in frame.schema]
    return frame.sparkSession.range(1).select(*columns)


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_every_record_is_in_the_books_once(undisturbed: Undisturbed, job: StreamingJob) -> None:
    books = undisturbed(job)["accounting"]
    assert sum(line[3] for line in books) == sum(len(batch) for batch in batches())
    assert all(line[3] == sum(line[4:]) for line in books)
    assert sum(line[-1] for line in books) == 1  # the poison


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_deaths_between_tables_and_before_commits_leave_no_row_twice_and_none_out(
    spark: SparkSession, home: Path, undisturbed: Undisturbed, job: StreamingJob
) -> None:
    feed = Feed()
    feed.add(batches()[0])
    for batch_id, place in DEATHS[job.name]:
        if feed.files <= batch_id:
            feed.add(*batches()[feed.files :])
        mortal = Mortal(job, batch_id, place)
        with pytest.raises(StreamingQueryException, match=DIED):
            take(spark, feed, mortal.runner, mortal.process)
        assert not list((home / "staging").glob("*/*"))
    assert lake(run(spark, feed, job)) == undisturbed(job)


def test_a_process_that_lives_on_writes_a_failed_batch_again_in_the_same_files(
    spark: SparkSession, home: Path, undisturbed: Undisturbed
) -> None:
    feed = Feed()
    feed.add(*batches())
    mortal = Mortal(voltage_deviation.JOB, 1, COMMIT)
    with pytest.raises(StreamingQueryException, match=DIED):
        take(spark, feed, mortal.runner, mortal.process)
    take(spark, feed, mortal.runner, mortal.process)
    assert lake(mortal.runner) == undisturbed(voltage_deviation.JOB)


def test_a_lost_state_stops_the_query_and_names_the_repair(spark: SparkSession, home: Path) -> None:
    job = readings_lake.JOB
    feed = Feed()
    feed.add(batches()[0])
    runner = run(spark, feed, job)
    before = rows("readings")
    (home / "state" / job.name / runner.query_id / "0").rename(home / "elsewhere")
    feed.add(batches()[1])
    with pytest.raises(StreamingQueryException, match="Repair: stop the jobs, remove"):
        run(spark, feed, job)
    assert rows("readings") == before


def test_dead_letters_in_number_reach_their_table_with_their_bytes(spark: SparkSession, home: Path) -> None:
    feed = Feed()
    letters = [
        {"payload": bytes([0, number]), "reason": "not_framed", "detail": "made up", "received_at": at("01:00")}
        for number in range(20)
    ]
    feed.add([("", encode("dead-letter", letter)) for letter in letters], topic=DEAD_LETTERS)
    run(spark, feed, readings_lake.JOB)
    assert sorted(row[0] for row in rows("dead_letters")) == [letter["payload"] for letter in letters]
    assert [line[3:] for line in rows("accounting") if line[3]] == [(20, 0, 0, 0, 0, 20)]
