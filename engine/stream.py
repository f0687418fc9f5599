"""Micro-batches of streaming jobs: Spark plans them, each is read once for all jobs of a driver.

One query reads the topics of all jobs. Spark says how far a micro-batch goes; each job that reads one of its topics
makes its own batch of it (`engine/runner.py`), and all of them share its tasks (`engine/partition_tasks.py`). A job's
place is its own: where one was alone before, is new, or was killed before its intent, it first catches up by itself.
"""

import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from types import MappingProxyType

import structlog
from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql.streaming.query import StreamingQuery

from engine import metrics
from engine.batch import BatchPlan
from engine.checkpoint import (
    KAFKA_IS_AWAY,
    LOST_IN_KAFKA,
    STATE_LOST,
    as_json,
    lost_in_kafka,
    offsets_after,
    planned_at,
    ranges,
)
from engine.partition_tasks import Done, Fetch, MicroBatch
from engine.partition_tasks import run as run_tasks
from engine.runner import Runner
from kafka_io.offsets import Offsets
from kafka_io.ranges import Range, fetched
from lake.reading import RegistryFiles, registry_files
from lake.spark import uri
from lake.store import store
from schemas.errors import ContractBroken, MeterstreamError, RetryLater, StateLost
from settings import home

log = structlog.get_logger()
JAVA_OPTIONS = "-XX:TieredStopAtLevel=1"
"""No record goes through the JVM, so its best compiler takes longer than it saves (docs/bench.md)."""
LOOK_S = 1.0
"""How often Spark asks Kafka whether something came: both spend some milliseconds of CPU on it."""
SHARE = 1 / 10
"""Of the time, when little comes, that micro-batches take: the rest they wait, so that the next one carries more."""
BACKLOG = 1 / 2
"""Of the most records of a micro-batch; when so many came, the next one does not wait."""
NO_IDS: Mapping[str, str] = MappingProxyType({})
CURRENT_SHARE = 1 / 20
"""Of the time that tables of the newest rows only are written, however many rows they have."""


class Stream:
    """The jobs of one driver, and the query that they share."""

    def __init__(
        self,
        session: SparkSession | None,
        runners: Sequence[Runner],
        fetch: Fetch | None = None,
        is_over: Callable[[], bool] = lambda: False,
    ) -> None:
        """Nothing is read yet.

        Args:
            session: whose tasks do the work; without one it is done in this process.
            runners: the jobs.
            fetch: gives the records of a range; by default Kafka does.
            is_over: asked before each batch: whether nothing more shall be taken.
        """
        self.session = session
        self.runners = list(runners)
        self.settings = settings = runners[0].settings
        self._fetch = fetch or partial(fetched, bootstrap=settings.kafka_bootstrap, accept_loss=settings.accept_loss)
        self._checkpoint = home() / "run" / "queries" / "-".join(sorted(runner.job.name for runner in runners))
        self._is_over = is_over
        self._goal: Offsets | None = None
        self._hurry = threading.Event()
        self._seen = time.time()
        self._current_due = 0.0
        self._turn = threading.Lock()
        self._is_busy = False

    @property
    def topics(self) -> set[str]:
        """Names of all that is read."""
        return {topic for runner in self.runners for topic in runner.topics}

    def catch_up(self, oldest: Offsets, newest: Offsets, topic_ids: Mapping[str, str] = NO_IDS) -> None:
        """Brings the jobs to one place, that of the one that has come furthest; one after the other, each by itself.

        Args:
            oldest: the first offsets that Kafka still has.
            newest: the offsets that its next records get.
            topic_ids: topic → Kafka's id of it: one that is made anew has another.

        Raises:
            StateLost: Kafka no longer has what a job has not read.
        """
        for runner in self.runners:
            metrics.alive(runner.job.name, self._alive)
            known = runner.topic_ids
            made_anew = {topic for topic, name in topic_ids.items() if known.get(topic, name) != name}
            runner.place = self._begin(runner, oldest, newest, made_anew)
            runner.topic_ids = {**known, **topic_ids}
        furthest: Offsets = {}
        for runner in self.runners:
            furthest |= {at: max(offset, furthest.get(at, 0)) for at, offset in runner.place.items()}
        for runner in self.runners:
            goal = {at: offset for at, offset in furthest.items() if at[0] in runner.topics}
            if behind := sum(each.records for each in ranges(runner.place, goal)):
                log.info("catches up", job=runner.job.name, records=behind)
            while (left := ranges(runner.place, goal)) and not self._is_over():
                self._batch([runner], bounded(left, self.settings.max_offsets_per_trigger), datetime.now(UTC))

    def _accept(self, runner: Runner, what: str) -> None:
        """Goes on without what is gone.

        Raises:
            StateLost: that is not wanted.
        """
        if not self.settings.accept_loss:
            raise StateLost(lost_in_kafka(runner.job.name, f"KAFKA_DATA_LOSS {what}"))
        log.warning("records are gone", job=runner.job.name, why=what)

    def _begin(self, runner: Runner, oldest: Offsets, newest: Offsets, made_anew: set[str]) -> Offsets:
        """Where a job goes on: its place, and the oldest records of what it has never read.

        Raises:
            StateLost: Kafka no longer has what comes next, or a topic has more partitions than it had.
        """
        require_same_partitions(runner.place, oldest)
        begin = {at: offset for at, offset in oldest.items() if at[0] in runner.topics}
        made_anew = made_anew | {at[0] for at, offset in runner.place.items() if offset > newest.get(at, -1)}
        for at, offset in runner.place.items():
            low, high = oldest.get(at, 0), newest.get(at, 0)
            if at in newest and low <= offset and at[0] not in made_anew:
                begin[at] = offset
            else:
                anew = ", of a topic that was made anew" if at[0] in made_anew else ""
                what = f"{at[0]}-{at[1]}: offset {offset} comes next, and Kafka has {low} to {high}{anew}"
                self._accept(runner, what)
        return begin

    def start(self) -> StreamingQuery:
        """Starts the query where the jobs stand; they stand at one place.

        Its own checkpoint is new each time: a job's place is in the job's.
        """
        assert self.session
        settings = self.settings
        shutil.rmtree(self._checkpoint, ignore_errors=True)
        place = {at: offset for runner in self.runners for at, offset in runner.place.items()}
        records = (
            self.session.readStream.format("kafka")
            .option("kafka.bootstrap.servers", settings.kafka_bootstrap)
            .option("subscribe", ",".join(sorted(self.topics)))
            .option("startingOffsets", as_json(place))
            .option("failOnDataLoss", str(not settings.accept_loss).lower())
            .load()
        )
        return (
            records.writeStream.queryName("-".join(runner.job.name for runner in self.runners))
            .option("checkpointLocation", uri(str(self._checkpoint)))
            .trigger(processingTime=f"{min(LOOK_S, settings.trigger_s)} seconds")
            .foreachBatch(self._take)
            .start()
        )

    def _alive(self) -> float:
        """When it was last seen to go on, seconds since 1970."""
        return self._seen if self._is_busy else time.time()

    def _take(self, _: DataFrame, number: int) -> None:
        """Spark has planned a micro-batch; its records are not asked of Spark, the tasks fetch them."""
        began = time.monotonic()
        ends = offsets_after(self._checkpoint, number)
        require_same_partitions(self._place(), ends)
        self._begin_anew({at[0] for at, offset in self._place().items() if ends.get(at, offset) < offset})
        if self._goal is not None:
            ends = {at: min(offset, self._goal.get(at, 0)) for at, offset in ends.items()}
        records = self.process(ends, planned_at(self._checkpoint, number))
        if records < BACKLOG * self.settings.max_offsets_per_trigger:
            took_s = time.monotonic() - began
            self._hurry.wait(min(self.settings.trigger_s, took_s * (1 / SHARE - 1)))

    def _begin_anew(self, made_anew: set[str]) -> None:
        """Reads topics from their begin that were made anew meanwhile: Spark lets that pass where loss is accepted."""
        for runner in self.runners if made_anew else []:
            log.warning("records are gone", job=runner.job.name, made_anew=sorted(made_anew))
            runner.place = {at: 0 if at[0] in made_anew else offset for at, offset in runner.place.items()}
            runner.topic_ids = {topic: name for topic, name in runner.topic_ids.items() if topic not in made_anew}

    def process(self, ends: Offsets, at: datetime) -> int:
        """Does a micro-batch, in batches of at most so many records a topic. Returns how many records came.

        Args:
            ends: topic and partition → the offset that comes next after it.
            at: when it was planned.

        Raises:
            ContractBroken: two jobs stand at different places of a topic.
        """
        goal = {each: offset for each, offset in ends.items() if each[0] in self.topics}
        records = 0
        while (left := ranges(self._place(), goal)) and not self._is_over():
            came = bounded(left, self.settings.max_offsets_per_trigger)
            topics = {each.topic for each in came}
            self._batch([runner for runner in self.runners if runner.topics & topics], came, at)
            records += sum(each.records for each in came)
        return records

    def _place(self) -> Offsets:
        """Where all jobs stand.

        Raises:
            ContractBroken: two of them stand at different places of a topic.
        """
        place: Offsets = {}
        for runner in self.runners:
            if any(place.setdefault(each, offset) != offset for each, offset in runner.place.items()):
                msg = f"{runner.job.name} stands at another place than the jobs beside it: {runner.place}, {place}"
                raise ContractBroken(msg)
        return place

    def _batch(self, runners: list[Runner], came: list[Range], at: datetime, close_all: bool = False) -> None:
        """One batch of each of these jobs, of the same records; one that closes all takes none."""
        began, registry = time.monotonic(), registry_files()
        with self._turn:
            self._is_busy = True
            try:
                plans = [runner.plan(came, at, registry, close_all) for runner in runners]
                done = self._tasks(MicroBatch(tuple(plans), tuple(came), self._fetch, registry, store().url))
                self._end(runners, plans, done, registry, began)
            except StateLost:
                for runner in runners:
                    runner.require_alone()
                raise
            finally:
                self._seen, self._is_busy = time.time(), False
        self.write_current()

    def flush(self, runner: Runner) -> None:
        """Closes what is open after a job's last batch, by a batch that takes nothing; the query must have stopped."""
        if not runner.is_flushed:
            self._batch([runner], [], datetime.now(UTC), close_all=True)

    def _end(
        self, runners: list[Runner], plans: list[BatchPlan], done: list[Done], registry: RegistryFiles, began: float
    ) -> None:
        """Makes batches visible whose tasks are done: an intent of each job, then a commit of each table for all."""
        ended = []
        for runner, plan in zip(runners, plans, strict=True):
            mine = [each for each in done if each.job == runner.job.name]
            ended.append((runner, plan, runner.say(plan, mine, registry), mine))
        for runner, _, intent, _ in ended:
            runner.send(intent)
        commits = [(runner.intents.commit(intent.number), intent.parts) for runner, _, intent, _ in ended]
        runners[0].writer.add_all(commits)
        for runner, plan, intent, mine in ended:
            runner.finish(plan, intent, mine, registry, began)

    def _tasks(self, micro_batch: MicroBatch) -> list[Done]:
        with in_one_sentence(", ".join(plan.job.name for plan in micro_batch.plans)):
            return run_tasks(self.session, micro_batch)

    def write_current(self, is_last: bool = False) -> None:
        """Writes the tables that have their newest version only, a small share of the time; at the end in any case."""
        if not is_last and time.monotonic() < self._current_due:
            return
        if not self._turn.acquire(blocking=is_last):
            return  # a batch is on its way, and asks when it is done
        try:
            began = time.monotonic()
            for runner in self.runners:
                runner.write_current()
            now = time.monotonic()
            self._current_due = now + (now - began) * (1 / CURRENT_SHARE - 1)
        finally:
            self._turn.release()

    def end_with(self, newest: Offsets) -> None:
        """Sets what shall be taken, and no record more: topic and partition → the offset that comes next."""
        self._goal = {at: offset for at, offset in newest.items() if at[0] in self.topics}
        self._hurry.set()

    def hurry(self) -> None:
        """The next micro-batch waits no longer."""
        self._hurry.set()

    @property
    def is_at_its_end(self) -> bool:
        """Whether all is taken that shall be; never, where nothing was set."""
        return self._goal is not None and all(
            runner.place.get(at, 0) >= offset
            for runner in self.runners
            for at, offset in self._goal.items()
            if at[0] in runner.topics
        )


@contextmanager
def in_one_sentence(names: str) -> Iterator[None]:
    """What a task of these jobs fails of is our error: whichever PySpark makes of it."""
    try:
        yield
    except (Py4JJavaError, PySparkException) as error:
        raise ended(names, str(error)) from error


def require_same_partitions(place: Offsets, found: Offsets) -> None:
    """Refuses a topic whose partitions became more, or fewer: its meters' state lies where no record of them comes.

    Args:
        place: how far jobs have come.
        found: what Kafka has.

    Raises:
        StateLost: it names the partitions.
    """
    both = {topic for topic, _ in place} & {topic for topic, _ in found}
    if changed := sorted(f"{topic}-{number}" for topic, number in found.keys() ^ place.keys() if topic in both):
        msg = (
            f"{', '.join(changed)} came or went after the jobs began: a topic's number of partitions must not change, "
            "since a meter's records come to another one then than its state is kept by. Nothing of what came since "
            "was taken. Repair (docs/operations.md): a topic that is made anew"
        )
        raise StateLost(msg)


def bounded(left: list[Range], most: int) -> list[Range]:
    """The first of these records: of each topic so many, of each of its partitions a share, at least one."""
    found = []
    for each in left:
        of_topic = sum(other.records for other in left if other.topic == each.topic)
        share = each.records if of_topic <= most else max(1, each.records * most // of_topic)
        found.append(each._replace(end_offset=each.start_offset + share))
    return found


def ended(name: str, exception: str) -> MeterstreamError:
    """What a query that has ended by itself means for whoever runs it.

    Args:
        name: of the query.
        exception: its text.
    """
    if state := STATE_LOST.search(exception):
        return StateLost(state[1])
    if lost := next((line for line in exception.splitlines() if LOST_IN_KAFKA.search(line)), None):
        return StateLost(lost_in_kafka(name, lost.strip()))
    msg = f"query {name} ended: {exception}"
    return (RetryLater if KAFKA_IS_AWAY.search(exception) else ContractBroken)(msg)
