"""Running nightly jobs: the lake's tables → transform → a report, for one local day.

A report's date is the local day at the usage point: `registry.time_zone`, UTC where none is known, so a day has 23, 24
or 25 hours. Two views of its edges: a reading ends the time it speaks of, so one exactly at midnight belongs to the
earlier day (`is_read_in_day`); a window or an event begins, so at midnight it belongs to the later (`is_begun_in_day`).

A job reads the UTC days that its local day can touch and a finite number before them, writes one date only, and gives
the same rows when it is run again on the same lake.
"""

import datetime
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial, reduce
from graphlib import CycleError, TopologicalSorter
from typing import Annotated
from zoneinfo import available_timezones

import polars as pl
import pyarrow as pa
import typer
from py4j.protocol import Py4JError
from pyarrow import ArrowException
from pyspark.errors import PySparkException
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from engine.session import spark_session
from engine.settings import JudgeSettings
from lake.reading import Lake
from lake.reports import files_of, folder_of, publish_report
from lake.spark import frame_of, read_registry, read_table, spark_schema
from lake.store import store
from metering.clocks import utc_days
from schemas.errors import ConfigError, ContractBroken, RetryLater, exits
from schemas.tables import REPORTS, TABLES
from settings import load

SHARDS = 32
"""Groups of meters a night is cut into: one must fit into a task's memory, and each costs some milliseconds."""
DEFAULT_ZONE = "UTC"
YEARS = range(1970, 2200)
AT_ONCE = 2
"""Jobs of a night at the same time: while one waits for its plan or its Python workers another computes."""

Transform = Callable[[Mapping[str, DataFrame], DataFrame, datetime.date], DataFrame]


@dataclass(frozen=True, eq=False)
class BatchJob:
    """One nightly job.

    Attributes:
        name: its module's name: report, CLI word.
        version: raised when columns of the report change their meaning; part of the report's name.
        reads: lake table or report → how many days before the local day it needs. Of a table the UTC days that these
            local days can touch are read, of a report the days themselves. None: the whole of a small table.
        reads_after: lake table in `reads` → how many days after the local day it needs, too.
        transform: (tables by name, registry, local day) → the report's rows, columns `schemas.tables.REPORTS`; pure,
            runs on static frames too.
        refuses_impossible_clocks: lake tables of which it is not handed the rows whose clock cannot be right.
        by_arrival: lake tables in `reads` of which it is handed, as `arrived(table)`, the rows that came within the UTC
            days that the local day can touch, whatever day their own clock says.
    """

    name: str
    version: int
    reads: Mapping[str, int | None]
    transform: Transform
    refuses_impossible_clocks: tuple[str, ...] = ()
    by_arrival: tuple[str, ...] = ()
    reads_after: Mapping[str, int] = field(default_factory=dict)

    @property
    def report(self) -> str:
        """Name of what it writes."""
        return f"{self.name}_v{self.version}"


def arrived(table: str) -> str:
    """Name under which a job is handed the rows of a table by their arrival."""
    return f"{table} by arrival"


def graph(jobs: Iterable[BatchJob]) -> TopologicalSorter[BatchJob]:
    """Which job comes after which: those whose reports it reads, else by name."""
    by_report = {job.report: job for job in sorted(jobs, key=lambda job: job.name)}
    return TopologicalSorter(
        {job: [by_report[read] for read in job.reads if read in by_report] for job in by_report.values()}
    )


def in_order(jobs: Iterable[BatchJob]) -> list[BatchJob]:
    """The jobs so that each comes after those whose reports it reads, else by name.

    Raises:
        ContractBroken: jobs read each other in a circle.
    """
    try:
        return list(graph(jobs).static_order())
    except CycleError as error:
        msg = f"jobs read each other in a circle: {' → '.join(job.report for job in error.args[1])}"
        raise ContractBroken(msg) from error


def midnight(day: datetime.date, time_zone: Column) -> Column:
    """When a local day begins, as UTC; where clocks jump over midnight, the context of the jump."""
    return F.to_utc_timestamp(F.lit(day.isoformat()), F.coalesce(time_zone, F.lit(DEFAULT_ZONE)))


def with_local_day(rows: DataFrame, registry: DataFrame, date: datetime.date, *known: str) -> DataFrame:
    """Adds `day_start` and `day_end` of the local day where each row's meter stands.

    Args:
        rows: has meter_id.
        registry: one row per meter.
        date: the local day.
        known: columns of the registry to add too; null for a meter that it does not have.
    """
    zone = F.col("time_zone")
    edges = {"day_start": midnight(date, zone), "day_end": midnight(date + datetime.timedelta(days=1), zone)}
    fleet = registry.select("meter_id", *known, *[edge.alias(name) for name, edge in edges.items()])
    nowhere = F.lit(None).cast("string")  # a meter that the registry does not have
    return rows.join(F.broadcast(fleet), "meter_id", "left").withColumns(
        {
            "day_start": F.coalesce("day_start", midnight(date, nowhere)),
            "day_end": F.coalesce("day_end", midnight(date + datetime.timedelta(days=1), nowhere)),
        }
    )


def is_read_in_day(at: str) -> Column:
    """True where a reading ends a time of the local day: after its midnight, the next midnight included."""
    return (F.col(at) > F.col("day_start")) & (F.col(at) <= F.col("day_end"))


def is_begun_in_day(at: str) -> Column:
    """True where something began in the local day: its midnight included."""
    return (F.col(at) >= F.col("day_start")) & (F.col(at) < F.col("day_end"))


def day_s() -> Column:
    """Length of the local day, s."""
    return F.unix_seconds("day_end") - F.unix_seconds("day_start")


def impossible_clock(max_ahead_s: int, max_behind_s: int) -> Column:
    """`metering.clocks.is_impossible` as a column of Spark's."""
    seconds = F.col("observed_at").cast("double") - F.col("arrival_at").cast("double")
    return (seconds > max_ahead_s) | (seconds < -max_behind_s)


def rows_of(
    job: BatchJob, lake: Mapping[str, DataFrame], registry: DataFrame, date: datetime.date, limits: JudgeSettings
) -> DataFrame:
    """A report's rows, in its columns: what the engine does for a job as declared, its transform, the check.

    Args:
        job: whose.
        lake: tables and reports that it reads, by name.
        registry: one row per meter.
        date: the local day.
        limits: which clocks cannot be right; the stream has quarantined the records of those.

    Raises:
        ContractBroken: the transform gives other columns than the report is declared with.
    """
    is_impossible = F.coalesce(impossible_clock(limits.max_ahead_s, limits.max_behind_s), F.lit(False))
    refused = [name for table in job.refuses_impossible_clocks for name in (table, arrived(table))]
    believable = {name: lake[name].where(~is_impossible) for name in refused if name in lake}
    known = registry.withColumn("default_fuse_a", F.lit(limits.default_fuse_a).cast("long"))
    rows = job.transform({**lake, **believable}, known, date)
    declared = spark_schema(REPORTS[job.report])
    found, wanted = (
        {field.name: field.dataType.simpleString() for field in schema} for schema in (rows.schema, declared)
    )
    if found != wanted:
        wrong = sorted(set(found.items()) ^ set(wanted.items()))
        msg = f"{job.report} is declared with other columns than its transform gives: "
        msg += ", ".join(
            f"{name} {kind} ({'given' if found.get(name) == kind else 'declared'})" for name, kind in wrong
        )
        raise ContractBroken(msg)
    return rows.select(*declared.names)


def with_silent(
    rows: DataFrame, expected: DataFrame, registry: DataFrame, date: datetime.date, *known: str
) -> DataFrame:
    """Adds rows of nulls for what the registry expects on the day and nothing came from.

    Args:
        rows: has the columns of `expected`; all rows are kept, those of unknown meters too.
        expected: the keys that must be there, meter_id among them.
        registry: one row per meter; one whose validity does not touch the day is not expected.
        date: the local day.
        known: columns of the registry to add.
    """
    both = rows.withColumn("has_rows", F.lit(True)).join(expected, expected.columns, "full")
    is_there = F.coalesce(F.col("valid_from") < F.col("day_end"), F.lit(True)) & F.coalesce(
        F.col("valid_to") > F.col("day_start"), F.lit(True)
    )
    return (
        with_local_day(both, registry, date, "valid_from", "valid_to", *known)
        .where(F.col("has_rows") | is_there)
        .drop("has_rows", "valid_from", "valid_to")
    )


def per_shard(
    rows: DataFrame,
    engine: Callable[..., pl.DataFrame],
    output: pa.Schema,
    *others: DataFrame,
    shards: int = SHARDS,
    by: str = "meter_id",
) -> DataFrame:
    """Runs a Polars function over each group of meters.

    Args:
        rows: has the column `by`.
        engine: all rows of some meters, and those of each of the others → rows with the columns of `output`.
        output: names and types of what it gives.
        others: have it, too; what `rows` does not have may be left out.
        shards: how many groups: more where a job reads many days.
        by: the column whose equal values are in one group.
    """
    frames = [rows, *others]
    columns = [frame.columns for frame in frames]

    def run(shard: pa.Table) -> pa.Table:
        both = pl.from_arrow(shard)
        if not isinstance(both, pl.DataFrame):
            msg = "an Arrow table gave no frame"
            raise ContractBroken(msg)
        given = [both.filter(pl.col("frame") == number).select(names) for number, names in enumerate(columns)]
        return engine(*given).select(output.names).to_arrow().cast(output)

    numbered = [frame.withColumn("frame", F.lit(number)) for number, frame in enumerate(frames)]
    together = reduce(lambda one, other: one.unionByName(other, allowMissingColumns=True), numbered)
    sharded = together.withColumn("shard", F.crc32(F.col(by).cast("binary")) % shards)
    return sharded.groupBy("shard").applyInArrow(run, spark_schema(output))


def per_community(
    rows: DataFrame,
    declared: DataFrame,
    engine: Callable[[pl.DataFrame, pl.DataFrame], pl.DataFrame],
    output: pa.Schema,
) -> DataFrame:
    """Runs a Polars function over each community.

    Args:
        rows: has community_id.
        declared: has community_id; a community that it does not have is left out, one without rows is not.
        engine: rows and declared of one community → rows with the columns of `output`.
        output: names and types of what it gives.
    """

    def run(mine: pa.Table, of_community: pa.Table) -> pa.Table:
        frames = [pl.DataFrame(table) for table in (mine, of_community)]
        given = engine(*frames) if len(of_community) else pl.DataFrame(schema=pl.Schema(output))
        return given.select(output.names).to_arrow().cast(output)

    both = rows.groupBy("community_id").cogroup(declared.groupBy("community_id"))
    return both.applyInArrow(run, spark_schema(output))


def _read(session: SparkSession, lake: Lake, job: BatchJob, name: str, date: datetime.date) -> DataFrame:
    days_before = job.reads[name]
    if days_before is None:
        return read_table(session, lake, name)
    days = [date + datetime.timedelta(days=shift) for shift in range(-days_before, job.reads_after.get(name, 0) + 1)]
    if name in TABLES:
        return read_table(session, lake, name, sorted({each for day in days for each in utc_days(day)}))
    files = files_of(name, [day.isoformat() for day in days])
    if not files:
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
                    skipped = sorted({job.report for job in ordered if set(job.reads) & set(failed)} - set(failed))
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
                    except (OSError, PySparkException, Py4JError, ArrowException) as error:
                        failed[job.report] = reason(error)
                        continue
                    left.done(job)
                    say(job, date, rows, took_s)
        except BaseException:  # Ctrl-C too: what has not begun does not begin, what has is cancelled
            pool.shutdown(wait=False, cancel_futures=True)
            session.sparkContext.cancelAllJobs()
            raise


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
