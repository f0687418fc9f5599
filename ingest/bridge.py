"""The loop: one thread, MQTT in, Kafka out, acknowledgements behind.

A message is acknowledged when Kafka's delivery report for it and for all that were received before it has come. Poison
goes to the dead letters first and is acknowledged then, so it cannot block the window. What was not acknowledged comes
again: from NATS in front of newer messages where all of its `ack_wait` ran out while nobody was connected, else behind
them. So a session is taken up only after that, and left where something comes again in the middle of it (decision 13).
"""

import contextlib
import hashlib
import os
import socket
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import paho.mqtt.client as mqtt
import structlog
from confluent_kafka import KafkaError, Message

from ingest.decode import Routed, dead_letter, routed
from kafka_io.clients import producer
from mqtt_io.client import LoopClient, turn
from schemas.errors import InvalidMessage, RetryLater
from schemas.topics import DEAD_LETTERS
from settings import Settings, home

log = structlog.get_logger()

LOOP_S = 0.02  # longest wait for a packet: bounds how long a delivery report waits for its acknowledgement
RECONNECT_S = 1.0
DRAIN_S = 10.0  # at a stop: how long Kafka may take for what is in flight; what is left comes again
QUIET_S = 1.0  # before a connection is left nothing came for so long: before a clean end, or where something came again
LEAVING_S = 5.0  # longest until a connection is left on which something came again
WAIT = 1.2  # of the broker's ack_wait: so long nobody is connected, so that what was on its way comes first
MOST_WAITS = 8  # so many times that, where `ack_wait_s` is less than the broker's
HELD = 0.7  # of ack_wait: what Kafka has not taken by then would come again
WINDOW = 1_000  # acknowledged messages by which one that crossed its acknowledgement is known: more than are open
EARLIER_ACK_WAIT_S = 3.0  # of an earlier release's session
SESSION = "meterstream-bridge-2"
"""Of the sessions, with a generation: the broker keeps a session's ack_wait and window as they were at its begin."""
CLEAN, OPEN = "clean", "open"
"""How a session ended, in the mark that the bridge keeps of it."""
SENTINEL = "bridge-sentinel"
"""Last level of the topic of a message that the bridge sends to itself."""
SENTINEL_S = 60.0  # a session that a message of our own does not come through has no subscription
BRAKE_WINDOW = 1_000  # messages over which the share of poison is taken
PROGRESS_S = 10.0
QUEUED_KB = 131_072  # of all sessions' windows, as long as Kafka is away
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
    """A message between its receipt and its acknowledgement.

    Attributes:
        mid: its number on this connection.
        fingerprint: of its topic and bytes.
        came_at: when, s.
        is_safe: whether Kafka has it.
    """

    mid: int
    fingerprint: bytes
    came_at: float
    is_safe: bool = False


class Subscription:
    """One filter, in a session of its own, with the messages that are not acknowledged yet.

    NATS gives a session one window for all its subscriptions, and each of them one of that size: what is too much for
    the session is left out, and comes when `ack_wait` runs out, behind newer messages of its meter.

    Args:
        name: of the session.
        pattern: what it subscribes to; None of an earlier release's session, which has its own.
        ack_wait_s: of the session.
        settings: of the bridge.
        take: topic and payload → the record for Kafka.
        send: hands a record to Kafka, which says through the pending message when it is safe.
    """

    def __init__(
        self,
        name: str,
        pattern: str | None,
        ack_wait_s: float,
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
        self.wait_s = WAIT * ack_wait_s
        self._ack_wait_s = ack_wait_s
        self._settings = settings
        self._take, self._send = take, send
        self._known: Counter[bytes] = Counter()
        self._acknowledged: deque[tuple[int, bytes]] = deque(maxlen=WINDOW)
        self._left_because: str | None = None
        self._linger_until = self._began = self.came_at = 0.0
        self._mark = home() / "run" / f"{name}.session"
        mark = self._read_mark()
        self._may_be_open = mark != CLEAN
        self._brings_nothing_again = mark == CLEAN
        self._goes_on = mark is not None
        is_open = mark not in (CLEAN, None)
        self._due = time.monotonic() + (self.wait_s if is_open else 0.0)
        self._is_used = self._is_broker_away = False
        self.client = self._client(clean=False)
        self.client.on_connect = self._on_connect
        self.client.on_subscribe = self._on_subscribe
        self.client.on_message = self._on_message
        if is_open:
            log.info("waits until all comes in order", session=name, because="it did not end cleanly", s=self.wait_s)

    def _client(self, clean: bool) -> LoopClient:
        client = LoopClient(self.name, clean_session=clean, manual_ack=True, reconnect_on_failure=False)
        if self._settings.mqtt_username:
            client.username_pw_set(self._settings.mqtt_username, self._settings.mqtt_password)
        return client

    def _read_mark(self) -> str | None:
        """How the session ended, by the mark: clean, open (it did not end), or None: it is not known."""
        try:
            return self._mark.read_text()
        except OSError:
            return None

    def tend(self) -> None:
        """Leaves a connection that has to be left, and connects when it is time: once Kafka has all that came."""
        now = time.monotonic()
        if self.client.socket() is not None and not self._left_because and self.held_s > HELD * self._ack_wait_s:
            # before anything of it comes again: the broker keeps it in the order of its last deliveries
            self._give_up("Kafka takes longer than the MQTT broker waits")
        if self._left_because and self.client.socket() is not None:
            if now < self._linger_until and now - self.came_at < QUIET_S:
                return
            self.client.leave()
        if self.client.socket() is not None:
            if not self._left_because:
                self._been_up(now - self._began)
            return
        if self._is_used:
            self._is_used = self.is_ready = False
            self._is_broker_away = not self._left_because
            self._due = now + self.wait_s
            because = self._left_because or "the connection is lost"
            log.info("waits until all comes in order", session=self.name, because=because, s=self.wait_s)
        if now < self._due or not all(pending.is_safe for pending in self.open):
            return
        if self._is_broker_away and self._may_be_open:
            # a broker that starts reads first what was on its way
            self._is_broker_away = not self._answers()
            self._due = now + (RECONNECT_S if self._is_broker_away else self.wait_s)
            return
        # Kafka has these, the broker was not told
        self._known.update(pending.fingerprint for pending in self.open)
        self.open.clear()
        self._acknowledged.clear()
        self._left_because, self._began, self._due = None, now, now + RECONNECT_S
        self._mark_as(OPEN)
        try:
            self.client.connect(self._settings.mqtt_host, self._settings.mqtt_port, keepalive=30)
        except OSError as error:
            self._is_broker_away = True
            if not self._may_be_open:
                self._mark_as(CLEAN)
            log.warning("MQTT broker does not answer", port=self._settings.mqtt_port, error=str(error))
            return
        self._may_be_open = self._is_used = True

    @property
    def held_s(self) -> float:
        """How long the oldest message has been waiting for Kafka, s; 0 where none is."""
        return time.monotonic() - self.open[0].came_at if self.open else 0.0

    def _been_up(self, lasted_s: float) -> None:
        if lasted_s > self._ack_wait_s:
            self._known.clear()  # a message like these is another one by now
            self._brings_nothing_again = False
        if lasted_s > MOST_WAITS * self._ack_wait_s:
            self.wait_s = WAIT * self._ack_wait_s

    def _answers(self) -> bool:
        """Whether the broker takes connections; no session begins by that."""
        try:
            with socket.create_connection((self._settings.mqtt_host, self._settings.mqtt_port), timeout=RECONNECT_S):
                return True
        except OSError:
            return False

    def acknowledge(self) -> None:
        """Acknowledges the contiguous prefix that is safe, in the order of receipt."""
        if self.client.socket() is None or self._left_because:
            return
        while self.open and self.open[0].is_safe:
            pending = self.open.popleft()
            self._acknowledged.append((pending.mid, pending.fingerprint))
            self.client.ack(pending.mid, 1)

    def leave(self) -> None:
        """Ends the connection; where nothing is on its way any more, the next process need not wait for it."""
        is_quiet = self.is_ready and not self._left_because and time.monotonic() - self.came_at > QUIET_S
        is_clean = is_quiet and not self.open and not self._known and self.client.socket() is not None
        self.client.leave()
        if is_clean and self.client.is_quiet_end:
            with contextlib.suppress(OSError):  # without the mark the next one waits
                self._mark_as(CLEAN)

    def remove(self) -> None:
        """Removes the session from the broker; what it still holds is gone with it."""
        self.client.leave()
        client = self._client(clean=True)
        with contextlib.suppress(OSError):  # the next start finds it again
            client.connect(self._settings.mqtt_host, self._settings.mqtt_port)
        until = time.monotonic() + DRAIN_S
        while not client.is_connected() and client.socket() is not None and time.monotonic() < until:
            turn([client], LOOP_S)
        client.leave()
        self._mark.unlink(missing_ok=True)

    def _mark_as(self, state: str) -> None:
        if self._read_mark() != state:
            self._mark.parent.mkdir(parents=True, exist_ok=True)
            self._mark.write_text(state)

    def _on_connect(self, client: mqtt.Client, _: Any, flags: mqtt.ConnectFlags, code: Any, *rest: Any) -> None:
        if code.is_failure:
            self.failure = f"MQTT broker refused: {code}"
            return
        self.awaited = None
        self.again_at = self.came_at = time.monotonic()
        self.is_new = not flags.session_present
        if self.is_new:
            self._known.clear()
        elif not self._goes_on:  # the home is new, and the session is not
            self._give_up("how the session ended is not known")
        self._goes_on = True
        if self.pattern is not None:
            client.subscribe(self.pattern, 1)
        else:
            self.is_ready = not self._left_because

    def _on_subscribe(self, client: mqtt.Client, _: Any, mid: int, codes: list[Any], *rest: Any) -> None:
        if any(code.is_failure for code in codes):
            self.failure = f"MQTT broker refused the subscription: {codes}"
            return
        self.is_ready = not self._left_because

    def _give_up(self, reason: str, linger_s: float = 0.0) -> None:
        """Has the connection left, after so long or once nothing comes any more."""
        self._left_because, self.is_ready = reason, False
        self._linger_until = time.monotonic() + linger_s

    def _on_message(self, client: mqtt.Client, _: Any, message: mqtt.MQTTMessage) -> None:
        now = self.came_at = time.monotonic()
        try:
            topic = message.topic
        except UnicodeDecodeError:
            topic = "(not UTF-8)"
        payload = bytes(message.payload)
        pending = Pending(message.mid, hashlib.blake2b(topic.encode() + b"\0" + payload, digest_size=16).digest(), now)
        if message.dup:
            self.again_at = now
            is_open = any(each.mid == message.mid for each in self.open)
            if is_open or self._brings_nothing_again or now - self._began > self._ack_wait_s:
                self._came_again(client, pending, is_open)
        if self._left_because:
            return
        if topic.endswith(SENTINEL):
            log.info("a message of our own came through", topic=topic, session=self.name)
            if self.awaited is not None:
                self.awaited.discard(topic)
            client.ack(message.mid, message.qos)
            return
        if message.qos:
            self.open.append(pending)
        if message.dup and self._known[pending.fingerprint]:
            pending.is_safe = True
            self._known -= Counter([pending.fingerprint])
            return
        self._send(self._take(topic, payload), pending)

    def _came_again(self, client: mqtt.Client, pending: Pending, is_open: bool) -> None:
        """Gives this connection up: newer messages may come before older ones from here on.

        Where our acknowledgement crosses what is sent again, that may get a number of its own, and a place in the
        window for as long as it is not acknowledged: newer messages are left out for it, and those behind them come
        first. One that comes under its old number was sent before the acknowledgement was read: the number may be
        another message's by now.
        """
        numbers = {mid for mid, fingerprint in self._acknowledged if fingerprint == pending.fingerprint}
        if not is_open and numbers:
            if pending.mid not in numbers:
                client.ack(pending.mid, 1)
        elif not is_open and not self._left_because:
            self.wait_s = min(2 * self.wait_s, MOST_WAITS * WAIT * self._ack_wait_s)
            hint = "is METERSTREAM_ACK_WAIT_S less than the MQTT broker's ack_wait?"
            log.warning(
                "a message came again that was not known", session=self.name, hint=hint, next_wait_s=self.wait_s
            )
        if not self._left_because:
            self._give_up("a message came again in the middle of newer ones", LEAVING_S)


class Bridge:
    """One bridge process; `run` until `stop`."""

    def __init__(self, settings: BridgeSettings) -> None:
        self.settings = settings
        self._stopping = False
        self._failure: str | None = None
        self._is_full = False
        self._asked_at = 0.0
        self._verdicts: deque[bool] = deque(maxlen=BRAKE_WINDOW)
        self._poisoned = 0
        self._is_told = False
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
            if not self._is_told:
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
        while not self._is_full:  # what comes behind a message that was not sent is not sent either
            try:
                self._producer.produce(record.topic, record.value, record.key, on_delivery=self._report(pending))
            except BufferError:  # stop acknowledging, let the broker hold
                self._is_full = self._stopping
                if self._is_full:
                    return
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
