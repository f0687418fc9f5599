"""A subscription's session at the MQTT broker: when it connects, what it acknowledges, when it leaves (decision 13).

What was not acknowledged comes again: from NATS in front of newer messages where all of its `ack_wait` ran out while
nobody was connected, else behind them. So a session is taken up only after that, and left where something comes again
in the middle of it.
"""

import contextlib
import hashlib
import socket
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import paho.mqtt.client as mqtt
import structlog

from ingest.decode import Routed
from ingest.settings import BridgeSettings
from mqtt_io.client import LoopClient, turn
from settings import home

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
CLEAN, OPEN = "clean", "open"
"""How a session ended, in the mark that the bridge keeps of it."""
SENTINEL = "bridge-sentinel"
"""Last level of the topic of a message that the bridge sends to itself."""


class Phase(Enum):
    """Where a subscription is with its connection.

    Attributes:
        WAITING: not connected, until it is time and Kafka has all that came.
        BROKER_AWAY: not connected, and the broker did not answer, or the connection was lost.
        CONNECTING: connected, and not subscribed yet.
        READY: subscribed; messages come.
        LEAVING: connected; what comes is dropped, and the connection is left once nothing comes any more.
    """

    WAITING = auto()
    BROKER_AWAY = auto()
    CONNECTING = auto()
    READY = auto()
    LEAVING = auto()


class Past(Enum):
    """What may be on its way from before this connection.

    Attributes:
        UNKNOWN: the home has no mark of the session.
        CLEAN: nothing; no connection of this process was opened yet.
        RESUMED: nothing; a connection is open, for less than ack_wait.
        OPEN: messages that were not acknowledged.
    """

    UNKNOWN = auto()
    CLEAN = auto()
    RESUMED = auto()
    OPEN = auto()


class Event(Enum):
    """What changes phase or past.

    Attributes:
        UNREACHABLE: the broker took no connection.
        ANSWERED: a broker that was away takes connections again.
        CONNECTED: it took one of ours.
        ACCEPTED: it has accepted the session.
        SUBSCRIBED: it has accepted the subscription, too.
        LASTED: the connection has lasted longer than ack_wait.
        GIVEN_UP: the connection has to be left.
        ENDED: there is no connection any more.
    """

    UNREACHABLE = auto()
    ANSWERED = auto()
    CONNECTED = auto()
    ACCEPTED = auto()
    SUBSCRIBED = auto()
    LASTED = auto()
    GIVEN_UP = auto()
    ENDED = auto()


NEXT_PHASE = {
    (Phase.WAITING, Event.UNREACHABLE): Phase.BROKER_AWAY,
    (Phase.WAITING, Event.CONNECTED): Phase.CONNECTING,
    (Phase.BROKER_AWAY, Event.ANSWERED): Phase.WAITING,
    (Phase.BROKER_AWAY, Event.CONNECTED): Phase.CONNECTING,
    (Phase.CONNECTING, Event.SUBSCRIBED): Phase.READY,
    (Phase.CONNECTING, Event.GIVEN_UP): Phase.LEAVING,
    (Phase.CONNECTING, Event.ENDED): Phase.BROKER_AWAY,
    (Phase.READY, Event.GIVEN_UP): Phase.LEAVING,
    (Phase.READY, Event.ENDED): Phase.BROKER_AWAY,
    (Phase.LEAVING, Event.ENDED): Phase.WAITING,
}
NEXT_PAST = {
    (Past.UNKNOWN, Event.ACCEPTED): Past.OPEN,
    (Past.CLEAN, Event.CONNECTED): Past.RESUMED,
    (Past.RESUMED, Event.LASTED): Past.OPEN,
}
"""An event that is not here changes nothing."""


@dataclass
class Pending:
    """A message between its receipt and its acknowledgement.

    Attributes:
        mid: its number on this connection.
        fingerprint: of its topic and bytes.
        came_at: when, s.
        left: records of it that Kafka does not have yet.
    """

    mid: int
    fingerprint: bytes
    came_at: float
    left: int = 1

    @property
    def is_safe(self) -> bool:
        """Whether Kafka has it."""
        return self.left == 0


class Subscription:
    """One filter, in a session of its own, with the messages that are not acknowledged yet.

    NATS gives a session one window for all its subscriptions, and each of them one of that size: what is too much for
    the session is left out, and comes when `ack_wait` runs out, behind newer messages of its meter.

    Args:
        name: of the session.
        pattern: what it subscribes to; None of an earlier release's session, which has its own.
        ack_wait_s: of the session.
        settings: of the bridge.
        take: topic and payload → the records for Kafka.
        send: hands records to Kafka, which says through the pending message when they are safe.

    Attributes:
        failure: what the broker refused, if it did.
        is_new: whether the broker had no such session at the last connection.
        open: messages that are not acknowledged, in the order of receipt.
        again_at: when a message last came again, s.
        came_at: when a message last came, s.
        awaited: topics of the bridge's own messages that are still to come through; None where none were sent.
        wait_s: how long nobody is connected, so that what was on its way comes first.
    """

    def __init__(
        self,
        name: str,
        pattern: str | None,
        ack_wait_s: float,
        settings: BridgeSettings,
        take: Callable[[str, bytes], list[Routed]],
        send: Callable[[list[Routed], Pending], None],
    ) -> None:
        self.name = name
        self.pattern = pattern
        self.failure: str | None = None
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
        self._leaving_because = ""
        self._linger_until = self._began = self.came_at = 0.0
        self._mark = home() / "run" / f"{name}.session"
        self._phase = Phase.WAITING
        self._past = {CLEAN: Past.CLEAN, None: Past.UNKNOWN}.get(self._read_mark(), Past.OPEN)
        self._due = time.monotonic()
        self.client = self._client(clean=False)
        self.client.on_connect = self._on_connect
        self.client.on_subscribe = self._on_subscribe
        self.client.on_message = self._on_message
        if self._past is Past.OPEN:
            self._wait(self._due, "it did not end cleanly")

    @property
    def is_ready(self) -> bool:
        """Whether it is subscribed, and does not leave."""
        return self._phase is Phase.READY

    def _after(self, event: Event) -> None:
        self._phase = NEXT_PHASE.get((self._phase, event), self._phase)
        self._past = NEXT_PAST.get((self._past, event), self._past)

    def _wait(self, now: float, because: str) -> None:
        self._due = now + self.wait_s
        log.info("waits until all comes in order", session=self.name, because=because, s=self.wait_s)

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
        if self.client.socket() is not None:
            self._tend_connection(now)
        if self.client.socket() is None:
            self._tend_absence(now)

    def _tend_connection(self, now: float) -> None:
        if self._phase is not Phase.LEAVING and self.held_s > HELD * self._ack_wait_s:
            # before anything of it comes again: the broker keeps it in the order of its last deliveries
            self._give_up("Kafka takes longer than the MQTT broker waits")
        if self._phase is not Phase.LEAVING:
            self._been_up(now - self._began)
        elif now >= self._linger_until or now - self.came_at >= QUIET_S:
            self.client.leave()

    def _tend_absence(self, now: float) -> None:
        if self._phase not in (Phase.WAITING, Phase.BROKER_AWAY):
            because = self._leaving_because if self._phase is Phase.LEAVING else "the connection is lost"
            self._after(Event.ENDED)
            self._wait(now, because)
        if now < self._due or not all(pending.is_safe for pending in self.open):
            return
        if self._phase is Phase.BROKER_AWAY and self._past is not Past.CLEAN:
            # a broker that starts reads first what was on its way
            if self._answers():
                self._after(Event.ANSWERED)
            self._due = now + (RECONNECT_S if self._phase is Phase.BROKER_AWAY else self.wait_s)
            return
        # Kafka has these, the broker does not know
        self._known.update(pending.fingerprint for pending in self.open)
        self.open.clear()
        self._acknowledged.clear()
        self._began, self._due = now, now + RECONNECT_S
        self._mark_as(OPEN)
        try:
            self.client.connect(self._settings.mqtt_host, self._settings.mqtt_port, keepalive=30)
        except OSError as error:
            self._after(Event.UNREACHABLE)
            if self._past is Past.CLEAN:
                self._mark_as(CLEAN)
            log.warning("MQTT broker does not answer", port=self._settings.mqtt_port, error=str(error))
            return
        self._after(Event.CONNECTED)

    @property
    def held_s(self) -> float:
        """How long the oldest message has been waiting for Kafka, s; 0 where none is."""
        return time.monotonic() - self.open[0].came_at if self.open else 0.0

    def _been_up(self, lasted_s: float) -> None:
        if lasted_s > self._ack_wait_s:
            self._known.clear()  # a message like these is another one by now
            self._after(Event.LASTED)
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
        if self.client.socket() is None or self._phase is Phase.LEAVING:
            return
        while self.open and self.open[0].is_safe:
            pending = self.open.popleft()
            self._acknowledged.append((pending.mid, pending.fingerprint))
            self.client.ack(pending.mid, 1)

    def leave(self) -> None:
        """Ends the connection; where nothing is on its way any more, the next process need not wait for it."""
        is_quiet = self.is_ready and time.monotonic() - self.came_at > QUIET_S
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
        elif self._past is Past.UNKNOWN:  # the home is new, and the session is not
            self._give_up("how the session ended is not known")
        self._after(Event.ACCEPTED)
        if self.pattern is not None:
            client.subscribe(self.pattern, 1)
        else:
            self._after(Event.SUBSCRIBED)

    def _on_subscribe(self, client: mqtt.Client, _: Any, mid: int, codes: list[Any], *rest: Any) -> None:
        if any(code.is_failure for code in codes):
            self.failure = f"MQTT broker refused the subscription: {codes}"
            return
        self._after(Event.SUBSCRIBED)

    def _give_up(self, reason: str, linger_s: float = 0.0) -> None:
        """Has the connection left, after so long or once nothing comes any more."""
        self._after(Event.GIVEN_UP)
        self._leaving_because = reason
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
            if is_open or self._past is Past.RESUMED or now - self._began > self._ack_wait_s:
                self._came_again(client, pending, is_open)
        if self._phase is Phase.LEAVING:
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
            pending.left = 0
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
        elif not is_open and self._phase is not Phase.LEAVING:
            self.wait_s = min(2 * self.wait_s, MOST_WAITS * WAIT * self._ack_wait_s)
            hint = "is METERSTREAM_ACK_WAIT_S less than the MQTT broker's ack_wait?"
            log.warning(
                "a message came again that was not known", session=self.name, hint=hint, next_wait_s=self.wait_s
            )
        if self._phase is not Phase.LEAVING:
            self._give_up("a message came again in the middle of newer ones", LEAVING_S)
