"""A steady run and the way behind the MQTT broker: the real broker, bridge and Kafka."""

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import psutil
import pytest

from replay import pace
from replay.run import play
from replay.run.order import Order
from replay.sinks import MqttSink
from schemas.errors import RetryLater
from stack.backlog import left_on_the_way, waiting_in_broker
from stack.native import NativeStack
from tests.brokers import pid_of, way
from tests.eventually import eventually
from tests.wire import small_tape

METERS = 300
LIMIT = 400
LOOKS = 60  # of 0.05 s


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[NativeStack]:
    small_tape.write(tmp_path / "tape")
    with way(tmp_path) as stack:
        yield stack


@contextlib.contextmanager
def suspended(stack: NativeStack) -> Iterator[None]:
    bridge = psutil.Process(pid_of(stack, "ingest"))
    bridge.suspend()
    try:
        yield
    finally:
        bridge.resume()


def order(stack: NativeStack, run_id: str, processes: int = 1, speed: float | None = 3_600.0) -> Order:
    return Order(stack.home / "tape", run_id, "mqtt", METERS, speed=speed, processes=processes,
                 way=stack.settings.kafka_bootstrap, on_the_way=LIMIT, prefix=f"{run_id}-")  # fmt: skip


def standing_still(stack: NativeStack) -> int:
    """Messages that the MQTT broker holds, once they have not become more for three seconds."""
    held: list[int] = []

    def stands() -> bool:
        held.append(waiting_in_broker(stack.settings.nats_monitor_port))
        return len(held) > LOOKS and held[-1] == held[-LOOKS] > LIMIT

    eventually(stands, 60)
    return held[-1]


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.long)])
def test_the_clock_waits_for_what_the_bridge_has_not_carried(stack: NativeStack, processes: int) -> None:
    sink = partial(MqttSink, "127.0.0.1", stack.settings.mqtt_port)
    with ThreadPoolExecutor(1) as pool:
        with suspended(stack):
            playing = pool.submit(play, order(stack, f"r{processes}", processes), sink)
            held = standing_still(stack)
            assert not playing.done()
        ledger = playing.result(600)
    assert held < 0.2 * ledger.records
    assert min(ledger.slip_s, ledger.waited_s["bridge"]) > 2, "as long as it stood still, and some"
    eventually(lambda: left_on_the_way(stack.settings, ledger.records) == (0, 0), 60)


def test_a_bridge_that_carries_nothing_ends_the_run_with_a_sentence(
    stack: NativeStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pace, "STALLED_S", 1.0)
    with suspended(stack), pytest.raises(RetryLater, match=r"nothing has come through .* --pace open"):
        play(order(stack, "r1", speed=None), partial(MqttSink, "127.0.0.1", stack.settings.mqtt_port))
