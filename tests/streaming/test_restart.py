"""However a query dies, it ends with the same rows in the same files as one that was never disturbed."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pyspark.errors import StreamingQueryException
from pyspark.sql import DataFrame, SparkSession

from engine import stream
from engine.checkpoint import require_whole
from engine.job import StreamingJob
from engine.stream import Runner, ended
from lake import publishing
from schemas.codec import encode
from schemas.errors import StateLost
from schemas.tables import ACCOUNTING
from schemas.topics import DEAD_LETTERS
from streaming_jobs import consumption_deltas, readings_lake, voltage_deviation
from tests.streaming.feed import SETTINGS, Feed, at, batches, lake, pair, rows, run, take

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

    def tables(job: StreamingJob) -> dict[str, Any]:
        if job.name not in found:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("METERSTREAM_HOME", str(tmp_path_factory.mktemp(job.name)))
                feed = Feed()
                feed.add(*batches())
                found[job.name] = lake(run(spark, feed, job))
        return found[job.name]

    return tables


class Mortal:
    """A runner that dies once, in the given batch: in front of Spark's commit, or where it adds to a table."""

    def __init__(self, job: StreamingJob, batch_id: int, place: str, patch: pytest.MonkeyPatch) -> None:
        self.batch_id, self.place, self.now, self.is_alive = batch_id, place, -1, True
        self.runner = Runner(job, SETTINGS)
        for name in ("rename_in", "swap_in", "publish_small"):
            patch.setattr(stream, name, self.dying(getattr(publishing, name)))

    def process(self, records: DataFrame, batch_id: int) -> None:
        self.now = batch_id
        self.runner.process(records, batch_id)
        self.at(COMMIT)

    def dying(self, write: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any) -> Any:
            for table in arguments:
                self.at(table)
            return write(*arguments)

        return called

    def at(self, place: object) -> None:
        if self.is_alive and place == self.place and self.now == self.batch_id:
            self.is_alive = False
            raise ConnectionError(DIED)


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_every_record_is_in_the_accounting_once(undisturbed: Undisturbed, job: StreamingJob) -> None:
    accounting = undisturbed(job)["accounting"]
    assert sum(line[3] for line in accounting) == sum(len(batch) for batch in batches())
    assert all(line[3] == sum(line[4:]) for line in accounting)
    assert sum(line[-1] for line in accounting) == 1  # the poison


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_deaths_between_tables_and_before_commits_leave_no_row_twice_and_none_out(
    spark: SparkSession, home: Path, undisturbed: Undisturbed, job: StreamingJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed = Feed()
    feed.add(batches()[0])
    for batch_id, place in DEATHS[job.name]:
        if feed.files <= batch_id:
            feed.add(*batches()[feed.files :])
        mortal = Mortal(job, batch_id, place, monkeypatch)
        with pytest.raises(StreamingQueryException, match=DIED):
            take(spark, feed, mortal.runner, mortal.process)
        assert not list((home / "staging").glob("*/*"))
    assert lake(run(spark, feed, job)) == undisturbed(job)


def test_a_process_that_lives_on_writes_a_failed_batch_again_in_the_same_files(
    spark: SparkSession, home: Path, undisturbed: Undisturbed, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed = Feed()
    feed.add(*batches())
    mortal = Mortal(voltage_deviation.JOB, 1, COMMIT, monkeypatch)
    with pytest.raises(StreamingQueryException, match=DIED):
        take(spark, feed, mortal.runner, mortal.process)
    take(spark, feed, mortal.runner, mortal.process)
    assert lake(mortal.runner) == undisturbed(voltage_deviation.JOB)


@pytest.mark.parametrize("lost", ["0", "0/meter-readings-v1-0/recent.arrow"], ids=["folder", "file"])
def test_a_lost_state_stops_the_query_and_names_the_repair(spark: SparkSession, home: Path, lost: str) -> None:
    job = readings_lake.JOB
    feed = Feed()
    feed.add(batches()[0])
    runner = run(spark, feed, job)
    before = rows("readings")
    (home / "state" / job.name / runner.query_id / lost).rename(home / "elsewhere")
    feed.add(batches()[1])
    with pytest.raises(StreamingQueryException) as caught:
        run(spark, feed, job)
    error = ended(job.name, str(caught.value))
    assert isinstance(error, StateLost)
    assert re.fullmatch(
        rf"{job.name}: (its|the) state .*0.* Repair: (stop the jobs, remove|from the beginning).*", str(error)
    ), error
    assert rows("readings") == before


def test_what_comes_twice_is_known_though_the_topic_was_made_anew_between(spark: SparkSession, home: Path) -> None:
    job = readings_lake.JOB
    feed = Feed()
    feed.offset = 50_000
    feed.add(pair(0, 100, 230))
    run(spark, feed, job)
    feed.offset = 0
    feed.add(pair(5, 105, 231), pair(5, 105, 231))
    run(spark, feed, job)
    assert [row[ACCOUNTING.names.index("duplicate")] for row in rows("accounting")] == [0, 0, 2]


@pytest.mark.parametrize("damaged", ["offsets", "commits"])
@pytest.mark.parametrize("left", ["", "v1\n{", "v1\n"], ids=["empty", "cut", "only a head"])
def test_a_damaged_file_of_the_newest_batch_is_told_and_its_repair_changes_no_row(
    spark: SparkSession, home: Path, undisturbed: Undisturbed, damaged: str, left: str
) -> None:
    job = readings_lake.JOB
    feed = Feed()
    feed.add(*batches())
    runner = run(spark, feed, job)
    if damaged == "offsets":
        for name in ("2", ".2.crc"):  # a batch that was planned and not done
            (runner.checkpoint / "commits" / name).unlink()
    file = runner.checkpoint / damaged / "2"
    file.write_text(left)
    with pytest.raises(
        StateLost, match=f"{damaged}/2 cannot be read. Repair: stop the jobs, remove that file and .2.crc"
    ):
        require_whole(job.name, job.version, runner.checkpoint)
    file.unlink()
    file.with_name(".2.crc").unlink()
    require_whole(job.name, job.version, runner.checkpoint)
    assert lake(run(spark, feed, job)) == undisturbed(job)


def test_lost_metadata_is_told_and_its_repair_changes_no_row(
    spark: SparkSession, home: Path, undisturbed: Undisturbed
) -> None:
    job = readings_lake.JOB
    feed = Feed()
    feed.add(*batches()[:2])
    runner = run(spark, feed, job)
    metadata, query_id = runner.checkpoint / "metadata", runner.query_id
    metadata.write_text("")
    with pytest.raises(StateLost, match=f'remove .metadata.crc beside it, write {{"id":"{query_id}"}} into it'):
        require_whole(job.name, job.version, runner.checkpoint)
    metadata.with_name(".metadata.crc").unlink()
    metadata.write_text(f'{{"id":"{query_id}"}}')
    feed.add(batches()[2])
    assert lake(run(spark, feed, job)) == undisturbed(job)


def test_a_committed_batch_whose_offsets_are_gone_and_a_state_of_another_version_are_told(
    spark: SparkSession, home: Path
) -> None:
    job = readings_lake.JOB
    feed = Feed()
    feed.add(batches()[0])
    runner = run(spark, feed, job)
    with pytest.raises(StateLost, match=f"version {job.version + 1} cannot read it.*{job.name}-{runner.query_id}-"):
        require_whole(job.name, job.version + 1, runner.checkpoint.with_name(f"{job.name}-v{job.version + 1}"))
    (runner.checkpoint / "offsets" / "0").unlink()
    with pytest.raises(StateLost, match="batch 0 was committed, and what it read cannot be read"):
        require_whole(job.name, job.version, runner.checkpoint)


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
