"""What is still on its way: messages that the MQTT broker holds, records that Kafka lacks; and a flush, which waits."""

import json
import time
from collections.abc import Callable

from kafka_io.offsets import received
from schemas.errors import RetryLater
from schemas.topics import INGESTED
from stack.ports import http_answer
from stack.settings import StackSettings

FLUSH_GRACE_S = 900.0
"""Time to take all that Kafka has, and to close what is open."""
NOT_READY = "the streaming jobs are starting, and cannot flush yet: wait for make status to say running"
NOT_FLUSHED = "the streaming jobs did not take all that Kafka has: make up, and down with FLUSH=1 again; see make logs"
FLUSHING = "streaming takes what Kafka has and closes what is open"
STANDSTILL_S = 60.0
"""How long the bridge may carry nothing before a flush goes on without the rest."""
LOOK_S = 0.5  # at Kafka and the MQTT broker, which have other work


def waiting_in_broker(monitor_port: int) -> int:
    """Messages that the MQTT broker holds: not delivered yet, or delivered and not acknowledged.

    Raises:
        RetryLater: the broker does not say.
    """
    answer = http_answer(monitor_port, "/jsz?streams=true", timeout_s=5.0)
    if answer is None:
        msg = f"the MQTT broker's monitor does not answer at port {monitor_port}"
        raise RetryLater(msg)
    return sum(
        stream["state"]["messages"]
        for account in json.loads(answer).get("account_details", [])
        for stream in account.get("stream_detail", [])
        if stream["name"] == "$MQTT_msgs"
    )


def left_on_the_way(settings: StackSettings, wanted: int) -> tuple[int, int]:
    """Records that Kafka lacks of so many, and messages that the MQTT broker holds.

    Raises:
        RetryLater: one of the two does not say.
    """
    in_kafka = received(settings.kafka_bootstrap, INGESTED)
    return max(0, wanted - in_kafka), waiting_in_broker(settings.nats_monitor_port)


def let_through(settings: StackSettings, on_progress: Callable[[str], None]) -> None:
    """Waits until Kafka has what the MQTT broker holds now; what comes meanwhile is not waited for.

    Where nothing is carried for a minute, or the broker does not say, that is said, and the waiting ends.
    """
    try:
        held = waiting_in_broker(settings.nats_monitor_port)
        wanted = received(settings.kafka_bootstrap, INGESTED) + held
        if held:
            on_progress(f"the bridge carries {held:,} messages that the MQTT broker holds")
        changed_at, before = time.monotonic(), -1
        while (left := min(left_on_the_way(settings, wanted))) > 0:
            if left != before:
                changed_at, before = time.monotonic(), left
            elif time.monotonic() - changed_at > STANDSTILL_S:
                on_progress(f"{left:,} messages stay in the MQTT broker: they come at the next start, late")
                return
            time.sleep(LOOK_S)
    except RetryLater as error:
        on_progress(f"what the MQTT broker holds stays there: {error}")
