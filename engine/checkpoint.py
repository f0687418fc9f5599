"""Can a query go on from its checkpoint? What is wrong, and a repair that loses nothing where there is one.

Spark's own messages for a damaged checkpoint tell of JSON that ends early, or of a concurrent update of the log. A
batch without a commit is done again with the same rows in the same files, so a damaged file of the newest can go.
"""

import json
import re
from datetime import UTC, datetime
from pathlib import Path

from kafka_io.ranges import Range
from schemas.errors import StateLost
from settings import home

LOST_IN_KAFKA = re.compile(r"KAFKA_DATA_LOSS|OffsetOutOfRangeException")
"""What the errors of Spark and of Kafka say where Kafka no longer has what a query has not read."""


STATE_LOST = re.compile(r"schemas\.errors\.StateLost: (?!KAFKA_DATA_LOSS)(.+)")
"""What a query's error says where its own state is gone."""
KAFKA_IS_AWAY = re.compile(r"RetryLater|org\.apache\.kafka\.common\.errors\.(Timeout|Disconnect|Network)Exception")
"""What they say where Kafka does not answer, to us and to Spark."""


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
        return
    offsets, commits = _newest(checkpoint / "offsets"), _newest(checkpoint / "commits")
    if offsets is None and commits is None:
        return
    metadata = checkpoint / "metadata"
    if not _has_json(metadata, 0, 1):
        ids = [folder.name for folder in (home() / "state" / name).glob("*-*-*-*-*")]
        msg = f"{name}: {metadata} cannot be read. "
        if len(ids) != 1:
            raise StateLost(msg + from_the_beginning(name, checkpoint))
        msg += f'Repair: stop the jobs, remove .metadata.crc beside it, write {{"id":"{ids[0]}"}} into it, start again.'
        raise StateLost(msg)
    batch, done = (int(log.name) if log else -1 for log in (offsets, commits))
    is_planned, is_committed = _has_json(offsets, 1, 2), _has_json(commits, 1, 1)
    if batch < done or (batch == done and not is_planned):
        msg = f"{name}: batch {done} was committed, and what it read cannot be read in {checkpoint / 'offsets'}. "
        raise StateLost(msg + from_the_beginning(name, checkpoint))
    damaged = commits if commits and not is_committed else offsets if not is_planned else None
    if damaged:
        msg = (
            f"{name}: {damaged} cannot be read. Repair: stop the jobs, remove that file and .{damaged.name}.crc beside "
            "it, and start again: its batch is done again, nothing is lost and nothing is there twice."
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
        f"{name}: Kafka no longer has records that this job has not read: they grew older than the topic's retention, "
        "or the topic was made anew. What is in the lake stays. Repair: start with "
        "METERSTREAM_ACCEPT_LOSS=true until the lag is 0, then without: the job goes on with the oldest record "
        f"that there is, its accounting lacks what is gone. {exception}"
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
    """The query's id, which its checkpoint keeps for life."""
    return str(json.loads((checkpoint / "metadata").read_text())["id"])


def last_commit(checkpoint: Path) -> int | None:
    """Number of the newest batch that Spark has committed; None before the first."""
    return max((int(commit.name) for commit in (checkpoint / "commits").glob("[0-9]*")), default=None)


def planned_at(checkpoint: Path, batch_id: int) -> datetime:
    """When Spark planned a batch: the same when it is tried again."""
    planned_ms = json.loads((checkpoint / "offsets" / str(batch_id)).read_text().splitlines()[1])["batchTimestampMs"]
    return datetime.fromtimestamp(planned_ms / 1000, UTC)


def planned(checkpoint: Path, batch_id: int) -> list[Range]:
    """What Spark has planned for a batch, by the query's checkpoint; partitions without new records are left out.

    Args:
        checkpoint: of a query whose only source is Kafka, from the earliest offsets.
        batch_id: a batch that has begun.
    """
    starts = offsets_after(checkpoint, batch_id - 1)
    ranges = [Range(*place, starts.get(place, 0), end) for place, end in offsets_after(checkpoint, batch_id).items()]
    # One that ends before it starts is of a topic that was made anew: Spark lets it pass only where loss is accepted.
    whole = [each if each.start_offset <= each.end_offset else each._replace(start_offset=0) for each in ranges]
    return [each for each in whole if each.start_offset < each.end_offset]


def offsets_after(checkpoint: Path, batch_id: int | None) -> dict[tuple[str, int], int]:
    """Topic and partition → the offset that comes next after a batch; before the first (−1 or None) where it begins.

    A file of the checkpoint has them as JSON on its last line. What has not begun yet begins nowhere.
    """
    if batch_id is not None and batch_id >= 0:
        file = checkpoint / "offsets" / str(batch_id)
    elif not (file := checkpoint / "sources" / "0" / "0").exists():
        return {}
    return next_offsets(file.read_text().splitlines()[-1])


def drop_unfinished(checkpoint: Path) -> None:
    """Removes what a killed write has left: before its first batch Spark takes no folder that has such a file."""
    for left in [*checkpoint.rglob(".*.tmp"), *checkpoint.rglob(".*.tmp.crc")]:
        left.unlink()


def next_offsets(text: str | None) -> dict[tuple[str, int], int]:
    """The same of the Kafka source's JSON: topic → partition → offset; before the first batch PySpark says "None"."""
    if text in (None, "None", "null"):
        return {}
    return {
        (topic, int(partition)): offset
        for topic, partitions in json.loads(str(text)).items()
        for partition, offset in partitions.items()
    }
