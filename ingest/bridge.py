"""The loop: one thread, MQTT in, Kafka out, acknowledgements behind.

A message is acknowledged when Kafka's delivery report for it and for all that were received before it has come. Poison
goes to the dead letters first and is acknowledged then, so it cannot block the window.
"""

import os
import time
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import structlog
from confluent_kafka import KafkaError, Message

from ingest.decode import Routed, dead_letter, routed
from ingest.settings import BridgeSettings
from ingest.subscription import DRAIN_S, HELD, LOOP_S, SENTINEL, Pending, Subscription
from kafka_io.clients import producer
from mqtt_io.client import turn
from schemas.errors import InvalidMessage, RetryLater
from schemas.topics import DEAD_LETTERS
from settings import home

log = structlog.get_logger()

EARLIER_ACK_WAIT_S = 3.0  # of an earlier release's session
SESSION = "meterstream-bridge-2"
"""Of the sessions, with a generation: the broker keeps a session's ack_wait and window as they were at its begin."""
SENTINEL_S = 60.0  # a session that a message of our own does not come through has no subscription
BRAKE_WINDOW = 1_000  # messages over which the share of poison is taken
PROGRESS_S = 10.0
QUEUED_KB = 131_072  # of all sessions' windows, as long as Kafka is away
LONGEST_RECORD_BYTES = 1_250_000  # a dead letter has whatever the MQTT broker takes (max_payload), and its topic


class Bridge:
    """One bridge process; `run` until `stop`."""

    def __init__(self, settings: BridgeSettings) -> None:
        self.settings = settings
        self._stopping = False
        self._failure: str | None = None
        self._is_full = False
        self._asked_at = 0.0
        self._power_failures: dict[str, datetime] = {}
        self._verdicts: deque[bool] = deque(maxlen=BRAKE_WINDOW)
        self._poisoned = 0
        self._is_reported_ready = False
        self.received = 0
        self.dead_letters = 0
        self._ready = home() / "run" / "ingest.ready"
        self._producer = producer(
            settings.kafka_bootstrap,
            {
                "linger.ms": 5,
                "message.max.bytes": LONGEST_RECORD_BYTES,
                "queue.buffering.max.kbytes": QUEUED_KB,
                "message.timeout.ms": 0,  # Kafka away is not an error: the MQTT broker holds what is not acknowledged
                "error_cb": self._on_kafka_error,
                "log_level": 4,
            },
        )
        patterns = {shard: f"meters/{shard}/#" for shard in settings.shards} or {"all": "meters/#"}
        self._subscriptions = [
            Subscription(f"{SESSION}-{name}", pattern, settings.ack_wait_s, settings, self._taken, self._send)
            for name, pattern in patterns.items()
        ]
        earlier = f"meterstream-bridge-{settings.shards or 'all'}"
        self._retiring: Subscription | None = Subscription(
            earlier, None, EARLIER_ACK_WAIT_S, settings, self._taken, self._send
        )

    @property
    def _every(self) -> list[Subscription]:
        """Those of ours, and an earlier release's while there is one."""
        return [*self._subscriptions, *([self._retiring] if self._retiring else [])]

    def stop(self, *_: Any) -> None:
        """Asks the loop to end; a signal handler."""
        self._stopping = True

    def run(self) -> None:
        """Carries messages until `stop`.

        Raises:
            RetryLater: Kafka refused for good, or too much is poison; start again when that is mended.
        """
        logged_at = time.monotonic()
        self._ready.parent.mkdir(parents=True, exist_ok=True)
        try:
            while not self._stopping:
                every = self._every
                for subscription in every:
                    if not self._stopping:
                        subscription.tend()
                turn([subscription.client for subscription in every], LOOP_S)
                self._producer.poll(0)
                for subscription in every:
                    subscription.acknowledge()
                self._report_ready()
                self._retire()
                failure = self._failure or next(filter(None, (each.failure for each in every)), None)
                if failure:
                    raise RetryLater(failure)
                if time.monotonic() - logged_at > PROGRESS_S:
                    logged_at = time.monotonic()
                    waiting = sum(len(subscription.open) for subscription in self._subscriptions)
                    log.info("bridge", received=self.received, dead_letters=self.dead_letters, open=waiting)
        finally:
            self._ready.unlink(missing_ok=True)
            held_s = max(each.held_s for each in self._every)
            self._producer.flush(max(0.0, min(DRAIN_S, HELD * self.settings.ack_wait_s - held_s)))
            for subscription in self._every:
                subscription.acknowledge()
                subscription.leave()
            log.info("bridge stopped", received=self.received, dead_letters=self.dead_letters)

    def _retire(self) -> None:
        """Removes an earlier release's session once it has brought all that came before ours began.

        NATS keeps a session's ack_wait and window as they were when it began. Both sessions get what comes meanwhile:
        it is carried twice, which the jobs count as duplicates, and nothing is missed. When ours stand, a message of
        our own goes through each of the old one's filters: behind it nothing is the old one's alone. What was left out
        in front of it comes again, so it must have brought nothing again for `wait_s`.
        """
        old = self._retiring
        if old is None or not old.is_ready:
            return
        if not old.is_new:
            if not self._is_reported_ready:
                old.awaited = None  # a sentinel may be lost with its connection
                return
            if old.awaited is None:
                old.again_at = self._asked_at = time.monotonic()
                old.awaited = {f"meters/{shard}/{SENTINEL}" for shard in self.settings.shards or "0"}
                for topic in old.awaited:
                    self._subscriptions[0].client.publish(topic, qos=1)
            is_deaf = not old.open and time.monotonic() - max(self._asked_at, old.came_at) > SENTINEL_S
            if not is_deaf and (old.awaited or old.open or time.monotonic() - old.again_at < old.wait_s):
                return
            log.info("removed the session of an earlier release", name=old.name)
        self._retiring = None
        old.remove()

    def _report_ready(self) -> None:
        """Says that it is ready, in a file, while all subscriptions stand."""
        is_ready = all(subscription.is_ready and subscription.client.socket() for subscription in self._subscriptions)
        if is_ready == self._is_reported_ready:
            return
        self._is_reported_ready = is_ready
        if is_ready:
            self._ready.write_text(str(os.getpid()))
            patterns = [subscription.pattern for subscription in self._subscriptions]
            log.info("bridge ready", mqtt=patterns, kafka=self.settings.kafka_bootstrap)
        else:
            self._ready.unlink(missing_ok=True)
            log.warning("not every session stands, connecting again")

    def _taken(self, topic: str, payload: bytes) -> list[Routed]:
        """The records of a message, or the dead letter that it is."""
        self.received += 1
        now = datetime.now(UTC)
        try:
            records = routed(topic, payload, now, self.settings.accept_run_ids, self._power_failures)
        except InvalidMessage as error:
            records = [dead_letter(topic, payload, error, now)]
            self.dead_letters += 1
            log.warning("dead letter", topic=topic, reason=str(error.reason), detail=error.detail)
        self._brake(records[-1].topic == DEAD_LETTERS.name)
        return records

    def _send(self, records: list[Routed], pending: Pending) -> None:
        pending.left = len(records)
        for record in records:
            self._send_one(record, pending)

    def _send_one(self, record: Routed, pending: Pending) -> None:
        while not self._is_full:  # what comes behind a message that was not sent is not sent either
            try:
                self._producer.produce(
                    record.topic, record.value, record.key, on_delivery=self._delivery_report(pending)
                )
            except BufferError:  # stop acknowledging, let the broker hold
                self._is_full = self._stopping
                if self._is_full:
                    return
                self._producer.poll(LOOP_S)
            else:
                return

    def _delivery_report(self, pending: Pending) -> Callable[[KafkaError | None, Message], None]:
        def delivered(error: KafkaError | None, _: Message) -> None:
            if error is None:
                pending.left -= 1
            else:
                self._failure = f"Kafka did not take a record: {error}"

        return delivered

    def _brake(self, is_poison: bool) -> None:
        if len(self._verdicts) == BRAKE_WINDOW:
            self._poisoned -= self._verdicts[0]
        self._verdicts.append(is_poison)
        self._poisoned += is_poison
        share = self._poisoned / BRAKE_WINDOW
        if is_poison and share > self.settings.poison_share:
            self._failure = (
                f"{share:.0%} of the last {BRAKE_WINDOW} messages are poison: stopped, so that a bad release does not "
                "empty a topic into the dead letters; METERSTREAM_POISON_SHARE moves the limit"
            )

    def _on_kafka_error(self, error: KafkaError) -> None:
        if error.fatal():
            self._failure = f"Kafka: {error}"
        else:
            log.warning("Kafka", error=str(error))
