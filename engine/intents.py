"""A job's place: one intent a batch, put before anything of it is visible; the newest one says where the job stands.

An intent has all that a batch has come to: what it took, what state it left, which files it adds to which tables. It is
put under its number, where there is none yet: that is the only step that counts. What was written for a batch without
an intent is not there for anybody, and the batch is made anew, of what comes then; a batch with an intent is never made
again: its files are added to the tables, by whoever comes, once. Of two drivers at once one puts the next intent, and
the other ends.
"""

import json
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

from engine.state import Manifest
from kafka_io.offsets import Offsets
from lake.store import store
from lake.tables import Commit, Part
from schemas.errors import RetryLater, StateLost

KEPT = 100
"""So many intents stay: for who wants to know what a file was made of."""


@dataclass(frozen=True)
class Intent:
    """What a batch has come to.

    Attributes:
        number: of the batch, from 0.
        at: when it was planned.
        starts: topic and partition → the first offset that it took.
        ends: the offset that comes next after it, of all partitions that the job has read.
        topic_ids: topic → Kafka's id of it, as far as it is known.
        state: what it left.
        parts: files that it adds to tables.
        is_flush: whether it closed what was open, and took nothing.
    """

    number: int
    at: datetime
    starts: Offsets
    ends: Offsets
    topic_ids: Mapping[str, str]
    state: Manifest
    parts: tuple[Part, ...]
    is_flush: bool = False

    def as_json(self) -> bytes:
        """As it is kept."""
        found = {
            "number": self.number, "at_ms": round(self.at.timestamp() * 1000), "starts": nested(self.starts),
            "ends": nested(self.ends), "topic_ids": dict(self.topic_ids), "state": self.state, "parts": self.parts,
            "is_flush": self.is_flush,
        }  # fmt: skip
        return json.dumps(found).encode()

    @classmethod
    def of_json(cls, text: bytes) -> "Intent":
        """As it was kept.

        Raises:
            ValueError, LookupError, TypeError, AttributeError: it is damaged.
        """
        found: dict[str, Any] = json.loads(text)
        return cls(
            int(found["number"]), datetime.fromtimestamp(found["at_ms"] / 1000, UTC), flat(found["starts"]),
            flat(found["ends"]), found["topic_ids"], found["state"], tuple(Part(*part) for part in found["parts"]),
            bool(found["is_flush"]),
        )  # fmt: skip


STALLED_S = 60.0
"""Who has put no intent for so long looks whether another driver did: its own number may be one that was forgotten."""
DAMAGED = (ValueError, LookupError, TypeError, AttributeError)


class Intents:
    """The intents of a job.

    Attributes:
        job: its name.
        version: of its state's form.
    """

    def __init__(self, job: str, version: int) -> None:
        self.job, self.version = job, version
        self._seen = time.monotonic()

    @property
    def folder(self) -> str:
        """Where all lies that the job keeps, in the store."""
        return f"state/{self.job}-v{self.version}"

    @cached_property
    def query_id(self) -> str:
        """Names the job's life: another one begins when its folder is removed.

        Raises:
            StateLost: it cannot be read.
        """
        place = f"{self.folder}/id.json"
        store().put_new(place, json.dumps({"id": str(uuid.uuid4())}).encode())
        try:
            return str(json.loads(store().get(place))["id"])
        except DAMAGED as error:
            msg = f"{self.job}: {store().uri(place)} cannot be read. "
            raise StateLost(msg + self._repair_of_id()) from error

    def _repair_of_id(self) -> str:
        ids = [name for name in store().folders(self.folder) if store().paths(f"{self.folder}/{name}")]
        if len(ids) != 1:
            return from_the_beginning(self.job)
        return f'Repair: stop the jobs, write {{"id": "{ids[0]}"}} into it, start again.'

    @property
    def states(self) -> str:
        """Folder of the state's objects."""
        return f"{self.folder}/{self.query_id}/state"

    @property
    def app(self) -> str:
        """The name under which the job commits to tables."""
        return f"{self.job}-{self.query_id}"

    def commit(self, number: int) -> Commit:
        """Whose batch it is, for the tables."""
        return Commit(self.app, number)

    def _place(self, number: int, ending: str = ".json") -> str:
        return f"{self.folder}/{self.query_id}/intents/{number:08d}{ending}"

    def newest(self) -> Intent | None:
        """The last batch that has an intent; None before the first.

        Raises:
            StateLost: it cannot be read, or see `require_id`.
        """
        self.require_id()
        numbers = self._numbers()
        if not numbers:
            return None
        place = self._place(numbers[-1])
        try:
            return Intent.of_json(store().get(place))
        except DAMAGED as error:
            msg = f"{self.job}: {store().uri(place)} cannot be read ({error}). "
            raise StateLost(msg + from_the_beginning(self.job)) from error

    def _numbers(self) -> list[int]:
        """Of the batches that have an intent, as far as these are kept."""
        names = [path.rpartition("/")[2] for path in store().paths(f"{self.folder}/{self.query_id}/intents")]
        return [int(name.removesuffix(".json")) for name in names if name.endswith(".json")]

    def require_id(self) -> None:
        """Refuses a job without an id that is not a new one: it would begin anew beside its rows.

        Raises:
            StateLost: its id is gone, or the job's state is of another version; the message says what to do.
        """
        if store().has(f"{self.folder}/id.json"):
            return
        self._require_no_other()
        if store().paths(self.folder):
            msg = f"{self.job}: {store().uri(self.folder)}/id.json is gone, beside what the job keeps. "
            raise StateLost(msg + self._repair_of_id())

    def _require_no_other(self) -> None:
        for name in store().folders("state"):
            if name == "checkpoints":
                msg = f"{self.job}: {store().url} is of an earlier release. "
                raise StateLost(msg + "Repair: stop the jobs, copy it, python -m stack migrate, and start again")
            job, _, theirs = name.rpartition("-v")
            if job == self.job and theirs.isdecimal() and store().has(f"state/{name}/id.json"):
                msg = f"{self.job}: its state is of version {theirs}, and version {self.version} cannot read it. "
                raise StateLost(msg + from_the_beginning(self.job))

    def require_all(self, last: int, committed: int | None) -> None:
        """Refuses to go on where tables have a batch whose intent is gone: it would be made again, and skipped there.

        Args:
            last: number of the newest batch that has an intent; −1 before the first.
            committed: number of the newest batch that a table has.

        Raises:
            StateLost: an intent is gone.
        """
        if committed is not None and committed > last:
            place = store().uri(f"{self.folder}/{self.query_id}/intents")
            msg = f"{self.job}: its tables have batch {committed}, and its intent is gone from {place}. "
            raise StateLost(msg + from_the_beginning(self.job))

    def put(self, intent: Intent) -> None:
        """Says what a batch has come to: from now on it is not made again.

        Raises:
            RetryLater: another driver has said so of a batch of this number, or of a later one.
        """
        place, content = self._place(intent.number), intent.as_json()
        if not store().put_new(place, content) and store().get(place) != content:  # else an answer was lost
            raise self._another(intent.number)
        now, seen = time.monotonic(), self._seen
        self._seen = now
        if now - seen > STALLED_S:
            self.require_alone(intent.number)

    def require_alone(self, last: int) -> None:
        """Refuses to go on where another driver has put a later intent.

        Args:
            last: number of the newest batch that this driver knows of.

        Raises:
            RetryLater: another driver has.
        """
        numbers = self._numbers()
        if numbers and numbers[-1] > last:
            raise self._another(numbers[-1])

    def _another(self, number: int) -> RetryLater:
        return RetryLater(f"another driver runs {self.job} on {store().url}: it has done batch {number}, this one ends")

    def is_sent(self, number: int) -> bool:
        """Whether what a batch sends to Kafka was sent."""
        return store().has(self._place(number, ".sent"))

    def sent(self, number: int) -> None:
        """Says that what a batch sends to Kafka was sent; else it is sent again at the next start."""
        store().put(self._place(number, ".sent"), b"")

    def forget(self, number: int) -> None:
        """Removes the intent that is too old for anybody, after this batch."""
        store().delete([self._place(number - KEPT), self._place(number - KEPT, ".sent")])


def from_the_beginning(job: str) -> str:
    """The repair that always works, and what it costs."""
    return (
        f"Repair: stop the jobs, python -m stack begin-anew {job}, and start again: its state and the rows that it has "
        "added to tables go, and it reads all that Kafka still has. Where its tables reach back further than Kafka "
        "does, keep a copy of the store first."
    )


def nested(offsets: Offsets) -> dict[str, dict[str, int]]:
    """Offsets as JSON has them: topic → partition → offset."""
    found: dict[str, dict[str, int]] = {}
    for (topic, partition), offset in sorted(offsets.items()):
        found.setdefault(topic, {})[str(partition)] = offset
    return found


def flat(offsets: Mapping[str, Mapping[str, int]]) -> Offsets:
    """Offsets from JSON."""
    return {
        (topic, int(partition)): offset
        for topic, partitions in offsets.items()
        for partition, offset in partitions.items()
    }
