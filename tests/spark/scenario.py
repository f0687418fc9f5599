"""Scenario folders: `when/*.csv` is what comes, `then/*.csv` what must be there, in words a domain expert writes.

`when/<entity>.csv` has columns of the entity; a column `batch` cuts it into micro-batches (state goes from one to the
next), a column `payload` stands for bytes that are none of ours. `when/registry.csv` and, for a night job,
`when/<table>.csv` are tables, `when/<report>_v<N>.csv` reports. `when/settings.csv` has name,value. `then/<table>.csv`
names the columns it speaks of; its rows are all the rows, in any order. A column `#` holds prose. `about.md` says in a
sentence what is given, what happens, and what must follow. A file or a column that nobody reads is refused; a streaming
job's scenario says in `then/accounting.csv` where every record went.
"""

import csv
import re
from collections.abc import Iterable, Mapping
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
from pyspark.sql import SparkSession

from engine.job import StreamingJob
from engine.night import BatchJob, arrived, rows_of
from engine.settings import JudgeSettings, StreamSettings
from kafka_io.ranges import KAFKA
from lake.spark import spark_schema
from schemas.codec import arrow_schema, decode, encode
from schemas.tables import REPORTS, TABLES
from schemas.topics import CRITICAL_EVENTS, EVENTS, READINGS, Topic
from settings import load
from streaming_jobs import critical_events
from tests.settling import Settling, kafka_table

FOLDER = Path(__file__).parent.parent / "scenarios"
KAFKA_AT = datetime(2024, 1, 1, tzinfo=UTC)


PROSE = "#"
OF_RECORDS = {"batch", "key", "payload"}
"""Columns of `when/<entity>s.csv` beside the entity's own."""
SENTENCE = re.compile(r"Given .+; when .+; then .+\.\n")


def scenarios() -> list[Path]:
    return sorted(FOLDER.glob("*/given_*"))


def read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as lines:
        return list(csv.DictReader(lines))


def columns_of(path: Path) -> list[str]:
    with path.open(newline="") as lines:
        return next(csv.reader(lines))


def problems(folder: Path, when: Mapping[str, Iterable[str]], then: Iterable[str], needs: Iterable[str]) -> list[str]:
    """What is wrong with a scenario's files, a sentence each.

    Args:
        folder: of the scenario.
        when: names of files that may come → their columns.
        then: names of files that may be expected.
        needs: those that must be.
    """
    about = folder / "about.md"
    found = [] if about.exists() and SENTENCE.fullmatch(about.read_text()) else ["about.md: Given …; when …; then …."]
    for path in sorted(folder.glob("when/*")):
        if path.suffix != ".csv" or path.stem not in when:
            found.append(f"when/{path.name}: nobody reads it; there are {', '.join(sorted(when))}")
        elif unknown := sorted(set(columns_of(path)) - {*when[path.stem], PROSE}):
            found.append(f"when/{path.name}: no such column: {', '.join(unknown)}")
    found += [f"then/{path.name}: nobody writes it" for path in folder.glob("then/*") if path.stem not in set(then)]
    found += [f"then/{name}.csv is missing" for name in needs if not (folder / "then" / f"{name}.csv").exists()]
    return found


def of_stream(topics: Iterable[Topic]) -> dict[str, Iterable[str]]:
    """Files of `when` for who reads these topics."""
    entities = {f"{topic.entity}s": {*arrow_schema(topic.entity).names, *OF_RECORDS} for topic in topics}
    return {**entities, "registry": TABLES["registry"].names, "settings": ("name", "value")}


def typed(text: str | None, kind: pa.DataType) -> Any:
    if not text:
        return None
    if pa.types.is_timestamp(kind):
        return datetime.fromisoformat(text)
    if pa.types.is_integer(kind):
        return int(text)
    if pa.types.is_floating(kind):
        return float(text)
    if pa.types.is_boolean(kind):
        return text == "true"
    if pa.types.is_list(kind):
        return text.split(" ")
    return text


def table(name: str, path: Path) -> pa.Table:
    rows = [{field.name: typed(row.get(field.name), field.type) for field in TABLES[name]} for row in read(path)]
    return pa.Table.from_pylist(rows, TABLES[name])


def kafka_rows(topic: Topic, path: Path, batch: str, start: int) -> list[tuple[Any, ...]]:
    schema = arrow_schema(topic.entity)
    rows: list[tuple[Any, ...]] = []
    for row in read(path):
        if row.get("batch", "1") != batch:
            continue
        if row.get("payload"):
            value, key = row["payload"].encode().decode("unicode_escape").encode("latin-1"), row.get("meter_id", "")
        else:
            record = {field.name: typed(row.get(field.name), field.type) for field in schema}
            record["dialect"] = record.get("dialect") or "dsmr-5"
            value, key = encode(topic.entity, record), row.get("key") or row["meter_id"]
        rows.append((key.encode(), value, topic.name, 0, start + len(rows), KAFKA_AT))
    return rows


def settings_of(folder: Path) -> dict[str, str]:
    return {row["name"]: row["value"] for row in read(folder / "when" / "settings.csv")}


def stream(job: StreamingJob, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Rows per table after all batches of a scenario, state handed on as the runner does.

    A batch without a row comes last, since a window that is over is closed by the next batch.
    """
    options = settings_of(folder)
    flush = options.pop("flush", "") == "true"
    settings = load(StreamSettings, kafka_bootstrap="none:0", **options)
    registry = frame_of(table("registry", folder / "when" / "registry.csv"))
    when = {topic: folder / "when" / f"{topic.entity}s.csv" for topic in job.topics}
    batches = sorted({row.get("batch", "1") for path in when.values() for row in read(path)})
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in [*job.tables, *job.current, "accounting"]}
    offsets = dict.fromkeys(job.topics, 0)
    settling = Settling(job, registry, settings)
    for batch in [*batches, "", *(["flush"] if flush else [])]:
        rows = []
        for topic in job.topics:
            of_topic = kafka_rows(topic, when[topic], batch, offsets[topic])
            offsets[topic] += len(of_topic)
            rows += of_topic
        for name, frame in settling.batch(kafka_table(rows), close_all=batch == "flush").items():
            found[name] = [*([] if name in job.current else found[name]), *frame.to_dicts()]
    found["accounting"] = summed(found["accounting"])
    return found


def frame_of(rows: pa.Table) -> pl.DataFrame:
    frame = pl.from_arrow(rows)
    assert isinstance(frame, pl.DataFrame)
    return frame


def at_once(session: SparkSession, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """What critical_events tells of the records of a scenario, read back from its bytes."""
    batches = sorted(
        {row.get("batch", "1") for name in ("events", "readings") for row in read(folder / "when" / f"{name}.csv")}
    )
    rows = [
        row for topic in (EVENTS, READINGS) for batch in batches
        for row in kafka_rows(topic, folder / "when" / f"{topic.entity}s.csv", batch, 0)
    ]  # fmt: skip
    registry = session.createDataFrame(table("registry", folder / "when" / "registry.csv"))
    far_out_pct = critical_events.CriticalSettings.model_fields["far_out_pct"].default
    records = critical_events.transform(session.createDataFrame(rows, spark_schema(KAFKA)), registry, far_out_pct)
    framed = critical_events.framed(records).collect()
    return {critical_events.NAME: [decode(bytes(row.value), CRITICAL_EVENTS.entity) for row in framed]}


def night(session: SparkSession, job: BatchJob, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Rows of the report for the date in the settings; a row's place in Kafka is its line, its arrival its own time."""
    registry = session.createDataFrame(table("registry", folder / "when" / "registry.csv"))
    lake = {}
    for name in job.reads:
        schema, rows = (TABLES | REPORTS)[name], []
        for offset, row in enumerate(read(folder / "when" / f"{name}.csv")):
            arrival = row.get("arrival_at") or row.get("received_at") or row.get("observed_at")
            filled = {"topic": name, "partition": "0", "offset": str(offset)} | row | {"arrival_at": arrival}
            rows.append(tuple(typed(filled.get(field.name), field.type) for field in schema))
        lake[name] = session.createDataFrame(rows, spark_schema(schema))
    lake |= {arrived(name): lake[name] for name in job.by_arrival}
    day = date.fromisoformat(settings_of(folder)["date"])
    return {job.name: rows_of(job, lake, registry, day, JudgeSettings()).toArrow().to_pylist()}


def summed(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    totals: dict[tuple[str | None, str], int] = {}
    for line in lines:
        key = (line["run_id"], line["bucket"])
        totals[key] = totals.get(key, 0) + line["records"]
    return [{"run_id": run, "bucket": bucket, "records": n} for (run, bucket), n in totals.items() if n]


def text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat().replace("+00:00", "Z")
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, float):
        return f"{value:.4f}".rstrip("0").rstrip(".")
    if isinstance(value, list) and all(isinstance(each, dict) for each in value):
        return " ".join(":".join(map(text, each.values())) for each in value)
    if isinstance(value, Decimal):
        return f"{value:f}"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, bytes):
        return value.decode("latin-1").encode("unicode_escape").decode()
    return str(value)


def check(found: dict[str, list[dict[str, Any]]], folder: Path) -> None:
    """Every `then` file holds, row for row."""
    expectations = sorted((folder / "then").glob("*.csv"))
    assert expectations, f"{folder} expects nothing"
    for path in expectations:
        columns = [column for column in columns_of(path) if column != PROSE]
        expected = sorted(tuple(row[column] for column in columns) for row in read(path))
        actual = sorted(tuple(text(row[column]) for column in columns) for row in found[path.stem])
        missing, extra = sorted(set(expected) - set(actual)), sorted(set(actual) - set(expected))
        assert actual == expected, f"{folder.name}/{path.name} {columns}: missing {missing}, not expected {extra}"
