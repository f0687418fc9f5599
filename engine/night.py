"""Running nightly jobs: the lake's tables → transform → a report, for one local day.

A report's date is the local day at the usage point: `registry.time_zone`, UTC where none is known, so a day has 23, 24
or 25 hours. Two views of its edges: a reading ends the time it speaks of, so one exactly at midnight belongs to the
earlier day (`is_read_in_day`); a window or an event begins, so at midnight it belongs to the later (`is_begun_in_day`).

A job reads the UTC days that its local day can touch and a finite number before them, writes one date only, and gives
the same rows when it is run again on the same lake.
"""

import datetime
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from graphlib import CycleError, TopologicalSorter

import polars as pl
import pyarrow as pa
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from engine.settings import JudgeSettings
from lake.spark import spark_schema
from schemas.closed_lists import IntervalQuality
from schemas.errors import ContractBroken
from schemas.tables import REPORTS

SHARDS = 32
"""Groups of meters a night is cut into: one must fit into a task's memory, and each costs some milliseconds."""
DEFAULT_ZONE = "UTC"
QUARTER_S = 900

Transform = Callable[[Mapping[str, DataFrame], DataFrame, datetime.date], DataFrame]


@dataclass(frozen=True, eq=False)
class BatchJob:
    """One nightly job.

    Attributes:
        name: its module's name: report, CLI word.
        version: raised when columns of the report change their meaning; part of the report's name.
        reads: lake table or report → how many days before the local day it needs. Of a table the UTC days that these
            local days can touch are read, of a report the days themselves. None: the whole of a small table.
        reads_after: table or report in `reads` → how many days after the local day it takes, as far as they are there.
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


def quarters(intervals: DataFrame) -> DataFrame:
    """Quarter hours whose energy is known, of validated intervals: a half hour is two, interpolated.

    Args:
        intervals: interval_start, interval_end, energy_wh, quality, and others that stay.

    Returns:
        The same, with `count` and `part` of the interval; interval_end stays that of the interval.
    """
    seconds = F.unix_seconds("interval_end") - F.unix_seconds("interval_start")
    count, part, wh = F.col("count"), F.col("part"), F.col("energy_wh")
    is_cut = (count > 1) & (F.col("quality") == IntervalQuality.MEASURED.value)
    return (
        intervals.where(wh.isNotNull())
        .withColumn("count", F.floor(seconds / QUARTER_S).cast("int"))
        .withColumn("part", F.explode(F.sequence(F.lit(0), count - 1)))
        .withColumns(
            {
                "interval_start": F.col("interval_start")
                + F.make_dt_interval(secs=(part * QUARTER_S).cast("decimal(18,6)")),
                "energy_wh": F.floor(wh * (part + 1) / count) - F.floor(wh * part / count),
                "quality": F.when(is_cut, IntervalQuality.INTERPOLATED.value).otherwise(F.col("quality")),
            }
        )
    )
