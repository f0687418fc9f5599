"""The loop: one thread, MQTT in, Kafka out, acknowledgements behind.

A message is acknowledged when Kafka's delivery report for it and for all that were received before it has come. Poison
goes to the dead letters first and is acknowledged then, so it cannot block the window. What was not acknowledged comes
again: from NATS newer messages first, the old ones when its `ack_wait` runs out. So a session that is taken up again is
first collected for that long and sorted, and order per meter is as if nothing had happened.
"""

import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import paho.mqtt.client as mqtt
import structlog
from confluent_kafka import KafkaError, Message, Producer
from paho.mqtt.enums import CallbackAPIVersion

from ingest.decode import Routed, dead_letter, routed
from schemas.errors import ContractBroken, InvalidMessage, RetryLater
from schemas.settings import Settings
from schemas.tables import home
from schemas.topics import DEAD_LETTERS

log = structlog.get_logger()

LOOP_S = 0.02  # longest wait for a packet: bounds how long a delivery report waits for its acknowledgement
RECONNECT_S = 1.0
DRAIN_S = 10.0  # at a stop: how long Kafka may take for what is in flight; what is left comes again
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
        settle_s: how long a taken-up session is collected before it is sorted: the broker's ack_wait and some.
        poison_share: the brake: stop when more than this share of the last thousand messages is poison.
    """

    kafka_bootstrap: str
    mqtt_host: str = "127.0.0.1"
    mqtt_port: int = 1883
    mqtt_username: str | None = None
    mqtt_password: str | None = None
    shards: str = ""
    accept_run_ids: bool = True
    settle_s: float = 3.5
    poison_share: float = 0.5


@dataclass
class Pending:
    """A message between its receipt and its acknowledgement."""

    mid: int
    epoch: int
    is_safe: bool = False


class Bridge:
    """One bridge process; `run` until `stop`."""

    def __init__(self, settings: BridgeSettings) -> None:
        self.settings = settings
        self._stopping = False
        self._failure: str | None = None
        self._epoch = 0
        self._window: deque[Pending] = deque()
        self._in_flight: set[int] = set()
        self._settled_at: float | None = None
        self._collected: list[tuple[Routed, Pending]] = []
        self._verdicts: deque[bool] = deque(maxlen=BRAKE_WINDOW)
        self._poisoned = 0
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
        name = f"meterstream-bridge-{settings.shards or 'all'}"
        self._client = mqtt.Client(
            CallbackAPIVersion.VERSION2,
            client_id=name,
            clean_session=False,
            manual_ack=True,
            reconnect_on_failure=False,
        )
        if settings.mqtt_username:
            self._client.username_pw_set(settings.mqtt_username, settings.mqtt_password)
        self._client.on_connect = self._on_connect
        self._client.on_subscribe = self._on_subscribe
        self._client.on_message = self._on_message

    @property
    def _filters(self) -> list[str]:
        return [f"meters/{shard}/#" for shard in self.settings.shards] or ["meters/#"]

    def stop(self, *_: Any) -> None:
        """Asks the loop to end; a signal handler."""
        self._stopping = True

    def run(self) -> None:
        """Carries messages until `stop`.

        Raises:
            RetryLater: Kafka refused for good, or too much is poison; start again when that is mended.
        """
        told_at = time.monotonic()
        self._connect()
        try:
            while not self._stopping:
                if self._client.loop(LOOP_S) != mqtt.MQTT_ERR_SUCCESS and not self._stopping:
                    log.warning("MQTT broker is away, connecting again")
                    self._ready.unlink(missing_ok=True)
                    time.sleep(RECONNECT_S)
                    self._connect()
                self._settle()
                self._producer.poll(0)
                self._acknowledge()
                if self._failure:
                    raise RetryLater(self._failure)
                if time.monotonic() - told_at > PROGRESS_S:
                    told_at = time.monotonic()
                    log.info("bridge", received=self.received, dead_letters=self.dead_letters, open=len(self._window))
        finally:
            self._ready.unlink(missing_ok=True)
            self._producer.flush(DRAIN_S)
            self._acknowledge()
            self._client.loop(LOOP_S)
            self._client.disconnect()
            log.info("bridge stopped", received=self.received, dead_letters=self.dead_letters)

    def _connect(self) -> None:
        while not self._stopping:
            try:
                self._client.connect(self.settings.mqtt_host, self.settings.mqtt_port, keepalive=30)
            except OSError as error:
                log.warning("MQTT broker does not answer", port=self.settings.mqtt_port, error=str(error))
                time.sleep(RECONNECT_S)
            else:
                return

    def _on_connect(self, client: mqtt.Client, _: Any, flags: mqtt.ConnectFlags, code: Any, *rest: Any) -> None:
        if code.is_failure:
            self._failure = f"MQTT broker refused: {code}"
            return
        self._epoch += 1
        self._window.clear()
        self._in_flight.clear()
        self._collected.clear()
        self._settled_at = time.monotonic() + self.settings.settle_s if flags.session_present else None
        client.subscribe([(name, 1) for name in self._filters])

    def _on_subscribe(self, client: mqtt.Client, _: Any, mid: int, codes: list[Any], *rest: Any) -> None:
        if any(code.is_failure for code in codes):
            self._failure = f"MQTT broker refused the subscription: {codes}"
            return
        self._ready.parent.mkdir(parents=True, exist_ok=True)
        self._ready.write_text(str(os.getpid()))
        log.info("bridge ready", mqtt=self._filters, kafka=self.settings.kafka_bootstrap)

    def _on_message(self, client: mqtt.Client, _: Any, message: mqtt.MQTTMessage) -> None:
        if message.mid in self._in_flight:
            return  # the broker's ack_wait ran out while we still have it
        self.received += 1
        now = datetime.now(UTC)
        payload = bytes(message.payload)
        try:
            topic = message.topic
        except UnicodeDecodeError:
            topic = "(not UTF-8)"
        try:
            record = routed(topic, payload, now, self.settings.accept_run_ids)
        except InvalidMessage as error:
            record = dead_letter(topic, payload, error, now)
            self.dead_letters += 1
            log.warning("dead letter", topic=topic, reason=str(error.reason), detail=error.detail)
        self._brake(record.topic == DEAD_LETTERS.name)
        pending = Pending(message.mid, self._epoch)
        if message.qos:
            self._in_flight.add(message.mid)
            self._window.append(pending)
        if self._settled_at is not None:
            self._collected.append((record, pending))
        else:
            self._send(record, pending)

    def _settle(self) -> None:
        """Sends what was collected since the session was taken up, in the order of each meter."""
        if self._settled_at is None or time.monotonic() < self._settled_at:
            return
        self._settled_at = None
        collected, self._collected = self._collected, []
        for record, pending in sorted(collected, key=lambda item: item[0].order):
            self._send(record, pending)

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

    def _acknowledge(self) -> None:
        """Acknowledges the contiguous prefix that is safe, in the order of receipt."""
        while self._window and self._window[0].is_safe:
            pending = self._window.popleft()
            if pending.epoch != self._epoch:
                msg = "a message of an older connection is in the window"
                raise ContractBroken(msg)
            self._in_flight.discard(pending.mid)
            self._client.ack(pending.mid, 1)

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
