"""However a query dies, it ends with the same rows in the same files as one that was never disturbed."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pytest
from pyspark.sql import SparkSession

from engine import checkpoint, runner
from engine.checkpoint import commit, last_plan, require_whole
from engine.job import StreamingJob
from engine.runner import Runner
from engine.state import _known
from engine.stream import Stream
from kafka_io.ranges import Range
from lake import publishing
from lake.paths import table_path
from schemas.codec import encode
from schemas.errors import ConfigError, MeterstreamError, RetryLater, StateLost
from schemas.tables import ACCOUNTING
from schemas.topics import DEAD_LETTERS, READINGS
from streaming_jobs import consumption_deltas, readings_lake, voltage_deviation
from tests.streaming.feed import PLANNED_AT, SETTINGS, Feed, at, batches, flush, lake, pair, rows, run, take

JOBS = [consumption_deltas.JOB, voltage_deviation.JOB, readings_lake.JOB]
DIED = "the power is gone"
COMMIT, COMMITTING = "commit", commit
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


def failing(error: MeterstreamError, _: Range) -> pa.Table:
    raise error


class Mortal:
    """A process of a job that dies once, in the given batch: in front of its commit, or where it adds to a table."""

    def __init__(self, job: StreamingJob, batch_id: int, place: str, patch: pytest.MonkeyPatch) -> None:
        self.batch_id, self.place, self.is_alive = batch_id, place, True
        self.runner = Runner(job, SETTINGS)
        for name in ("rename_in", "replace", "publish_small"):
            patch.setattr(runner, name, self.dying(getattr(publishing, name)))
        patch.setattr(checkpoint, "commit", self.dying(COMMITTING, COMMIT))

    def dying(self, write: Callable[..., Any], *places: str) -> Callable[..., Any]:
        def called(*arguments: Any) -> Any:
            for place in (*places, *[each for each in arguments if isinstance(each, str)]):
                if self.is_alive and place == self.place and last_plan(self.runner.checkpoint) == self.batch_id:
                    self.is_alive = False
                    raise ConnectionError(DIED)
            return write(*arguments)

        return called


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
        with pytest.raises(ConnectionError, match=DIED):
            take(spark, feed, mortal.runner)
        assert not list((home / "staging").glob("*/*"))
    assert lake(run(spark, feed, job)) == undisturbed(job)


def test_a_process_that_lives_on_writes_a_failed_batch_again_in_the_same_files(
    spark: SparkSession, home: Path, undisturbed: Undisturbed, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed = Feed()
    feed.add(*batches())
    mortal = Mortal(voltage_deviation.JOB, 1, COMMIT, monkeypatch)
    with pytest.raises(ConnectionError, match=DIED):
        take(spark, feed, mortal.runner)
    take(spark, feed, mortal.runner)
    assert lake(mortal.runner) == undisturbed(voltage_deviation.JOB)


@pytest.mark.parametrize("is_there", [False, True], ids=["gone", "damaged"])
def test_a_lost_state_stops_the_job_and_names_the_repair(spark: SparkSession, home: Path, is_there: bool) -> None:
    job = readings_lake.JOB
    feed = Feed()
    feed.add(batches()[0])
    done = run(spark, feed, job)
    before = rows("readings")
    (file,) = (home / "state" / job.name / done.query_id).glob("*.zip")
    file.unlink()
    if is_there:
        file.write_bytes(b"ARROW1 no more")
    feed.add(batches()[1])
    _known.clear()  # as another process
    with pytest.raises(StateLost, match=rf"^{job.name}: the state in .*{file.name} cannot be read .* Repair: from the"):
        take(None, feed, Runner(job, SETTINGS))
    assert rows("readings") == before


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        (StateLost("one: the state in x cannot be read. Repair: y"), "^one: the state in x cannot be read. Repair: y$"),
        (StateLost("KAFKA_DATA_LOSS t-0 at offset 7"), "^readings_lake: Kafka no longer has .* KAFKA_DATA_LOSS t-0 at"),
        (RetryLater("Kafka gives nothing of t-0"), "Kafka gives nothing of t-0"),
    ],
    ids=["state", "records", "Kafka"],
)
def test_what_a_spark_task_fails_of_is_said_as_what_it_is(
    spark: SparkSession, home: Path, said: MeterstreamError, sentence: str
) -> None:
    feed, job = Feed(), readings_lake.JOB
    feed.add(batches()[0])
    one = Runner(job, SETTINGS)
    one.resume()
    stream = Stream(spark, [one], partial(failing, said))
    with pytest.raises(type(said), match=sentence):
        stream.process(feed.ends[0], PLANNED_AT)
    assert rows("readings") == []


def test_what_comes_twice_is_known_though_the_topic_was_made_anew_between(spark: SparkSession, home: Path) -> None:
    job = readings_lake.JOB
    feed = Feed()
    feed.offset = 50_000
    feed.add(pair(0, 100, 230))
    run(spark, feed, job)
    feed.offset = 0
    feed.ends.clear()
    feed.add(pair(5, 105, 231), pair(5, 105, 231))
    with pytest.raises(StateLost, match="KAFKA_DATA_LOSS meter-readings-v1-0: offset 50002 comes next.* has 0 to 4"):
        run(spark, feed, job)
    take(spark, feed, Runner(job, SETTINGS.model_copy(update={"accept_loss": True})))
    assert [row[ACCOUNTING.names.index("duplicate")] for row in rows("accounting")] == [0, 0, 2]


@pytest.mark.parametrize("damaged", ["offsets", "commits"])
@pytest.mark.parametrize("left", ["", "v1\n{", "v1\n"], ids=["empty", "cut", "only a head"])
def test_a_damaged_file_of_the_newest_batch_is_told_and_its_repair_changes_no_row(
    spark: SparkSession, home: Path, undisturbed: Undisturbed, damaged: str, left: str
) -> None:
    job = readings_lake.JOB
    feed = Feed()
    feed.add(*batches())
    done = run(spark, feed, job)
    if damaged == "offsets":
        (done.checkpoint / "commits" / "2").unlink()  # a batch that was planned and not done
    file = done.checkpoint / damaged / "2"
    file.write_text(left)
    with pytest.raises(
        StateLost, match=f"{damaged}/2 cannot be read. Repair: stop the jobs, remove that file, and start again"
    ):
        require_whole(job.name, job.version, done.checkpoint)
    file.unlink()
    require_whole(job.name, job.version, done.checkpoint)
    assert lake(run(spark, feed, job)) == undisturbed(job)


def test_lost_metadata_is_told_and_its_repair_changes_no_row(
    spark: SparkSession, home: Path, undisturbed: Undisturbed
) -> None:
    job = readings_lake.JOB
    feed = Feed()
    feed.add(*batches()[:2])
    done = run(spark, feed, job)
    metadata, query_id = done.checkpoint / "metadata", done.query_id
    metadata.write_text("")
    with pytest.raises(StateLost, match=f'stop the jobs, write {{"id":"{query_id}"}} into it'):
        require_whole(job.name, job.version, done.checkpoint)
    metadata.write_text(f'{{"id":"{query_id}"}}')
    feed.add(batches()[2])
    assert lake(run(spark, feed, job)) == undisturbed(job)


def test_a_committed_batch_whose_offsets_are_gone_and_a_state_of_another_version_are_told(
    spark: SparkSession, home: Path
) -> None:
    job = readings_lake.JOB
    feed = Feed()
    feed.add(batches()[0])
    done = run(spark, feed, job)
    with pytest.raises(StateLost, match=f"version {job.version + 1} cannot read it.*{job.name}-{done.query_id}-"):
        require_whole(job.name, job.version + 1, done.checkpoint.with_name(f"{job.name}-v{job.version + 1}"))
    (done.checkpoint / "offsets" / "0").unlink()
    with pytest.raises(StateLost, match="batch 0 was committed, and what it read cannot be read"):
        require_whole(job.name, job.version, done.checkpoint)


def test_a_batch_that_is_done_again_after_a_flush_undoes_what_that_has_closed(home: Path) -> None:
    job = voltage_deviation.JOB
    feed, done = Feed(), Runner(voltage_deviation.JOB, SETTINGS)
    feed.add(*batches()[:2])
    take(None, feed, done)
    flush(done)
    assert rows("voltage_windows")
    (done.checkpoint / "commits" / "1").unlink()  # the repair of a damaged one
    again = Runner(job, SETTINGS)
    again.resume()
    Stream(None, [again], feed.fetch).catch_up({}, feed.ends[-1])
    feed.add(batches()[2])
    take(None, feed, Runner(job, SETTINGS))
    last = Runner(job, SETTINGS)
    flush(last)
    windows = [row[:3] for row in rows("voltage_windows")]
    assert len(windows) == len(set(windows)) > 0


def test_a_topic_that_was_made_anew_and_outgrew_the_old_one_is_not_read_from_its_middle(home: Path) -> None:
    job, feed = readings_lake.JOB, Feed()
    feed.add(*batches()[:2])
    take(None, feed, Runner(job, SETTINGS))
    with pytest.raises(StateLost, match="meter-readings-v1-0: offset .* comes next, .* of a topic that was made anew"):
        take(None, feed, Runner(job, SETTINGS), topic_id="another")
    accepting = SETTINGS.model_copy(update={"accept_loss": True})
    begun = Runner(job, accepting)
    begun.resume()
    feed.add(batches()[2])
    ranges = [Range(READINGS.name, 0, feed.ends[1][READINGS.name, 0], feed.ends[2][READINGS.name, 0])]
    begun.begin(ranges, PLANNED_AT, ())  # and killed: its records are gone with the topic
    with pytest.raises(StateLost, match="made anew while a batch was on its way"):
        take(None, feed, Runner(job, SETTINGS), topic_id="another")
    take(None, feed, Runner(job, accepting), topic_id="another")
    received = [line[ACCOUNTING.names.index("received")] for line in rows("accounting")]
    assert sum(received) == sum(feed.ends[1].values()) + sum(feed.ends[2].values())
    take(None, feed, Runner(job, SETTINGS), topic_id="another")


def test_a_loss_that_was_accepted_and_of_which_nothing_was_read_yet_is_no_accepted_one(home: Path) -> None:
    job, feed = readings_lake.JOB, Feed()
    feed.add(*batches()[:2])
    take(None, feed, Runner(job, SETTINGS))
    accepting = Runner(job, SETTINGS.model_copy(update={"accept_loss": True}))
    accepting.resume()
    nothing = dict.fromkeys(feed.ends[-1], 0)
    Stream(None, [accepting], feed.fetch).catch_up(nothing, nothing, {READINGS.name: "another"})  # empty, and stopped
    feed.add(batches()[2])
    with pytest.raises(StateLost, match="of a topic that was made anew"):
        take(None, feed, Runner(job, SETTINGS), topic_id="another")


@pytest.mark.parametrize("gone", ["all", "offsets and commits"])
def test_a_checkpoint_that_is_gone_beside_its_state_is_told(home: Path, gone: str) -> None:
    job, feed, done = consumption_deltas.JOB, Feed(), Runner(consumption_deltas.JOB, SETTINGS)
    feed.add(batches()[0])
    take(None, feed, done)
    for folder in [done.checkpoint] if gone == "all" else [done.checkpoint / "offsets", done.checkpoint / "commits"]:
        shutil.rmtree(folder)
    with pytest.raises(StateLost, match="its state is there, and what it has read is gone from .* Repair: stop the jo"):
        take(None, feed, Runner(job, SETTINGS))


def test_a_file_that_is_no_registry_is_named(home: Path) -> None:
    feed = Feed()
    feed.add(batches()[0])
    file = table_path("registry") / "date=2024-01-01" / "mine.parquet"
    file.write_bytes(b"PAR1 and no more")
    with pytest.raises(ConfigError, match=f"{file} is no file of the registry, mend or remove it: "):
        take(None, feed, Runner(consumption_deltas.JOB, SETTINGS))
    pl.DataFrame({"meter_id": ["m1"], "nominal_mv": [230_000]}, {"meter_id": pl.String, "nominal_mv": pl.Int32}
    ).write_parquet(file)  # fmt: skip
    take(None, feed, Runner(consumption_deltas.JOB, SETTINGS))


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
