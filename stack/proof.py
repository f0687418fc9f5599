"""What a run must satisfy, by DuckDB over the same plain globs that everyone reads, and by Kafka's own offsets."""

import json
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
from confluent_kafka import TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec  # type: ignore[attr-defined]

from schemas.closed_lists import ACCEPTED_DELTAS, DeltaReason
from schemas.tables import TABLES, glob_of, table_path
from schemas.topics import EVENTS, INGESTED, READINGS, TOPICS

STAGES = {
    "readings_lake": INGESTED,
    "consumption_deltas": (READINGS,),
    "voltage_deviation": (READINGS,),
    "alarms": (EVENTS,),
}
"""Topics that each stage must have received in full."""


@dataclass(frozen=True)
class Books:
    """One stage's books, summed over runs and batches."""

    stage: str
    received: int
    stored: int
    duplicate: int
    late: int
    quarantined: int
    invalid: int

    @property
    def balance(self) -> bool:
        """Received = stored + duplicate + late + quarantined + invalid."""
        return self.received == self.stored + self.duplicate + self.late + self.quarantined + self.invalid


def open_lake() -> duckdb.DuckDBPyConnection:
    """A connection with one view per table that has files, over its plain glob."""
    connection = duckdb.connect()
    connection.execute("SET TimeZone = 'UTC'")
    for table in TABLES:
        if any(table_path(table).glob("date=*/*.parquet")):
            connection.execute(f"CREATE VIEW {table} AS FROM read_parquet('{glob_of(table_path(table))}')")
        else:
            columns = ", ".join(f"NULL AS {name}" for name in TABLES[table].names)
            connection.execute(f"CREATE VIEW {table} AS SELECT {columns} WHERE false")
    return connection


def books(lake: duckdb.DuckDBPyConnection) -> list[Books]:
    """The books of every stage."""
    rows = lake.execute(
        """SELECT stage, sum(received), sum(stored), sum(duplicate), sum(late), sum(quarantined), sum(invalid)
        FROM accounting GROUP BY stage ORDER BY stage"""
    ).fetchall()
    return [Books(stage, *map(int, numbers)) for stage, *numbers in rows]


def broken_segments(lake: duckdb.DuckDBPyConnection) -> list[tuple[Any, ...]]:
    """Segments whose deltas do not sum up to last − start; there must be none.

    A segment starts at its first accepted value, or at 0 after a reset; a rollover adds a full register.
    """
    accepted = ", ".join(f"'{reason}'" for reason in ACCEPTED_DELTAS)
    return lake.execute(
        f"""WITH accepted AS (
            SELECT *,
                CASE WHEN reason = '{DeltaReason.ROLLOVER}' THEN previous_wh + delta_wh - wh ELSE 0 END AS unrolled_wh
            FROM consumption_deltas WHERE reason IN ({accepted}))
        SELECT meter_id, register, segment_id, sum(delta_wh) AS deltas_wh,
            max_by(wh, observed_at) + sum(unrolled_wh)
                - CASE WHEN min_by(reason, observed_at) = '{DeltaReason.RESET}' THEN 0 ELSE min_by(wh, observed_at) END
                AS registers_wh
        FROM accepted GROUP BY ALL HAVING deltas_wh <> registers_wh ORDER BY ALL"""
    ).fetchall()


def energy(lake: duckdb.DuckDBPyConnection, truth: Path) -> tuple[int, int, list[tuple[Any, ...]]]:
    """(Wh on the tape, Wh in the deltas, meters and registers where they differ)."""
    total = lake.execute(f"SELECT sum(energy_wh) FROM read_parquet('{truth}')").fetchone()
    found = lake.execute("SELECT coalesce(sum(delta_wh), 0) FROM consumption_deltas").fetchone()
    differing = lake.execute(
        f"""WITH deltas AS (SELECT meter_id, register, sum(delta_wh) AS found_wh FROM consumption_deltas GROUP BY ALL)
        SELECT meter_id, register, energy_wh, found_wh
        FROM read_parquet('{truth}') FULL JOIN deltas USING (meter_id, register)
        WHERE energy_wh IS DISTINCT FROM found_wh ORDER BY ALL LIMIT 5"""
    ).fetchall()
    return int((total or (0,))[0]), int((found or (0,))[0]), differing


def end_offsets(bootstrap: str) -> dict[str, int]:
    """Records that each topic has received since it was made: the bridge's books."""
    admin = AdminClient({"bootstrap.servers": bootstrap, "log_level": 0})
    wanted = {
        TopicPartition(topic.name, partition): OffsetSpec.latest()  # type: ignore[no-untyped-call]
        for topic in TOPICS
        for partition in range(topic.partitions)
    }
    ends: dict[str, int] = {topic.name: 0 for topic in TOPICS}
    for place, future in admin.list_offsets(wanted, request_timeout=10.0).items():
        ends[place.topic] += future.result().offset
    return ends


def waiting_in_broker(monitor_port: int) -> int:
    """Messages that the MQTT broker holds: not delivered yet, or delivered and not acknowledged."""
    with urllib.request.urlopen(f"http://127.0.0.1:{monitor_port}/jsz?streams=true", timeout=5) as answer:
        accounts = json.load(answer).get("account_details", [])
    return sum(
        stream["state"]["messages"]
        for account in accounts
        for stream in account.get("stream_detail", [])
        if stream["name"] == "$MQTT_msgs"
    )


def problems(lake: duckdb.DuckDBPyConnection, offsets: dict[str, int], sent: int, truth: Path | None) -> list[str]:
    """Everything that does not hold, a sentence each; empty when the run is proven.

    Args:
        lake: of `open_lake`.
        offsets: of `end_offsets`, when all was drained.
        sent: records that the MQTT broker or Kafka acknowledged to the replay.
        truth: the run's truth, where its registers neither reset nor lie.
    """
    found = []
    in_kafka = sum(offsets[topic.name] for topic in INGESTED)
    if in_kafka < sent:
        found.append(f"{sent} records were sent and acknowledged, Kafka has {in_kafka}")
    stages = {line.stage: line for line in books(lake)}
    for stage, topics in STAGES.items():
        expected = sum(offsets[topic.name] for topic in topics)
        line = stages.get(stage)
        if line is None:
            if expected:
                found.append(f"{stage} kept no books, its topics have {expected} records")
            continue
        if not line.balance:
            found.append(f"{stage}'s books do not balance: {line}")
        if line.received != expected:
            found.append(f"{stage} received {line.received} records, its topics have {expected}")
    found += [f"segment {row[2]}: deltas {row[3]} Wh, registers {row[4]} Wh" for row in broken_segments(lake)[:5]]
    if truth:
        found += [f"{row[0]} {row[1]}: {row[2]} Wh sent, {row[3]} Wh in the deltas" for row in energy(lake, truth)[2]]
    return found
