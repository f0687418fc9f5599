"""However a query dies, it ends with the same rows as one that was never disturbed."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyspark.sql import SparkSession

from engine.intents import Intent, Intents
from engine.job import StreamingJob
from engine.runner import Runner
from engine.state import _content, _known, names
from engine.stream import Stream
from kafka_io.ranges import Range
from lake.reading import newest_registry, registry_files
from lake.tables import Commit, Writer
from schemas.codec import encode
from schemas.errors import ConfigError, MeterstreamError, RetryLater, StateLost
from schemas.tables import ACCOUNTING
from schemas.topics import DEAD_LETTERS, READINGS
from streaming_jobs import consumption_deltas, readings_lake, voltage_deviation
from tests.streaming.feed import PLANNED_AT, SETTINGS, Feed, at, batches, lake, pair, rows, run, take

JOBS = [consumption_deltas.JOB, voltage_deviation.JOB, readings_lake.JOB]
DIED = "the power is gone"
INTENT = "intent"
DEATHS = {
    "consumption_deltas": [
        (0, INTENT), (0, "consumption_deltas"), (1, "late_readings"), (2, "accounting"), (2, "latest_readings")
    ],
    "voltage_deviation": [(0, "accounting"), (1, INTENT), (2, "quarantined_readings")],
    "readings_lake": [(0, "dead_letters"), (2, INTENT)],
}  # fmt: skip
"""Per job, one process after the other: the batch in which it dies, and what it dies before: its intent, or the commit
of a table."""

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
    """A process of a job that dies once, in the given batch: before its intent, or before a commit to a table."""

    def __init__(self, job: StreamingJob, batch_id: int, place: str, patch: pytest.MonkeyPatch) -> None:
        self.batch_id, self.place, self.is_alive = batch_id, place, True
        self.runner = Runner(job, SETTINGS)
        put, committing = Intents.put, Writer._commit

        def putting(intents: Intents, intent: Intent) -> None:
            self.die(INTENT, intent.number)
            put(intents, intent)

        def dying(writer: Writer, table: str, batches: dict[Commit, Any], is_replaced: bool = False) -> None:
            self.die(table, *[commit.version for commit in batches])
            committing(writer, table, batches, is_replaced)

        patch.setattr(Intents, "put", putting)
        patch.setattr(Writer, "_commit", dying)

    def die(self, place: str, batch_id: int) -> None:
        if self.is_alive and (batch_id, place) == (self.batch_id, self.place):
            self.is_alive = False
            raise ConnectionError(DIED)


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_every_record_is_in_the_accounting_once(undisturbed: Undisturbed, job: StreamingJob) -> None:
    accounting = undisturbed(job)["accounting"]
    assert sum(line[3] for line in accounting) == sum(len(batch) for batch in batches())
    assert all(line[3] == sum(line[4:]) for line in accounting)
    assert sum(line[-1] for line in accounting) == 1  # the poison


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_deaths_between_tables_and_before_intents_leave_no_row_twice_and_none_out(
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
    assert lake(run(spark, feed, job)) == undisturbed(job)


def test_a_process_that_lives_on_makes_a_failed_batch_again(
    spark: SparkSession, home: Path, undisturbed: Undisturbed, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed = Feed()
    feed.add(*batches())
    mortal = Mortal(voltage_deviation.JOB, 1, INTENT, monkeypatch)
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
    (file,) = (home / done.intents.states).glob("*.zip")
    file.unlink()
    if is_there:
        file.write_bytes(b"ARROW1 no more")
    feed.add(batches()[1])
    _known.clear()  # as another process
    _content.cache_clear()
    with pytest.raises(StateLost, match=rf"^{job.name}: the state in .*{file.name} cannot be read .* Repair: stop"):
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


@pytest.mark.parametrize("left", ["", "{", "{}"], ids=["empty", "cut", "of nothing"])
def test_a_damaged_intent_is_told(home: Path, left: str) -> None:
    job, feed, done = readings_lake.JOB, Feed(), Runner(readings_lake.JOB, SETTINGS)
    feed.add(*batches())
    take(None, feed, done)
    file = newest_intent(home, done)
    file.write_text(left)
    with pytest.raises(StateLost, match=f"{file} cannot be read.*Repair: stop the jobs, .*begin-anew {job.name}"):
        take(None, feed, Runner(job, SETTINGS))


def newest_intent(home: Path, runner: Runner) -> Path:
    return max((home / runner.intents.folder / runner.intents.query_id / "intents").glob("*.json"))


def test_a_lost_id_is_told_and_its_repair_changes_no_row(home: Path, undisturbed: Undisturbed) -> None:
    job, feed, done = readings_lake.JOB, Feed(), Runner(readings_lake.JOB, SETTINGS)
    feed.add(*batches()[:2])
    take(None, feed, done)
    file, query_id = home / done.intents.folder / "id.json", done.intents.query_id
    file.write_text("")
    with pytest.raises(StateLost, match=f'stop the jobs, write {{"id": "{query_id}"}} into it'):
        take(None, feed, Runner(job, SETTINGS))
    file.write_text(f'{{"id": "{query_id}"}}')
    feed.add(batches()[2])
    again = Runner(job, SETTINGS)
    take(None, feed, again)
    assert lake(again) == undisturbed(job)


def test_an_id_that_is_gone_beside_what_the_job_keeps_is_no_new_life(home: Path, undisturbed: Undisturbed) -> None:
    job, feed, done = readings_lake.JOB, Feed(), Runner(readings_lake.JOB, SETTINGS)
    feed.add(*batches()[:2])
    take(None, feed, done)
    (home / done.intents.folder / "id.json").unlink()
    query_id = done.intents.query_id
    with pytest.raises(StateLost, match=f'id.json is gone.* write {{"id": "{query_id}"}} into it'):
        take(None, feed, Runner(job, SETTINGS))
    (home / done.intents.folder / "id.json").write_text(f'{{"id": "{query_id}"}}')
    feed.add(batches()[2])
    again = Runner(job, SETTINGS)
    take(None, feed, again)
    assert lake(again) == undisturbed(job)


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_a_store_that_is_put_back_from_a_copy_goes_on_where_the_copy_stood(
    job: StreamingJob, home: Path, undisturbed: Undisturbed
) -> None:
    feed = Feed()
    feed.add(*batches()[:2])
    take(None, feed, Runner(job, SETTINGS))
    for folder in ("state", "lake"):  # in this order, with the jobs down
        shutil.copytree(home / folder, home / "copy" / folder)
    feed.add(batches()[2])
    take(None, feed, Runner(job, SETTINGS))
    for folder in ("state", "lake"):
        shutil.rmtree(home / folder)
        shutil.copytree(home / "copy" / folder, home / folder)
    again = Runner(job, SETTINGS)
    take(None, feed, again)
    assert lake(again) == undisturbed(job)


def test_a_driver_that_stood_still_ends_however_far_the_other_one_is(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, feed = voltage_deviation.JOB, Feed()
    feed.add(batches()[0])
    old = Runner(job, SETTINGS)
    take(None, feed, old)
    feed.add(*batches()[1:])
    monkeypatch.setattr("engine.intents.KEPT", 1)
    new = Runner(job, SETTINGS)
    take(None, feed, new)
    newest_intent(home, old).with_name("00000001.json").unlink(missing_ok=True)  # as if it was forgotten long ago
    before = lake(new)
    _known.clear()
    with pytest.raises(RetryLater, match=f"another driver runs {job.name} .* it has done batch 2"):
        monkeypatch.setattr("engine.intents.STALLED_S", -1.0)
        Stream(None, [old], feed.fetch).process(feed.ends[1], PLANNED_AT)
    assert lake(new) == before


def test_what_tries_that_failed_left_of_state_is_removed_by_the_next_start(home: Path) -> None:
    feed, done = Feed(), Runner(consumption_deltas.JOB, SETTINGS)
    feed.add(*batches())
    take(None, feed, done)
    left = home / done.intents.states / "00000002-0123456789ab.zip"
    later = home / done.intents.states / "00000003-0123456789ab.zip"  # another driver's, that is on its way
    for file in (left, later):
        file.write_bytes(b"")
    Runner(consumption_deltas.JOB, SETTINGS).resume()
    assert not left.exists()
    assert later.exists()


def test_a_state_of_another_version_is_told(home: Path) -> None:
    job, feed = readings_lake.JOB, Feed()
    feed.add(batches()[0])
    take(None, feed, Runner(job, SETTINGS))
    with pytest.raises(StateLost, match=f"version {job.version}, and version {job.version + 1} cannot read it.*Repair"):
        take(None, feed, Runner(replace(job, version=job.version + 1), SETTINGS))


def test_of_two_drivers_at_once_one_puts_the_next_intent_and_the_other_ends(
    home: Path, undisturbed: Undisturbed
) -> None:
    job, feed = voltage_deviation.JOB, Feed()
    feed.add(batches()[0])
    old, new = Runner(job, SETTINGS), Runner(job, SETTINGS)
    take(None, feed, old)
    feed.add(*batches()[1:])
    take(None, feed, new)
    with pytest.raises(RetryLater, match=f"another driver runs {job.name} .* it has done batch 1, this one ends"):
        Stream(None, [old], feed.fetch).process(feed.ends[1], PLANNED_AT)
    assert lake(new) == undisturbed(job)


def test_state_that_no_intent_of_the_last_two_names_is_gone(home: Path) -> None:
    feed, done = Feed(), Runner(consumption_deltas.JOB, SETTINGS)
    feed.add(*batches())
    take(None, feed, done)
    folder = home / done.intents.folder / done.intents.query_id
    named = [names(Intent.of_json(file.read_bytes()).state) for file in sorted((folder / "intents").glob("*.json"))]
    assert {file.name for file in (folder / "state").glob("*")} == named[-1] | named[-2]
    assert named[0] - named[-1] - named[-2], "some of it was not needed any more"


def test_a_topic_that_was_made_anew_and_outgrew_the_old_one_is_not_read_from_its_middle(home: Path) -> None:
    job, feed = readings_lake.JOB, Feed()
    feed.add(*batches()[:2])
    take(None, feed, Runner(job, SETTINGS))
    with pytest.raises(StateLost, match="meter-readings-v1-0: offset .* comes next, .* of a topic that was made anew"):
        take(None, feed, Runner(job, SETTINGS), topic_id="another")
    accepting = SETTINGS.model_copy(update={"accept_loss": True})
    feed.add(batches()[2])
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


def test_intents_that_are_gone_beside_their_state_are_told(home: Path) -> None:
    job, feed, done = consumption_deltas.JOB, Feed(), Runner(consumption_deltas.JOB, SETTINGS)
    feed.add(batches()[0])
    take(None, feed, done)
    shutil.rmtree(newest_intent(home, done).parent)
    with pytest.raises(StateLost, match="its tables have batch 0, and its intent is gone from .* Repair: stop"):
        take(None, feed, Runner(job, SETTINGS))


def test_a_file_that_is_no_registry_is_named(home: Path) -> None:
    feed = Feed()
    feed.add(batches()[0])
    file = Path(registry_files()[0])
    right = file.read_bytes()
    file.write_bytes(b"PAR1 and no more")
    with pytest.raises(ConfigError, match=f"{file} is no file of the registry, mend or remove it: "):
        take(None, feed, Runner(consumption_deltas.JOB, SETTINGS))
    file.write_bytes(right)
    newest_registry.cache_clear()
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
