"""A night's run: nightly jobs for one local day or several, some at once, in the order of what they read."""

import datetime
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Annotated
from zoneinfo import available_timezones

import typer
from py4j.protocol import Py4JError
from pyarrow import ArrowException
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from engine.night import BatchJob, arrived, graph, in_order, rows_of
from engine.session import spark_session
from engine.settings import JudgeSettings
from lake.reading import Lake
from lake.reports import files_of, folder_of, publish_report
from lake.spark import frame_of, read_registry, read_table
from lake.store import store
from metering.clocks import utc_days
from schemas.errors import ConfigError, RetryLater, exits
from schemas.tables import REPORTS, TABLES
from settings import load

YEARS = range(1970, 2200)
AT_ONCE = 2
"""Jobs of a night at the same time: while one waits for its plan or its Python workers another computes."""


def _read(session: SparkSession, lake: Lake, job: BatchJob, name: str, date: datetime.date) -> DataFrame:
    days_before = job.reads[name]
    if days_before is None:
        return read_table(session, lake, name)
    days = [date + datetime.timedelta(days=shift) for shift in range(-days_before, job.reads_after.get(name, 0) + 1)]
    if name in TABLES:
        return read_table(session, lake, name, sorted({each for day in days for each in utc_days(day)}))
    files = files_of(name, [day.isoformat() for day in days])
    if not files_of(name, [date.isoformat()]):
        msg = f"report {name} has nothing for {date.isoformat()}: run its job for that date first"
        raise ConfigError(msg)
    return frame_of(session, files, REPORTS[name])


def _arrived(session: SparkSession, lake: Lake, table: str, date: datetime.date, limits: JudgeSettings) -> DataFrame:
    """Rows of a table that came in the UTC days that a local day can touch: of all days that a clock can say."""
    days = utc_days(date)
    first, last = days[0] - datetime.timedelta(seconds=limits.max_behind_s), days[-1]
    last += datetime.timedelta(seconds=limits.max_ahead_s + datetime.timedelta(days=1).total_seconds())
    at = F.col("arrival_at")
    begin, end = (F.lit(day.isoformat()).cast("timestamp") for day in (days[0], days[-1] + datetime.timedelta(days=1)))
    dates = [day for day in lake.dates(table) if first <= day <= last]
    return read_table(session, lake, table, dates).where((at >= begin) & (at < end))


def publish(session: SparkSession, lake: Lake, job: BatchJob, date: datetime.date, limits: JudgeSettings) -> int:
    """Replaces one date of a job's report.

    Args:
        session: Spark's.
        lake: what it is made of.
        job: whose report.
        date: the local day.
        limits: which clocks cannot be right.

    Returns:
        The number of rows.

    Raises:
        ConfigError: the registry names a time zone that does not exist, or a report that is read is not there.
    """
    registry = read_registry(session, lake)
    zones = {row.time_zone: row["count"] for row in registry.groupBy("time_zone").count().collect()}
    if unknown := sorted(zones.keys() - {None} - available_timezones()):
        msg = f"registry: no such time zone: {', '.join(unknown)}"
        raise ConfigError(msg)
    tables = {name: _read(session, lake, job, name, date) for name in job.reads}
    tables |= {arrived(name): _arrived(session, lake, name, date, limits) for name in job.by_arrival}
    rows = rows_of(job, tables, registry, date, limits)
    return publish_report(rows, job.report, date.isoformat(), sum(zones.values()))


def silent(lake: Lake, date: datetime.date) -> str | None:
    """What is to be said before the reports of a day whose readings the lake does not have; None where it has some."""
    days = lake.dates("readings")
    if date in days:
        return None
    known = f"it has those of {days[0]} to {days[-1]}" if days else "it has none of any day"
    return f"The lake has no readings of {date.isoformat()}; {known}. The reports will say no more than that."


def run(
    jobs: Iterable[BatchJob],
    dates: Sequence[datetime.date],
    limits: JudgeSettings,
    as_json: bool = False,
    as_of: datetime.datetime | None = None,
) -> None:
    """Runs the jobs for each date, some at once, each after those whose reports it reads, and says rows and seconds.

    A report that cannot be read or written stops those of its date that read it, and no other.

    Args:
        jobs: which.
        dates: local days, in order.
        limits: which clocks cannot be right.
        as_json: a line of JSON each instead.
        as_of: the tables are read as they were then; None: as they are now.

    Raises:
        ConfigError: see `publish`.
        RetryLater: reports are missing; it names them, and why.
    """
    ordered, lake = in_order(jobs), Lake(as_of)
    console = Console(stderr=as_json, highlight=False)
    for table in {"registry", *(name for job in ordered for name in job.reads)} & set(TABLES):
        lake.version(table)  # all jobs read the tables as they are now
    for date in dates:
        if silence := silent(lake, date):
            Console(stderr=True, highlight=False).print(silence, soft_wrap=True)
    if not as_json and len(ordered) > 1:
        span = " to ".join(day.isoformat() for day in dict.fromkeys((dates[0], dates[-1])))
        console.print(f"{len(ordered)} reports of {span}, {AT_ONCE} at a time", soft_wrap=True)
    columns = (TextColumn("  {task.fields[day]}"), BarColumn(), MofNCompleteColumn())
    doing = TextColumn("{task.fields[doing]} · left")
    with Progress(
        *columns, doing, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("night", total=len(ordered) * len(dates), day="", doing="starting Spark")

        def say(job: BatchJob, date: datetime.date, rows: int, took_s: float) -> None:
            bar.advance(task)
            day = date.isoformat()
            if as_json:
                line = {"report": job.report, "date": day, "rows": rows, "seconds": round(took_s, 3)}
                sys.stdout.write(json.dumps(line) + "\n")
            else:
                console.print(f"{day}  {job.report:<24} {rows:>10,} rows {took_s:>7.1f} s")

        session = spark_session("meterstream-night-" + "-".join(job.name for job in ordered))
        try:
            missing = []
            for date in dates:
                day = date.isoformat()
                failed = _night(session, lake, ordered, date, limits, say, partial(bar.update, task, day=day))
                if failed:
                    skipped = sorted(_readers(ordered, failed))
                    then = f"; not run, since they read it: {', '.join(skipped)}" if skipped else ""
                    missing.append("; ".join(f"{name} of {day}: {why}" for name, why in failed.items()) + then)
            if missing:
                raise RetryLater("reports are missing: " + "; ".join(missing))
            where = store().uri(folder_of("<report>", dates[0].isoformat() if len(dates) == 1 else "<date>"))
            console.print(f"In {where}/*.parquet", markup=False, soft_wrap=True)
        finally:
            session.stop()


def _night(
    session: SparkSession,
    lake: Lake,
    ordered: list[BatchJob],
    date: datetime.date,
    limits: JudgeSettings,
    say: Callable[[BatchJob, datetime.date, int, float], None],
    show: Callable[..., None],
) -> dict[str, str]:
    """Runs the jobs for one date. Returns which reports failed, and why.

    Args:
        session: Spark's.
        lake: what they are made of.
        ordered: the jobs.
        date: the local day.
        limits: which clocks cannot be right.
        say: called with each that is done, its rows and seconds.
        show: called with `doing`, what runs.
    """
    left = graph(ordered)
    left.prepare()
    running: dict[Future[tuple[int, float]], BatchJob] = {}
    failed: dict[str, str] = {}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        try:
            while True:
                for job in sorted(left.get_ready(), key=lambda job: job.name):
                    running[pool.submit(_timed, session, lake, job, date, limits)] = job
                if not running:
                    return failed
                show(doing=", ".join(job.name for job in list(running.values())[:AT_ONCE]))
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    job = running.pop(done)
                    try:
                        rows, took_s = done.result()
                    except (RetryLater, OSError, PySparkException, Py4JError, ArrowException) as error:
                        failed[job.report] = reason(error)
                        continue
                    left.done(job)
                    say(job, date, rows, took_s)
        except BaseException:  # Ctrl-C too: what has not begun does not begin, what has is cancelled
            pool.shutdown(wait=False, cancel_futures=True)
            session.sparkContext.cancelAllJobs()
            raise


def _readers(ordered: Iterable[BatchJob], failed: Iterable[str]) -> list[str]:
    """Reports that are made of these, or of such that are."""
    lost, found = set(failed), []
    for job in ordered:
        if set(job.reads) & lost:
            lost.add(job.report)
            found.append(job.report)
    return found


def reason(error: Exception) -> str:
    """The line of an error that says most: that which names a file, else the first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if "file:/" in line]
    return (named or lines or [type(error).__name__])[0].lstrip(": ")


def _timed(
    session: SparkSession, lake: Lake, job: BatchJob, date: datetime.date, limits: JudgeSettings
) -> tuple[int, float]:
    """Publishes one job's report. Returns rows and seconds."""
    began = time.monotonic()
    return publish(session, lake, job, date, limits), time.monotonic() - began


def _time(text: str) -> datetime.datetime:
    try:
        found = datetime.datetime.fromisoformat(text)
    except ValueError:
        found = None
    if found is None or found.tzinfo is None:
        msg = f"--as-of is a time with its zone, such as 2026-11-30T06:00:00+01:00, not {text}"
        raise ConfigError(msg)
    return found


def _days(date: str | None, first: str | None, last: str | None) -> list[datetime.date]:
    """The local days that a command line names: `--date`, or `--from` and `--to`.

    Raises:
        ConfigError: they are none.
    """
    given = {"--date": date, "--from": first, "--to": last}
    found = {}
    for option, text in given.items():
        if text is None:
            continue
        try:
            found[option] = datetime.date.fromisoformat(text)
        except ValueError as error:
            msg = f"{option} is a day like 2016-06-15, not {text}"
            raise ConfigError(msg) from error
        if found[option].year not in YEARS:
            msg = f"{option} is a day of the years {YEARS.start} to {YEARS.stop - 1}, not {text}"
            raise ConfigError(msg)
    if set(found) == {"--date"}:
        return [found["--date"]]
    if set(found) != {"--from", "--to"}:
        msg = f"which days? --date, or --from and --to; found {', '.join(found) or 'none of them'}"
        raise ConfigError(msg)
    count = (found["--to"] - found["--from"]).days + 1
    if count < 1:
        msg = f"--from {first} is after --to {last}"
        raise ConfigError(msg)
    return [found["--from"] + datetime.timedelta(days=number) for number in range(count)]


def command(jobs: list[BatchJob]) -> None:
    """The command line of one job, or of all in one session."""

    def main(
        date: Annotated[str | None, typer.Option(metavar="YYYY-MM-DD", help="Local day of the report.")] = None,
        first: Annotated[
            str | None, typer.Option("--from", metavar="YYYY-MM-DD", help="First of several days, with --to.")
        ] = None,
        last: Annotated[str | None, typer.Option("--to", metavar="YYYY-MM-DD", help="Last of them.")] = None,
        as_json: Annotated[bool, typer.Option("--json", help="One JSON object per job on standard output.")] = False,
        as_of: Annotated[
            str | None,
            typer.Option(metavar="TIME", help="Of the tables as they were then, such as 2026-11-30T06:00:00+01:00."),
        ] = None,
    ) -> None:
        with exits():
            days = _days(date, first, last)
            run(jobs, days, load(JudgeSettings), as_json, _time(as_of) if as_of else None)

    main.__doc__ = (
        f"Writes the reports of one local day, or of several: {', '.join(job.name for job in jobs)}.\n\n"
        "Examples: --date 2016-06-15 · --from 2016-06-01 --to 2016-06-30"
    )
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
