"""The loop: one thread, MQTT in, Kafka out, acknowledgements behind.

A message is acknowledged when Kafka's delivery report for it and for all that were received before it has come. Poison
goes to the dead letters first and is acknowledged then, so it cannot block the window. What was not acknowledged comes
again: from NATS in front of newer messages if its `ack_wait` ran out while nobody was connected, else behind them. So a
session is taken up only after that, and left when something comes again in the middle of it (decision 13).
"""

import contextlib
import os
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import paho.mqtt.client as mqtt
import structlog
from confluent_kafka import KafkaError, Message, Producer

from ingest.decode import Routed, dead_letter, routed
from mqtt_io.client import LoopClient, turn
from schemas.errors import InvalidMessage, RetryLater
from schemas.settings import Settings
from schemas.tables import home
from schemas.topics import DEAD_LETTERS

log = structlog.get_logger()

LOOP_S = 0.02  # longest wait for a packet: bounds how long a delivery report waits for its acknowledgement
RECONNECT_S = 1.0
DRAIN_S = 10.0  # at a stop: how long Kafka may take for what is in flight; what is left comes again
QUIET_S = 1.0  # before a clean end nothing came for so long
SESSION = "meterstream-bridge-2"
"""Of the sessions, with a generation: the broker keeps a session's ack_wait and window as they were at its begin."""
SENTINEL = "bridge-sentinel"
"""Last level of the topic of a message that the bridge sends to itself."""
WAIT = 1.2  # of the broker's ack_wait: so long nobody is connected, so that what was on its way comes first
LONGEST_WAIT_S = 300.0  # where `ack_wait_s` is not the broker's
BRAKE_WINDOW = 1_000  # messages over which the share of poison is taken
PROGRESS_S = 10.0
LONGEST_RECORD_BYTES = 1_250_000  # a dead letter has whatever the MQTT broker takes (max_payload), and its topic


class BridgeSettings(Settings):
    """Settings of a bridge process.

    Attributes:
        kafka_bootstrap: host:port of a Kafka broker.
        mqtt_host: MQTT broker.
        mqtt_port: its port.
        shards: hex digits of the shards that this process owns; all of them if empty.
        accept_run_ids: False where no replay may send.
        ack_wait_s: the broker's ack_wait (config/nats/nats.conf): after it a message that was not acknowledged comes
            again.
        poison_share: the brake: stop when more than this share of the last thousand messages is poison.
    """

    kafka_bootstrap: str
    mqtt_host: str = "127.0.0.1"
    mqtt_port: int = 1883
    mqtt_username: str | None = None
    mqtt_password: str | None = None
    shards: str = ""
    accept_run_ids: bool = True
    ack_wait_s: float = 10.0
    poison_share: float = 0.5


@dataclass
class Pending:
    """A message between its receipt and its acknowledgement; safe once Kafka has it."""

    mid: int
    topic: str
    payload: bytes
    is_safe: bool = False


class Subscription:
    """One filter, in a session of its own, with the messages that are not acknowledged yet.

    NATS gives a session one window for all its subscriptions, and each of them one of that size: what is too much for
    the session is left out, and comes when `ack_wait` runs out, behind newer messages of its meter.

    Args:
        name: of the session.
        pattern: what it subscribes to; None of an earlier release's session, which has its own.
        settings: of the bridge.
        take: topic and payload → the record for Kafka.
        send: hands a record to Kafka, which says through the pending message when it is safe.
    """

    def __init__(
        self,
        name: str,
        pattern: str | None,
        settings: BridgeSettings,
        take: Callable[[str, bytes], Routed],
        send: Callable[[Routed, Pending], None],
    ) -> None:
        self.name = name
        self.pattern = pattern
        self.failure: str | None = None
        self.is_ready = False
        self.is_new = False
        self.open: deque[Pending] = deque()
        self.again_at = time.monotonic()
        self.awaited: set[str] | None = None
        self.wait_s = WAIT * settings.ack_wait_s
        self._settings = settings
        self._take, self._send = take, send
        self._known: Counter[tuple[str, bytes]] = Counter()
        self._is_used = False
        self._is_refused: str | None = None
        self._has_waited = self._goes_on = False
        self._mark = home() / "run" / f"{name}.clean"
        self._due = self._began = self._came_at = 0.0
        self.client = self._client(clean=False)
        self.client.on_connect = self._on_connect
        self.client.on_subscribe = self._on_subscribe
        self.client.on_message = self._on_message

    def _client(self, clean: bool) -> LoopClient:
        client = LoopClient(self.name, clean_session=clean, manual_ack=True, reconnect_on_failure=False)
        if self._settings.mqtt_username:
            client.username_pw_set(self._settings.mqtt_username, self._settings.mqtt_password)
        return client

    def tend(self) -> None:
        """Leaves a connection that is refused, and connects when it is time: not before Kafka has all that came."""
        if self._is_refused and self.client.socket() is not None:
            self._disconnect(self.client)
        now = time.monotonic()
        if self.client.socket() is not None:
            return
        if self._is_used:
            self._is_used = self.is_ready = False
            if self._is_refused:
                self._has_waited, self._due = True, now + self.wait_s
                log.info("waits until all comes in order", session=self.name, because=self._is_refused, s=self.wait_s)
        if now < self._due or not all(pending.is_safe for pending in self.open):
            return
        # Kafka has these, the broker was not told; their numbers mean other messages on the next connection
        self._known.update((pending.topic, pending.payload) for pending in self.open)
        self.open.clear()
        self._goes_on, self._has_waited = self._has_waited or self._taken_mark(), False
        self._is_refused, self._began, self._due = None, now, now + RECONNECT_S
        try:
            self.client.connect(self._settings.mqtt_host, self._settings.mqtt_port, keepalive=30)
        except OSError as error:
            log.warning("MQTT broker does not answer", port=self._settings.mqtt_port, error=str(error))

    def acknowledge(self) -> None:
        """Acknowledges the contiguous prefix that is safe, in the order of receipt."""
        if self.client.socket() is None:
            return
        while self.open and self.open[0].is_safe:
            self.client.ack(self.open.popleft().mid, 1)

    def leave(self) -> None:
        """Ends the connection; where nothing is on its way any more, the next process need not wait for it."""
        is_quiet = self.is_ready and not self._is_refused and time.monotonic() - self._came_at > QUIET_S
        is_clean = is_quiet and not self.open and not self._known
        self._disconnect(self.client)
        if is_clean and self.client.is_quiet_end:
            with contextlib.suppress(OSError):  # without the mark the next one waits
                self._mark.write_text("")

    def remove(self) -> None:
        """Removes the session from the broker; what it still holds is gone with it."""
        self._disconnect(self.client)
        client = self._client(clean=True)
        with contextlib.suppress(OSError):  # the next start finds it again
            client.connect(self._settings.mqtt_host, self._settings.mqtt_port)
        until = time.monotonic() + DRAIN_S
        while not client.is_connected() and client.socket() is not None and time.monotonic() < until:
            turn([client], LOOP_S)
        self._disconnect(client)

    def _disconnect(self, client: LoopClient) -> None:
        client.disconnect()
        client.loop_write()

    def _taken_mark(self) -> bool:
        """Whether the last process left the mark; it is gone before anything can come."""
        try:
            self._mark.unlink()
        except OSError:
            return False
        return True

    def _refuse(self, mid: int) -> None:
        """Has the connection left on which a message came again.

        Our acknowledgements may cross what is sent again, which then takes newer messages' places in the window: those
        are left out, and those behind them come first.
        """
        self._is_refused = "a message came again in the middle of newer ones"
        if all(pending.mid != mid for pending in self.open):
            # it may be one of before this connection: then the broker's ack_wait is longer than we believe
            self.wait_s = min(2 * self.wait_s, LONGEST_WAIT_S)

    def _on_connect(self, client: mqtt.Client, _: Any, flags: mqtt.ConnectFlags, code: Any, *rest: Any) -> None:
        if code.is_failure:
            self.failure = f"MQTT broker refused: {code}"
            return
        self.is_new = not flags.session_present
        if self.is_new:
            self._known.clear()
        elif not self._goes_on:
            self._is_refused = "messages may have been on their way"
        self._is_used = True
        self.awaited = None
        self.again_at = self._came_at = time.monotonic()
        if self.pattern is not None:
            client.subscribe(self.pattern, 1)
        else:
            self.is_ready = not self._is_refused

    def _on_subscribe(self, client: mqtt.Client, _: Any, mid: int, codes: list[Any], *rest: Any) -> None:
        if any(code.is_failure for code in codes):
            self.failure = f"MQTT broker refused the subscription: {codes}"
            return
        self.is_ready = not self._is_refused

    def _on_message(self, client: mqtt.Client, _: Any, message: mqtt.MQTTMessage) -> None:
        if self._is_refused:
            return
        now = self._came_at = time.monotonic()
        if message.dup:
            self.again_at = now
            if now - self._began > self._settings.ack_wait_s:
                self._refuse(message.mid)
                return
            self.wait_s = WAIT * self._settings.ack_wait_s  # it was long enough
        try:
            topic = message.topic
        except UnicodeDecodeError:
            topic = "(not UTF-8)"
        if topic.endswith(SENTINEL):
            log.info("a message of our own came through", topic=topic, session=self.name)
            if self.awaited is not None:
                self.awaited.discard(topic)
            client.ack(message.mid, message.qos)
            return
        pending = Pending(message.mid, topic, bytes(message.payload))
        if message.qos:
            self.open.append(pending)
        if message.dup and self._known[topic, pending.payload]:
            pending.is_safe = True
            self._known -= Counter([(topic, pending.payload)])
            return
        self._send(self._take(topic, pending.payload), pending)


class Bridge:
    """One bridge process; `run` until `stop`."""

    def __init__(self, settings: BridgeSettings) -> None:
        self.settings = settings
        self._stopping = False
        self._failure: str | None = None
        self._verdicts: deque[bool] = deque(maxlen=BRAKE_WINDOW)
        self._poisoned = 0
        self._is_told = False
        self.received = 0
        self.dead_letters = 0
        self._ready = home() / "run" / "ingest.ready"
        self._producer = Producer(
            {
                "bootstrap.servers": settings.kafka_bootstrap,
                "enable.idempotence": True,
                "acks": "all",
                "compression.type": "lz4",
                "linger.ms": 5,
                "partitioner": "murmur2_random",
                "message.max.bytes": LONGEST_RECORD_BYTES,
                "message.timeout.ms": 0,  # Kafka away is not an error: the MQTT broker holds what is not acknowledged
                "error_cb": self._on_kafka_error,
                "log_level": 4,
            }
        )
        patterns = {shard: f"meters/{shard}/#" for shard in settings.shards} or {"all": "meters/#"}
        self._subscriptions = [
            Subscription(f"{SESSION}-{name}", pattern, settings, self._taken, self._send)
            for name, pattern in patterns.items()
        ]
        self._retiring: Subscription | None = Subscription(
            f"meterstream-bridge-{settings.shards or 'all'}", None, settings, self._taken, self._send
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
        told_at = time.monotonic()
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
                self._tell_ready()
                self._retire()
                failure = self._failure or next(filter(None, (each.failure for each in every)), None)
                if failure:
                    raise RetryLater(failure)
                if time.monotonic() - told_at > PROGRESS_S:
                    told_at = time.monotonic()
                    waiting = sum(len(subscription.open) for subscription in self._subscriptions)
                    log.info("bridge", received=self.received, dead_letters=self.dead_letters, open=waiting)
        finally:
            self._ready.unlink(missing_ok=True)
            self._producer.flush(DRAIN_S)
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
            if not self._is_told:
                old.awaited = None  # a sentinel may be lost with its connection
                return
            if old.awaited is None:
                old.again_at = time.monotonic()
                old.awaited = {f"meters/{shard}/{SENTINEL}" for shard in self.settings.shards or "0"}
                for topic in old.awaited:
                    self._subscriptions[0].client.publish(topic, qos=1)
            if old.awaited or old.open or time.monotonic() - old.again_at < old.wait_s:
                return
            log.info("removed the session of an earlier release", name=old.name)
        self._retiring = None
        old.remove()

    def _tell_ready(self) -> None:
        """Says that it is ready, in a file, while all subscriptions stand."""
        is_ready = all(subscription.is_ready and subscription.client.socket() for subscription in self._subscriptions)
        if is_ready == self._is_told:
            return
        self._is_told = is_ready
        if is_ready:
            self._ready.write_text(str(os.getpid()))
            patterns = [subscription.pattern for subscription in self._subscriptions]
            log.info("bridge ready", mqtt=patterns, kafka=self.settings.kafka_bootstrap)
        else:
            self._ready.unlink(missing_ok=True)
            log.warning("not every session stands, connecting again")

    def _taken(self, topic: str, payload: bytes) -> Routed:
        """The record of a message, or the dead letter that it is."""
        self.received += 1
        now = datetime.now(UTC)
        try:
            record = routed(topic, payload, now, self.settings.accept_run_ids)
        except InvalidMessage as error:
            record = dead_letter(topic, payload, error, now)
            self.dead_letters += 1
            log.warning("dead letter", topic=topic, reason=str(error.reason), detail=error.detail)
        self._brake(record.topic == DEAD_LETTERS.name)
        return record

    def _send(self, record: Routed, pending: Pending) -> None:
        while True:
            try:
                self._producer.produce(record.topic, record.value, record.key, on_delivery=self._report(pending))
            except BufferError:  # stop acknowledging, let the broker hold
                self._producer.poll(LOOP_S)
            else:
                return

    def _report(self, pending: Pending) -> Callable[[KafkaError | None, Message], None]:
        def delivered(error: KafkaError | None, _: Message) -> None:
            if error is None:
                pending.is_safe = True
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
