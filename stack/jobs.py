"""What runs, and how the streaming jobs get on, by the metrics that their driver exports."""

import time
from dataclasses import dataclass
from datetime import UTC, datetime
from math import isfinite, nan

from prometheus_client.parser import text_string_to_metric_families
from rich.table import Table

from stack.parts import PartState
from stack.ports import http_answer

PREFIX = "meterstream_"
UPKEEP_STANDS_S = 900.0
"""A look at all tables takes seconds; one that makes a day's files large, minutes."""
LEGEND = """lag: records in Kafka that are not taken · took: seconds of the last batch, ended: how long ago
p50, p99: seconds from Kafka to the tables, of the last five minutes' records
state: rows kept · late, bad: records kept apart since the start · watermark: windows up to then are closed"""
COLOURS = {"running": "green", "starting": "yellow", "died": "red", "stopped": "dim"}


@dataclass(frozen=True)
class JobMetrics:
    """What is known of one job; what it has not exported yet is None.

    Attributes:
        job: its name.
        lag_records: in Kafka and not taken.
        records_per_second: that the last batch took.
        batch: number of the last batch.
        batch_seconds: how long that took.
        batch_ended: when, seconds since 1970.
        state_rows: kept from batch to batch.
        latency_p50: seconds from Kafka to the tables that half of the last minutes' records did not exceed.
        latency_p99: that all but one in a hundred did not.
        watermark: up to when windows are over, seconds since 1970.
        records: taken since the driver's start.
        late: of these, kept apart as late.
        quarantined: of these, kept apart as wrong.
    """

    job: str
    lag_records: int | None = None
    records_per_second: float | None = None
    batch: int | None = None
    batch_seconds: float | None = None
    batch_ended: float | None = None
    state_rows: int | None = None
    latency_p50: float | None = None
    latency_p99: float | None = None
    watermark: float | None = None
    records: int = 0
    late: int = 0
    quarantined: int = 0


def metrics_text(port: int) -> str | None:
    """The driver's metrics as text; None where nobody answers."""
    answer = http_answer(port, "/metrics", timeout_s=2.0)
    return None if answer is None else answer.decode()


def jobs(text: str) -> list[JobMetrics]:
    """The jobs of one driver, by name."""
    values: dict[str, dict[str, float]] = {}
    records: dict[str, dict[str, int]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            job = sample.labels.get("job")
            if job is None:
                continue
            if sample.name == f"{PREFIX}records_total":
                records.setdefault(job, {})[sample.labels["bucket"]] = int(sample.value)
            elif sample.name == f"{PREFIX}latency_seconds":
                values.setdefault(job, {})[f"latency_{sample.labels['quantile']}"] = sample.value
            else:
                values.setdefault(job, {})[sample.name.removeprefix(PREFIX)] = sample.value

    def finite(found: dict[str, float], name: str) -> float | None:
        return found[name] if isfinite(found.get(name, nan)) else None

    def whole(found: dict[str, float], name: str) -> int | None:
        value = finite(found, name)
        return None if value is None else int(value)

    return [
        JobMetrics(
            job,
            lag_records=whole(found, "lag_records"),
            records_per_second=found.get("records_per_second"),
            batch=whole(found, "batch"),
            batch_seconds=found.get("batch_seconds"),
            batch_ended=found.get("batch_ended_timestamp_seconds"),
            state_rows=whole(found, "state_rows"),
            latency_p50=finite(found, "latency_0.5"),
            latency_p99=finite(found, "latency_0.99"),
            watermark=found.get("watermark_timestamp_seconds"),
            records=sum(records.get(job, {}).values()),
            late=records.get(job, {}).get("late", 0),
            quarantined=records.get(job, {}).get("quarantined", 0),
        )
        for job, found in sorted(values.items())
    ]


def upkeep_warning(text: str) -> str | None:
    """What to say where upkeep of the tables stands, or cannot look after some of them.

    Args:
        text: the driver's metrics.
    """
    found = {sample.name: sample.value for family in text_string_to_metric_families(text) for sample in family.samples}
    ended = found.get(f"{PREFIX}upkeep_ended_timestamp_seconds")
    left = int(found.get(f"{PREFIX}upkeep_left_tables", 0))
    stands_s = time.time() - ended if ended else 0.0  # 0: it has not begun
    if stands_s > UPKEEP_STANDS_S:
        return f"upkeep of the tables has not got through them for {stands_s / 60:.0f} minutes: see make logs"
    return f"upkeep leaves {left} tables for the next time: see make logs" if left else None


def jobs_table(found: list[JobMetrics]) -> Table:
    """How the jobs get on; red is more in Kafka than ten batches of the last one's speed take.

    p50 and p99 are of the records of the last five minutes: from Kafka to the tables.
    """
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("job", no_wrap=True)
    for column in ("lag", "rec/s", "took", "p50", "p99", "ended", "state", "late", "bad", "watermark"):
        table.add_column(column, justify="right", no_wrap=True)
    for job in found:
        rate, lag = job.records_per_second or 0.0, job.lag_records or 0
        is_behind = lag > 10 * max(1.0, rate * (job.batch_seconds or 1.0))
        table.add_row(
            job.job,
            "-" if job.lag_records is None else f"[{'red' if is_behind else 'green'}]{lag:,}[/]",
            f"{rate:,.0f}",
            "-" if job.batch_seconds is None else f"{job.batch_seconds:.1f}",
            *["-" if latency is None else f"{latency:.1f}" for latency in (job.latency_p50, job.latency_p99)],
            "-" if job.batch_ended is None else f"{max(0.0, time.time() - job.batch_ended):.0f} s",
            "-" if job.state_rows is None else f"{job.state_rows:,}",
            f"{job.late:,}",
            f"{job.quarantined:,}",
            "-" if job.watermark is None else f"{datetime.fromtimestamp(job.watermark, UTC):%m-%d %H:%M}",
        )
    return table


def processes_table(states: list[PartState]) -> Table:
    """The processes of a stack, for people."""
    table = Table("process", "pid", "up since", "port", "memory", "state")
    for state in states:
        since = (
            datetime.fromtimestamp(state.since, UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S") if state.since else "-"
        )
        memory = f"{state.memory_bytes / 1e6:.0f} MB" if state.memory_bytes is not None else "-"
        shown = f"[{COLOURS[state.state]}]{state.state}[/]"
        table.add_row(state.name, str(state.pid or "-"), since, str(state.port or "-"), memory, shown)
    return table
