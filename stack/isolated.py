"""A stack with a home and ports of its own, beside whatever else runs: for the demo, tests and measurements."""

import contextlib
import socket
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from schemas.errors import RetryLater
from settings import load
from stack.containers import ContainerStack
from stack.native import NativeStack
from stack.parts import STREAMING, SUPERVISOR
from stack.settings import StackSettings

Stack = NativeStack | ContainerStack
SHORT_LIVED_JVM = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"
"""For a driver that lives minutes: compiling for the long run took 40 % of its CPU time."""
DRAIN_S = 3_600.0  # a slow machine is slow, not broken
TRIES = 3  # the driver may be killed while it drains: it is started again and drains then


def own_settings(folder: Path, store: str = "") -> StackSettings:
    """A stack of its own in a folder, on ports that are free now; its lake in a store or in the folder."""
    names = [name for name in StackSettings.model_fields if name.endswith("_port")]
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in names]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        ports = [each.getsockname()[1] for each in sockets]
    return load(StackSettings, home=folder, store=store, **dict(zip(names, ports, strict=True)))


def environment(settings: StackSettings) -> dict[str, str]:
    """Variables by which replay, jobs and this process use that stack; the jobs flush when they are stopped."""
    return {
        "METERSTREAM_HOME": str(settings.home),
        "METERSTREAM_STORE": settings.store,
        "METERSTREAM_MQTT_PORT": str(settings.mqtt_port),
        "METERSTREAM_KAFKA_BOOTSTRAP": settings.kafka_bootstrap,
        "METERSTREAM_FLUSH": "true",
        "SPARK_SUBMIT_OPTS": SHORT_LIVED_JVM,
    }


def drain(stack: Stack, watched: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext) -> None:
    """Ends the driver, which takes what Kafka has and flushes; again where it was killed meanwhile.

    Args:
        stack: started with `environment`.
        watched: is open while the driver drains.

    Raises:
        RetryLater: the jobs did not get to their end.
    """
    from engine.runner import Runner
    from engine.settings import StreamSettings
    from streaming_jobs import discovered

    runners = [Runner(job, load(StreamSettings)) for job in discovered()]
    stack.stop_part(SUPERVISOR)
    for _ in range(TRIES):
        with watched():
            stack.start([STREAMING.name])
            stack.stop_part(STREAMING.name, DRAIN_S)
        if isinstance(stack, ContainerStack):
            stack.collect()
        if all(runner.is_flushed for runner in runners):
            return
    msg = "the streaming jobs did not finish: see make logs"
    raise RetryLater(msg)
