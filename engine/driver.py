"""The driver of streaming jobs: one process, from its start to its end, on a signal, with a flush or without.

All jobs together (`python -m streaming_jobs`), or one alone; `engine/stream.py` has their micro-batches.
"""

import fcntl
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated

import structlog
import typer
from py4j.protocol import Py4JError
from pyspark.sql.streaming.query import StreamingQuery

from engine import metrics
from engine.job import StreamingJob
from engine.partition_tasks import warm_up
from engine.runner import Runner
from engine.session import spark_session
from engine.settings import StreamSettings
from engine.stream import JAVA_OPTIONS, Stream, ended, in_one_sentence
from kafka_io.offsets import newest_offsets, oldest_offsets, topic_ids
from lake.tables import Writer
from lake.upkeep import Upkeep
from schemas.errors import RetryLater, exits
from settings import home, load

log = structlog.get_logger()
ALL_JOBS = "streaming"
"""Name of the driver of several jobs; that of one alone is its job's."""


def asked_to_end() -> threading.Event:
    """Set by SIGTERM or SIGINT from now on."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    return stop


@contextmanager
def served(name: str, queries: list[StreamingQuery]) -> Iterator[None]:
    """Says by `run/<name>.ready` that a driver's queries run; at the end they are stopped."""
    ready = home() / "run" / f"{name}.ready"
    ready.parent.mkdir(parents=True, exist_ok=True)
    ready.write_text(str(os.getpid()))
    try:
        yield
    finally:
        ready.unlink(missing_ok=True)
        for query in queries:
            query.stop()


def stay(
    queries: list[StreamingQuery],
    stop: threading.Event,
    is_over: Callable[[], bool] = lambda: False,
    meanwhile: Callable[[], None] = lambda: None,
) -> None:
    """Waits until somebody asks for the end, or until it is over by itself; does something meanwhile.

    Raises:
        StateLost: Kafka no longer has what a query has not read.
        RetryLater: Kafka was away for longer than a batch waits.
        ContractBroken: a query ended by itself.
    """
    while not stop.wait(0.5) and not is_over():
        meanwhile()
        for query in queries:
            if not query.isActive:
                raise ended(query.name, str(query.exception()))


@contextmanager
def kept_up(files: int, every_s: float) -> Iterator[None]:
    """While it holds, a thread keeps the tables small to open and fast to read (`lake/upkeep.py`)."""
    is_over = threading.Event()

    def work() -> None:
        keeping = Upkeep(files)
        metrics.upkeep(0, 0)
        while not is_over.wait(every_s):
            done = keeping.once(is_over.is_set)
            metrics.upkeep(done.compacted, done.left)

    keeper = threading.Thread(target=work, name="upkeep", daemon=True)
    keeper.start()
    try:
        yield
    finally:
        is_over.set()
        keeper.join()


def flushed_mark() -> Path:
    """There since the driver of all jobs last ended with a flush, until one starts again."""
    return home() / "run" / f"{ALL_JOBS}.flushed"


def run(jobs: list[StreamingJob], settings: StreamSettings) -> None:
    """Runs the jobs in one driver until SIGTERM or SIGINT; SIGUSR1 before that asks for a flush at the end.

    Raises:
        RetryLater: another process runs one of them on this home.
        ContractBroken: a query ended by itself; the others are stopped.
    """
    with only_one(*[job.name for job in jobs]):
        stop = asked_to_end()
        try:
            _run(jobs, settings, stop)
        except Py4JError:
            if not stop.is_set():
                raise
            log.info("stopped", by="Spark, which was asked to end too: the next start goes on from the last batch")


@contextmanager
def only_one(*jobs: str) -> Iterator[None]:
    """While it holds, no other process of this machine runs these jobs on this home.

    It saves whoever starts a second one by mistake a puzzle, and no more: of two drivers on one store, wherever they
    run, one puts the next intent and the other ends (`engine/intents.py`).

    Raises:
        RetryLater: one does.
    """
    folder = home() / "run"
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        for job in jobs:
            mark = held.enter_context((folder / f"{job}.lock").open("a"))
            try:
                fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                msg = f"{job} runs in another process with METERSTREAM_HOME={home()}; stop that one first"
                raise RetryLater(msg) from None
        yield


def _run(jobs: list[StreamingJob], settings: StreamSettings, stop: threading.Event) -> None:
    name = ALL_JOBS if len(jobs) > 1 else jobs[0].name
    writer = Writer()
    runners = [Runner(job, settings, writer) for job in jobs]
    for runner in runners:
        runner.resume()
    flush = threading.Event()
    if settings.flush:
        flush.set()
    signal.signal(signal.SIGUSR1, lambda *_: flush.set())
    session = spark_session("meterstream-" + "-".join(job.name for job in jobs), JAVA_OPTIONS)
    lag = metrics.Lag(settings.kafka_bootstrap)
    for runner in runners:
        lag.watch(runner.job.name, runner.where)
    if settings.metrics_port:
        metrics.serve(settings.metrics_port, settings.listen)
    stream = Stream(session, runners, is_over=lambda: stop.is_set() and not flush.is_set())
    with in_one_sentence(", ".join(job.name for job in jobs)):
        warm_up(session, jobs, settings)
    flushed_mark().unlink(missing_ok=True)
    topics = {topic for job in jobs for topic in job.topics}
    queries: list[StreamingQuery] = []
    with served(name, queries), kept_up(settings.compact_files, settings.upkeep_s):
        log.info("streaming", jobs=[job.name for job in jobs], kafka=settings.kafka_bootstrap)
        oldest, newest = (ask(settings.kafka_bootstrap, topics) for ask in (oldest_offsets, newest_offsets))
        ids = topic_ids(settings.kafka_bootstrap, topics)
        stream.catch_up(oldest, newest, ids)
        if flush.is_set():  # that may have come after a stop had cut it short
            stream.catch_up(oldest, newest, ids)
        if flush.is_set() or not stop.is_set():
            queries.append(stream.start())
        stay(queries, stop, meanwhile=stream.write_current)
        stream.hurry()
        if flush.is_set():
            log.info("flush", takes="what Kafka has now")
            stream.end_with(newest_offsets(settings.kafka_bootstrap, topics))
            while not stream.is_at_its_end:
                for query in queries:
                    if not query.isActive:
                        raise ended(query.name, str(query.exception()))
                time.sleep(0.05)
    for runner in runners:
        if flush.is_set():
            stream.flush(runner)
    stream.write_current(is_last=True)
    if flush.is_set() and name == ALL_JOBS:
        flushed_mark().touch()
    log.info("stopped", flushed=flush.is_set())
    session.stop()


def command(jobs: list[StreamingJob]) -> None:
    """The command line of one job, or of all in one driver."""

    def main(
        flush: Annotated[bool, typer.Option(help="When stopped, take what Kafka has and close open windows.")] = False,
        kafka_bootstrap: Annotated[str | None, typer.Option(help="host:port of a Kafka broker.")] = None,
        trigger_s: Annotated[float | None, typer.Option(help="Most seconds between micro-batches.")] = None,
    ) -> None:
        with exits():
            settings = load(StreamSettings, flush=flush or None, kafka_bootstrap=kafka_bootstrap, trigger_s=trigger_s)
            run(jobs, settings)

    main.__doc__ = f"Runs {', '.join(job.name for job in jobs)} on Kafka until SIGTERM or Ctrl-C."
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
