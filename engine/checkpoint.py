"""A job's checkpoint: what each batch takes, written before it begins, and that it is done, with what it left.

It has the form of Spark's own: `metadata`, `offsets/N`, `commits/N`. Spark keeps one for a query; here several jobs
share a query and each has its own place, so that it can join, leave and run alone. What is wrong with one is said
before anything is read, with a repair that loses nothing where there is one: a batch without a commit is done again
with the same rows in the same files, so a damaged file of the newest can go.
"""

import json
import re
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from engine.state import Manifest
from kafka_io.offsets import Offsets
from kafka_io.ranges import Range
from schemas.errors import StateLost
from settings import home

LOST_IN_KAFKA = re.compile(r"KAFKA_DATA_LOSS|OffsetOutOfRangeException|data may have been lost")
"""What the errors of Spark and of Kafka say where Kafka no longer has what a query has not read."""

STATE_LOST = re.compile(r"schemas\.errors\.StateLost: (?!KAFKA_DATA_LOSS)(.+)")
"""What a query's error says where its own state is gone."""
KAFKA_IS_AWAY = re.compile(r"RetryLater|org\.apache\.kafka\.common\.errors\.(Timeout|Disconnect|Network)Exception")
"""What they say where Kafka does not answer, to us and to Spark."""
KEPT_BATCHES = 100
"""Plans and commits of so many batches are kept, as Spark does: for who wants to know what a file was made of."""


def require_whole(name: str, version: int, checkpoint: Path) -> None:
    """Looks at a checkpoint before Spark does.

    Args:
        name: of the job.
        version: of its state's form.
        checkpoint: folder of the query, there or not.

    Raises:
        StateLost: it cannot be gone on from; the message says what to do.
    """
    if not checkpoint.exists():
        for other in sorted(checkpoint.parent.glob(f"{name}-v*")):
            theirs = other.name.rpartition("v")[2]
            msg = f"{name}: its state is of version {theirs}, and version {version} cannot read it. "
            raise StateLost(msg + from_the_beginning(name, other))
    offsets, commits = _newest(checkpoint / "offsets"), _newest(checkpoint / "commits")
    if offsets is None and commits is None:
        if any((home() / "state" / name).glob("*/*.zip")):
            msg = f"{name}: its state is there, and what it has read is gone from {checkpoint}. "
            raise StateLost(msg + from_the_beginning(name, checkpoint))
        return
    metadata = checkpoint / "metadata"
    if not _has_json(metadata, 0, 1):
        ids = [folder.name for folder in (home() / "state" / name).glob("*-*-*-*-*")]
        msg = f"{name}: {metadata} cannot be read. "
        if len(ids) != 1:
            raise StateLost(msg + from_the_beginning(name, checkpoint))
        msg += f'Repair: stop the jobs, write {{"id":"{ids[0]}"}} into it, start again.'
        raise StateLost(msg)
    batch, done = (int(log.name) if log else -1 for log in (offsets, commits))
    is_planned, is_committed = _has_json(offsets, 1, 2), _has_json(commits, 1, 1)
    if batch < done or (batch == done and not is_planned):
        msg = f"{name}: batch {done} was committed, and what it read cannot be read in {checkpoint / 'offsets'}. "
        raise StateLost(msg + from_the_beginning(name, checkpoint))
    damaged = commits if commits and not is_committed else offsets if not is_planned else None
    if damaged:
        msg = (
            f"{name}: {damaged} cannot be read. Repair: stop the jobs, remove that file, and start again: its batch is "
            "done again, nothing is lost and nothing is there twice."
        )
        raise StateLost(msg)


def from_the_beginning(name: str, checkpoint: Path) -> str:
    """The repair that always works, and what it costs."""
    metadata = checkpoint / "metadata"
    query_id = json.loads(metadata.read_text())["id"] if _has_json(metadata, 0, 1) else "*"
    return (
        f"Repair: stop the jobs, remove {checkpoint} and {home() / 'state' / name}, remove the files "
        f"{name}-{query_id}-* under {home() / 'lake'}, and start again: the job reads all that Kafka still has. "
        "Keep a copy of those files where they reach back further than Kafka does."
    )


def lost_in_kafka(name: str, exception: str) -> str:
    """What to do where Kafka no longer has what a query has not read."""
    return (
        f"{name}: Kafka no longer has records that were not read: they grew older than the topic's retention, "
        "or the topic was made anew. What is in the lake stays. Repair: start with "
        "METERSTREAM_ACCEPT_LOSS=true until the lag is 0, then without: a job goes on with the oldest record "
        "that there is, its accounting lacks what is gone, and what senders bring again is there twice in the tables "
        f"of readings and events. {exception}"
    )


def _newest(folder: Path) -> Path | None:
    return max(folder.glob("[0-9]*"), key=lambda file: int(file.name), default=None)


def _has_json(file: Path | None, head_lines: int, least_lines: int) -> bool:
    """Whether so many lines after the head are there, all of them JSON."""
    try:
        lines = file.read_text().splitlines()[head_lines:] if file else []
        for line in lines:
            json.loads(line)
    except (OSError, ValueError):
        return False
    return len(lines) >= least_lines


def query_id(checkpoint: Path) -> str:
    """The id by which a job's files are named, from its first start on for the checkpoint's life."""
    metadata = checkpoint / "metadata"
    if not metadata.exists():
        write(metadata, json.dumps({"id": str(uuid.uuid4())}))
    return str(json.loads(metadata.read_text())["id"])


def topic_ids(checkpoint: Path, batch_id: int) -> dict[str, str]:
    """Kafka's ids of the topics that a batch read: a topic made anew has another."""
    found: dict[str, str] = _facts(checkpoint, batch_id).get("topicIds", {})
    return found


def forget_plan(checkpoint: Path, batch_id: int) -> None:
    """A batch that was planned is not done: what it takes is gone."""
    (checkpoint / "offsets" / str(batch_id)).unlink(missing_ok=True)


def last_commit(checkpoint: Path) -> int | None:
    """Number of the newest batch that is done; None before the first."""
    return max((int(commit.name) for commit in (checkpoint / "commits").glob("[0-9]*")), default=None)


def last_plan(checkpoint: Path) -> int | None:
    """Number of the newest batch that was begun; None before the first."""
    return max((int(plan.name) for plan in (checkpoint / "offsets").glob("[0-9]*")), default=None)


def plan(
    checkpoint: Path, batch_id: int, starts: Offsets, ends: Offsets, at: datetime, topic_ids: Mapping[str, str]
) -> None:
    """Says what a batch takes, before it begins: the same when it is tried again.

    Args:
        checkpoint: of the job.
        batch_id: number of the batch.
        starts: topic and partition → the first offset that it takes.
        ends: the offset that comes next after it.
        at: when it was planned.
        topic_ids: topic → Kafka's id of it, as far as it is known.
    """
    facts = {
        "batchTimestampMs": round(at.timestamp() * 1000), "startOffsets": _nested(starts), "topicIds": dict(topic_ids)
    }  # fmt: skip
    text = f"v1\n{json.dumps(facts)}\n{json.dumps(_nested(ends))}"
    write(checkpoint / "offsets" / str(batch_id), text)


def commit(checkpoint: Path, batch_id: int, state: Manifest) -> None:
    """Says that a batch is done, and what it left: from now on it is not tried again."""
    write(checkpoint / "commits" / str(batch_id), f"v1\n{json.dumps({'state': state})}")
    for kind in ("offsets", "commits"):
        (checkpoint / kind / str(batch_id - KEPT_BATCHES)).unlink(missing_ok=True)


def state_after(checkpoint: Path, batch_id: int) -> Manifest:
    """What a batch left, by its commit."""
    found: Manifest = json.loads((checkpoint / "commits" / str(batch_id)).read_text().splitlines()[1])["state"]
    return found


def planned_at(checkpoint: Path, batch_id: int) -> datetime:
    """When a batch was planned: the same when it is tried again."""
    return datetime.fromtimestamp(_facts(checkpoint, batch_id)["batchTimestampMs"] / 1000, UTC)


def planned(checkpoint: Path, batch_id: int) -> list[Range]:
    """What a batch takes, as it was planned; partitions without new records are left out."""
    starts = _flat(_facts(checkpoint, batch_id)["startOffsets"])
    return ranges(starts, offsets_after(checkpoint, batch_id))


def ranges(starts: Offsets, ends: Offsets) -> list[Range]:
    """What lies between: topic and partition → offset that comes next, at the begin and at the end."""
    found = [Range(*place, starts.get(place, 0), end) for place, end in sorted(ends.items())]
    return [each for each in found if each.start_offset < each.end_offset]


def offsets_after(checkpoint: Path, batch_id: int) -> Offsets:
    """Topic and partition → the offset that comes next after a batch: JSON on the last line, as Spark writes it."""
    return _flat(json.loads((checkpoint / "offsets" / str(batch_id)).read_text().splitlines()[-1]))


def as_json(offsets: Offsets) -> str:
    """Offsets as Spark's Kafka source takes them."""
    return json.dumps(_nested(offsets))


def _facts(checkpoint: Path, batch_id: int) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((checkpoint / "offsets" / str(batch_id)).read_text().splitlines()[1])
    return facts


def _nested(offsets: Offsets) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for (topic, partition), offset in sorted(offsets.items()):
        found.setdefault(topic, {})[str(partition)] = offset
    return found


def _flat(nested: Mapping[str, Mapping[str, int]]) -> Offsets:
    return {
        (topic, int(partition)): offset
        for topic, partitions in nested.items()
        for partition, offset in partitions.items()
    }


def write(file: Path, text: str) -> None:
    """Writes a file in one step: it is there as a whole, or not."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.part")
    part.write_text(text)
    part.rename(file)
