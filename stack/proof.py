"""What the demo must satisfy: the lake's own sums, and Kafka's offsets; `replay verify` looks at every record."""

from collections import Counter
from pathlib import Path

import duckdb

from kafka_io.offsets import newest_offsets
from lake.queries import accounting_lines, broken_segments, compared_energy
from schemas.topics import EVENTS, INGESTED, READINGS, TOPICS

STAGES = {
    "readings_lake": INGESTED,
    "consumption_deltas": (READINGS, EVENTS),
    "voltage_deviation": (READINGS,),
    "derived_alarms": (READINGS,),
    "alarms": (EVENTS,),
}
"""Topics that each stage must have received in full."""


def end_offsets(bootstrap: str) -> dict[str, int]:
    """Records that each topic has received since it was made: the bridge's accounting.

    Raises:
        RetryLater: Kafka does not say.
    """
    ends = Counter({topic.name: 0 for topic in TOPICS})
    for (topic, _), offset in newest_offsets(bootstrap, TOPICS).items():
        ends[topic] += offset
    return dict(ends)


def problems(lake: duckdb.DuckDBPyConnection, offsets: dict[str, int], sent: int, truth: Path | None) -> list[str]:
    """Everything that does not hold, a sentence each; empty when the run is proven.

    Args:
        lake: of `Lake.duckdb`.
        offsets: of `end_offsets`, when all was drained.
        sent: records that the MQTT broker or Kafka acknowledged to the replay.
        truth: the run's truth, where its registers neither reset nor lie.
    """
    found = []
    in_kafka = sum(offsets[topic.name] for topic in INGESTED)
    if in_kafka < sent:
        found.append(f"{sent} records were sent and acknowledged, Kafka has {in_kafka}")
    stages = {line.stage: line for line in accounting_lines(lake)}
    for stage, topics in STAGES.items():
        expected = sum(offsets[topic.name] for topic in topics)
        line = stages.get(stage)
        if line is None:
            if expected:
                found.append(f"{stage} has no accounting, its topics have {expected} records")
            continue
        if not line.balance:
            found.append(f"{stage}'s accounting does not balance: {line}")
        if line.received != expected:
            found.append(f"{stage} received {line.received} records, its topics have {expected}")
    found += [f"segment {row[2]}: deltas {row[3]} Wh, registers {row[4]} Wh" for row in broken_segments(lake)[:5]]
    if truth:
        found += [
            f"{row[0]} {row[1]}: {row[2]} Wh sent, {row[3]} Wh in the deltas"
            for row in compared_energy(lake, str(truth))[2]
        ]
    return found
