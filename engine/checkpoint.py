"""Spark's own checkpoint of the query that all jobs share, and what errors say of what is lost.

It is made anew at each start, since a job's place is in its intents (`engine/intents.py`): what a micro-batch takes is
read from it, and nothing is kept in it.
"""

import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from engine.intents import flat, nested
from kafka_io.offsets import Offsets
from kafka_io.ranges import Range

LOST_IN_KAFKA = re.compile(r"KAFKA_DATA_LOSS|OffsetOutOfRangeException|data may have been lost")
"""What the errors of Spark and of Kafka say where Kafka no longer has what a query has not read."""

STATE_LOST = re.compile(r"schemas\.errors\.StateLost: (?!KAFKA_DATA_LOSS)(.+)")
"""What a query's error says where its own state is gone."""
KAFKA_IS_AWAY = re.compile(r"RetryLater|org\.apache\.kafka\.common\.errors\.(Timeout|Disconnect|Network)Exception")
"""What they say where Kafka does not answer, to us and to Spark."""


def lost_in_kafka(name: str, exception: str) -> str:
    """What to do where Kafka no longer has what a query has not read."""
    return (
        f"{name}: Kafka no longer has records that were not read: they grew older than the topic's retention, "
        "or the topic was made anew. What is in the lake stays. Repair: start with "
        "METERSTREAM_ACCEPT_LOSS=true until the lag is 0, then without: a job goes on with the oldest record "
        "that there is, its accounting lacks what is gone, and what senders bring again is there twice in the tables "
        f"of readings and events. {exception}"
    )


def ranges(starts: Offsets, ends: Offsets) -> list[Range]:
    """What lies between: topic and partition → offset that comes next, at the begin and at the end."""
    found = [Range(*place, starts.get(place, 0), end) for place, end in sorted(ends.items())]
    return [each for each in found if each.start_offset < each.end_offset]


def planned_at(checkpoint: Path, batch_id: int) -> datetime:
    """When Spark planned a micro-batch."""
    facts: dict[str, Any] = json.loads((checkpoint / "offsets" / str(batch_id)).read_text().splitlines()[1])
    return datetime.fromtimestamp(facts["batchTimestampMs"] / 1000, UTC)


def offsets_after(checkpoint: Path, batch_id: int) -> Offsets:
    """Topic and partition → the offset that comes next after a micro-batch: JSON on the last line."""
    return flat(json.loads((checkpoint / "offsets" / str(batch_id)).read_text().splitlines()[-1]))


def as_json(offsets: Offsets) -> str:
    """Offsets as Spark's Kafka source takes them."""
    return json.dumps(nested(offsets))
